//! Attributes between C and core: field by field, judged where C allows more than verbs does.

use crate::addr::zeroed_ah_attr;
use crate::guard::{EINVAL, EOPNOTSUPP, Result};
use freeflow_core::verbs::{Access, AhAttr, Gid, QpAttr, QpAttrMask, QpCaps, QpState, Sge, Wc};
use freeflow_verbs_abi::*;
use std::ffi::{c_int, c_uint};
use std::mem::{align_of, offset_of, size_of};

/// Asserts that a structure of core's has the layout of a C one, field by field.
macro_rules! same_layout {
    ($ours:ty, $c:ty { $($field:ident $(= $c_field:ident)?),* $(,)? }) => {
        const _: () = assert!(size_of::<$ours>() == size_of::<$c>() && align_of::<$ours>() == align_of::<$c>());
        $(const _: () = assert!(offset_of!($ours, $field) == same_layout!(@ $c, $field $(, $c_field)?));)*
    };
    (@ $c:ty, $field:ident) => { offset_of!($c, $field) };
    (@ $c:ty, $field:ident, $c_field:ident) => { offset_of!($c, $c_field) };
}

same_layout!(Sge, ibv_sge { addr, length, lkey });
same_layout!(Wc, ibv_wc {
    wr_id, status, opcode, vendor_err, byte_len, imm_data = __bindgen_anon_1, qp_num, src_qp, wc_flags, pkey_index, slid,
    sl, dlid_path_bits,
});

/// Access flags of a QP; unknown optional bits are dropped, as ibv_reg_mr_iova2 promises.
pub fn access(flags: c_uint) -> Result<Access> {
    Access::from_bits(flags & !IB_UVERBS_ACCESS_OPTIONAL_RANGE).ok_or(EINVAL)
}

/// The same of a region or window. No memory here is persistent: EOPNOTSUPP, as Linux says of a device that has none.
pub fn region_access(flags: c_uint) -> Result<Access> {
    let granted = access(flags)?;
    if granted.contains(Access::FLUSH_PERSISTENT) { Err(EOPNOTSUPP) } else { Ok(granted) }
}

pub fn ah_from_c(attr: &ibv_ah_attr) -> AhAttr {
    AhAttr {
        // SAFETY: every bit pattern is a GID's.
        dgid: Gid(unsafe { attr.grh.dgid.raw }),
        sgid_index: attr.grh.sgid_index,
        hop_limit: attr.grh.hop_limit,
        traffic_class: attr.grh.traffic_class,
        flow_label: attr.grh.flow_label,
        sl: attr.sl,
        port_num: attr.port_num,
        is_global: attr.is_global != 0,
        dlid: attr.dlid,
    }
}

pub fn ah_to_c(ah: &AhAttr) -> ibv_ah_attr {
    let grh = ibv_global_route {
        dgid: ibv_gid { raw: ah.dgid.0 },
        flow_label: ah.flow_label,
        sgid_index: ah.sgid_index,
        hop_limit: ah.hop_limit,
        traffic_class: ah.traffic_class,
    };
    let (is_global, dlid) = (ah.is_global.into(), ah.dlid);
    ibv_ah_attr { grh, dlid, sl: ah.sl, is_global, port_num: ah.port_num, ..zeroed_ah_attr() }
}

pub fn caps_from_c(cap: &ibv_qp_cap) -> QpCaps {
    QpCaps {
        max_send_wr: cap.max_send_wr,
        max_recv_wr: cap.max_recv_wr,
        max_send_sge: cap.max_send_sge,
        max_recv_sge: cap.max_recv_sge,
        max_inline_data: cap.max_inline_data,
    }
}

pub fn caps_to_c(caps: &QpCaps) -> ibv_qp_cap {
    ibv_qp_cap {
        max_send_wr: caps.max_send_wr,
        max_recv_wr: caps.max_recv_wr,
        max_send_sge: caps.max_send_sge,
        max_recv_sge: caps.max_recv_sge,
        max_inline_data: caps.max_inline_data,
    }
}

/// The mask of a modify; bits no verb knows are EINVAL.
pub fn mask_from_c(mask: c_int) -> Result<QpAttrMask> {
    QpAttrMask::from_bits(mask as u32).ok_or(EINVAL)
}

/// What `mask` names, taken from `attr`; the rest of `attr` may be uninitialised in the program and is not judged.
pub fn qp_attr_from_c(attr: &ibv_qp_attr, mask: QpAttrMask) -> Result<QpAttr> {
    let mut new = QpAttr::default();
    let state = |value| QpState::try_from(value).map_err(|_| EINVAL);
    if mask.contains(QpAttrMask::STATE) {
        new.qp_state = state(attr.qp_state)?;
    }
    if mask.contains(QpAttrMask::CUR_STATE) {
        new.cur_qp_state = state(attr.cur_qp_state)?;
    }
    if mask.contains(QpAttrMask::ACCESS_FLAGS) {
        new.access = access(attr.qp_access_flags)?;
    }
    new.path_mtu = attr.path_mtu;
    new.qkey = attr.qkey;
    new.rq_psn = attr.rq_psn;
    new.sq_psn = attr.sq_psn;
    new.dest_qpn = attr.dest_qp_num;
    new.ah = ah_from_c(&attr.ah_attr);
    new.pkey_index = attr.pkey_index;
    new.max_rd_atomic = attr.max_rd_atomic;
    new.max_dest_rd_atomic = attr.max_dest_rd_atomic;
    new.min_rnr_timer = attr.min_rnr_timer;
    new.port_num = attr.port_num;
    new.timeout = attr.timeout;
    new.retry_cnt = attr.retry_cnt;
    new.rnr_retry = attr.rnr_retry;
    Ok(new)
}

pub fn qp_attr_to_c(attr: &QpAttr, caps: &QpCaps) -> ibv_qp_attr {
    ibv_qp_attr {
        qp_state: attr.qp_state as u32,
        cur_qp_state: attr.cur_qp_state as u32,
        path_mtu: attr.path_mtu,
        path_mig_state: IBV_MIG_MIGRATED,
        qkey: attr.qkey,
        rq_psn: attr.rq_psn,
        sq_psn: attr.sq_psn,
        dest_qp_num: attr.dest_qpn,
        qp_access_flags: attr.access.bits(),
        cap: caps_to_c(caps),
        ah_attr: ah_to_c(&attr.ah),
        alt_ah_attr: zeroed_ah_attr(),
        pkey_index: attr.pkey_index,
        alt_pkey_index: 0,
        en_sqd_async_notify: 0,
        sq_draining: 0,
        max_rd_atomic: attr.max_rd_atomic,
        max_dest_rd_atomic: attr.max_dest_rd_atomic,
        min_rnr_timer: attr.min_rnr_timer,
        port_num: attr.port_num,
        timeout: attr.timeout,
        retry_cnt: attr.retry_cnt,
        rnr_retry: attr.rnr_retry,
        alt_port_num: 0,
        alt_timeout: 0,
        rate_limit: 0,
    }
}
