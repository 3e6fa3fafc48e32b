//! How fast the transport is, as UCX asks: measured on the direct path (docs/ucx.md), so that its choices are right there.

use std::ffi::{c_uint, c_void};

use crate::iface::Iface;
use crate::uct::types::{Bandwidth, Linear, Status};

/// One message's way from processor to processor.
pub const LATENCY: Linear = Linear { c: 80e-9, m: 0.0 };
/// A call of ours.
pub const OVERHEAD: f64 = 10e-9;
/// A copy that has to look at a key and set out.
const ZCOPY_OVERHEAD: f64 = 50e-9;
/// Memory that is registered already; new memory costs more, once.
pub const REGISTRATION: Linear = Linear { c: 300e-9, m: 0.0 };

/// `UCT_PERF_ATTR_FIELD_*`.
mod field {
    pub const OPERATION: u64 = 1;
    pub const SEND_PRE_OVERHEAD: u64 = 1 << 5;
    pub const SEND_POST_OVERHEAD: u64 = 1 << 6;
    pub const RECV_OVERHEAD: u64 = 1 << 7;
    pub const BANDWIDTH: u64 = 1 << 8;
    /// Where there is a path bandwidth it has bit 9, and those behind it are one further.
    pub const PATH_BANDWIDTH: u64 = 1 << 9;
    pub const LATENCY: u64 = 1 << 9;
    pub const MAX_INFLIGHT_EPS: u64 = 1 << 10;
    pub const FLAGS: u64 = 1 << 11;
}

/// `uct_perf_attr_t` up to `bandwidth`, the same in all releases.
#[repr(C)]
pub struct PerfAttr {
    field_mask: u64,
    operation: c_uint,
    local_memory_type: c_uint,
    remote_memory_type: c_uint,
    sys_devices: [u8; 2],
    send_pre_overhead: f64,
    send_post_overhead: f64,
    recv_overhead: f64,
    bandwidth: Bandwidth,
}

/// `UCT_EP_OP_PUT_ZCOPY`, `UCT_EP_OP_GET_ZCOPY`.
const ZCOPY: [c_uint; 2] = [5, 8];

/// `iface_estimate_perf`.
pub unsafe extern "C" fn estimate(iface: *mut c_void, attr: *mut PerfAttr) -> Status {
    // SAFETY: an interface of ours.
    let iface = unsafe { Iface::from_raw(iface) };
    let layout = &iface.md().ucx.abi.perf;
    // SAFETY: UCX's structure, its common part.
    let known = unsafe { &mut *attr };
    let mask = known.field_mask;
    let asked = |bit: u64| mask & bit != 0;
    let shift = u32::from(layout.path_bandwidth.is_some());
    let put = |offset: usize, words: &[u64]| {
        for (i, word) in words.iter().enumerate() {
            // SAFETY: the table's offsets are inside this UCX's structure.
            unsafe { attr.cast::<u8>().wrapping_add(offset + 8 * i).cast::<u64>().write(*word) };
        }
    };
    let bandwidth = Bandwidth { dedicated: iface.config.bandwidth, shared: 0.0 };
    if asked(field::LATENCY << shift) {
        put(layout.latency, &[LATENCY.c.to_bits(), LATENCY.m.to_bits()]);
    }
    if asked(field::MAX_INFLIGHT_EPS << shift) {
        put(layout.max_inflight_eps, &[u64::MAX]);
    }
    if let Some(offset) = layout.flags.filter(|_| asked(field::FLAGS << shift)) {
        put(offset, &[0]);
    }
    if let Some(offset) = layout.path_bandwidth.filter(|_| asked(field::PATH_BANDWIDTH)) {
        put(offset, &[bandwidth.dedicated.to_bits(), bandwidth.shared.to_bits()]);
    }
    let zcopy = asked(field::OPERATION) && ZCOPY.contains(&known.operation);
    if asked(field::SEND_PRE_OVERHEAD) {
        known.send_pre_overhead = if zcopy { ZCOPY_OVERHEAD } else { OVERHEAD };
    }
    if asked(field::SEND_POST_OVERHEAD) {
        known.send_post_overhead = 0.0;
    }
    if asked(field::RECV_OVERHEAD) {
        known.recv_overhead = OVERHEAD;
    }
    if asked(field::BANDWIDTH) {
        known.bandwidth = bandwidth;
    }
    Status::OK
}
