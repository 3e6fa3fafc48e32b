//! Atomics and fences, loom's when the model checker runs.

pub mod asym;
#[cfg(loom)]
pub mod weak;

#[cfg(not(loom))]
pub use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, AtomicUsize, Ordering, fence};
#[cfg(loom)]
pub use weak::{AtomicBool, AtomicU32, AtomicU64, AtomicUsize, Ordering, fence};

/// A release store with a sequentially consistent fence behind it: no later load is done before the store is seen.
#[inline]
pub fn store_fenced(word: &AtomicU64, value: u64) {
    if cfg!(all(target_arch = "x86_64", not(loom))) {
        // xchg is both there, at half of mfence's price.
        word.swap(value, Ordering::SeqCst);
    } else {
        word.store(value, Ordering::Release);
        fence(Ordering::SeqCst);
    }
}

/// The fence that an exchange is by itself on x86-64, where loads are not done before earlier ones either.
#[inline]
pub fn fence_behind_swap() {
    if cfg!(any(not(target_arch = "x86_64"), loom)) {
        fence(Ordering::SeqCst);
    }
}
