//! A mapped piece of a memfd, and typed views into it.

use std::ops::Deref;
use std::os::fd::AsFd;
use std::ptr::NonNull;
use std::sync::Arc;

use rustix::io::Errno;
use rustix::mm::{Advice, MapFlags, ProtFlags, madvise, mmap, munmap};

/// Types that may be looked at in memory other processes write.
///
/// # Safety
/// Every bit pattern is a valid value and every field is an atomic (or padding never read).
pub unsafe trait Shared {}

// SAFETY: only atomics and padding.

unsafe impl Shared for crate::ring::RecvSlot {}
// SAFETY: only atomics and padding.

unsafe impl Shared for crate::ring::SrqShared {}
// SAFETY: only atomics and padding.

unsafe impl Shared for crate::ring::QpShared {}
// SAFETY: only atomics and padding.

unsafe impl Shared for crate::ring::CqShared {}
// SAFETY: only atomics and padding.

unsafe impl Shared for crate::ring::MrEntry {}
// SAFETY: only atomics and padding.

unsafe impl Shared for crate::ring::FifoShared {}
// SAFETY: only atomics and padding.

unsafe impl Shared for crate::ring::FifoSlot {}
// SAFETY: only atomics and padding.

unsafe impl Shared for crate::ring::LinkHeader {}
// SAFETY: one atomic.

unsafe impl Shared for crate::ring::LinkWord {}
// SAFETY: one atomic.

unsafe impl Shared for crate::sync::AtomicU64 {}

/// A shared mapping; unmapped when dropped.
#[derive(Debug)]
pub struct Mapping {
    base: NonNull<u8>,
    len: usize,
    /// The process that made it.
    pid: u32,
}

// SAFETY: a mapping is plain memory, valid in every thread until it is dropped; access is through atomics or raw copies.
unsafe impl Send for Mapping {}
// SAFETY: as above.
unsafe impl Sync for Mapping {}

impl Mapping {
    /// Maps `[offset, offset+len)` of `fd`, writable or not. The caller has checked that the file is sealed at a size
    /// that holds it.
    pub fn new(fd: impl AsFd, offset: u64, len: usize, writable: bool) -> Result<Self, Errno> {
        let prot = if writable { ProtFlags::READ | ProtFlags::WRITE } else { ProtFlags::READ };
        // SAFETY: a fresh mapping at an address of the kernel's choice touches nothing that exists.
        let base = unsafe { mmap(std::ptr::null_mut(), len, prot, MapFlags::SHARED, fd, offset) }?;
        let base = NonNull::new(base.cast()).ok_or(Errno::NOMEM)?;
        Ok(Mapping { base, len, pid: std::process::id() })
    }

    /// Keeps the mapping out of forked children: queues belong to one process.
    pub fn dont_fork(&self) {
        // SAFETY: the range is ours; the advice changes nothing in this process.
        let _ = unsafe { madvise(self.base.as_ptr().cast(), self.len, Advice::LinuxDontFork) };
    }

    pub fn len(&self) -> usize {
        self.len
    }

    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// First byte.
    pub fn base(&self) -> *mut u8 {
        self.base.as_ptr()
    }

    /// The `T` at `offset`, if it is aligned and wholly inside.
    pub fn get<T: Shared>(&self, offset: u64) -> Option<&T> {
        self.slice(offset, 1)?.first()
    }

    /// `count` `T`s from `offset` on.
    pub fn slice<T: Shared>(&self, offset: u64, count: usize) -> Option<&[T]> {
        let offset = usize::try_from(offset).ok()?;
        let end = count.checked_mul(size_of::<T>())?.checked_add(offset)?;
        if end > self.len || !offset.is_multiple_of(align_of::<T>()) {
            return None;
        }
        // SAFETY: offset <= len, both inside one mapping.
        let first = unsafe { self.base.as_ptr().add(offset) };
        // SAFETY: in bounds, aligned (mappings are page-aligned), valid for any bytes by `Shared`, and alive as long as self.
        Some(unsafe { std::slice::from_raw_parts(first.cast::<T>(), count) })
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        if self.pid != std::process::id() {
            return; // a forked child does not have it (dont_fork), but maybe something else at its address
        }
        // SAFETY: this object made the mapping in this process, and views into it borrow this object.
        let _ = unsafe { munmap(self.base.as_ptr().cast(), self.len) };
    }
}

/// `count` consecutive `T`s of a mapping, which it keeps alive.
#[derive(Debug)]
pub struct View<T: Shared> {
    first: NonNull<T>,
    count: usize,
    map: Arc<Mapping>,
}

impl<T: Shared> View<T> {
    /// None if it is misaligned or not wholly inside.
    pub fn new(map: Arc<Mapping>, offset: u64, count: usize) -> Option<Self> {
        let first = NonNull::from(map.slice::<T>(offset, count)?).cast();
        Some(View { first, count, map })
    }

    /// The mapping it is a view of.
    pub fn mapping(&self) -> &Arc<Mapping> {
        &self.map
    }
}

impl<T: Shared> Clone for View<T> {
    fn clone(&self) -> Self {
        View { first: self.first, count: self.count, map: Arc::clone(&self.map) }
    }
}

impl<T: Shared> Deref for View<T> {
    type Target = [T];

    fn deref(&self) -> &[T] {
        // SAFETY: new() took the range from the mapping, and `map` keeps that mapped.
        unsafe { std::slice::from_raw_parts(self.first.as_ptr(), self.count) }
    }
}

// SAFETY: a view is shared atomics in a mapping that is Send and Sync.
unsafe impl<T: Shared> Send for View<T> {}
// SAFETY: as above.
unsafe impl<T: Shared> Sync for View<T> {}
