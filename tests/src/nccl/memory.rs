//! Buffers that a plugin writes to behind the compiler's back, filled and checked by pattern.

use std::alloc::{Layout, alloc_zeroed, dealloc, handle_alloc_error};
use std::ffi::c_void;

use rustix::mm::{MapFlags, MprotectFlags, ProtFlags, mmap_anonymous, mprotect};

use super::{Dice, Outcome};

/// Page-aligned memory.
#[derive(Debug)]
pub struct Buffer {
    start: *mut u8,
    layout: Layout,
}

// SAFETY: plain memory; the scenarios say who may touch what when.
unsafe impl Send for Buffer {}
// SAFETY: as above.
unsafe impl Sync for Buffer {}

impl Buffer {
    pub fn new(len: usize) -> Self {
        let layout = Layout::from_size_align(len.max(1), 4096).expect("a sensible size");
        // SAFETY: the size is not 0.
        let start = unsafe { alloc_zeroed(layout) };
        if start.is_null() {
            handle_alloc_error(layout);
        }
        Buffer { start, layout }
    }

    pub fn len(&self) -> usize {
        self.layout.size()
    }

    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Address of byte `offset`.
    pub fn at(&self, offset: usize) -> *mut c_void {
        assert!(offset <= self.len());
        // SAFETY: inside, or one behind.
        unsafe { self.start.add(offset) }.cast()
    }

    /// Writes the bytes of stream `seed` to `[offset, offset+len)`.
    pub fn fill(&self, offset: usize, len: usize, seed: u64) {
        self.chunks(
            offset,
            len,
            |at, n, bytes| {
                // SAFETY: inside the buffer; the scenario owns these bytes now.
                unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), at, n) };
            },
            seed,
        );
    }

    /// Are those bytes there?
    pub fn check(&self, offset: usize, len: usize, seed: u64) -> Outcome {
        let mut wrong = None;
        self.chunks(
            offset,
            len,
            |at, n, bytes| {
                // SAFETY: inside the buffer; whoever wrote it has said that it is done.
                let found = unsafe { std::slice::from_raw_parts(at, n) };
                if wrong.is_none() && found != &bytes[..n] {
                    let i = (0..n).find(|i| found[*i] != bytes[*i]).unwrap_or(0);
                    wrong = Some((at as usize - self.start as usize + i, found[i], bytes[i]));
                }
            },
            seed,
        );
        match wrong {
            None => Ok(()),
            Some((at, found, wanted)) => Err(format!(
                "byte {} of {len} is {found:#x} instead of {wanted:#x} (stream {seed:#x})",
                at - offset
            )),
        }
    }

    /// A number that changes if a byte does.
    pub fn sum(&self) -> u64 {
        let byte = |i| {
            // SAFETY: inside the buffer.
            let at = unsafe { self.start.add(i) };
            // SAFETY: readable; volatile, because a broken plugin may write at any time.
            u64::from(unsafe { at.read_volatile() })
        };
        (0..self.len()).fold(0, |sum, i| sum.rotate_left(5) ^ byte(i))
    }

    /// libc's memcpy.
    pub fn copy(&self, offset: usize, from: &Buffer, from_offset: usize, len: usize) {
        assert!(offset + len <= self.len() && from_offset + len <= from.len());
        // SAFETY: inside both, which do not overlap.
        unsafe {
            std::ptr::copy_nonoverlapping(from.at(from_offset).cast::<u8>(), self.at(offset).cast(), len)
        };
        std::hint::black_box(self.start);
    }

    pub fn put_words(&self, words: &[u32]) {
        assert!(words.len() * 4 <= self.len());
        // SAFETY: inside the buffer, aligned; the scenario owns these bytes now.
        unsafe { std::ptr::copy_nonoverlapping(words.as_ptr(), self.start.cast(), words.len()) };
    }

    pub fn words(&self, count: usize) -> Vec<u32> {
        assert!(count * 4 <= self.len());
        // SAFETY: inside the buffer, aligned; whoever wrote it has said that it is done.
        unsafe { std::slice::from_raw_parts(self.start.cast(), count) }.to_vec()
    }

    fn chunks(&self, offset: usize, len: usize, mut each: impl FnMut(*mut u8, usize, &[u8; 64]), seed: u64) {
        assert!(offset + len <= self.len(), "{offset}+{len} of {}", self.len());
        let mut bytes = [0; 64];
        for at in (0..len).step_by(64) {
            let base = Dice(seed ^ (at as u64).rotate_left(17)).roll();
            for (i, word) in bytes.chunks_exact_mut(8).enumerate() {
                word.copy_from_slice(&base.wrapping_mul(2 * i as u64 + 1).to_le_bytes());
            }
            // SAFETY: inside the buffer, as asserted.
            each(unsafe { self.start.add(offset + at) }, (len - at).min(64), &bytes);
        }
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        // SAFETY: allocated with this layout.
        unsafe { dealloc(self.start, self.layout) };
    }
}

/// Anonymous pages of their own mapping, for what malloc does not do.
#[derive(Debug)]
pub struct Pages(Buffer);

impl Pages {
    pub fn new(len: usize) -> Self {
        let pages = Pages(Buffer::new(len.next_multiple_of(4096)));
        pages.map_again();
        pages
    }

    pub fn at(&self, offset: usize) -> *mut c_void {
        self.0.at(offset)
    }

    /// Unmaps them and maps others, all zero, at the same address.
    pub fn map_again(&self) {
        let flags = MapFlags::PRIVATE | MapFlags::FIXED;
        let len = self.0.len();
        // SAFETY: whole pages of our own buffer, whose bytes nobody needs.
        unsafe { mmap_anonymous(self.at(0), len, ProtFlags::READ | ProtFlags::WRITE, flags) }.expect("mmap");
    }

    /// Nobody may write them from now on.
    pub fn protect(&self) {
        // SAFETY: our own pages.
        unsafe { mprotect(self.at(0), self.0.len(), MprotectFlags::READ) }.expect("mprotect");
    }

    pub fn fill(&self, len: usize, seed: u64) {
        self.0.fill(0, len, seed);
    }

    pub fn check(&self, len: usize, seed: u64) -> Outcome {
        self.0.check(0, len, seed)
    }
}

impl Drop for Pages {
    fn drop(&mut self) {
        // As malloc gave them.
        self.map_again();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pattern_is_found_again_and_a_wrong_byte_too() {
        let buffer = Buffer::new(1000);
        buffer.fill(3, 777, 42);
        assert_eq!(buffer.check(3, 777, 42), Ok(()));
        assert!(buffer.check(3, 777, 43).is_err());
        buffer.fill(779, 1, 1);
        assert!(buffer.check(3, 777, 42).is_err(), "the last byte counts");
    }
}
