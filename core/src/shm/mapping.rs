//! A mapped piece of a memfd, and typed views into it.

use std::ffi::c_void;
use std::ops::Deref;
use std::os::fd::AsFd;
use std::ptr::NonNull;
use std::sync::Arc;

use rustix::io::Errno;
use rustix::mm::{Advice, MapFlags, ProtFlags, madvise, mmap, mmap_anonymous, munmap};

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

/// Size of a huge page.
const HUGE: usize = 2 << 20;

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
        let base = if len < HUGE {
            // SAFETY: a fresh mapping at an address of the kernel's choice touches nothing that exists.
            unsafe { mmap(std::ptr::null_mut(), len, prot, MapFlags::SHARED, fd, offset) }?
        } else {
            map_congruent(fd, offset, len, prot)?
        };
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

/// Maps at an address that agrees with the offset modulo [`HUGE`]: only then are the file's huge pages huge here, too.
fn map_congruent(fd: impl AsFd, offset: u64, len: usize, prot: ProtFlags) -> Result<*mut c_void, Errno> {
    let len = len.checked_next_multiple_of(super::PAGE as usize).ok_or(Errno::NOMEM)?;
    let room = len.checked_add(HUGE).ok_or(Errno::NOMEM)?;
    let reserve = MapFlags::PRIVATE | MapFlags::NORESERVE;
    // SAFETY: a fresh mapping at an address of the kernel's choice touches nothing that exists.
    let start = unsafe { mmap_anonymous(std::ptr::null_mut(), room, ProtFlags::empty(), reserve) }?;
    let lead = (offset as usize).wrapping_sub(start.addr()) % HUGE;
    let base = start.wrapping_byte_add(lead);
    // SAFETY: over a part of what was just reserved: lead < HUGE.
    let mapped = unsafe { mmap(base, len, prot, MapFlags::SHARED | MapFlags::FIXED, fd, offset) };
    let rest = base.wrapping_byte_add(len);
    let unused = match mapped {
        Ok(_) => [(start, lead), (rest, HUGE - lead)],
        Err(_) => [(start, room), (start, 0)],
    };
    for (at, len) in unused.into_iter().filter(|(_, len)| *len > 0) {
        // SAFETY: reserved above and not mapped over; nobody else knows of it.
        let _ = unsafe { munmap(at, len) };
    }
    mapped
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

    /// A view of one of them.
    pub fn only(&self, index: usize) -> Option<Self> {
        let first = NonNull::from(self.get(index)?);
        Some(View { first, count: 1, map: Arc::clone(&self.map) })
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::shm::make_memfd;

    #[test]
    fn large_mappings_agree_with_their_offset() {
        let fd = make_memfd("large", 4 * HUGE as u64).expect("memfd");
        for page in [0, 1, 200, 511] {
            let offset = page * crate::shm::PAGE;
            let map = Mapping::new(&fd, offset, HUGE + 4096, true).expect("mapping");
            assert_eq!(map.base().addr() % HUGE, offset as usize % HUGE);
            // SAFETY: the first byte of a mapping.
            unsafe { map.base().write_volatile(page as u8) };
            // SAFETY: its last.
            unsafe { map.base().wrapping_add(map.len() - 1).write_volatile(1) };
        }
    }
}
