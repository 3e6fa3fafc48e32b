//! What bindgen leaves out: macros, and how large other releases of rdma-core make the same structures.

use crate::{
    ibv_context, ibv_device, ibv_odp_transport_cap_bits, ibv_qp_create_send_ops_flags, ibv_qp_ex,
    ibv_wr_opcode, verbs_context,
};
use core::mem::{offset_of, size_of};

/// `abi_compat` of an `ibv_context` that sits at the end of a `verbs_context`.
pub const VERBS_ABI_IS_EXTENDED: *mut libc::c_void = core::ptr::without_provenance_mut(usize::MAX);

/// Bytes from the start of a `verbs_context` to the `ibv_context` its clients hold.
pub const CONTEXT_OFFSET: usize = offset_of!(verbs_context, context);

/// Largest `ibv_qp_ex` of any release so far; ours (v44) is smaller, and newer clients may look further.
pub const QP_EX_MAX_SIZE: usize = 384;

/// `wr_flush` of `ibv_qp_ex`, which rdma-core 45 appended.
pub type WrFlush = unsafe extern "C" fn(*mut ibv_qp_ex, u32, u64, usize, u8, u8);
/// IBV_WR_FLUSH, and what else came with it: IBV_QP_EX_WITH_FLUSH, IBV_ODP_SUPPORT_FLUSH, and
/// IB_UVERBS_DEVICE_FLUSH_GLOBAL of `device_cap_flags_ex`.
pub const WR_FLUSH: ibv_wr_opcode = 14;
pub const QP_EX_WITH_FLUSH: ibv_qp_create_send_ops_flags = 1 << 11;
pub const ODP_SUPPORT_FLUSH: ibv_odp_transport_cap_bits = 1 << 6;
pub const DEVICE_FLUSH_GLOBAL: u64 = 1 << 38;

/// Bytes to allocate for a device: provider libraries read a private tail behind `ibv_device`.
pub const DEVICE_ALLOC_SIZE: usize = 1024;

/// The `ibv_port_attr` that callers of the exported `ibv_query_port` function (not the macro) have room for.
pub const COMPAT_PORT_ATTR_SIZE: usize = 48;

const _: () = assert!(size_of::<ibv_context>() == 328);
const _: () = assert!(size_of::<ibv_qp_ex>() <= QP_EX_MAX_SIZE);
const _: () = assert!(size_of::<ibv_device>() < DEVICE_ALLOC_SIZE);
const _: () = assert!(offset_of!(verbs_context, sz) + size_of::<usize>() == CONTEXT_OFFSET);
