//! The fork interface: forking is always safe here (core gives a child private copies of registered memory), so there is
//! nothing to switch on and nothing to mark.

use freeflow_verbs_abi::{IBV_FORK_UNNEEDED, ibv_fork_status};
use std::ffi::{c_int, c_void};

pub extern "C" fn ibv_fork_init() -> c_int {
    0
}

pub extern "C" fn ibv_is_fork_initialized() -> ibv_fork_status {
    IBV_FORK_UNNEEDED
}

pub extern "C" fn ibv_dontfork_range(_base: *mut c_void, _size: usize) -> c_int {
    0
}

pub extern "C" fn ibv_dofork_range(_base: *mut c_void, _size: usize) -> c_int {
    0
}
