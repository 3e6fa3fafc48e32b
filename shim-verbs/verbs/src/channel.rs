//! Completion channels and their events.

use crate::context::Context;
use crate::cq::Cq;
use crate::guard::{self, EBUSY, Errno, Result};
use crate::object::{Live, Object};
use crate::signals;
use freeflow_core::client;
use freeflow_verbs_abi::*;
use std::ffi::{c_int, c_uint, c_void};
use std::os::fd::AsRawFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicI32, Ordering};

pub struct Rust {
    pub core: Arc<client::Channel>,
    live: Arc<Live>,
}

pub type Channel = Object<ibv_comp_channel, Rust>;

/// # Safety
/// `context` is a live context of this library.
pub unsafe extern "C" fn ibv_create_comp_channel(context: *mut ibv_context) -> *mut ibv_comp_channel {
    guard::pointer(|| {
        // SAFETY: the caller's promise.
        let device = unsafe { &Context::of_ibv(context).rust };
        let core = device.core.create_channel()?;
        let live = Arc::clone(&device.live);
        let fd = core.fd().as_raw_fd();
        Ok(Channel::alloc(ibv_comp_channel { context, fd, refcnt: 0 }, Rust { core, live }))
    })
}

/// # Safety
/// `channel` is a live channel of this library.
pub unsafe extern "C" fn ibv_destroy_comp_channel(channel: *mut ibv_comp_channel) -> c_int {
    guard::code(|| {
        // SAFETY: the caller's promise.
        if unsafe { references(channel) }.load(Ordering::Relaxed) != 0 {
            return Err(EBUSY);
        }
        // SAFETY: the C API forbids any use after this.
        unsafe { Channel::free(channel) };
        Ok(())
    })
}

/// How many CQs a channel serves. Relaxed throughout: a program orders its own creates and destroys.
///
/// # Safety
/// `channel` is a live channel of this library.
pub unsafe fn references<'a>(channel: *mut ibv_comp_channel) -> &'a AtomicI32 {
    // SAFETY: a field of a live C structure.
    let refcnt = unsafe { &raw mut (*channel).refcnt };
    // SAFETY: clients only read it.
    unsafe { AtomicI32::from_ptr(refcnt) }
}

/// Waits for the next event, unless the program made the descriptor non-blocking.
///
/// # Safety
/// All pointers are valid, as the C prototype demands.
pub unsafe extern "C" fn ibv_get_cq_event(
    channel: *mut ibv_comp_channel,
    cq: *mut *mut ibv_cq,
    cq_context: *mut *mut c_void,
) -> c_int {
    guard::number(|| {
        // SAFETY: the caller's promise.
        let which = unsafe { next_event(channel) }?;
        // SAFETY: the caller's promise.
        unsafe { cq.write(which) };
        // SAFETY: a field of a live C structure.
        let user = unsafe { (*which).cq_context };
        // SAFETY: the caller's promise.
        unsafe { cq_context.write(user) };
        Ok(0)
    })
}

/// The next event of a CQ that lives, counted as delivered.
///
/// # Safety
/// `channel` is a live channel of this library.
unsafe fn next_event(channel: *mut ibv_comp_channel) -> Result<*mut ibv_cq> {
    // SAFETY: the caller's promise.
    let rust = unsafe { &Channel::of(channel).rust };
    loop {
        let cookie = match rust.core.next_event().map_err(Errno::from) {
            Err(Errno(libc::EINTR)) if signals::restarts() => continue,
            answer => answer?,
        };
        let cq = cookie as *mut ibv_cq;
        // SAFETY: the cookie is the address of the CQ, which is live while this runs.
        let count = || unsafe { Cq::of(cq) }.rust.comp_events.add();
        if rust.live.with(cookie, count) {
            return Ok(cq);
        }
    }
}

/// # Safety
/// `cq` is a live CQ of this library.
pub unsafe extern "C" fn ibv_ack_cq_events(cq: *mut ibv_cq, nevents: c_uint) {
    // SAFETY: the caller's promise.
    guard::nothing(|| unsafe { Cq::of(cq) }.comp_acks().add(nevents));
}
