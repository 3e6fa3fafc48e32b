//! The QP transitions that the connection manager makes for its users, with the attributes a RoCE connection gets.

use std::ffi::c_int;

use freeflow_core::ctl::RawGid;
use freeflow_verbs_abi::*;

use crate::device::PORT;
use crate::edge::{self, Errno, Result};
use crate::id::{Id, field};
use crate::verbs::verbs;

/// The address of a peer: its GID from our only one.
pub fn ah_attr(gid: RawGid, tos: u8) -> ibv_ah_attr {
    let grh = ibv_global_route {
        dgid: ibv_gid { raw: gid },
        flow_label: 0,
        sgid_index: 0,
        hop_limit: 64,
        traffic_class: tos,
    };
    // The service level that RoCE derives from the type of service.
    let sl = tos >> 5;
    ibv_ah_attr { grh, dlid: 0, sl, src_path_bits: 0, static_rate: 0, is_global: 1, port_num: PORT }
}

/// Attributes and mask that take the id's QP to `state`.
fn attributes(id: &Id, to: ibv_qp_state) -> Result<(ibv_qp_attr, c_int)> {
    // SAFETY: integers, for which zero is valid.
    let mut attr: ibv_qp_attr = unsafe { std::mem::zeroed() };
    attr.qp_state = to;
    let mask = match (to, id.is_datagram()) {
        (IBV_QPS_INIT, _) => init(id, &mut attr)?,
        (IBV_QPS_RTR, false) => rtr(id, &mut attr)?,
        (IBV_QPS_RTS, false) => rts(id, &mut attr)?,
        (IBV_QPS_RTR, true) => 0,
        (IBV_QPS_RTS, true) => IBV_QP_SQ_PSN,
        _ => return Err(Errno::INVAL),
    };
    Ok((attr, (mask | IBV_QP_STATE) as c_int))
}

fn init(id: &Id, attr: &mut ibv_qp_attr) -> Result<u32> {
    let state = id.state();
    state.attached.ok_or(Errno::INVAL)?;
    attr.port_num = PORT;
    let datagram = field!(id, qp_type) == IBV_QPT_UD;
    if datagram {
        attr.qkey = RDMA_UDP_QKEY;
        return Ok(IBV_QP_PKEY_INDEX | IBV_QP_PORT | IBV_QP_QKEY);
    }
    // Before there is a peer nobody may reach in; with one, as much as both sides agreed on.
    attr.qp_access_flags = match state.peer {
        None => 0,
        Some(_) if state.responder_resources == 0 || field!(id, qp_type) == IBV_QPT_UC => {
            IBV_ACCESS_REMOTE_WRITE
        }
        Some(_) => IBV_ACCESS_REMOTE_WRITE | IBV_ACCESS_REMOTE_READ | IBV_ACCESS_REMOTE_ATOMIC,
    };
    Ok(IBV_QP_PKEY_INDEX | IBV_QP_PORT | IBV_QP_ACCESS_FLAGS)
}

fn rtr(id: &Id, attr: &mut ibv_qp_attr) -> Result<u32> {
    let state = id.state();
    let open = state.attached.ok_or(Errno::INVAL)?;
    let peer = state.peer.ok_or(Errno::INVAL)?;
    attr.path_mtu = open.mtu;
    attr.dest_qp_num = peer.params.qpn;
    attr.rq_psn = peer.params.psn;
    attr.max_dest_rd_atomic = state.responder_resources;
    attr.min_rnr_timer = 0;
    attr.ah_attr = ah_attr(peer.gid, state.tos);
    let serves = match field!(id, qp_type) {
        IBV_QPT_RC | IBV_QPT_XRC_RECV => IBV_QP_MAX_DEST_RD_ATOMIC | IBV_QP_MIN_RNR_TIMER,
        _ => 0,
    };
    Ok(IBV_QP_AV | IBV_QP_PATH_MTU | IBV_QP_DEST_QPN | IBV_QP_RQ_PSN | serves)
}

fn rts(id: &Id, attr: &mut ibv_qp_attr) -> Result<u32> {
    let state = id.state();
    let peer = state.peer.ok_or(Errno::INVAL)?;
    attr.sq_psn = state.psn;
    attr.timeout = state.ack_timeout;
    attr.retry_cnt = state.retry_count;
    // How often we may retry is what the receiver said.
    attr.rnr_retry = peer.params.rnr_retry_count;
    attr.max_rd_atomic = state.initiator_depth;
    let asks = IBV_QP_TIMEOUT | IBV_QP_RETRY_CNT | IBV_QP_RNR_RETRY | IBV_QP_MAX_QP_RD_ATOMIC;
    Ok(IBV_QP_SQ_PSN
        | match field!(id, qp_type) {
            IBV_QPT_UC => 0,
            IBV_QPT_XRC_RECV => IBV_QP_TIMEOUT,
            _ => asks,
        })
}

fn step(id: &Id, qp: *mut ibv_qp, to: ibv_qp_state) -> Result<()> {
    let (mut attr, mask) = attributes(id, to)?;
    verbs()?.modify_qp(qp, &mut attr, mask)
}

/// Makes a new QP able to receive; a datagram one also to send.
pub fn to_init(id: &Id, qp: *mut ibv_qp) -> Result<()> {
    step(id, qp, IBV_QPS_INIT)?;
    if id.is_datagram() {
        step(id, qp, IBV_QPS_RTR)?;
        step(id, qp, IBV_QPS_RTS)?;
    }
    Ok(())
}

/// Connects the id's QP, if it has one, to the peer. INIT comes again: the rights are known now.
pub fn to_rts(id: &Id) -> Result<()> {
    let qp = field!(id, qp);
    if qp.is_null() {
        return Ok(());
    }
    step(id, qp, IBV_QPS_INIT)?;
    step(id, qp, IBV_QPS_RTR)?;
    step(id, qp, IBV_QPS_RTS)
}

/// Ends the id's QP, if it has one: what is posted is flushed.
pub fn to_error(id: &Id) -> Result<()> {
    let qp = field!(id, qp);
    if qp.is_null() {
        return Ok(());
    }
    // SAFETY: integers, for which zero is valid.
    let mut attr: ibv_qp_attr = unsafe { std::mem::zeroed() };
    attr.qp_state = IBV_QPS_ERR;
    verbs()?.modify_qp(qp, &mut attr, IBV_QP_STATE as c_int)
}

pub unsafe extern "C" fn rdma_init_qp_attr(
    id: *mut rdma_cm_id,
    attr: *mut ibv_qp_attr,
    mask: *mut c_int,
) -> c_int {
    edge::code(|| {
        // SAFETY: the program's id.
        let id = unsafe { Id::from_raw(id) }?;
        if attr.is_null() || mask.is_null() {
            return Err(Errno::INVAL);
        }
        // SAFETY: the program's structure, in which it has set the state it wants.
        let to = unsafe { (*attr).qp_state };
        let (filled, bits) = attributes(id, to)?;
        // SAFETY: the program's structure.
        unsafe { attr.write(filled) };
        // SAFETY: the program's int.
        unsafe { mask.write(bits) };
        Ok(())
    })
}
