//! Functions behind exported symbols that have no implementation: the documented error, never success.
//!
//! They take no arguments whatever their C prototype says, which the C calling convention allows.

use crate::guard::{EOPNOTSUPP, set_errno};
use std::ffi::{c_int, c_void};

pub extern "C" fn int() -> c_int {
    set_errno(EOPNOTSUPP);
    EOPNOTSUPP.0
}

pub extern "C" fn minus() -> c_int {
    set_errno(EOPNOTSUPP);
    -1
}

pub extern "C" fn ptr() -> *mut c_void {
    set_errno(EOPNOTSUPP);
    std::ptr::null_mut()
}

pub extern "C" fn void() {}
