//! Copies between the program's memory and pages that peers see or change meanwhile.
//!
//! Verbs let pollers watch the last byte of a WRITE, so the body is copied first and the last 64 bytes after it; a
//! naturally aligned 8-byte copy is one store.

use std::ptr::{copy_nonoverlapping, read_volatile, write_volatile};
use std::sync::atomic::{AtomicU64, Ordering, fence};

const TAIL: usize = 64;

/// Bytes of this process that a registration covers.
#[derive(Debug, Clone, Copy)]
pub struct LocalBytes {
    pub addr: u64,
    pub len: usize,
}

/// Bytes of a peer, as mapped here.
#[derive(Debug, Clone, Copy)]
pub struct SharedBytes {
    ptr: *mut u8,
    len: usize,
}

// SAFETY: an address in a mapping, which every thread of the process has; new()'s promise is about time, not threads.
unsafe impl Send for SharedBytes {}

impl SharedBytes {
    /// # Safety
    /// `[ptr, ptr+len)` stays mapped, readable and writable while the value is used.
    pub unsafe fn new(ptr: *mut u8, len: usize) -> Self {
        SharedBytes { ptr, len }
    }

    pub fn len(&self) -> usize {
        self.len
    }

    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// What follows after `skipped` bytes, if anything does.
    #[inline]
    #[must_use]
    pub fn from(self, skipped: u64) -> Option<Self> {
        let skipped = usize::try_from(skipped).ok().filter(|skipped| *skipped < self.len)?;
        Some(SharedBytes { ptr: self.ptr.wrapping_add(skipped), len: self.len - skipped })
    }

    /// At most the first `len` bytes.
    #[must_use]
    pub fn first(self, len: u64) -> Self {
        SharedBytes { ptr: self.ptr, len: usize::try_from(len).map_or(self.len, |len| len.min(self.len)) }
    }
}

/// The aligned 8-byte word at the start of `bytes`, for CPU atomics.
pub fn atomic_word(bytes: &SharedBytes) -> Option<&AtomicU64> {
    if bytes.len < 8 || !bytes.ptr.cast::<u64>().is_aligned() {
        return None;
    }
    // SAFETY: aligned, 8 bytes inside a live mapping (SharedBytes::new), borrowed no longer than the value.
    Some(unsafe { AtomicU64::from_ptr(bytes.ptr.cast::<u64>()) })
}

/// Has the cache line of `place` fetched in the meantime: this processor will write it soon.
#[inline]
pub fn prefetch_for_write<T>(place: &T) {
    #[cfg(target_arch = "x86_64")]
    // SAFETY: a hint to the processor, which touches nothing and cannot fault.
    unsafe {
        std::arch::asm!("prefetchw [{}]", in(reg) place, options(nostack, readonly, preserves_flags));
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = place;
}

/// Copies local bytes into shared pages, last bytes last.
///
/// # Safety
/// `src` is readable in this process and no longer than `dst`.
pub unsafe fn copy_in(dst: SharedBytes, src: LocalBytes) {
    assert!(src.len <= dst.len);
    // SAFETY: readable by the caller's promise, writable by SharedBytes::new's.
    unsafe { ordered_copy(dst.ptr, src.addr as *const u8, src.len) };
}

/// Copies shared pages into local bytes.
///
/// # Safety
/// `dst` is writable in this process and no longer than `src`.
pub unsafe fn copy_out(dst: LocalBytes, src: SharedBytes) {
    assert!(dst.len <= src.len);
    // SAFETY: writable by the caller's promise, readable by SharedBytes::new's.
    unsafe { ordered_copy(dst.addr as *mut u8, src.ptr, dst.len) };
}

/// # Safety
/// Both sides are valid for `len` bytes. They may be the same memory mapped twice; then they do not overlap partially,
/// or the program asked for an undefined result.
unsafe fn ordered_copy(dst: *mut u8, src: *const u8, len: usize) {
    if len == 8 && dst.cast::<u64>().is_aligned() && src.cast::<u64>().is_aligned() {
        // SAFETY: 8 aligned readable bytes.
        let value = unsafe { read_volatile(src.cast::<u64>()) };
        fence(Ordering::Release);
        // SAFETY: 8 aligned writable bytes.
        unsafe { write_volatile(dst.cast::<u64>(), value) };
        return;
    }
    let body = len.saturating_sub(TAIL);
    if body > 0 {
        // SAFETY: a prefix of the caller's ranges.
        unsafe { copy_nonoverlapping(src, dst, body) };
        fence(Ordering::Release);
    }
    // SAFETY: body <= len.
    let tail_src = unsafe { src.add(body) };
    // SAFETY: body <= len.
    let tail_dst = unsafe { dst.add(body) };
    // SAFETY: the remaining len - body bytes.
    unsafe { copy_nonoverlapping(tail_src, tail_dst, len - body) };
    fence(Ordering::Release);
}
