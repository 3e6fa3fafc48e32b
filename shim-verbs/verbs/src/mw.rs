//! Memory windows.

use crate::convert;
use crate::guard::{self, EINVAL, Errno, Result};
use crate::object::{Object, next_handle};
use crate::pd::Pd;
use crate::qp::Qp;
use freeflow_core::client::{self, SendWr};
use freeflow_core::exec::{Request, Target};
use freeflow_core::verbs::{MwType, QpType, SendFlags, SendOp};
use freeflow_verbs_abi::*;
use std::ffi::c_int;
use std::sync::Arc;

/// What the program owns of an rkey: its last byte.
const TAG: u32 = 0xff;

pub struct Rust {
    core: Arc<client::Mw>,
}

pub type Mw = Object<ibv_mw, Rust>;

/// Behind the inline ibv_alloc_mw.
pub unsafe extern "C" fn alloc(pd: *mut ibv_pd, kind: ibv_mw_type) -> *mut ibv_mw {
    guard::pointer(|| {
        // SAFETY: called through a live PD.
        let domain = unsafe { Pd::of(pd) };
        let core = domain.rust.core.alloc_mw(MwType::try_from(kind).map_err(|_| EINVAL)?)?;
        domain.rust.users.add();
        // SAFETY: a field of a live C structure.
        let context = unsafe { (*pd).context };
        let mw = ibv_mw { context, pd, rkey: core.key(), handle: next_handle(), type_: kind };
        Ok(Mw::alloc(mw, Rust { core }))
    })
}

/// Behind the inline ibv_dealloc_mw: a window that is bound is invalidated first.
pub unsafe extern "C" fn dealloc(mw: *mut ibv_mw) -> c_int {
    guard::code(|| {
        // SAFETY: the live C structure.
        let pd = unsafe { (*mw).pd };
        // SAFETY: the C API forbids any use after this.
        unsafe { Mw::free(mw) };
        // SAFETY: a window keeps its PD alive.
        unsafe { Pd::of(pd) }.rust.users.sub();
        Ok(())
    })
}

/// Behind the inline ibv_bind_mw, which is for windows of type 1: a request whose new rkey is the library's to choose.
pub unsafe extern "C" fn bind(qp: *mut ibv_qp, mw: *mut ibv_mw, bind: *mut ibv_mw_bind) -> c_int {
    guard::code(|| {
        // SAFETY: called with the program's own live objects.
        let before = unsafe { mw.as_ref() }.ok_or(EINVAL)?.rkey;
        // SAFETY: as above.
        let args = unsafe { bind.as_ref() }.ok_or(EINVAL)?;
        // SAFETY: called through a live QP.
        let queue = unsafe { Qp::of(qp) };
        let rkey = (before & !TAG) | (before.wrapping_add(1) & TAG);
        // SAFETY: as above.
        let (target, imm) = unsafe { target(queue, MwType::One, mw, rkey, &args.bind_info) }?;
        let flags = SendFlags::from_bits(args.send_flags).ok_or(EINVAL)?;
        let request = Request { op: SendOp::BindMw, flags, imm, target, srqn: 0, sges: &[] };
        queue.rust.core.post_send(&SendWr { wr_id: args.wr_id, request })?;
        // SAFETY: a field of the live C structure.
        unsafe { (*mw).rkey = rkey };
        Ok(())
    })
}

/// A bind as core takes it: its target, and the rights where the immediate would be.
///
/// # Safety
/// `mw` is a live window or NULL, and `info` names a live MR or NULL.
pub unsafe fn target(
    qp: &Qp,
    kind: MwType,
    mw: *mut ibv_mw,
    rkey: u32,
    info: &ibv_mw_bind_info,
) -> Result<(Target, u32)> {
    // SAFETY: the caller's promise.
    let window = unsafe { mw.as_ref() }.filter(|window| window.type_ == kind as u32).ok_or(EINVAL)?;
    // SAFETY: the caller's promise.
    let mr = unsafe { info.mr.as_ref() };
    if qp.rust.kind == QpType::Ud || (mr.is_none() && info.length > 0) {
        return Err(EINVAL);
    }
    // SAFETY: a window keeps its PD alive.
    let own = &unsafe { Pd::of(window.pd) }.rust.core;
    // SAFETY: a region keeps its PD alive.
    if mr.is_some_and(|mr| !Arc::ptr_eq(own, &unsafe { Pd::of(mr.pd) }.rust.core)) {
        return Err(Errno(libc::EPERM));
    }
    let access = convert::region_access(info.mw_access_flags)?;
    // SAFETY: the live window.
    let key = unsafe { Mw::of(mw) }.rust.core.key();
    let (rkey, mr) = ((key & !TAG) | (rkey & TAG), mr.map_or(0, |mr| mr.lkey));
    Ok((Target::Bind { rkey, mr, addr: info.addr, len: info.length }, access.bits()))
}
