//! The edge of the C boundary: turns results into -1 and errno, and stops panics.

use std::ffi::c_int;
use std::panic::{AssertUnwindSafe, catch_unwind};

pub use rustix::io::Errno;

pub type Result<T> = std::result::Result<T, Errno>;

/// The errno that a call of libibverbs (or libc) left behind.
pub fn last_errno() -> Errno {
    // SAFETY: glibc returns the address of the calling thread's own errno.
    let slot = unsafe { libc::__errno_location() };
    // SAFETY: that address is valid and only this thread writes it.
    let value = unsafe { *slot };
    Errno::from_raw_os_error(if value == 0 { libc::EIO } else { value })
}

pub fn set_errno(errno: Errno) {
    // SAFETY: glibc returns the address of the calling thread's own errno.
    let slot = unsafe { libc::__errno_location() };
    // SAFETY: that address is valid and only this thread writes it.
    unsafe { *slot = errno.raw_os_error() };
}

/// A verb that answers with an errno value.
pub fn checked(code: c_int) -> Result<()> {
    match code {
        0 => Ok(()),
        errno => Err(Errno::from_raw_os_error(errno.abs())),
    }
}

/// A bug in this library shows as EIO in its caller; the panic message is on stderr.
fn stop_panic<T>(f: impl FnOnce() -> Result<T>) -> Result<T> {
    catch_unwind(AssertUnwindSafe(f)).unwrap_or(Err(Errno::IO))
}

/// For functions that return 0 or -1.
pub fn code(f: impl FnOnce() -> Result<()>) -> c_int {
    match stop_panic(f) {
        Ok(()) => 0,
        Err(errno) => {
            set_errno(errno);
            -1
        }
    }
}

/// For functions that return a number of bytes or -1.
pub fn count(f: impl FnOnce() -> Result<usize>) -> isize {
    match stop_panic(f) {
        Ok(count) => count as isize,
        Err(errno) => {
            set_errno(errno);
            -1
        }
    }
}

/// For functions that return an object or NULL.
pub fn pointer<T>(f: impl FnOnce() -> Result<*mut T>) -> *mut T {
    stop_panic(f).unwrap_or_else(|errno| {
        set_errno(errno);
        std::ptr::null_mut()
    })
}

/// For functions that return nothing.
pub fn nothing(f: impl FnOnce() -> Result<()>) {
    // There is nobody to tell; a destroy that fails leaks.
    let _ = stop_panic(f);
}
