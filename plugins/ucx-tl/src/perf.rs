//! How fast the transport is, as UCX asks: measured on each device's path (docs/ucx.md), so that its choices are right there.

use std::ffi::{c_uint, c_void};

use crate::device::Device;
use crate::iface::Iface;
use crate::uct::abi::Version;
use crate::uct::types::{Bandwidth, Linear, Status};

/// What UCX computes with. Seconds, and bytes per second.
#[derive(Debug, Clone, Copy)]
pub struct Figures {
    /// One message's way from processor to processor.
    pub latency: f64,
    /// A call of ours.
    pub overhead: f64,
    /// A transfer of memory that has to look at a key and set out.
    pub zcopy_overhead: f64,
    /// Of active messages.
    pub messages: f64,
    /// Of puts and gets.
    pub memory: f64,
}

impl Figures {
    fn of(iface: &Iface) -> Self {
        let (copy, net) = (iface.config.bandwidth, iface.config.net_bandwidth);
        match iface.device() {
            Device::Here => Figures {
                latency: 80e-9,
                overhead: 10e-9,
                zcopy_overhead: 50e-9,
                messages: copy,
                memory: copy,
            },
            // A message is copied on its way into a buffer, and out of one.
            Device::Far => Figures {
                latency: 9e-6,
                overhead: 300e-9,
                zcopy_overhead: 300e-9,
                messages: 1.0 / (1.0 / net + 2.0 / copy),
                memory: net,
            },
        }
    }
}

/// What an interface says of itself when UCX asks for all its attributes at once.
pub fn asked_once(iface: &Iface) -> Figures {
    let honest = Figures::of(iface);
    if iface.device() == Device::Here || iface.md().ucx.abi.version >= Version::V1_16 {
        return honest;
    }
    // Older releases have one bandwidth for messages and memory: by the true ones messages of megabytes would be sent as fragments. By
    // these the rendezvous begins at some 100 KiB, where it is the faster one.
    Figures { latency: 2e-6, memory: iface.config.bandwidth, ..honest }
}

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

/// `UCT_EP_OP_AM_SHORT`, `..._AM_BCOPY`, `..._AM_ZCOPY`.
const MESSAGES: [c_uint; 3] = [0, 1, 2];
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
    let figures = Figures::of(iface);
    let operation = asked(field::OPERATION).then_some(known.operation);
    let message = operation.is_some_and(|operation| MESSAGES.contains(&operation));
    let dedicated = if message { figures.messages } else { figures.memory };
    let bandwidth = Bandwidth { dedicated, shared: 0.0 };
    if asked(field::LATENCY << shift) {
        put(layout.latency, &[figures.latency.to_bits(), 0f64.to_bits()]);
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
    let zcopy = operation.is_some_and(|operation| ZCOPY.contains(&operation));
    if asked(field::SEND_PRE_OVERHEAD) {
        known.send_pre_overhead = if zcopy { figures.zcopy_overhead } else { figures.overhead };
    }
    if asked(field::SEND_POST_OVERHEAD) {
        known.send_post_overhead = 0.0;
    }
    if asked(field::RECV_OVERHEAD) {
        known.recv_overhead = figures.overhead;
    }
    if asked(field::BANDWIDTH) {
        known.bandwidth = bandwidth;
    }
    Status::OK
}
