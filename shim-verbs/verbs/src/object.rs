//! What all verbs objects have in common: a C structure that clients reach into, followed by our own part.
//!
//! Owns allocation of such objects and the C-visible locks and counters in them. Clients hold the address of the C part,
//! which is the address of the whole; the C part is shared with them and only ever touched through raw pointers.

use crate::guard::{EBUSY, Result};
use std::cell::UnsafeCell;
use std::collections::HashSet;
use std::ffi::c_uint;
use std::mem::MaybeUninit;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Mutex, PoisonError};

/// An object as clients see it, `C`, and behind it what they don't, `R`.
#[repr(C)]
pub struct Object<C, R> {
    c: UnsafeCell<C>,
    pub rust: R,
}

impl<C, R> Object<C, R> {
    /// Allocates an object; the address stays valid until [`Object::free`].
    pub fn alloc(c: C, rust: R) -> *mut C {
        Self::reserve().fill(c, rust)
    }

    /// Allocates the place for an object that is still to be made.
    pub fn reserve() -> Reserved<C, R> {
        Reserved(Box::new_uninit())
    }

    /// The object a client's pointer belongs to.
    ///
    /// # Safety
    /// `c` came from [`Object::alloc`] of this very type and was not freed.
    pub unsafe fn of<'a, T>(c: *mut T) -> &'a Self {
        // SAFETY: the caller's promise; #[repr(C)] puts the C part first. Its bytes are in an UnsafeCell.
        unsafe { &*c.cast::<Self>() }
    }

    /// The C part, for reading and writing field by field.
    pub fn c(&self) -> *mut C {
        self.c.get()
    }

    /// Frees the object and drops what is in it.
    ///
    /// # Safety
    /// As for [`Object::of`], and nobody uses the object any more.
    pub unsafe fn free<T>(c: *mut T) {
        // SAFETY: the caller's promise: this is the pointer alloc made.
        drop(unsafe { Box::from_raw(c.cast::<Self>()) });
    }
}

/// The place of an object to be, whose address is known already.
pub struct Reserved<C, R>(Box<MaybeUninit<Object<C, R>>>);

impl<C, R> Reserved<C, R> {
    /// The address the object will have: what core hands back when it reports the object's events.
    pub fn cookie(&self) -> u64 {
        self.0.as_ptr() as u64
    }

    pub fn fill(self, c: C, rust: R) -> *mut C {
        Box::into_raw(Box::write(self.0, Object { c: UnsafeCell::new(c), rust })).cast()
    }
}

/// The lock, condition and counter in a CQ or QP that count the events its program acknowledged.
pub struct Acks {
    pub mutex: *mut libc::pthread_mutex_t,
    pub cond: *mut libc::pthread_cond_t,
    pub completed: *mut u32,
}

impl Acks {
    /// Counts `n` more acknowledged events and wakes a waiting destroy.
    pub fn add(&self, n: c_uint) {
        let _held = Held::lock(self.mutex);
        // SAFETY: the counter is in a live object and the lock is held.
        let completed = unsafe { &mut *self.completed };
        *completed = completed.wrapping_add(n);
        // SAFETY: the condition was initialised with the object.
        unsafe { libc::pthread_cond_signal(self.cond) };
    }

    /// Waits until as many events were acknowledged as were `reported`; no more may be reported meanwhile.
    pub fn wait(&self, reported: &Delivered) {
        let reported = reported.0.load(Ordering::Relaxed);
        let _held = Held::lock(self.mutex);
        // SAFETY: the counter is in a live object and the lock is held.
        while unsafe { self.completed.read_volatile() } != reported {
            // SAFETY: both were initialised with the object, and the lock is held.
            unsafe { libc::pthread_cond_wait(self.cond, self.mutex) };
        }
    }
}

/// How many events of an object its program got. Counted under the lock of [`Live`], and read after the object was taken
/// out of it: that lock orders the two.
#[derive(Default)]
pub struct Delivered(AtomicU32);

impl Delivered {
    pub fn add(&self) {
        self.0.fetch_add(1, Ordering::Relaxed);
    }
}

/// A held pthread mutex of a C structure, released on drop.
pub struct Held(*mut libc::pthread_mutex_t);

impl Held {
    /// Locks a mutex that was initialised with the live object it is in.
    pub fn lock(mutex: *mut libc::pthread_mutex_t) -> Self {
        // SAFETY: callers pass the mutex of a live object.
        unsafe { libc::pthread_mutex_lock(mutex) };
        Self(mutex)
    }

    /// Takes charge of a mutex this thread locked earlier.
    pub fn adopt(mutex: *mut libc::pthread_mutex_t) -> Self {
        Self(mutex)
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        // SAFETY: this thread locked it.
        unsafe { libc::pthread_mutex_unlock(self.0) };
    }
}

/// Numbers for the `handle` fields, which have no meaning here but to tell objects apart.
pub fn next_handle() -> u32 {
    static NEXT: AtomicU32 = AtomicU32::new(1);
    // Relaxed: only uniqueness counts.
    NEXT.fetch_add(1, Ordering::Relaxed)
}

/// The CQs and QPs of a context that may have events. An event is counted as delivered only while its object is in here,
/// so a destroy, which takes the object out first, knows the final count.
#[derive(Default)]
pub struct Live(Mutex<HashSet<u64>>);

impl Live {
    pub fn insert(&self, cookie: u64) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).insert(cookie);
    }

    pub fn remove(&self, cookie: u64) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).remove(&cookie);
    }

    /// Runs `count` if the object lives; false if it was destroyed since its event.
    pub fn with(&self, cookie: u64, count: impl FnOnce()) -> bool {
        let live = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let found = live.contains(&cookie);
        if found {
            count();
        }
        found
    }
}

/// How many objects were made from this one; an object in use cannot be destroyed.
#[derive(Default)]
pub struct Users(AtomicU32);

impl Users {
    // Relaxed: the counts only serve programs that order their own creates and destroys.
    pub fn add(&self) {
        self.0.fetch_add(1, Ordering::Relaxed);
    }

    pub fn sub(&self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }

    /// EBUSY while there are users.
    pub fn check_none(&self) -> Result<()> {
        if self.0.load(Ordering::Relaxed) == 0 { Ok(()) } else { Err(EBUSY) }
    }
}
