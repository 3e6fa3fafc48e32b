//! madvise(2) in front of the C library's: memory whose pages moved for a registration must read zero after
//! MADV_DONTNEED, like the private memory the program takes it for.
//!
//! Exported without a version, so that it stands in for the C library's wherever this library is searched first (as
//! with LD_PRELOAD, or when the program itself is linked with libibverbs).

use crate::guard::set_errno;
use freeflow_core::client::mem::madvise_moved;
use std::ffi::{c_int, c_void};

/// # Safety
/// As for madvise(2).
#[unsafe(no_mangle)]
pub unsafe extern "C" fn madvise(addr: *mut c_void, len: usize, advice: c_int) -> c_int {
    // SAFETY: the program asked for it.
    match unsafe { madvise_moved(addr as u64, len as u64, advice) } {
        // SAFETY: the system call the program made.
        None => unsafe { libc::syscall(libc::SYS_madvise, addr, len, advice) as c_int },
        Some(Ok(())) => 0,
        Some(Err(errno)) => {
            set_errno(errno.into());
            -1
        }
    }
}
