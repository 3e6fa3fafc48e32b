//! What keeps a forked child's memory its own, although its parent's moved pages are a shared mapping.
//!
//! Nothing stays frozen across the fork: a frozen writer may hold a malloc lock that fork itself takes next.
//! * Before: every moved mapping becomes a *private* mapping of the same file, and its bytes are copied to
//!   staging memory (chunk by chunk, frozen meanwhile). From here on local writes go to copies on write, which
//!   fork divides exactly at its own instant; nothing in this process writes to the file.
//! * Child: its own copies and, where there is none, the staged bytes become plain private memory. Until then it
//!   reads pages of the file that nobody wrote to, so the parent must leave the file alone:
//! * Parent: waits for the child's word, or its end. What was written meanwhile is merged into the file, word by word against the staged bytes, so that
//!   neither these writes nor a peer's are lost; then the mappings are shared again. A peer's write to a page
//!   that was also written locally during the fork becomes visible here only then. (Where both wrote to one
//!   aligned 8-byte word meanwhile, the peer's stays; and where a peer changed a word and changed it back around
//!   the first local write to its page, the value in between stays.)
//!
//! The child's part neither allocates nor writes to memory that may have moved before it has put it right.

use std::cell::UnsafeCell;
use std::ops::ControlFlow;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicPtr, AtomicU32, AtomicU64, AtomicUsize, Ordering};
use std::sync::{MutexGuard, Once};

use rustix::io::Errno;
use rustix::pipe::PipeFlags;

use super::freeze::{self, CHUNK, SignalsWait};
use super::maps::Vma;
use super::os::{self, Maps, Pagemap};
use super::pages::{self, Sharing};
use super::{MemError, Mover, RUNS, SCARS, mover, registry};

/// One mapping and where its bytes are staged.
#[derive(Clone, Copy)]
struct Staged {
    vma: Vma,
    at: u64,
}

/// What lasts from before a fork to after it.
struct Plan {
    _mover: MutexGuard<'static, Mover>,
    staging: u64,
    staging_len: u64,
    list: Vec<Staged>,
    /// Open already, so that the parent needs no descriptor afterwards and the child can close two for its own.
    proc: Option<(Maps, Pagemap)>,
    /// The child's word to the parent: (reading end, writing end).
    done: Option<(OwnedFd, OwnedFd)>,
    failed: Option<Errno>,
}

struct Slot(UnsafeCell<Option<Plan>>);
// SAFETY: only used by the thread that holds the mover's lock (in the child: by its only thread).
unsafe impl Sync for Slot {}
static PLAN: Slot = Slot(UnsafeCell::new(None));

/// How many forks lie between this process and the one that loaded us.
static GENERATION: AtomicU64 = AtomicU64::new(0);
/// A page that reads 1 here, and 0 in a child whose handler has not run.
static MARKER: AtomicPtr<AtomicU32> = AtomicPtr::new(std::ptr::null_mut());

const CALLBACKS: usize = 16;
static CALLBACK: [AtomicUsize; CALLBACKS] = [const { AtomicUsize::new(0) }; CALLBACKS];

/// Has `callback` run in every forked child, after its memory has been put right. False: there are too many.
pub fn on_fork_child(callback: fn()) -> bool {
    CALLBACK
        .iter()
        .any(|c| c.compare_exchange(0, callback as usize, Ordering::AcqRel, Ordering::Relaxed).is_ok())
}

/// Tells the processes of a fork apart. A child that ran no handlers (`_Fork`) never equals anything stored.
pub(super) fn generation() -> u64 {
    match marker() {
        Some(m) if m.load(Ordering::Acquire) == 0 => u64::MAX,
        _ => GENERATION.load(Ordering::Acquire),
    }
}

fn marker() -> Option<&'static AtomicU32> {
    // SAFETY: null, or a page mapped for good.
    unsafe { MARKER.load(Ordering::Acquire).as_ref() }
}

/// Registers the fork handlers, once.
pub(super) fn install() -> Result<(), MemError> {
    static ONCE: Once = Once::new();
    static RESULT: AtomicU32 = AtomicU32::new(0);
    ONCE.call_once(|| {
        if let Err(e) = install_once() {
            RESULT.store(e.raw_os_error() as u32, Ordering::Release);
        }
    });
    match RESULT.load(Ordering::Acquire) {
        0 => Ok(()),
        e => Err(MemError::System {
            what: "installing the fork handlers",
            errno: Errno::from_raw_os_error(e as i32),
        }),
    }
}

fn install_once() -> Result<(), Errno> {
    let page = os::anonymous(os::page_size())?;
    os::wipe_on_fork(page)?;
    let marker = page as *mut AtomicU32;
    // SAFETY: a fresh mapping of ours, never unmapped.
    unsafe { &*marker }.store(1, Ordering::Release);
    MARKER.store(marker, Ordering::Release);
    // SAFETY: three handlers that live as long as this library.
    match unsafe { libc::pthread_atfork(Some(prepare), Some(parent), Some(child)) } {
        0 => Ok(()),
        e => Err(Errno::from_raw_os_error(e)),
    }
}

/// The plan's place. Callers hold the mover's lock.
fn slot() -> &'static mut Option<Plan> {
    // SAFETY: exclusive by the mover's lock; no reference outlives the handler that took it.
    unsafe { &mut *PLAN.0.get() }
}

extern "C" fn prepare() {
    let mut plan = Plan {
        _mover: mover(),
        staging: 0,
        staging_len: 0,
        list: Vec::new(),
        proc: None,
        done: None,
        failed: None,
    };
    if !registry::is_empty() {
        plan.failed = plan.stage().err();
    }
    *slot() = Some(plan);
}

impl Plan {
    fn stage(&mut self) -> Result<(), Errno> {
        let pagemap = Pagemap::open()?;
        let maps = &self.proc.insert((Maps::open()?, pagemap)).0;
        maps.all(|vma| {
            if vma.shared && registry::find(&vma).is_some() {
                self.list.push(Staged { vma, at: self.staging_len });
                self.staging_len += vma.end - vma.start;
            }
            ControlFlow::Continue(())
        })?;
        if !self.list.is_empty() {
            self.done = Some(rustix::pipe::pipe_with(PipeFlags::CLOEXEC)?);
            self.staging = os::anonymous(self.staging_len)?;
            freeze::ready().map_err(|_| Errno::BUSY)?;
        }
        for s in &mut self.list {
            s.at += self.staging;
            stage_one(maps, s)?;
        }
        Ok(())
    }

    /// Where the bytes of `[va, ..)` of `vma` are staged and how many of them follow, at most `most`. Mappings
    /// are found at their address or, when mremap carried them elsewhere meanwhile, by their offset.
    fn staged(&self, vma: &Vma, va: u64, most: u64) -> (Option<u64>, u64) {
        let off = vma.offset + (va - vma.start);
        let holds = |s: &Staged| {
            s.vma.ino == vma.ino && (s.vma.offset..s.vma.offset + (s.vma.end - s.vma.start)).contains(&off)
        };
        let at = self.list.partition_point(|s| s.vma.end <= va);
        let here = self.list.get(at).filter(|s| s.vma.start <= va && holds(s));
        match here.or_else(|| self.list.iter().find(|s| holds(s))) {
            Some(s) => {
                let skip = off - s.vma.offset;
                (Some(s.at + skip), most.min(s.vma.end - s.vma.start - skip))
            }
            None => (None, os::page_size().min(most)),
        }
    }
}

/// Makes one mapping private and stages its bytes.
fn stage_one(maps: &Maps, s: &Staged) -> Result<(), Errno> {
    let vma = &s.vma;
    let Some(fd) = registry::find(vma) else { return Ok(()) };
    let mut same = false;
    maps.over(vma.start, vma.end, |now| {
        let (now, then) = (now.clip(vma.start, vma.end), vma.clip(now.start, now.end));
        same = now == Vma { name: now.name, huge: now.huge, ..then };
        if same { ControlFlow::Continue(()) } else { ControlFlow::Break(()) }
    })?;
    if !same {
        // Unmapped or remapped since it was listed; what is shared still, the child will find.
        return Ok(());
    }
    each_chunk(vma, |at, len| {
        let off = vma.offset + (at - vma.start);
        if os::next_data(fd, off, off + len).is_some() {
            // Where the kernel cannot, it is only slower.
            let _ = os::populate(s.at + (at - vma.start), len);
        }
        freeze::frozen(at, len, || {
            pages::map_file(at, len, vma, Sharing::PrivateFrozen, fd, off)?;
            let staged = match os::next_data(fd, off, off + len) {
                Some(_) => pages::read_in(s.at + (at - vma.start), len, fd, off),
                None => Ok(()),
            };
            thaw(at, len, vma).and(staged)
        })
    })
}

/// Gives a chunk its protection back. What another thread unmapped meanwhile needs none, and must not fail the fork.
fn thaw(at: u64, len: u64, vma: &Vma) -> Result<(), Errno> {
    let whole = pages::protect(at, len, vma, false);
    if whole != Err(Errno::NOMEM) {
        return whole;
    }
    let page = os::page_size();
    for at in (at..at + len).step_by(page as usize) {
        match pages::protect(at, page, vma, false) {
            Ok(()) | Err(Errno::NOMEM) => {}
            failed => return failed,
        }
    }
    Ok(())
}

fn each_chunk(vma: &Vma, mut f: impl FnMut(u64, u64) -> Result<(), Errno>) -> Result<(), Errno> {
    let mut at = vma.start;
    while at < vma.end {
        let len = CHUNK.min(vma.end - at);
        f(at, len)?;
        at += len;
    }
    Ok(())
}

fn is_private_of_ours(vma: &Vma) -> Option<BorrowedFd<'static>> {
    if vma.shared { None } else { registry::find(vma) }
}

extern "C" fn parent() {
    let Some(mut plan) = slot().take() else { return };
    if let Some((word, ours)) = plan.done.take() {
        drop(ours);
        // One byte, or the end of file when there is no child any more.
        while rustix::io::read(&word, &mut [0u8; 1]) == Err(Errno::INTR) {}
    }
    if let Some((maps, pagemap)) = &plan.proc {
        let mut list = Vec::new();
        let _ = maps.all(|vma| {
            if let Some(fd) = is_private_of_ours(&vma) {
                list.push((vma, fd));
            }
            ControlFlow::Continue(())
        });
        for (vma, fd) in list {
            // On failure the rest stays private: right for this process, and `still_mapped` tells the others.
            let _ = each_chunk(&vma, |at, len| share_again(&plan, pagemap, &vma, fd, at, len));
        }
    }
    if plan.staging != 0 {
        pages::unmap(plan.staging, plan.staging_len);
    }
}

fn share_again(
    plan: &Plan,
    pagemap: &Pagemap,
    vma: &Vma,
    fd: BorrowedFd<'_>,
    at: u64,
    len: u64,
) -> Result<(), Errno> {
    let off = vma.offset + (at - vma.start);
    freeze::frozen(at, len, || {
        let r = pages::protect(at, len, vma, true)
            .and_then(|()| merge_chunk(plan, pagemap, vma, fd, at, len))
            .and_then(|()| pages::map_file(at, len, vma, Sharing::Shared, fd, off));
        if r.is_err() {
            let _ = pages::protect(at, len, vma, false);
        }
        r
    })
}

const PAGES: usize = CHUNK as usize / 4096;

/// Carries into the file what this process wrote to its own copies of the chunk's pages.
fn merge_chunk(
    plan: &Plan,
    pagemap: &Pagemap,
    vma: &Vma,
    fd: BorrowedFd<'_>,
    at: u64,
    len: u64,
) -> Result<(), Errno> {
    let (page, mut own) = (os::page_size(), [false; PAGES]);
    let own = &mut own[..(len / page) as usize];
    pagemap.own_copies(at, own)?;
    if !own.contains(&true) {
        return Ok(());
    }
    let file = Alias::new(fd, vma.offset + (at - vma.start), len)?;
    for (i, _) in own.iter().enumerate().filter(|(_, own)| **own) {
        let step = i as u64 * page;
        let (base, _) = plan.staged(vma, at + step, page);
        // Without a base it is memory that appeared meanwhile: no peer knows of it, all bytes are ours.
        merge_page(at + step, base, file.at + step, page);
    }
    Ok(())
}

/// A second mapping of a piece of the file.
struct Alias {
    at: u64,
    len: u64,
}

impl Alias {
    fn new(fd: BorrowedFd<'_>, off: u64, len: u64) -> Result<Self, Errno> {
        os::shared_alias(fd, off, len).map(|at| Alias { at, len })
    }
}

impl Drop for Alias {
    fn drop(&mut self) {
        pages::unmap(self.at, self.len);
    }
}

/// Writes those words of `local` that differ from `base` to `file`, except where a peer has written too. Whole
/// words: `local` may hold what a peer wrote between the staging and the copy on write, and taking single bytes
/// of that would mix old and new.
fn merge_page(local: u64, base: Option<u64>, file: u64, len: u64) {
    for i in (0..len).step_by(8) {
        let mine = word(local + i).load(Ordering::Relaxed);
        let target = word(file + i);
        match base.map(|b| word(b + i).load(Ordering::Relaxed)) {
            Some(before) if before == mine => {}
            // Fails where a peer was here: its word stays.
            Some(before) => {
                let _ = target.compare_exchange(before, mine, Ordering::AcqRel, Ordering::Relaxed);
            }
            None => target.store(mine, Ordering::Release),
        }
    }
}

fn word(at: u64) -> &'static AtomicU64 {
    // SAFETY: an aligned word of a mapped, readable page that stays mapped for the duration of the caller; the
    // page of the file is writable, the others are only loaded from.
    unsafe { &*(at as *const AtomicU64) }
}

extern "C" fn child() {
    let signals = SignalsWait::begin();
    if let Some(plan) = slot().as_mut() {
        // Closed first: the child gets the two descriptors it needs.
        let staged = plan.proc.take().is_some();
        let made = match plan.failed {
            Some(e) => Err(e),
            None if staged && !plan.list.is_empty() => make_private(plan),
            None => Ok(()),
        };
        if let Err(e) = made {
            give_up(e);
        }
        if let Some((_, word)) = plan.done.take() {
            let _ = rustix::io::write(&word, &[1u8]);
        }
        if plan.staging != 0 {
            pages::unmap(plan.staging, plan.staging_len);
        }
    }
    freeze::reset_after_fork();
    registry::clear();
    RUNS.store(0, Ordering::Relaxed);
    SCARS.store(0, Ordering::Relaxed);
    GENERATION.fetch_add(1, Ordering::AcqRel);
    if let Some(m) = marker() {
        m.store(1, Ordering::Release);
    }
    drop(slot().take());
    drop(signals);
    for c in &CALLBACK {
        let f = c.load(Ordering::Acquire);
        if f != 0 {
            // SAFETY: only `on_fork_child` stores here, and only functions of this type.
            let f: fn() = unsafe { std::mem::transmute(f) };
            f();
        }
    }
}

/// Going on would mean writing into the parent's memory.
fn give_up(errno: Errno) -> ! {
    let text = b"freeflow: a forked child could not be given its own copy of registered memory (errno ";
    let code = errno.raw_os_error();
    let digits = [b'0' + (code / 100 % 10) as u8, b'0' + (code / 10 % 10) as u8, b'0' + (code % 10) as u8];
    let err = os::borrow(libc::STDERR_FILENO);
    let _ = rustix::io::write(err, text);
    let _ = rustix::io::write(err, &digits);
    let _ = rustix::io::write(err, b"): ending it\n");
    // SAFETY: always possible.
    unsafe { libc::abort() }
}

fn make_private(plan: &Plan) -> Result<(), Errno> {
    let (maps, pagemap) = (Maps::open()?, Pagemap::open()?);
    let mut result = Ok(());
    maps.all(|vma| {
        result = match registry::find(&vma) {
            Some(_) if !vma.shared => privatise(plan, &pagemap, &vma),
            Some(fd) => own_from_now_on(&vma, fd),
            None => Ok(()),
        };
        if result.is_ok() { ControlFlow::Continue(()) } else { ControlFlow::Break(()) }
    })?;
    result
}

/// A mapping that was made while the fork was under way: only its later fate can be kept apart.
fn own_from_now_on(vma: &Vma, fd: BorrowedFd<'_>) -> Result<(), Errno> {
    let len = vma.end - vma.start;
    pages::map_file(vma.start, len, vma, Sharing::PrivateFrozen, fd, vma.offset)?;
    pages::protect(vma.start, len, vma, false)
}

fn privatise(plan: &Plan, pagemap: &Pagemap, vma: &Vma) -> Result<(), Errno> {
    if !vma.read {
        pages::protect(vma.start, vma.end - vma.start, vma, true)?;
    }
    let mut at = vma.start;
    while at < vma.end {
        let (staged, len) = plan.staged(vma, at, vma.end - at);
        let scratch = match staged {
            Some(s) => s,
            None => os::anonymous(len)?,
        };
        copy_own(pagemap, at, len, scratch, staged.is_none())?;
        if !(vma.read && vma.write) {
            pages::protect(scratch, len, vma, false)?;
        }
        pages::move_over(scratch, at, len)?;
        at += len;
    }
    Ok(())
}

/// Copies the process's own copies of pages (or all pages) over the staged ones.
fn copy_own(pagemap: &Pagemap, at: u64, len: u64, to: u64, all: bool) -> Result<(), Errno> {
    let (page, mut own) = (os::page_size(), [false; 512]);
    let group = own.len() as u64 * page;
    for start in (0..len).step_by(group as usize) {
        let n = group.min(len - start);
        let own = &mut own[..(n / page) as usize];
        pagemap.own_copies(at + start, own)?;
        for (i, _) in own.iter().enumerate().filter(|(_, own)| all || **own) {
            let step = start + i as u64 * page;
            copy_page(at + step, to + step, page);
        }
    }
    Ok(())
}

fn copy_page(from: u64, to: u64, len: u64) {
    for i in (0..len).step_by(8) {
        word(to + i).store(word(from + i).load(Ordering::Relaxed), Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::merge_page;

    #[test]
    fn merging_keeps_both_sides_writes() {
        let base = [1u64, 1, 1, 1];
        let mine = [1u64, 2, 1, 7];
        let mut file = [1u64, 1, 3, 9];
        let at = |words: &[u64; 4]| words.as_ptr() as u64;
        merge_page(at(&mine), Some(at(&base)), file.as_mut_ptr() as u64, 32);
        assert_eq!(file, [1, 2, 3, 9], "a peer keeps its own words");
        merge_page(at(&mine), None, file.as_mut_ptr() as u64, 32);
        assert_eq!(file, mine);
    }
}
