//! The lock of a queue: held for one request, by the one thread that uses the queue, nearly always.
//!
//! Its release is a plain store, which is what it is for: a mutex that can wake a waiter needs a locked instruction there,
//! as dear as all the rest of a small request. Whoever meets it held offers the processor to others until it is free:
//! for one bounded copy, or a question to the router, at most.

pub type Lock<T> = spin::mutex::SpinMutex<T, spin::Yield>;
pub type Guard<'a, T> = spin::mutex::SpinMutexGuard<'a, T, spin::Yield>;
