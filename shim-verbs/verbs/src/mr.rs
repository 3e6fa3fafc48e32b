//! Memory regions.

use crate::convert;
use crate::guard;
use crate::object::Object;
use crate::pd::Pd;
use freeflow_core::client;
use freeflow_verbs_abi::*;
use std::ffi::{c_int, c_uint, c_void};
use std::sync::Arc;

pub struct Rust {
    /// Deregisters when dropped.
    _core: Arc<client::Mr>,
}

pub type Mr = Object<ibv_mr, Rust>;

/// The one registration behind all three functions: a region at `addr` that peers address from `iova` on.
///
/// # Safety
/// `pd` is a live PD of this library, and the program vouches for the memory until it deregisters it.
unsafe fn register(
    pd: *mut ibv_pd,
    addr: *mut c_void,
    length: usize,
    iova: u64,
    access: c_uint,
) -> *mut ibv_mr {
    guard::pointer(|| {
        let access = convert::access(access)?;
        // SAFETY: the caller's promise.
        let domain = unsafe { Pd::of(pd) };
        let core = domain.rust.core.reg_mr(addr as u64, length as u64, iova, access)?;
        domain.rust.users.add();
        // SAFETY: a field of a live C structure.
        let context = unsafe { (*pd).context };
        let key = core.key();
        let mr = ibv_mr { context, pd, addr, length, handle: key, lkey: key, rkey: key };
        Ok(Mr::alloc(mr, Rust { _core: core }))
    })
}

/// # Safety
/// `pd` is a live PD of this library, and the program vouches for the memory until it deregisters it.
pub unsafe extern "C" fn ibv_reg_mr(
    pd: *mut ibv_pd,
    addr: *mut c_void,
    length: usize,
    access: c_int,
) -> *mut ibv_mr {
    // SAFETY: the caller's promise.
    unsafe { register(pd, addr, length, addr as u64, access as c_uint) }
}

/// # Safety
/// As for [`ibv_reg_mr`].
pub unsafe extern "C" fn ibv_reg_mr_iova(
    pd: *mut ibv_pd,
    addr: *mut c_void,
    length: usize,
    iova: u64,
    access: c_int,
) -> *mut ibv_mr {
    // SAFETY: the caller's promise.
    unsafe { register(pd, addr, length, iova, access as c_uint) }
}

/// # Safety
/// As for [`ibv_reg_mr`].
pub unsafe extern "C" fn ibv_reg_mr_iova2(
    pd: *mut ibv_pd,
    addr: *mut c_void,
    length: usize,
    iova: u64,
    access: c_uint,
) -> *mut ibv_mr {
    // SAFETY: the caller's promise.
    unsafe { register(pd, addr, length, iova, access) }
}

/// # Safety
/// `mr` is a live MR of this library.
pub unsafe extern "C" fn ibv_dereg_mr(mr: *mut ibv_mr) -> c_int {
    guard::code(|| {
        // SAFETY: a field of a live C structure.
        let pd = unsafe { (*mr).pd };
        // SAFETY: the C API forbids any use after this.
        unsafe { Mr::free(mr) };
        // SAFETY: an MR keeps its PD alive.
        unsafe { Pd::of(pd) }.rust.users.sub();
        Ok(())
    })
}
