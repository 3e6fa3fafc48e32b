//! Multicast groups of UD queue pairs.

use crate::guard::{self, EINVAL};
use crate::qp::Qp;
use freeflow_core::verbs::{Gid, QpType};
use freeflow_verbs_abi::*;
use std::ffi::c_int;
use std::sync::PoisonError;

fn group(gid: &ibv_gid) -> Gid {
    // SAFETY: every bit pattern is a GID's.
    Gid(unsafe { gid.raw })
}

/// Attaching twice is attaching once, as with every kernel's device.
///
/// # Safety
/// `qp` is a live QP of this library and `gid` points to a GID.
pub unsafe extern "C" fn ibv_attach_mcast(qp: *mut ibv_qp, gid: *const ibv_gid, _lid: u16) -> c_int {
    guard::code(|| {
        // SAFETY: the caller's promise.
        let queue = unsafe { Qp::of(qp) };
        // SAFETY: the caller's promise.
        let mgid = group(unsafe { &*gid });
        if queue.rust.kind != QpType::Ud || !mgid.is_multicast() {
            return Err(EINVAL);
        }
        let mut groups = queue.rust.groups.lock().unwrap_or_else(PoisonError::into_inner);
        if !groups.contains(&mgid) {
            queue.rust.core.attach_mcast(mgid)?;
            groups.insert(mgid);
        }
        Ok(())
    })
}

/// # Safety
/// `qp` is a live QP of this library and `gid` points to a GID.
pub unsafe extern "C" fn ibv_detach_mcast(qp: *mut ibv_qp, gid: *const ibv_gid, _lid: u16) -> c_int {
    guard::code(|| {
        // SAFETY: the caller's promise.
        let queue = unsafe { Qp::of(qp) };
        // SAFETY: the caller's promise.
        let mgid = group(unsafe { &*gid });
        let mut groups = queue.rust.groups.lock().unwrap_or_else(PoisonError::into_inner);
        if !groups.remove(&mgid) {
            return Err(EINVAL);
        }
        Ok(queue.rust.core.detach_mcast(mgid)?)
    })
}
