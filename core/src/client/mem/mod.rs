//! The page mover: registered memory becomes reachable for peers at its own address, without the program's help.
//!
//! Owns, per PD, one sparse memfd and the knowledge of which of the program's pages are in it. Knows nothing of
//! keys, peers or the router. `unsafe` is in `os` (looking), `freeze` and `handler` (making writers wait), `pages`
//! (exchanging pages) and `fork`; what lies where is decided in `plan`, `table` and `windows`, which are pure.
//!
//! Limits a caller should know:
//! * While a chunk is being moved (64 KiB, or 256 KiB where only the copy is left to do: some 50 us either way), a
//!   system call that writes into it fails with EFAULT, and a thread that blocks SIGSEGV and writes to it dies.
//!   Threads of this library must leave SIGSEGV unblocked.
//! * `_Fork` and a bare clone run no fork handlers: such a child shares moved pages with its parent.
//! * Advice given to memory before (MADV_DONTFORK, huge pages) is lost when it moves.

mod alloc;
mod exchange;
mod fork;
mod freeze;
mod handler;
mod maps;
mod os;
mod pages;
mod plan;
mod recall;
mod registry;
mod table;
mod threads;
mod windows;

use std::ops::ControlFlow;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, IntoRawFd, OwnedFd};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, LazyLock, Mutex, MutexGuard, PoisonError};

use rustix::io::Errno;

pub use fork::on_fork_child;
pub use freeze::FreezeStats;
use maps::{Name, Vma};
use os::Maps;
use plan::{FileId, Piece, Span};
use recall::Recall;
use table::{Part, Table};
use windows::Windows;

/// Why memory could not be registered.
#[derive(Debug, Clone, thiserror::Error)]
pub enum MemError {
    #[error("bad address: {addr:#x}+{len:#x} is {why} at {at:#x}")]
    BadAddress { addr: u64, len: u64, at: u64, why: &'static str },
    #[error("the range {addr:#x}+{len:#x} wraps around the address space")]
    Wraps { addr: u64, len: u64 },
    #[error("{what}: {errno}")]
    System { what: &'static str, errno: Errno },
    #[error("/proc is not mounted here or cannot be read: {0}")]
    NoProc(Errno),
    #[error("the file size limit (ulimit -f) of {0} bytes leaves no room for a PD's memory file")]
    FileSizeLimit(u64),
    #[error("SIGSEGV's handler was replaced {0} times: pages cannot be moved safely")]
    HandlerTaken(usize),
    #[error("more than {0} PDs in this process")]
    TooManyPds(usize),
    #[error("this PD belongs to the parent process")]
    Forked,
    #[error("thread {0} blocks SIGSEGV: it would die of writing to memory that is being moved")]
    FaultsBlocked(i32),
    #[error("{0} pieces of moved memory are as many mappings as the kernel lets us have (vm.max_map_count)")]
    TooManyRuns(usize),
}

impl MemError {
    /// What a C caller sees.
    pub fn errno(&self) -> Errno {
        match self {
            MemError::BadAddress { .. } => Errno::FAULT,
            MemError::Wraps { .. } | MemError::Forked => Errno::INVAL,
            MemError::System { errno, .. } | MemError::NoProc(errno) => *errno,
            MemError::FileSizeLimit(_) => Errno::FBIG,
            MemError::HandlerTaken(_) | MemError::FaultsBlocked(_) => Errno::BUSY,
            MemError::TooManyPds(_) | MemError::TooManyRuns(_) => Errno::NOMEM,
        }
    }
}

/// What will be done to the memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Want {
    /// Any remote access.
    pub remote: bool,
    /// Written by this end's own receives and reads (real verbs demand it for remote writes and atomics too).
    pub local_write: bool,
}

/// `len` bytes of a registration at `va`, which are in the PD's file from `offset`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Extent {
    pub va: u64,
    pub len: u64,
    pub offset: u64,
}

/// More pieces than this of one registration go through the router.
const MAX_EXTENTS: usize = 3;

/// One mover at a time in the whole process: there is one handler, and fork must find everything at rest.
static MOVER: Mutex<Mover> = Mutex::new(Mover { recall: Recall::new() });

/// What whoever holds the lock may use.
struct Mover {
    recall: Recall,
}

/// Stretches of moved memory, of all PDs.
static RUNS: AtomicUsize = AtomicUsize::new(0);
/// Stretches given back: their pages remember another place, so the kernel keeps them as mappings of their own.
static SCARS: AtomicUsize = AtomicUsize::new(0);
static RUN_LIMIT: LazyLock<usize> = LazyLock::new(os::run_limit);

fn mover() -> MutexGuard<'static, Mover> {
    MOVER.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Counters of the mover since the process started.
pub fn freeze_stats() -> FreezeStats {
    freeze::stats()
}

/// The movable memory of one PD.
pub struct PdMemory {
    /// None only while being dropped.
    fd: Option<OwnedFd>,
    file: FileId,
    generation: u64,
    /// Locked only with the mover's lock held.
    book: Mutex<Book>,
}

type Pieces = (Vec<Piece>, Option<MemError>);

struct Book {
    table: Table,
    windows: Windows,
}

impl PdMemory {
    pub fn new() -> Result<Arc<PdMemory>, MemError> {
        fork::install()?;
        LazyLock::force(&RUN_LIMIT);
        let (fd, dev, ino) = os::sparse_file()?;
        let file = FileId { dev, ino };
        let _mover = mover();
        if !registry::add(file, fd.as_raw_fd()) {
            return Err(MemError::TooManyPds(registry::ROOM));
        }
        let book = Book { table: Table::default(), windows: Windows::new() };
        let generation = fork::generation();
        Ok(Arc::new(PdMemory { fd: Some(fd), file, generation, book: Mutex::new(book) }))
    }

    /// The file, to be passed to those that may reach this PD's memory.
    pub fn fd(&self) -> BorrowedFd<'_> {
        match &self.fd {
            Some(fd) => fd.as_fd(),
            None => unreachable!("taken only by drop"),
        }
    }

    /// Moves what may be moved of `[addr, addr + len)` and tells where it is.
    pub fn register(self: &Arc<Self>, addr: u64, len: u64, want: Want) -> Result<Registration, MemError> {
        if self.is_foreign() {
            return Err(MemError::Forked);
        }
        let span = Span::new(addr, len, os::page_size())?;
        let mut mover = mover();
        if let Some(known) = self.register_known(&mut mover, &span, want)? {
            return Ok(known);
        }
        let maps = Maps::open().map_err(MemError::NoProc)?;
        let vmas = mappings(&maps, span.outer())?;
        span.check(&vmas, want)?;
        let (pieces, mut unmoved) = self.pieces(&maps, &vmas, span.movable(want))?;
        let mut parts = self.with_book(|book| self.take_pieces(book, &pieces, &mut unmoved));
        let extents = plan::extents(&span, &parts, MAX_EXTENTS);
        let beyond: Vec<Part> =
            split_off(&mut parts, |p| extents.iter().any(|e| p.start < e.va + e.len && e.va < p.end));
        self.release(&maps, &beyond, false);
        Ok(Registration { pd: self.clone(), parts, extents, unmoved, retire: false, owned: false })
    }

    /// Whether all that would move of the range for `want` has moved already, as far as we know: the program may
    /// have mapped something else there meanwhile.
    pub fn has_moved(&self, addr: u64, len: u64, want: Want) -> bool {
        let Ok(span) = Span::new(addr, len, os::page_size()) else { return false };
        let (start, end) = span.movable(want);
        let _mover = mover();
        start < end && self.with_book(|book| book.table.covers(start, end))
    }

    /// A range that lies in our file already, in one mapping: looked at without opening anything.
    fn register_known(
        self: &Arc<Self>,
        mover: &mut Mover,
        span: &Span,
        want: Want,
    ) -> Result<Option<Registration>, MemError> {
        let ((start, end), outer) = (span.movable(want), span.outer());
        if (start, end) != outer || !self.with_book(|book| book.table.covers(start, end)) {
            return Ok(None);
        }
        let vma = mover.recall.at(fork::generation(), start);
        let Some(vma) = vma.filter(|v| v.end >= end && self.file.is_mapped_by(v)) else { return Ok(None) };
        span.check(&[vma], want)?;
        let vma = vma.clip(start, end);
        let parts = self.with_book(|book| book.hold(&vma));
        let extents = plan::extents(span, &parts, MAX_EXTENTS);
        Ok(Some(Registration {
            pd: self.clone(),
            parts,
            extents,
            unmoved: None,
            retire: false,
            owned: false,
        }))
    }

    /// The PD was made before a fork, by the parent.
    fn is_foreign(&self) -> bool {
        self.generation != fork::generation()
    }

    fn with_book<R>(&self, f: impl FnOnce(&mut Book) -> R) -> R {
        let mut book = self.book.lock().unwrap_or_else(PoisonError::into_inner);
        let before = book.table.runs();
        let r = f(&mut book);
        RUNS.fetch_add(book.table.runs(), Ordering::Relaxed);
        RUNS.fetch_sub(before, Ordering::Relaxed);
        r
    }

    /// What is in the file already or can be moved there now; and why not the rest, if nothing can.
    fn pieces(&self, maps: &Maps, vmas: &[Vma], range: (u64, u64)) -> Result<Pieces, MemError> {
        let mut pieces = plan::pieces(vmas, range, self.file, &[]);
        if pieces.iter().all(|p| p.own) {
            return Ok((pieces, None));
        }
        let threads = threads::look(maps)?;
        let refused = freeze::ready().err().or(threads.blocked.map(MemError::FaultsBlocked));
        if refused.is_some() {
            pieces.retain(|p| p.own);
            return Ok((pieces, refused));
        }
        let mut zones = threads.zones;
        zones.extend(freeze::own_zone());
        pieces = plan::pieces(vmas, range, self.file, &zones);
        pieces.retain(|p| p.own || !os::locked_or_growing(&p.vma));
        Ok((pieces, None))
    }

    fn take_pieces(&self, book: &mut Book, pieces: &[Piece], unmoved: &mut Option<MemError>) -> Vec<Part> {
        let mut parts: Vec<Part> = Vec::new();
        for (i, piece) in pieces.iter().enumerate() {
            if piece.own {
                parts.extend(book.hold(&piece.vma));
                continue;
            }
            let right = pieces.get(i + 1).filter(|n| n.own && n.vma.start == piece.vma.end);
            let left = parts.last().filter(|p| p.end == piece.vma.start);
            let Some(off) = book.place(&piece.vma, left, right.map(|n| &n.vma)) else {
                *unmoved = Some(MemError::TooManyRuns(RUNS.load(Ordering::Relaxed)));
                continue;
            };
            let (end, result) = exchange::move_in(&piece.vma, self.fd(), off);
            if let Err(errno) = result {
                *unmoved = Some(MemError::System { what: "moving pages", errno });
                book.windows.release(off + (end - piece.vma.start), piece.vma.end - end);
            }
            if end > piece.vma.start {
                parts.push(book.table.insert(piece.vma.start, end, off));
            }
        }
        parts
    }

    /// Lets go of parts; pages that nobody holds any more become private memory again. `retire`: their offsets
    /// are never used again.
    fn release(&self, maps: &Maps, parts: &[Part], retire: bool) {
        let (mut freed, mut stale) = (Vec::new(), Vec::new());
        self.with_book(|book| {
            for part in parts {
                let r = book.table.release(part);
                freed.extend(r.freed);
                stale.extend(r.stale);
            }
            if !freed.is_empty() && freeze::ready().is_err() {
                // Left where it is: it goes on working, as memory that happens to be in a file.
                freed.clear();
            }
            for part in &freed {
                self.give_back(maps, book, part, retire, &mut stale);
            }
            if !stale.is_empty() {
                self.clean_up(maps, book, &stale, retire);
            }
        });
    }

    fn give_back(&self, maps: &Maps, book: &mut Book, part: &Part, retire: bool, stale: &mut Vec<Part>) {
        let vmas = mappings(maps, (part.start, part.end)).unwrap_or_default();
        let mut done = Vec::new();
        for vma in vmas.iter().filter(|v| self.file.is_mapped_by(v)) {
            let cut = vma.clip(part.start, part.end);
            if cut.offset != part.off + (cut.start - part.start) {
                continue;
            }
            // A mapping that grew (mremap) maps offsets that nobody handed out.
            book.windows.give_up(vma.offset, vma.end - vma.start);
            let end = exchange::move_out(&cut, self.fd());
            if end > cut.start {
                done.push((cut.start, end));
                SCARS.fetch_add(1, Ordering::Relaxed);
                self.free_offsets(book, cut.offset, end - cut.start, retire);
            }
        }
        stale.extend(plan::subtract((part.start, part.end), &done).into_iter().map(|(s, e)| part.clip(s, e)));
    }

    /// Frees the offsets of memory that went away behind our back, unless something still maps them (a chunk
    /// that realloc carried elsewhere).
    fn clean_up(&self, maps: &Maps, book: &mut Book, stale: &[Part], retire: bool) {
        let mut mapped = Vec::new();
        let looked = maps.all(|vma| {
            if self.file.is_mapped_by(&vma) {
                mapped.push((vma.offset, vma.offset + (vma.end - vma.start)));
            }
            ControlFlow::Continue(())
        });
        if looked.is_err() {
            return;
        }
        for part in stale {
            for (s, e) in plan::subtract((part.off, part.end_off()), &mapped) {
                self.free_offsets(book, s, e - s, retire);
            }
        }
    }

    fn free_offsets(&self, book: &mut Book, off: u64, len: u64, retire: bool) {
        let punched = os::punch(self.fd(), off, len);
        // Offsets with old bytes in them must not come back.
        if punched.is_ok() && !retire {
            book.windows.release(off, len);
        }
    }
}

impl Drop for PdMemory {
    fn drop(&mut self) {
        if self.is_foreign() {
            return;
        }
        let _mover = mover();
        let mut left = false;
        let looked = Maps::open().and_then(|maps| {
            maps.all(|vma| {
                left |= self.file.is_mapped_by(&vma);
                ControlFlow::Continue(())
            })
        });
        if left || looked.is_err() {
            // Some of the program's memory stays in the file, and fork still needs it: leave it open for good.
            let _ = self.fd.take().map(IntoRawFd::into_raw_fd);
        } else {
            registry::remove(self.file);
        }
    }
}

impl Book {
    /// Holds what is mapped from our file: known pieces once more, unknown ones (grown, or moved by mremap) anew.
    fn hold(&mut self, vma: &Vma) -> Vec<Part> {
        let offset_at = |va: u64| vma.offset + (va - vma.start);
        for known in self.table.over(vma.start, vma.end) {
            if known.off != offset_at(known.start) {
                self.table.forget(known.start, known.end);
            }
        }
        let mut parts = self.table.acquire(vma.start, vma.end);
        let known: Vec<(u64, u64)> = parts.iter().map(|p| (p.start, p.end)).collect();
        for (s, e) in plan::subtract((vma.start, vma.end), &known) {
            self.windows.give_up(offset_at(s), e - s);
            parts.push(self.table.insert(s, e, offset_at(s)));
        }
        parts.sort_unstable_by_key(|p| p.start);
        parts
    }

    /// Where in the file new memory goes. None: it stays where it is.
    fn place(&mut self, vma: &Vma, left: Option<&Part>, right: Option<&Vma>) -> Option<u64> {
        // Whatever was known of these addresses is gone: other memory is mapped there now.
        self.table.forget(vma.start, vma.end);
        let len = vma.end - vma.start;
        if let Some(off) = left.and_then(|p| self.windows.after(p.end_off(), len)) {
            return Some(off);
        }
        if let Some(off) = right.and_then(|n| self.windows.before(n.offset, len)) {
            return Some(off);
        }
        if too_many_runs() {
            return None;
        }
        if vma.name == Name::Heap {
            self.windows.heap(vma.start, len)
        } else {
            self.windows.fresh(vma.start, len)
        }
    }
}

/// Each run of its own costs mappings, and the kernel's are limited.
fn too_many_runs() -> bool {
    if RUNS.load(Ordering::Relaxed) >= *RUN_LIMIT {
        return true;
    }
    if RUNS.load(Ordering::Relaxed) + SCARS.load(Ordering::Relaxed) < *RUN_LIMIT {
        return false;
    }
    // Scars vanish when their memory is unmapped, which nobody tells us: count what there is.
    let mut all = 0;
    let counted = Maps::open().and_then(|maps| {
        maps.all(|_| {
            all += 1;
            ControlFlow::Continue(())
        })
    });
    if counted.is_err() || all > 2 * *RUN_LIMIT {
        return true;
    }
    SCARS.store(0, Ordering::Relaxed);
    false
}

fn mappings(maps: &Maps, range: (u64, u64)) -> Result<Vec<Vma>, MemError> {
    let mut vmas = Vec::new();
    let looked = maps.over(range.0, range.1, |vma| {
        vmas.push(vma);
        ControlFlow::Continue(())
    });
    looked.map(|()| vmas).map_err(MemError::NoProc)
}

/// Keeps what `keep` says and returns the rest.
fn split_off<T>(all: &mut Vec<T>, keep: impl Fn(&T) -> bool) -> Vec<T> {
    let (kept, rest) = all.drain(..).partition(keep);
    *all = kept;
    rest
}

/// Registered memory. Dropping the last one over a page gives it back as private memory with the same bytes.
pub struct Registration {
    pd: Arc<PdMemory>,
    parts: Vec<Part>,
    extents: Vec<Extent>,
    unmoved: Option<MemError>,
    retire: bool,
    /// The memory was made here and is no one's but the registration's.
    owned: bool,
}

impl Registration {
    /// The pieces that peers can reach, in order of address. The rest of the range only the router reaches.
    pub fn extents(&self) -> &[Extent] {
        &self.extents
    }

    /// What kept memory from moving that could have moved: something an operator can change.
    pub fn unmoved_because(&self) -> Option<&MemError> {
        self.unmoved.as_ref()
    }

    /// Whether the extents are still mapped from where they were: a program may unmap and map again without
    /// deregistering, and then this registration is dead.
    pub fn still_mapped(&self) -> bool {
        if self.pd.is_foreign() {
            return false;
        }
        // Not while a fork has the mappings otherwise.
        let mut mover = mover();
        if self.extents.iter().all(|e| self.is_in_one_mapping(&mut mover, e)) {
            return true;
        }
        let Ok(maps) = Maps::open() else { return false };
        self.extents.iter().all(|e| self.is_mapped(&maps, e).unwrap_or(false))
    }

    /// The quick look: most extents are.
    fn is_in_one_mapping(&self, mover: &mut Mover, e: &Extent) -> bool {
        let vma = mover.recall.at(fork::generation(), e.va);
        vma.is_some_and(|vma| {
            self.pd.file.is_mapped_by(&vma)
                && vma.end >= e.va + e.len
                && vma.offset + (e.va - vma.start) == e.offset
        })
    }

    fn is_mapped(&self, maps: &Maps, e: &Extent) -> Result<bool, Errno> {
        let (mut at, end) = (e.va, e.va + e.len);
        maps.over(e.va, end, |vma| {
            let same = self.pd.file.is_mapped_by(&vma)
                && vma.start <= at
                && vma.offset + (at - vma.start) == e.offset + (at - e.va);
            if !same {
                return ControlFlow::Break(());
            }
            at = vma.end;
            ControlFlow::Continue(())
        })?;
        Ok(at >= end)
    }

    /// Drops this registration, and never uses its file offsets again: for when a peer may still write there.
    pub fn retire(mut self) {
        self.retire = true;
    }
}

impl Drop for Registration {
    fn drop(&mut self) {
        if self.pd.is_foreign() {
            return;
        }
        let _mover = mover();
        if self.owned {
            self.extents.iter().for_each(|e| pages::unmap(e.va, e.len));
        }
        if let Ok(maps) = Maps::open() {
            self.pd.release(&maps, &self.parts, self.retire);
        }
    }
}

/// What madvise must do on moved memory so that it behaves like the private memory the program knows.
/// None: nothing here has moved, or this advice needs no help; the real madvise does it all.
///
/// # Safety
/// As for madvise: MADV_DONTNEED discards the contents of the range.
pub unsafe fn madvise_moved(addr: u64, len: u64, advice: i32) -> Option<Result<(), Errno>> {
    const DONTNEED_LOCKED: i32 = 24;
    let page = os::page_size();
    let end = addr.checked_add(len)?.checked_add(page - 1)? & !(page - 1);
    let discards = matches!(advice, libc::MADV_DONTNEED | libc::MADV_FREE | DONTNEED_LOCKED);
    if !discards || !addr.is_multiple_of(page) || !freeze::ever_touched(addr, end) {
        return None;
    }
    let maps = Maps::open().ok()?;
    let found = find_moved(&maps, addr, end)?;
    let mut done = discard(&maps, addr, end, advice);
    if found == Found::ForkUnderWay && done.is_ok() {
        // The fork may have merged old bytes back just then. (Waiting for its end is out of the question: the
        // caller may be an allocator that holds a lock which fork takes.)
        done = discard(&maps, addr, end, advice);
    }
    Some(done)
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Found {
    Moved,
    ForkUnderWay,
}

fn find_moved(maps: &Maps, addr: u64, end: u64) -> Option<Found> {
    let mut found = None;
    let looked = maps.over(addr, end, |vma| {
        if registry::find(&vma).is_some() {
            found = Some(if vma.shared { Found::Moved } else { Found::ForkUnderWay });
        }
        if found.is_some() { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
    });
    looked.ok().and(found)
}

fn discard(maps: &Maps, addr: u64, end: u64, advice: i32) -> Result<(), Errno> {
    let (mut at, mut hole) = (addr, false);
    let mut result = Ok(());
    maps.over(addr, end, |vma| {
        hole |= vma.start > at;
        at = vma.end;
        let part = vma.clip(addr, end);
        let len = part.end - part.start;
        // MADV_FREE allows old bytes to stay for a while: at once is a special case.
        let punched = registry::find(&vma).map(|fd| os::punch(fd, part.offset, len));
        result = match punched {
            Some(done) if vma.shared || done.is_err() => done,
            _ => os::advise(part.start, len, advice),
        };
        if result.is_err() { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
    })?;
    // The kernel too does what it can, then says that there was a hole.
    result.and(if hole || at < end { Err(Errno::NOMEM) } else { Ok(()) })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Kernels before 6.11 tell of mappings only as text; the rest of the suite runs with what this one has.
    #[test]
    fn works_from_the_text_of_maps_alone() {
        os::forget_query();
        let pd = PdMemory::new().unwrap();
        let at = os::anonymous(8 * 4096).unwrap();
        let want = Want { remote: true, local_write: true };
        let a = pd.register(at + 100, 2 * 4096, want).unwrap();
        let b = pd.register(at, 8 * 4096, want).unwrap();
        assert_eq!(b.extents().len(), 1);
        assert_eq!(b.extents()[0].offset + 100, a.extents()[0].offset);
        assert!(a.still_mapped() && b.still_mapped());
        // SAFETY: memory of this test.
        assert!(unsafe { madvise_moved(at, 4096, libc::MADV_DONTNEED) }.unwrap().is_ok());
        pages::unmap(at + 4 * 4096, 4096);
        assert!(a.still_mapped() && !b.still_mapped());
        assert_eq!(pd.register(at, 8 * 4096, want).err().map(|e| e.errno()), Some(Errno::FAULT));
        drop((a, b));
        assert_eq!(RUNS.load(Ordering::Relaxed), 0);
    }
}
