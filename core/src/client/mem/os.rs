//! What the kernel says about this process's memory and threads, and the memfd. Looks, never moves.
//!
//! Walking the mappings neither allocates nor takes a lock: the fault handler and the forked child do it too.

use std::mem::size_of;
use std::ops::ControlFlow;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::ptr;
use std::sync::atomic::{AtomicBool, Ordering};

use rustix::fs::{FallocateFlags, MemfdFlags, Mode, OFlags, SealFlags, SeekFrom};
use rustix::io::Errno;
use rustix::mm::{Advice, MapFlags, MprotectFlags, ProtFlags};

use super::MemError;
use super::maps::{LineParser, Name, Vma, name_of};
use super::windows::FILE_SIZE;

/// `/proc/self` is the main thread's, which may have ended; this one is the caller's.
const MAPS: &std::ffi::CStr = c"/proc/thread-self/maps";
const PAGEMAP: &std::ffi::CStr = c"/proc/thread-self/pagemap";

/// `struct procmap_query` of linux/fs.h (6.11).
#[repr(C)]
#[derive(Default)]
struct ProcmapQuery {
    size: u64,
    query_flags: u64,
    query_addr: u64,
    vma_start: u64,
    vma_end: u64,
    vma_flags: u64,
    vma_page_size: u64,
    vma_offset: u64,
    inode: u64,
    dev_major: u32,
    dev_minor: u32,
    vma_name_size: u32,
    build_id_size: u32,
    vma_name_addr: u64,
    build_id_addr: u64,
}

const QUERY_NEXT: u64 = 0x10;
const PROCMAP_QUERY: rustix::ioctl::Opcode = rustix::ioctl::opcode::read_write::<ProcmapQuery>(b'f', 17);

impl ProcmapQuery {
    fn vma(&self, name: Name) -> Vma {
        Vma {
            start: self.vma_start,
            end: self.vma_end,
            offset: self.vma_offset,
            read: self.vma_flags & 1 != 0,
            write: self.vma_flags & 2 != 0,
            exec: self.vma_flags & 4 != 0,
            shared: self.vma_flags & 8 != 0,
            dev: (self.dev_major, self.dev_minor),
            ino: self.inode,
            name,
            huge: self.vma_page_size != page_size(),
        }
    }
}

/// Cleared once the kernel turns out not to know the query.
static HAS_QUERY: AtomicBool = AtomicBool::new(true);

/// The mappings of this process, looked up afresh at each call.
pub(super) struct Maps {
    fd: OwnedFd,
}

impl Maps {
    pub fn open() -> Result<Self, Errno> {
        Ok(Maps { fd: open_proc(MAPS)? })
    }

    /// Hands out the mappings that overlap `[start, end)`, in order, whole.
    pub fn over<F>(&self, start: u64, end: u64, mut each: F) -> Result<(), Errno>
    where
        F: FnMut(Vma) -> ControlFlow<()>,
    {
        if !HAS_QUERY.load(Ordering::Relaxed) {
            return self.over_text(start, end, &mut each);
        }
        let mut at = start;
        while at < end {
            match self.query(at) {
                Ok(vma) if vma.start < end => {
                    at = vma.end;
                    if each(vma).is_break() {
                        return Ok(());
                    }
                }
                Ok(_) | Err(Errno::NOENT) => return Ok(()),
                Err(Errno::NOTTY | Errno::INVAL) if at == start => {
                    HAS_QUERY.store(false, Ordering::Relaxed);
                    return self.over_text(start, end, &mut each);
                }
                Err(e) => return Err(e),
            }
        }
        Ok(())
    }

    /// The same from the text form, which every kernel has.
    fn over_text<F>(&self, start: u64, end: u64, each: &mut F) -> Result<(), Errno>
    where
        F: FnMut(Vma) -> ControlFlow<()>,
    {
        rustix::fs::seek(&self.fd, SeekFrom::Start(0))?;
        let (mut buf, mut parser) = ([0u8; 512], LineParser::new());
        loop {
            let n = match rustix::io::read(&self.fd, &mut buf[..]) {
                Ok(0) => return Ok(()),
                Ok(n) => n,
                Err(Errno::INTR) => continue,
                Err(e) => return Err(e),
            };
            let stop = parser.feed(&buf[..n], &mut |vma: Vma| {
                if vma.start >= end {
                    ControlFlow::Break(())
                } else if vma.end > start {
                    each(vma)
                } else {
                    ControlFlow::Continue(())
                }
            });
            if stop.is_break() {
                return Ok(());
            }
        }
    }

    /// Every mapping of the process, from the text form (one pass is cheaper than a query each).
    pub fn all<F>(&self, mut each: F) -> Result<(), Errno>
    where
        F: FnMut(Vma) -> ControlFlow<()>,
    {
        self.over_text(0, u64::MAX, &mut each)
    }

    /// The mapping at `addr`, or the next above it, without its name: half the price. Fails where the kernel has no
    /// such query.
    pub fn nameless(&self, addr: u64) -> Result<Vma, Errno> {
        let mut q = ProcmapQuery {
            size: size_of::<ProcmapQuery>() as u64,
            query_flags: QUERY_NEXT,
            query_addr: addr,
            ..Default::default()
        };
        self.ask(&mut q)?;
        Ok(q.vma(Name::Other))
    }

    /// The mapping at `addr`, or the next above it.
    fn query(&self, addr: u64) -> Result<Vma, Errno> {
        let mut name = [0u8; 32];
        let mut q = ProcmapQuery {
            size: size_of::<ProcmapQuery>() as u64,
            query_flags: QUERY_NEXT,
            query_addr: addr,
            vma_name_size: name.len() as u32,
            vma_name_addr: name.as_mut_ptr() as u64,
            ..Default::default()
        };
        match self.ask(&mut q) {
            // A name longer than ours is none of the names that matter.
            Err(Errno::NAMETOOLONG) => {
                (q.vma_name_size, q.vma_name_addr) = (0, 0);
                self.ask(&mut q)?;
                name[0] = b'/';
                q.vma_name_size = 2;
            }
            other => other?,
        }
        let name = &name[..(q.vma_name_size as usize).saturating_sub(1).min(name.len())];
        Ok(q.vma(name_of(name)))
    }

    fn ask(&self, q: &mut ProcmapQuery) -> Result<(), Errno> {
        // SAFETY: the opcode carries this very structure, whose name field is null or a live buffer of that size.
        let ask = unsafe { rustix::ioctl::Updater::<PROCMAP_QUERY, ProcmapQuery>::new(q) };
        // SAFETY: PROCMAP_QUERY writes only into the structure and the buffer it names.
        unsafe { rustix::ioctl::ioctl(&self.fd, ask) }
    }
}

impl From<Maps> for OwnedFd {
    fn from(maps: Maps) -> OwnedFd {
        maps.fd
    }
}

/// Whether the kernel answers [`Maps::nameless`].
pub(super) fn has_query() -> bool {
    HAS_QUERY.load(Ordering::Relaxed)
}

/// Which pages of a private mapping are the process's own copies.
pub(super) struct Pagemap {
    fd: OwnedFd,
}

impl Pagemap {
    pub fn open() -> Result<Self, Errno> {
        Ok(Pagemap { fd: open_proc(PAGEMAP)? })
    }

    /// Sets `own[i]` for each page from `start` that was copied on write (or swapped out, thus written).
    pub fn own_copies(&self, start: u64, own: &mut [bool]) -> Result<(), Errno> {
        const PRESENT: u64 = 1 << 63;
        const SWAPPED: u64 = 1 << 62;
        const FILE: u64 = 1 << 61;
        const GROUP: usize = 256;
        let mut raw = [0u8; 8 * GROUP];
        for (i, group) in own.chunks_mut(GROUP).enumerate() {
            let want = &mut raw[..group.len() * 8];
            let first = start / page_size() + (i * GROUP) as u64;
            let n = rustix::io::pread(&self.fd, &mut *want, first * 8)?;
            if n != want.len() {
                return Err(Errno::IO);
            }
            for (flag, entry) in group.iter_mut().zip(want.as_chunks::<8>().0) {
                let e = u64::from_ne_bytes(*entry);
                *flag = e & SWAPPED != 0 || (e & PRESENT != 0 && e & FILE == 0);
            }
        }
        Ok(())
    }
}

fn open_proc(path: &std::ffi::CStr) -> Result<OwnedFd, Errno> {
    rustix::fs::open(path, OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty())
}

pub(super) fn page_size() -> u64 {
    rustix::param::page_size() as u64
}

/// A sparse file of the full size that can neither shrink nor grow, and how the kernel names it in maps.
pub(super) fn sparse_file() -> Result<(OwnedFd, (u32, u32), u64), MemError> {
    let limit = rustix::process::getrlimit(rustix::process::Resource::Fsize).current;
    if limit.is_some_and(|l| l < FILE_SIZE) {
        // Asking all the same would raise SIGXFSZ.
        return Err(MemError::FileSizeLimit(limit.unwrap_or_default()));
    }
    let sys = |what| move |errno| MemError::System { what, errno };
    let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
    let fd = rustix::fs::memfd_create(c"freeflow-pd", flags).map_err(sys("memfd_create"))?;
    rustix::fs::ftruncate(&fd, FILE_SIZE).map_err(sys("ftruncate of a memfd"))?;
    let seals = SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL;
    rustix::fs::fcntl_add_seals(&fd, seals).map_err(sys("sealing a memfd"))?;
    let st = rustix::fs::fstat(&fd).map_err(sys("fstat of a memfd"))?;
    Ok((fd, (rustix::fs::major(st.st_dev), rustix::fs::minor(st.st_dev)), st.st_ino))
}

pub(super) fn punch(fd: BorrowedFd<'_>, off: u64, len: u64) -> Result<(), Errno> {
    rustix::fs::fallocate(fd, FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE, off, len)
}

/// Whether the file has pages for all of `[off, end)`.
pub(super) fn is_all_data(fd: BorrowedFd<'_>, off: u64, end: u64) -> bool {
    rustix::fs::seek(fd, SeekFrom::Hole(off)).is_ok_and(|hole| hole >= end)
}

/// Where data begins at or after `off`, if before `end`.
pub(super) fn next_data(fd: BorrowedFd<'_>, off: u64, end: u64) -> Option<u64> {
    match rustix::fs::seek(fd, SeekFrom::Data(off)) {
        Ok(at) => (at < end).then_some(at),
        Err(Errno::NXIO) => None,
        Err(_) => Some(off),
    }
}

/// Anonymous private memory of the process's own, readable and writable.
pub(super) fn anonymous(len: u64) -> Result<u64, Errno> {
    let prot = ProtFlags::READ | ProtFlags::WRITE;
    // SAFETY: a new mapping where the kernel likes; nothing existing is touched.
    unsafe { rustix::mm::mmap_anonymous(ptr::null_mut(), len as usize, prot, MapFlags::PRIVATE) }
        .map(|p| p as u64)
}

/// Another mapping of a piece of the file, where the kernel likes.
pub(super) fn shared_alias(fd: BorrowedFd<'_>, off: u64, len: u64) -> Result<u64, Errno> {
    let prot = ProtFlags::READ | ProtFlags::WRITE;
    // SAFETY: a new mapping where the kernel likes; nothing existing is touched.
    unsafe { rustix::mm::mmap(ptr::null_mut(), len as usize, prot, MapFlags::SHARED, fd, off) }
        .map(|p| p as u64)
}

/// Whether the mapping is locked or grows downwards: neither is told by maps, both show in what the kernel refuses.
pub(super) fn locked_or_growing(vma: &Vma) -> bool {
    let (page, len) = (vma.start as *mut std::ffi::c_void, page_size() as usize);
    // SAFETY: MADV_COLD changes no contents; EINVAL is its answer for locked mappings.
    let cold = unsafe { rustix::mm::madvise(page, len, Advice::LinuxCold) };
    let flags = MprotectFlags::READ | MprotectFlags::WRITE | MprotectFlags::GROWSDOWN;
    // SAFETY: on an ordinary mapping the kernel refuses this flag; on a growing one it sets the protection it has.
    let grows = unsafe { rustix::mm::mprotect(page, len, flags) };
    cold.is_err() || grows.is_ok()
}

/// A quarter of the mappings the kernel allows.
pub(super) fn run_limit() -> usize {
    let text = std::fs::read_to_string("/proc/sys/vm/max_map_count").unwrap_or_default();
    text.trim().parse::<usize>().unwrap_or(65530) / 4
}

/// The fork generation's marker: reads 1 here and 0 in a child that has not been set up yet.
pub(super) fn wipe_on_fork(page: u64) -> Result<(), Errno> {
    // SAFETY: the page is a private anonymous mapping of ours, made for this.
    unsafe { rustix::mm::madvise(page as *mut _, page_size() as usize, Advice::LinuxWipeOnFork) }
}

/// Has the kernel supply pages now rather than fault by fault. Kernels before 5.14 cannot.
pub(super) fn populate(start: u64, len: u64) -> Result<(), Errno> {
    // SAFETY: changes no contents.
    unsafe { rustix::mm::madvise(start as *mut _, len as usize, Advice::LinuxPopulateWrite) }
}

/// Address space of ours without memory.
pub(super) fn reserve(len: u64) -> Result<u64, Errno> {
    let flags = MapFlags::PRIVATE | MapFlags::NORESERVE;
    // SAFETY: a new mapping where the kernel likes; nothing existing is touched.
    unsafe { rustix::mm::mmap_anonymous(ptr::null_mut(), len as usize, ProtFlags::empty(), flags) }
        .map(|p| p as u64)
}

/// madvise past all help: as the program gave it, on memory that has not moved, or on ours.
pub(super) fn advise(start: u64, len: u64, advice: i32) -> Result<(), Errno> {
    // SAFETY: the program asked for exactly this (the contract of `madvise_moved`), or it changes no contents.
    let r = unsafe { libc::madvise(start as *mut libc::c_void, len as usize, advice) };
    if r == 0 { Ok(()) } else { Err(last_errno()) }
}

pub(super) fn last_errno() -> Errno {
    Errno::from_io_error(&std::io::Error::last_os_error()).unwrap_or(Errno::IO)
}

/// A PD's file, or standard error, by number.
pub(super) fn borrow(fd: std::os::fd::RawFd) -> BorrowedFd<'static> {
    // SAFETY: the registry names a file until its owner takes it out, which is before it is closed.
    unsafe { BorrowedFd::borrow_raw(fd) }
}

/// As on a kernel without the query.
#[cfg(test)]
pub(super) fn forget_query() {
    HAS_QUERY.store(false, Ordering::Relaxed);
}

#[cfg(test)]
mod tests {
    use super::*;

    fn collect(f: impl FnOnce(&mut dyn FnMut(Vma) -> ControlFlow<()>)) -> Vec<Vma> {
        let mut out = Vec::with_capacity(4096);
        f(&mut |v| {
            out.push(v);
            ControlFlow::Continue(())
        });
        out
    }

    #[test]
    fn query_and_text_agree() {
        let maps = Maps::open().unwrap();
        let here = anonymous(5 * 4096).unwrap();
        let a: Vec<Vma> = maps.query(here).into_iter().collect();
        let b = collect(|f| maps.over_text(here, here + 4096, &mut |v| f(v)).unwrap());
        assert_eq!(a.len(), 1);
        assert!(a[0].is_plain());
        assert_eq!(a, b);
    }

    #[test]
    fn locked_and_growing_mappings_are_found() {
        let page = anonymous(4096).unwrap();
        let maps = Maps::open().unwrap();
        let vma = collect(|f| maps.over(page, page + 1, f).unwrap())[0].clip(page, page + 4096);
        assert!(!locked_or_growing(&vma));
        // SAFETY: a page of ours.
        unsafe { rustix::mm::mlock(page as *mut _, 4096) }.unwrap();
        assert!(locked_or_growing(&vma));
        let prot = ProtFlags::READ | ProtFlags::WRITE;
        let flags = MapFlags::PRIVATE | MapFlags::GROWSDOWN;
        // SAFETY: a new mapping.
        let down = unsafe { rustix::mm::mmap_anonymous(ptr::null_mut(), 4096, prot, flags) }.unwrap() as u64;
        assert!(locked_or_growing(&Vma { start: down, end: down + 4096, ..vma }));
    }
}
