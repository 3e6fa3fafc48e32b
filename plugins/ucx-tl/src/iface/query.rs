//! What UCX asks an interface about itself: abilities, limits, addresses, who can be reached.

use std::ffi::{c_int, c_void};

use zerocopy::{FromBytes, IntoBytes};

use super::Iface;
use crate::perf;
use crate::uct::types::{
    AmLimits, AtomicCaps, Bandwidth, IfaceAttr, ReachableParams, RmaLimits, Status, atomic, cap, event_cap,
};
use crate::wire::{DeviceAddress, IfaceAddress};

/// Scatter/gather entries of the zcopy calls.
pub const MAX_IOV: usize = 8;
/// Longest single transfer.
pub const MAX_ZCOPY: usize = 1 << 30;
const CACHE_LINE: usize = 64;

const CAPABILITIES: u64 = cap::CONNECT_TO_IFACE
    | cap::AM_SHORT
    | cap::AM_BCOPY
    | cap::AM_ZCOPY
    | cap::PUT_SHORT
    | cap::PUT_BCOPY
    | cap::PUT_ZCOPY
    | cap::GET_SHORT
    | cap::GET_BCOPY
    | cap::GET_ZCOPY
    | cap::ATOMIC_CPU
    | cap::PENDING
    | cap::CB_SYNC
    | cap::EP_CHECK
    | cap::INTER_NODE
    | cap::ERRHANDLE_PEER_FAILURE;

/// `iface_query`.
pub unsafe extern "C" fn query(iface: *mut c_void, attr: *mut IfaceAttr) -> Status {
    // SAFETY: an interface of ours.
    let this = unsafe { Iface::from_raw(iface) };
    // SAFETY: UCX's own function fills its own structure.
    unsafe { (this.md().ucx.call.uct_base_iface_query)(iface.cast(), attr) };
    // SAFETY: UCX's structure.
    let attr = unsafe { &mut *attr };
    let segment = this.config.seg_size;
    attr.put = RmaLimits {
        max_short: segment,
        max_bcopy: segment,
        min_zcopy: 0,
        max_zcopy: MAX_ZCOPY,
        opt_zcopy_align: CACHE_LINE,
        align_mtu: CACHE_LINE,
        max_iov: MAX_IOV,
    };
    attr.get = attr.put;
    attr.am = AmLimits {
        max_short: this.max_short(),
        max_bcopy: segment,
        min_zcopy: 0,
        max_zcopy: segment,
        opt_zcopy_align: CACHE_LINE,
        align_mtu: CACHE_LINE,
        max_hdr: segment,
        max_iov: MAX_IOV,
    };
    attr.atomic32 = AtomicCaps { op_flags: atomic::POST, fop_flags: atomic::FETCH };
    attr.atomic64 = attr.atomic32;
    attr.flags = CAPABILITIES;
    attr.event_flags = event_cap::SEND_COMP | event_cap::RECV | event_cap::FD;
    attr.device_addr_len = size_of::<DeviceAddress>();
    attr.iface_addr_len = size_of::<IfaceAddress>();
    attr.latency = perf::LATENCY;
    attr.overhead = perf::OVERHEAD;
    attr.bandwidth = Bandwidth { dedicated: this.config.bandwidth, shared: 0.0 };
    attr.priority = 0;
    Status::OK
}

/// `iface_get_device_address`.
pub unsafe extern "C" fn device_address(iface: *mut c_void, addr: *mut u8) -> Status {
    // SAFETY: an interface of ours.
    let this = unsafe { Iface::from_raw(iface) };
    let bytes = DeviceAddress::of(&this.md().context);
    // SAFETY: UCX's buffer of device_addr_len bytes.
    unsafe { addr.copy_from_nonoverlapping(bytes.as_bytes().as_ptr(), size_of::<DeviceAddress>()) };
    Status::OK
}

/// `iface_get_address`.
pub unsafe extern "C" fn address(iface: *mut c_void, addr: *mut u8) -> Status {
    // SAFETY: an interface of ours.
    let this = unsafe { Iface::from_raw(iface) };
    let context = &this.md().context;
    let bytes = IfaceAddress { gid: context.gid().0, qpn: this.ud.qpn(), client: context.id() };
    // SAFETY: UCX's buffer of iface_addr_len bytes.
    unsafe { addr.copy_from_nonoverlapping(bytes.as_bytes().as_ptr(), size_of::<IfaceAddress>()) };
    Status::OK
}

/// An address out of UCX's buffer.
///
/// # Safety
/// `at` is null or has that many readable bytes.
pub unsafe fn read_address<T: FromBytes + Copy>(at: *const u8) -> Option<T> {
    if at.is_null() {
        return None;
    }
    // SAFETY: by the caller's promise; UCX packs addresses at any alignment.
    Some(unsafe { at.cast::<T>().read_unaligned() })
}

/// `iface_is_reachable`.
pub unsafe extern "C" fn is_reachable(
    iface: *const c_void,
    device: *const u8,
    _iface_addr: *const u8,
) -> c_int {
    // SAFETY: an interface of ours.
    let this = unsafe { Iface::from_raw(iface) };
    // SAFETY: a peer's device address, as device_address() wrote it.
    let theirs: Option<DeviceAddress> = unsafe { read_address(device) };
    c_int::from(theirs == Some(DeviceAddress::of(&this.md().context)))
}

/// `iface_is_reachable_v2` (1.15 and later), with a reason if not.
pub unsafe extern "C" fn is_reachable_v2(iface: *const c_void, params: *const ReachableParams) -> c_int {
    const DEVICE: u64 = 1;
    const INFO: u64 = 1 << 2 | 1 << 3;
    // SAFETY: UCX's structure.
    let params = unsafe { &*params };
    let device = if params.field_mask & DEVICE != 0 { params.device_addr } else { std::ptr::null() };
    // SAFETY: as for is_reachable.
    let reachable = unsafe { is_reachable(iface, device, std::ptr::null()) };
    if reachable == 0 && params.field_mask & INFO == INFO && params.info_len > 0 {
        let why = b"the peer belongs to another FreeFlow router";
        let len = why.len().min(params.info_len - 1);
        // SAFETY: UCX's buffer of info_len bytes.
        unsafe { params.info.cast::<u8>().copy_from_nonoverlapping(why.as_ptr(), len) };
        // SAFETY: as above.
        unsafe { params.info.wrapping_add(len).write(0) };
    }
    reachable
}
