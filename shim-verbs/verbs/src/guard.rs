//! The edge of the C boundary: turns results into what C callers expect, and stops panics.
//!
//! Owns the mapping of errors to errno values (one place for the whole library). Post and poll functions do not come
//! through here: they must not panic, and where they would, `extern "C"` aborts rather than unwinding into C.

use freeflow_core::error::Error;
use std::ffi::c_int;
use std::panic::{AssertUnwindSafe, catch_unwind};

/// An errno value, never zero.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Errno(pub c_int);

pub type Result<T> = std::result::Result<T, Errno>;

pub const EINVAL: Errno = Errno(libc::EINVAL);
pub const EBUSY: Errno = Errno(libc::EBUSY);
pub const ENOMEM: Errno = Errno(libc::ENOMEM);
pub const EOPNOTSUPP: Errno = Errno(libc::EOPNOTSUPP);

impl From<Error> for Errno {
    fn from(error: Error) -> Self {
        Self(error.errno().raw_os_error())
    }
}

impl From<rustix::io::Errno> for Errno {
    fn from(errno: rustix::io::Errno) -> Self {
        Self(errno.raw_os_error())
    }
}

pub fn set_errno(value: Errno) {
    // SAFETY: glibc returns the address of the calling thread's own errno.
    let slot = unsafe { libc::__errno_location() };
    // SAFETY: that address is valid and only this thread writes it.
    unsafe { *slot = value.0 };
}

/// A bug in this library shows as EIO in its caller; the panic message is already on stderr.
fn stop_panic<T>(f: impl FnOnce() -> Result<T>) -> Result<T> {
    catch_unwind(AssertUnwindSafe(f)).unwrap_or(Err(Errno(libc::EIO)))
}

/// For verbs that return 0 or an errno value.
pub fn code(f: impl FnOnce() -> Result<()>) -> c_int {
    match stop_panic(f) {
        Ok(()) => 0,
        Err(e) => {
            set_errno(e);
            e.0
        }
    }
}

/// For verbs that return a number or -1 with errno set.
pub fn number<T: From<i8>>(f: impl FnOnce() -> Result<T>) -> T {
    stop_panic(f).unwrap_or_else(|e| {
        set_errno(e);
        T::from(-1)
    })
}

/// For verbs that return an object or NULL with errno set.
pub fn pointer<T>(f: impl FnOnce() -> Result<*mut T>) -> *mut T {
    stop_panic(f).unwrap_or_else(|e| {
        set_errno(e);
        std::ptr::null_mut()
    })
}

/// For verbs that return nothing.
pub fn nothing(f: impl FnOnce()) {
    let _: Result<()> = stop_panic(|| {
        f();
        Ok(())
    });
}
