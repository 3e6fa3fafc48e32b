//! What bindgen leaves out: macros, and how large other releases of rdma-core make the same structures.

use crate::{ibv_context, ibv_device, ibv_qp_ex, verbs_context};
use core::mem::{offset_of, size_of};

/// `abi_compat` of an `ibv_context` that sits at the end of a `verbs_context`.
pub const VERBS_ABI_IS_EXTENDED: *mut libc::c_void = core::ptr::without_provenance_mut(usize::MAX);

/// Bytes from the start of a `verbs_context` to the `ibv_context` its clients hold.
pub const CONTEXT_OFFSET: usize = offset_of!(verbs_context, context);

/// Largest `ibv_qp_ex` of any release so far; ours (v44) is smaller, and newer clients may look further.
pub const QP_EX_MAX_SIZE: usize = 384;

/// Bytes to allocate for a device: provider libraries read a private tail behind `ibv_device`.
pub const DEVICE_ALLOC_SIZE: usize = 1024;

/// The `ibv_port_attr` that callers of the exported `ibv_query_port` function (not the macro) have room for.
pub const COMPAT_PORT_ATTR_SIZE: usize = 48;

const _: () = assert!(size_of::<ibv_context>() == 328);
const _: () = assert!(size_of::<ibv_qp_ex>() <= QP_EX_MAX_SIZE);
const _: () = assert!(size_of::<ibv_device>() < DEVICE_ALLOC_SIZE);
const _: () = assert!(offset_of!(verbs_context, sz) + size_of::<usize>() == CONTEXT_OFFSET);
