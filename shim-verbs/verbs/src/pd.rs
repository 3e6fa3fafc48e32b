//! Protection domains.

use crate::context::Context;
use crate::guard;
use crate::object::{Live, Object, Users, next_handle};
use freeflow_core::client;
use freeflow_verbs_abi::*;
use std::ffi::c_int;
use std::sync::Arc;

pub struct Rust {
    pub core: Arc<client::Pd>,
    /// MRs, QPs and AHs.
    pub users: Users,
    /// Where QPs of this PD are entered.
    pub live: Arc<Live>,
}

pub type Pd = Object<ibv_pd, Rust>;

/// # Safety
/// `context` is a live context of this library.
pub unsafe extern "C" fn ibv_alloc_pd(context: *mut ibv_context) -> *mut ibv_pd {
    guard::pointer(|| {
        // SAFETY: the caller's promise.
        let device = unsafe { &Context::of_ibv(context).rust };
        let core = device.core.alloc_pd()?;
        let live = Arc::clone(&device.live);
        Ok(Pd::alloc(ibv_pd { context, handle: next_handle() }, Rust { core, users: Users::default(), live }))
    })
}

/// # Safety
/// `pd` is a live PD of this library.
pub unsafe extern "C" fn ibv_dealloc_pd(pd: *mut ibv_pd) -> c_int {
    guard::code(|| {
        // SAFETY: the caller's promise.
        unsafe { Pd::of(pd) }.rust.users.check_none()?;
        // SAFETY: the C API forbids any use after this.
        unsafe { Pd::free(pd) };
        Ok(())
    })
}
