//! The context: what an open device is to a client, with the tables its inline functions call through.

use crate::guard;
use crate::imports::Exports;
use crate::object::{Live, Object};
use crate::{cq, device, dm, mr, mw, pd, post, qp, query, srq, unsupported, xrc};
use freeflow_core::client;
use freeflow_verbs_abi::*;
use std::ffi::{c_int, c_void};
use std::mem::{size_of, zeroed};
use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::Arc;

/// What stands behind a `verbs_context`.
pub struct Rust {
    pub core: Arc<client::Context>,
    pub live: Arc<Live>,
    pub exports: Arc<Exports>,
    /// XRC domains that files name.
    pub domains: xrc::Domains,
    /// Names the device for import; the program has its number.
    _cmd_fd: OwnedFd,
}

pub type Context = Object<verbs_context, Rust>;

impl Context {
    /// The context a client's `ibv_context` is the end of.
    ///
    /// # Safety
    /// `context` came from [`create`] and was not freed.
    pub unsafe fn of_ibv<'a>(context: *mut ibv_context) -> &'a Self {
        // SAFETY: create() hands out addresses this far into a verbs_context.
        let whole = unsafe { context.byte_sub(CONTEXT_OFFSET) };
        // SAFETY: the caller's promise.
        unsafe { Self::of(whole) }
    }
}

/// Makes the C side of an open device.
pub fn create(
    device: *mut ibv_device,
    core: Arc<client::Context>,
    live: Arc<Live>,
    exports: Arc<Exports>,
    cmd_fd: OwnedFd,
) -> *mut ibv_context {
    // SAFETY: integers, nullable pointers and functions: all zeroes is a valid verbs_context.
    let mut verbs: verbs_context = unsafe { zeroed() };
    verbs.sz = size_of::<verbs_context>();
    verbs.query_port = Some(query::port_ex);
    verbs.query_device_ex = Some(query::device_ex);
    verbs.create_cq_ex = Some(cq::create_ex);
    verbs.create_qp_ex = Some(qp::create_ex);
    verbs.create_srq_ex = Some(srq::create_ex);
    verbs.get_srq_num = Some(srq::number);
    verbs.open_xrcd = Some(xrc::open_xrcd);
    verbs.close_xrcd = Some(xrc::close_xrcd);
    verbs.open_qp = Some(qp::open);
    verbs.modify_cq = Some(cq::modify);
    verbs.query_rt_values = Some(query::rt_values);
    verbs.advise_mr = Some(mr::advise);
    verbs.alloc_null_mr = Some(mr::alloc_null);
    verbs.alloc_td = Some(pd::alloc_td);
    verbs.dealloc_td = Some(pd::dealloc_td);
    verbs.alloc_parent_domain = Some(pd::alloc_parent_domain);
    verbs.alloc_dm = Some(dm::alloc);
    verbs.free_dm = Some(dm::free);
    verbs.reg_dm_mr = Some(dm::register);
    let context = &mut verbs.context;
    context.device = device;
    context.ops = operations();
    context.cmd_fd = cmd_fd.as_raw_fd();
    context.async_fd = core.async_fd().as_raw_fd();
    context.num_comp_vectors = 1;
    context.mutex = libc::PTHREAD_MUTEX_INITIALIZER;
    context.abi_compat = VERBS_ABI_IS_EXTENDED;
    let whole = Context::alloc(
        verbs,
        Rust { core, live, exports, domains: xrc::Domains::default(), _cmd_fd: cmd_fd },
    );
    // SAFETY: the ibv_context is this far into it.
    unsafe { whole.byte_add(CONTEXT_OFFSET) }.cast()
}

/// Every slot is filled: clients call most of them without looking.
fn operations() -> ibv_context_ops {
    let gone: Option<unsafe extern "C" fn() -> *mut c_void> = Some(no_compat);
    ibv_context_ops {
        _compat_query_device: Some(query::ibv_query_device),
        _compat_query_port: Some(query::ibv_query_port),
        poll_cq: Some(post::poll_cq),
        req_notify_cq: Some(post::req_notify_cq),
        post_send: Some(post::post_send),
        post_recv: Some(post::post_recv),
        post_srq_recv: Some(srq::post_recv),
        alloc_mw: Some(mw::alloc),
        bind_mw: Some(mw::bind),
        dealloc_mw: Some(mw::dealloc),
        _compat_alloc_pd: gone,
        _compat_dealloc_pd: gone,
        _compat_reg_mr: gone,
        _compat_rereg_mr: gone,
        _compat_dereg_mr: gone,
        _compat_create_cq: gone,
        _compat_cq_event: gone,
        _compat_resize_cq: gone,
        _compat_destroy_cq: gone,
        _compat_create_srq: gone,
        _compat_modify_srq: gone,
        _compat_query_srq: gone,
        _compat_destroy_srq: gone,
        _compat_create_qp: gone,
        _compat_query_qp: gone,
        _compat_modify_qp: gone,
        _compat_destroy_qp: gone,
        _compat_create_ah: gone,
        _compat_destroy_ah: gone,
        _compat_attach_mcast: gone,
        _compat_detach_mcast: gone,
        _compat_async_event: gone,
    }
}

unsafe extern "C" fn no_compat() -> *mut c_void {
    unsupported::ptr()
}

/// Closes the device; ours is the only reference to core's side unless objects are left, which go with the process.
///
/// # Safety
/// `context` is a live context of this library.
pub unsafe extern "C" fn ibv_close_device(context: *mut ibv_context) -> c_int {
    guard::code(|| {
        // SAFETY: the address create() made, taken back.
        let whole = unsafe { context.byte_sub(CONTEXT_OFFSET) };
        // SAFETY: a field of a live C structure.
        let device = unsafe { (*context).device };
        // SAFETY: the C API forbids any use after this.
        unsafe { Context::free(whole) };
        // SAFETY: the context held a reference.
        unsafe { device::release(device) };
        Ok(())
    })
}

/// Core's side of a client's context.
///
/// # Safety
/// As for [`Context::of_ibv`].
pub unsafe fn core<'a>(context: *mut ibv_context) -> &'a Arc<client::Context> {
    // SAFETY: the caller's promise.
    unsafe { &Context::of_ibv(context).rust.core }
}
