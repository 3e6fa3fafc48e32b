//! What UCX asks an interface about itself: abilities, limits, addresses, who can be reached.

use std::ffi::{c_char, c_int, c_void};

use freeflow_core::verbs::Gid;
use zerocopy::{FromBytes, IntoBytes};

use super::{Iface, datagrams_to};
use crate::perf::{self, Figures};
use crate::uct::types::{
    AmLimits, AtomicCaps, Bandwidth, IfaceAttr, Linear, ReachableParams, RmaLimits, ScopedParams, Status,
    atomic, cap, event_cap, reachable,
};
use crate::wire::{DeviceAddress, IfaceAddress, reach};

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
    let Figures { latency, overhead, memory, .. } = perf::asked_once(this);
    attr.latency = Linear { c: latency, m: 0.0 };
    attr.overhead = overhead;
    attr.bandwidth = Bandwidth { dedicated: memory, shared: 0.0 };
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
    let (gid, reach) = (context.gid().0, this.presence.reach());
    let bytes = IfaceAddress { gid, qpn: this.ud.qpn(), client: context.id(), reach };
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
pub unsafe extern "C" fn is_reachable(iface: *const c_void, device: *const u8, address: *const u8) -> c_int {
    // SAFETY: an interface of ours.
    let this = unsafe { Iface::from_raw(iface) };
    // SAFETY: a peer's addresses, as device_address() and address() wrote them.
    c_int::from(unsafe { way_to(this, device, address) }.is_ok())
}

/// Why there is no way to a peer.
const NO_WAY: &str = "the FreeFlow router knows no such address in this container's tenant";
const NOT_HERE: &str = "the peer is on another host";
const OTHER_DEVICE: &str = "another of this transport's devices leads to the peer";

/// The router knows which interfaces there are; without an interface's address only this host's are certain.
///
/// # Safety
/// Null, or addresses as [`device_address`] and [`address`] write them.
unsafe fn way_to(this: &Iface, device: *const u8, address: *const u8) -> Result<(), &'static str> {
    // SAFETY: by the caller's promise.
    if let Some(to) = unsafe { read_address::<IfaceAddress>(address) } {
        // SAFETY: by the caller's promise.
        let here = unsafe { is_here(this, device) };
        // Without a device address nobody knows where the peer is.
        if !device.is_null() && !reach::agree(this.presence.reach(), to.reach, here) {
            return Err(OTHER_DEVICE);
        }
        let way = this.ud.reaches(datagrams_to(Gid(to.gid), to.qpn));
        return if way { Ok(()) } else { Err(NO_WAY) };
    }
    // SAFETY: by the caller's promise.
    if unsafe { is_here(this, device) } { Ok(()) } else { Err(NOT_HERE) }
}

/// Has the peer the same router?
///
/// # Safety
/// Null, or an address as [`device_address`] writes it.
unsafe fn is_here(this: &Iface, device: *const u8) -> bool {
    // SAFETY: by the caller's promise.
    let theirs = unsafe { read_address::<DeviceAddress>(device) };
    theirs == Some(DeviceAddress::of(&this.md().context))
}

/// `iface_is_reachable_v2` (1.15 and later), with a reason if not.
pub unsafe extern "C" fn is_reachable_v2(iface: *const c_void, params: *const ReachableParams) -> c_int {
    // SAFETY: an interface of ours.
    let this = unsafe { Iface::from_raw(iface) };
    // SAFETY: UCX's structure, of which only the fields in the mask count.
    let said = unsafe { &*params };
    let has = |field: u64| said.field_mask & field == field;
    let given = |field, address| if has(field) { address } else { std::ptr::null() };
    let device = given(reachable::DEVICE_ADDR, said.device_addr);
    let address = given(reachable::IFACE_ADDR, said.iface_addr);
    // SAFETY: releases that set the bit have the field.
    let near =
        has(reachable::SCOPE) && unsafe { (*params.cast::<ScopedParams>()).scope } == reachable::SCOPE_DEVICE;
    // SAFETY: an address that the peer packed, or null.
    let elsewhere = near && !unsafe { is_here(this, device) };
    // SAFETY: addresses that the peer packed, or null.
    let way = if elsewhere { Err(NOT_HERE) } else { unsafe { way_to(this, device, address) } };
    if let Err(why) = way
        && has(reachable::INFO)
    {
        // SAFETY: UCX's buffer of that length.
        unsafe { say(why, said.info, said.info_len) };
    }
    c_int::from(way.is_ok())
}

/// A C string, as far as it fits.
///
/// # Safety
/// `to` has `room` bytes.
unsafe fn say(why: &str, to: *mut c_char, room: usize) {
    let Some(len) = room.checked_sub(1).map(|most| why.len().min(most)) else { return };
    // SAFETY: by the caller's promise.
    unsafe { to.cast::<u8>().copy_from_nonoverlapping(why.as_ptr(), len) };
    // SAFETY: as above.
    unsafe { to.wrapping_add(len).write(0) };
}
