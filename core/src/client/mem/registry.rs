//! The files of all PDs of this process, for those that meet a mapping and ask whose it is: fork and madvise.
//! Lock-free and without allocation, because a program's madvise may come from inside its malloc.

use std::os::fd::{BorrowedFd, RawFd};
use std::sync::atomic::{AtomicI32, AtomicU64, Ordering};

use super::maps::Vma;
use super::plan::FileId;

struct Slot {
    ino: AtomicU64,
    dev: AtomicU64,
    fd: AtomicI32,
}

impl Slot {
    const fn empty() -> Self {
        Slot { ino: AtomicU64::new(0), dev: AtomicU64::new(0), fd: AtomicI32::new(-1) }
    }
}

/// Most PDs a process can have at a time.
pub(super) const ROOM: usize = 1024;
static SLOTS: [Slot; ROOM] = [const { Slot::empty() }; ROOM];

fn dev_word(dev: (u32, u32)) -> u64 {
    u64::from(dev.0) << 32 | u64::from(dev.1)
}

/// Enters a file; false if there is no room. Callers hold the mover's lock; readers need not.
pub(super) fn add(file: FileId, fd: RawFd) -> bool {
    let Some(slot) = SLOTS.iter().find(|s| s.ino.load(Ordering::Relaxed) == 0) else { return false };
    slot.fd.store(fd, Ordering::Relaxed);
    slot.dev.store(dev_word(file.dev), Ordering::Relaxed);
    // Pairs with the acquire in `find`.
    slot.ino.store(file.ino, Ordering::Release);
    true
}

pub(super) fn remove(file: FileId) {
    for slot in SLOTS.iter().filter(|s| s.ino.load(Ordering::Relaxed) == file.ino) {
        slot.ino.store(0, Ordering::Release);
    }
}

pub(super) fn clear() {
    SLOTS.iter().for_each(|s| s.ino.store(0, Ordering::Release));
}

pub(super) fn is_empty() -> bool {
    SLOTS.iter().all(|s| s.ino.load(Ordering::Acquire) == 0)
}

/// The file that `vma` maps, if it is one of ours.
pub(super) fn find(vma: &Vma) -> Option<BorrowedFd<'static>> {
    if vma.ino == 0 {
        return None;
    }
    let slot = SLOTS.iter().find(|s| s.ino.load(Ordering::Acquire) == vma.ino)?;
    let same = slot.dev.load(Ordering::Relaxed) == dev_word(vma.dev);
    same.then(|| super::os::borrow(slot.fd.load(Ordering::Relaxed)))
}
