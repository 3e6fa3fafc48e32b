//! loom's atomics, and a way to take their strength away: a model that still passes without an ordering proves nothing
//! about it.

use std::cell::Cell;

pub use loom::sync::atomic::Ordering;
use loom::sync::atomic::{self, fence as strong_fence};

/// What the atomics and fences of the models of this thread lack.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Lack {
    Nothing,
    /// Release stores, and the releasing half of what does both.
    Release,
    /// Acquire loads, and the acquiring half.
    Acquire,
    Fences,
    /// The acquiring half and fences, where either is enough.
    AcquireAndFences,
    /// A compare-and-swap is a look and a store.
    Swaps,
}

thread_local! {
    // A model's threads are all run by the thread that checks it.
    static LACK: Cell<Lack> = const { Cell::new(Lack::Nothing) };
}

/// From now on, in this thread.
pub fn lack(what: Lack) {
    LACK.set(what);
}

fn left_of(ordering: Ordering) -> Ordering {
    match (LACK.get(), ordering) {
        (Lack::Release, Ordering::Release) => Ordering::Relaxed,
        (Lack::Release, Ordering::AcqRel) => Ordering::Acquire,
        (Lack::Acquire | Lack::AcquireAndFences, Ordering::Acquire) => Ordering::Relaxed,
        (Lack::Acquire | Lack::AcquireAndFences, Ordering::AcqRel) => Ordering::Release,
        _ => ordering,
    }
}

pub fn fence(ordering: Ordering) {
    if !matches!(LACK.get(), Lack::Fences | Lack::AcquireAndFences) {
        strong_fence(ordering);
    }
}

macro_rules! atomics {
    ($($name:ident $value:ty;)*) => { $(
        #[derive(Debug, Default)]
        pub struct $name(atomic::$name);

        impl $name {
            pub fn new(value: $value) -> Self {
                Self(atomic::$name::new(value))
            }

            pub fn load(&self, ordering: Ordering) -> $value {
                self.0.load(left_of(ordering))
            }

            pub fn store(&self, value: $value, ordering: Ordering) {
                self.0.store(value, left_of(ordering));
            }

            pub fn swap(&self, value: $value, ordering: Ordering) -> $value {
                self.0.swap(value, left_of(ordering))
            }

            pub fn compare_exchange(
                &self,
                old: $value,
                new: $value,
                success: Ordering,
                failure: Ordering,
            ) -> Result<$value, $value> {
                if LACK.get() != Lack::Swaps {
                    return self.0.compare_exchange(old, new, left_of(success), left_of(failure));
                }
                let seen = self.0.load(Ordering::Acquire);
                if seen != old {
                    return Err(seen);
                }
                self.0.store(new, Ordering::Release);
                Ok(old)
            }

            pub fn compare_exchange_weak(
                &self,
                old: $value,
                new: $value,
                success: Ordering,
                failure: Ordering,
            ) -> Result<$value, $value> {
                self.compare_exchange(old, new, success, failure)
            }
        }
    )* };
}

macro_rules! arithmetic {
    ($($name:ident $value:ty;)*) => { $(
        impl $name {
            pub fn fetch_add(&self, value: $value, ordering: Ordering) -> $value {
                self.0.fetch_add(value, left_of(ordering))
            }

            pub fn fetch_or(&self, value: $value, ordering: Ordering) -> $value {
                self.0.fetch_or(value, left_of(ordering))
            }

            pub fn fetch_and(&self, value: $value, ordering: Ordering) -> $value {
                self.0.fetch_and(value, left_of(ordering))
            }
        }
    )* };
}

atomics! {
    AtomicBool bool;
    AtomicU32 u32;
    AtomicU64 u64;
    AtomicUsize usize;
}

arithmetic! {
    AtomicU32 u32;
    AtomicU64 u64;
    AtomicUsize usize;
}
