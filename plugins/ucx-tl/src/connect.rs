//! Queue pairs as the transport uses them: their attributes on the way to RTS.

use std::sync::Arc;

use freeflow_core::client::{Cq, Pd, Qp, QpInit};
use freeflow_core::error::Result;
use freeflow_core::verbs::{Access, AhAttr, Gid, QpAttr, QpAttrMask as Mask, QpCaps, QpState, QpType};

use crate::wire::QKEY;

/// Receives whose address has not come wait for it here; senders are told by rnr_retry 7 to wait for ever.
const RNR_TIMER_10_US: u8 = 1;
const RNR_FOR_EVER: u8 = 7;
/// 4.096 us * 2^18, some 1.1 s, eight times over: then the peer is gone.
const TIMEOUT: u8 = 18;
const RETRIES: u8 = 7;
const MTU_4096: u32 = 5;
const RD_ATOMIC: u8 = 16;

/// A queue pair in INIT: it takes receives already.
pub fn make_rc(pd: &Arc<Pd>, cq: &Arc<Cq>, send: u32, recv: u32) -> Result<Arc<Qp>> {
    let caps = QpCaps {
        max_send_wr: send,
        max_recv_wr: recv,
        max_send_sge: 2,
        max_recv_sge: 1,
        max_inline_data: 64,
    };
    let qp = make(pd, cq, QpType::Rc, caps)?;
    let init = QpAttr {
        qp_state: QpState::Init,
        port_num: 1,
        access: Access::REMOTE | Access::LOCAL_WRITE,
        ..QpAttr::default()
    };
    qp.modify(&init, Mask::STATE | Mask::PKEY_INDEX | Mask::PORT | Mask::ACCESS_FLAGS)?;
    Ok(qp)
}

fn make(pd: &Arc<Pd>, cq: &Arc<Cq>, kind: QpType, caps: QpCaps) -> Result<Arc<Qp>> {
    let (send_cq, recv_cq) = (Arc::clone(cq), Arc::clone(cq));
    pd.create_qp(QpInit { kind, send_cq, recv_cq, caps, sq_sig_all: false, receives: None, cookie: 0 })
}

/// Connects it; from now on it sends and serves.
pub fn connect_rc(qp: &Arc<Qp>, dgid: Gid, dest_qpn: u32) -> Result<()> {
    let rtr = QpAttr {
        qp_state: QpState::Rtr,
        path_mtu: MTU_4096,
        dest_qpn,
        ah: AhAttr { dgid, port_num: 1, is_global: true, hop_limit: 64, ..AhAttr::default() },
        max_dest_rd_atomic: RD_ATOMIC,
        min_rnr_timer: RNR_TIMER_10_US,
        ..QpAttr::default()
    };
    let mask = Mask::AV | Mask::PATH_MTU | Mask::DEST_QPN | Mask::RQ_PSN;
    qp.modify(&rtr, Mask::STATE | mask | Mask::MAX_DEST_RD_ATOMIC | Mask::MIN_RNR_TIMER)?;
    let rts = QpAttr {
        qp_state: QpState::Rts,
        timeout: TIMEOUT,
        retry_cnt: RETRIES,
        rnr_retry: RNR_FOR_EVER,
        max_rd_atomic: RD_ATOMIC,
        ..QpAttr::default()
    };
    let mask = Mask::SQ_PSN | Mask::TIMEOUT | Mask::RETRY_CNT | Mask::RNR_RETRY | Mask::MAX_QP_RD_ATOMIC;
    qp.modify(&rts, Mask::STATE | mask)
}

/// A datagram queue pair, ready.
pub fn make_ud(pd: &Arc<Pd>, cq: &Arc<Cq>, depth: u32) -> Result<Arc<Qp>> {
    let caps = QpCaps {
        max_send_wr: depth,
        max_recv_wr: depth,
        max_send_sge: 1,
        max_recv_sge: 1,
        max_inline_data: 256,
    };
    let qp = make(pd, cq, QpType::Ud, caps)?;
    let to = |qp_state| QpAttr { qp_state, port_num: 1, qkey: QKEY, ..QpAttr::default() };
    qp.modify(&to(QpState::Init), Mask::STATE | Mask::PKEY_INDEX | Mask::PORT | Mask::QKEY)?;
    qp.modify(&to(QpState::Rtr), Mask::STATE)?;
    qp.modify(&to(QpState::Rts), Mask::STATE | Mask::SQ_PSN)?;
    Ok(qp)
}
