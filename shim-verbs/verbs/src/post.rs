//! The fast path: post_send, post_recv, poll_cq and req_notify_cq, reached through the context's table.
//!
//! Nothing here allocates, locks or makes a system call of its own, and nothing may panic: lists are passed on as slices
//! of the program's own structures, completions are written where the program wants them.

use crate::ah::Ah;
use crate::cq::Cq;
use crate::guard::{EINVAL, EOPNOTSUPP, Errno, Result};
use crate::mw;
use crate::qp::Qp;
use freeflow_core::client::SendWr;
use freeflow_core::exec::{Request, Target, UdDest};
use freeflow_core::verbs::{AhAttr, MwType, QpType, SendFlags, SendOp, Sge, Wc};
use freeflow_verbs_abi::*;
use std::ffi::c_int;
use std::ptr;

/// A request's scatter/gather list; both sides have one layout (asserted in convert.rs).
///
/// # Safety
/// `list` points to `count` entries, as the C API demands.
pub unsafe fn sges<'a>(list: *const ibv_sge, count: c_int, max: u32) -> Result<&'a [Sge]> {
    let count = u32::try_from(count).ok().filter(|c| *c <= max).ok_or(EINVAL)?;
    if count == 0 {
        return Ok(&[]);
    }
    // SAFETY: the caller's promise; ibv_sge and Sge have one layout.
    Ok(unsafe { std::slice::from_raw_parts(list.cast(), count as usize) })
}

/// The remote side of a request on a connected QP.
///
/// # Safety
/// The union holds what the opcode says.
unsafe fn target(op: SendOp, wr: &ibv_send_wr) -> Target {
    if op.is_atomic() {
        // SAFETY: the caller's promise; any bytes are valid integers.
        let a = unsafe { wr.wr.atomic };
        return Target::Atomic {
            addr: a.remote_addr,
            rkey: a.rkey,
            compare_add: a.compare_add,
            swap: a.swap,
        };
    }
    if op.is_send() {
        return Target::Receive;
    }
    if op == SendOp::LocalInv {
        // SAFETY: any four bytes are a key.
        return Target::Invalidate { rkey: unsafe { wr.__bindgen_anon_1.invalidate_rkey } };
    }
    // SAFETY: as above.
    let rdma = unsafe { wr.wr.rdma };
    Target::Memory { addr: rdma.remote_addr, rkey: rdma.rkey }
}

/// Where a request on a UD QP goes.
///
/// # Safety
/// The union holds the address of a live AH of this library, or NULL.
unsafe fn datagram(op: SendOp, wr: &ibv_send_wr) -> Result<Target> {
    // SAFETY: the caller's promise; any bytes are valid integers.
    let ud = unsafe { wr.wr.ud };
    if ud.ah.is_null() || !matches!(op, SendOp::Send | SendOp::SendImm) {
        return Err(EINVAL);
    }
    // SAFETY: the caller's promise.
    Ok(datagram_to(unsafe { Ah::of(ud.ah) }, ud.remote_qpn, ud.remote_qkey))
}

/// The address of a datagram.
pub fn datagram_to(ah: &Ah, qpn: u32, qkey: u32) -> Target {
    let AhAttr { dgid, traffic_class, hop_limit, .. } = ah.rust.core.attr;
    Target::Datagram(UdDest { dgid, qpn, qkey, traffic_class, hop_limit })
}

/// Posts one request.
///
/// # Safety
/// `wr` is as the C API demands: live lists, and a union as its opcode says.
unsafe fn send_one(qp: &Qp, wr: &ibv_send_wr) -> Result<()> {
    let op = match wr.opcode {
        WR_FLUSH => return Err(unbuilt(WR_FLUSH)), // `ibv_send_wr` has no place for its range: ibv_wr_flush posts it
        other => SendOp::try_from(other).map_err(unbuilt)?,
    };
    if op == SendOp::BindMw {
        // SAFETY: the caller's promise.
        return unsafe { bind_one(qp, wr) };
    }
    let target = match qp.rust.kind {
        // SAFETY: the caller's promise.
        QpType::Ud => unsafe { datagram(op, wr) }?,
        // SAFETY: the caller's promise.
        QpType::Rc | QpType::Uc | QpType::XrcSend => unsafe { target(op, wr) },
        QpType::XrcRecv => return Err(EINVAL),
    };
    // SAFETY: the caller's promise.
    let sges = unsafe { sges(wr.sg_list, wr.num_sge, qp.rust.caps.max_send_sge) }?;
    // SAFETY: any four bytes are an immediate.
    let imm = unsafe { wr.__bindgen_anon_1.imm_data };
    let flags = SendFlags::from_bits(wr.send_flags).ok_or(EINVAL)?;
    let srqn = match qp.rust.kind {
        // SAFETY: any four bytes are a number.
        QpType::XrcSend => unsafe { wr.qp_type.xrc.remote_srqn },
        _ => 0,
    };
    let request = Request { op, flags, imm, target, srqn, sges };
    Ok(qp.rust.core.post_send(&SendWr { wr_id: wr.wr_id, request })?)
}

/// Opcodes that the C API has, and this function does not.
#[cold]
fn unbuilt(opcode: ibv_wr_opcode) -> Errno {
    if matches!(opcode, IBV_WR_TSO | IBV_WR_DRIVER1 | WR_FLUSH) { EOPNOTSUPP } else { EINVAL }
}

/// Posts a request that binds a window of type 2.
///
/// # Safety
/// As for [`send_one`].
#[cold]
unsafe fn bind_one(qp: &Qp, wr: &ibv_send_wr) -> Result<()> {
    // SAFETY: the caller's promise; any bytes are valid integers and pointers.
    let bind = unsafe { wr.__bindgen_anon_2.bind_mw };
    // SAFETY: the caller's promise.
    let (target, imm) = unsafe { mw::target(qp, MwType::Two, bind.mw, bind.rkey, &bind.bind_info) }?;
    let flags = SendFlags::from_bits(wr.send_flags).ok_or(EINVAL)?;
    let request = Request { op: SendOp::BindMw, flags, imm, target, srqn: 0, sges: &[] };
    Ok(qp.rust.core.post_send(&SendWr { wr_id: wr.wr_id, request })?)
}

/// Posts a list; stops at the first request that is refused and tells which.
pub unsafe extern "C" fn post_send(
    qp: *mut ibv_qp,
    wr: *mut ibv_send_wr,
    bad_wr: *mut *mut ibv_send_wr,
) -> c_int {
    // SAFETY: called through a live QP, as the C API demands.
    let qp = unsafe { Qp::of(qp) };
    let mut next = wr;
    // SAFETY: the program passes a NULL-terminated list.
    while let Some(request) = unsafe { next.as_ref() } {
        // SAFETY: as above.
        if let Err(Errno(error)) = unsafe { send_one(qp, request) } {
            // SAFETY: the program passes a place for the first request that was not posted.
            unsafe { bad_wr.write(next) };
            return error;
        }
        next = request.next;
    }
    0
}

/// # Safety
/// As for [`post_send`].
pub unsafe extern "C" fn post_recv(
    qp: *mut ibv_qp,
    wr: *mut ibv_recv_wr,
    bad_wr: *mut *mut ibv_recv_wr,
) -> c_int {
    // SAFETY: called through a live QP, as the C API demands.
    let qp = unsafe { Qp::of(qp) };
    let mut next = wr;
    // SAFETY: the program passes a NULL-terminated list.
    while let Some(request) = unsafe { next.as_ref() } {
        // SAFETY: as above.
        let list = unsafe { sges(request.sg_list, request.num_sge, qp.rust.caps.max_recv_sge) };
        let posted = list.and_then(|l| Ok(qp.rust.core.post_recv(request.wr_id, l)?));
        if let Err(Errno(error)) = posted {
            // SAFETY: the program passes a place for the first request that was not posted.
            unsafe { bad_wr.write(next) };
            return error;
        }
        next = request.next;
    }
    0
}

pub unsafe extern "C" fn poll_cq(cq: *mut ibv_cq, count: c_int, wc: *mut ibv_wc) -> c_int {
    let Ok(count @ 1..) = usize::try_from(count) else {
        return if count == 0 { 0 } else { -libc::EINVAL };
    };
    // SAFETY: the program passes room for that many; ibv_wc and Wc have one layout and any bytes are a valid Wc.
    let room = unsafe { &mut *ptr::slice_from_raw_parts_mut(wc.cast::<Wc>(), count) };
    // SAFETY: called through a live CQ, as the C API demands.
    unsafe { Cq::of(cq) }.rust.core.poll(room) as c_int
}

pub unsafe extern "C" fn req_notify_cq(cq: *mut ibv_cq, solicited_only: c_int) -> c_int {
    // SAFETY: called through a live CQ, as the C API demands.
    unsafe { Cq::of(cq) }.rust.core.arm(solicited_only != 0);
    0
}
