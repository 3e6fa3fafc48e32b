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

/// The same of a line that this processor will read soon.
#[inline]
pub fn prefetch_for_read<T>(place: &T) {
    #[cfg(target_arch = "x86_64")]
    // SAFETY: a hint to the processor, which touches nothing and cannot fault.
    unsafe {
        std::arch::asm!("prefetcht0 [{}]", in(reg) place, options(nostack, readonly, preserves_flags));
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

/// Copies upwards and writes each byte exactly once: who saw the last byte may write there, and a memcpy, which covers
/// a length with two stores that overlap, would take that back.
///
/// # Safety
/// Both sides are valid for `len` bytes.
unsafe fn copy_once(dst: *mut u8, src: *const u8, len: usize) {
    let mut at = 0;
    while len - at >= size_of::<u64>() {
        // SAFETY: 8 bytes that begin before the end.
        let word = unsafe { src.wrapping_add(at).cast::<u64>().read_unaligned() };
        // SAFETY: as above; volatile, so that no compiler makes one memcpy of it.
        unsafe { write_volatile(dst.wrapping_add(at).cast::<Unaligned>(), Unaligned(word)) };
        at += size_of::<u64>();
    }
    for at in at..len {
        // SAFETY: at < len.
        let byte = unsafe { src.wrapping_add(at).read() };
        // SAFETY: at < len.
        unsafe { write_volatile(dst.wrapping_add(at), byte) };
    }
}

/// Eight bytes anywhere.
#[derive(Clone, Copy)]
#[repr(C, packed)]
struct Unaligned(u64);

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
    unsafe { copy_once(tail_dst, tail_src, len - body) };
    fence(Ordering::Release);
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::AtomicU8;

    use super::*;

    #[test]
    fn every_length_is_copied_whole() {
        let from: Vec<u8> = (0..200u8).collect();
        for len in 0..from.len() {
            for shift in 0..9 {
                let mut to = [0xffu8; 220];
                // SAFETY: `to` lives until after the copy.
                let dst = unsafe { SharedBytes::new(to[shift..].as_mut_ptr(), len) };
                // SAFETY: `from` has `len` bytes.
                unsafe { copy_in(dst, LocalBytes { addr: from.as_ptr().addr() as u64, len }) };
                assert_eq!(to[shift..shift + len], from[..len], "length {len} at {shift}");
                assert!(to[..shift].iter().chain(&to[shift + len..]).all(|byte| *byte == 0xff));
            }
        }
    }

    /// Who sees the last byte of a copy may write there at once; the copy must not take that back.
    #[test]
    fn the_last_byte_is_written_once() {
        const ROUNDS: u32 = 200_000;
        #[repr(C, align(64))]
        struct Lines([u8; 128]);
        let lines = Box::leak(Box::new(Lines([0; 128])));
        // Across two lines, as malloc'ed memory often lies.
        let at = lines.0[16..80].as_mut_ptr();
        // SAFETY: one byte of leaked memory, which the other thread touches only through this atomic.
        let last = unsafe { AtomicU8::from_ptr(at.wrapping_add(63)) };
        // SAFETY: leaked memory.
        let dst = unsafe { SharedBytes::new(at, 64) };
        let begun = std::time::Instant::now();
        let wait_for = |mark: u8| {
            while last.load(Ordering::Acquire) != mark {
                assert!(begun.elapsed().as_secs() < 60, "{mark:#x} was overwritten");
                std::hint::spin_loop();
            }
        };
        let marks = || (0..ROUNDS).map(|round| 1 + (round % 100) as u8);
        std::thread::scope(|scope| {
            scope.spawn(move || {
                for mark in marks() {
                    wait_for(mark);
                    last.store(mark | 0x80, Ordering::Release);
                }
            });
            for mark in marks() {
                let from = [mark; 64];
                // SAFETY: both sides have 64 bytes.
                unsafe { copy_in(dst, LocalBytes { addr: from.as_ptr().addr() as u64, len: 64 }) };
                wait_for(mark | 0x80);
            }
        });
    }
}
