//! Atomics and fences, loom's when the model checker runs.

#[cfg(loom)]
pub mod weak;

#[cfg(not(loom))]
pub use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, AtomicUsize, Ordering, fence};
#[cfg(loom)]
pub use weak::{AtomicBool, AtomicU32, AtomicU64, AtomicUsize, Ordering, fence};
