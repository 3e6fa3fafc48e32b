//! What the device says about itself: honest limits, one port, its GIDs, one partition key.

use crate::context;
use crate::cq_ex;
use crate::dm;
use crate::guard::{self, EINVAL, EOPNOTSUPP, Errno, Result};
use freeflow_core::client;
use freeflow_core::verbs::device::{FIRMWARE, PKEY, PORT, SPEED, VENDOR_ID, VENDOR_PART_ID, WIDTH};
use freeflow_core::verbs::{Gid, limits};
use freeflow_verbs_abi::*;
use std::ffi::{c_char, c_int};
use std::mem::{size_of, zeroed};
use std::net::IpAddr;

/// The GUID programs see, in network byte order.
pub fn guid(gid: Gid) -> __be64 {
    u64::from_ne_bytes(gid.guid())
}

/// IBV_DEVICE_ATOMIC_WRITE of `device_cap_flags_ex`, which does not fit into the enumeration's type.
const ATOMIC_WRITE_CAP: u64 = 1 << 40;
const ODP_MESSAGES: u32 = IBV_ODP_SUPPORT_SEND | IBV_ODP_SUPPORT_RECV | IBV_ODP_SUPPORT_SRQ_RECV;
const ODP_MEMORY: u32 =
    IBV_ODP_SUPPORT_WRITE | IBV_ODP_SUPPORT_READ | IBV_ODP_SUPPORT_ATOMIC | ODP_SUPPORT_FLUSH;
const ODP_ALL: u32 = ODP_MESSAGES | ODP_MEMORY;

fn int(limit: u32) -> c_int {
    c_int::try_from(limit).unwrap_or(c_int::MAX)
}

fn device_attr(core: &client::Context) -> ibv_device_attr {
    let quota = core.limits();
    let guid = guid(core.gid());
    let mut fw_ver = [0 as c_char; 64];
    for (to, from) in fw_ver.iter_mut().zip(FIRMWARE.bytes()) {
        *to = from as c_char;
    }
    // SAFETY: integers only: all zeroes is valid, and means "none" for what is not built.
    let none: ibv_device_attr = unsafe { zeroed() };
    ibv_device_attr {
        fw_ver,
        node_guid: guid,
        sys_image_guid: guid,
        max_mr_size: quota.max_mr_bytes,
        page_size_cap: 0xffff_f000,
        vendor_id: VENDOR_ID,
        vendor_part_id: VENDOR_PART_ID,
        hw_ver: 1,
        max_qp: int(quota.max_qp),
        max_qp_wr: int(quota.max_qp_wr),
        device_cap_flags: IBV_DEVICE_CURR_QP_STATE_MOD
            | IBV_DEVICE_SYS_IMAGE_GUID
            | IBV_DEVICE_RC_RNR_NAK_GEN
            | IBV_DEVICE_PORT_ACTIVE_EVENT
            | IBV_DEVICE_XRC
            | IBV_DEVICE_MEM_WINDOW
            | IBV_DEVICE_MEM_WINDOW_TYPE_2B
            | IBV_DEVICE_MEM_MGT_EXTENSIONS,
        max_sge: int(limits::SGE),
        max_sge_rd: int(limits::SGE),
        max_cq: int(quota.max_cq),
        max_cqe: int(quota.max_cqe),
        max_mr: int(quota.max_mr),
        max_mw: int(quota.max_mr), // a window is a region to the quota
        max_pd: int(quota.max_pd),
        max_qp_rd_atom: c_int::from(limits::RD_ATOMIC),
        max_res_rd_atom: int(quota.max_qp.saturating_mul(u32::from(limits::RD_ATOMIC))),
        max_qp_init_rd_atom: c_int::from(limits::RD_ATOMIC),
        atomic_cap: IBV_ATOMIC_GLOB, // CPU atomics: atomic towards the program's own as well
        max_srq: int(quota.max_srq),
        max_srq_wr: int(quota.max_qp_wr),
        max_srq_sge: int(limits::SGE),
        max_mcast_grp: int(quota.max_mcast),
        max_mcast_qp_attach: int(quota.max_mcast),
        max_total_mcast_qp_attach: int(quota.max_mcast),
        max_ah: c_int::MAX,
        max_pkeys: 1,
        local_ca_ack_delay: 0,
        phys_port_cnt: 1,
        ..none
    }
}

/// # Safety
/// `context` is a live context and `attr` has room, as the C prototype demands.
pub unsafe extern "C" fn ibv_query_device(context: *mut ibv_context, attr: *mut ibv_device_attr) -> c_int {
    guard::code(|| {
        // SAFETY: the caller's promise.
        let answer = device_attr(unsafe { context::core(context) });
        // SAFETY: the caller's promise.
        unsafe { attr.write(answer) };
        Ok(())
    })
}

/// Behind the inline ibv_query_device_ex: `size` is the client's sizeof.
pub unsafe extern "C" fn device_ex(
    context: *mut ibv_context,
    input: *const ibv_query_device_ex_input,
    attr: *mut ibv_device_attr_ex,
    size: usize,
) -> c_int {
    guard::code(|| {
        // SAFETY: the program passes its input or NULL.
        if unsafe { input.as_ref() }.is_some_and(|i| i.comp_mask != 0) || size < size_of::<ibv_device_attr>()
        {
            return Err(EINVAL);
        }
        // SAFETY: integers only: all zeroes is valid, and means "none".
        let none: ibv_device_attr_ex = unsafe { zeroed() };
        // SAFETY: called through a live context.
        let orig_attr = device_attr(unsafe { context::core(context) });
        let device_cap_flags_ex =
            u64::from(orig_attr.device_cap_flags) | ATOMIC_WRITE_CAP | DEVICE_FLUSH_GLOBAL;
        let answer = ibv_device_attr_ex {
            orig_attr,
            device_cap_flags_ex,
            phys_port_cnt_ex: 1,
            odp_caps: ibv_odp_caps {
                general_caps: u64::from(IBV_ODP_SUPPORT | IBV_ODP_SUPPORT_IMPLICIT),
                per_transport_caps: ibv_odp_caps__bindgen_ty_1 {
                    rc_odp_caps: ODP_ALL,
                    uc_odp_caps: ODP_MESSAGES | IBV_ODP_SUPPORT_WRITE,
                    ud_odp_caps: ODP_MESSAGES,
                },
            },
            xrc_odp_caps: ODP_ALL,
            // Nanoseconds since the machine started.
            completion_timestamp_mask: u64::MAX,
            hca_core_clock: 1_000_000,
            max_dm_size: dm::MAX,
            cq_mod_caps: ibv_cq_moderation_caps { max_cq_count: u16::MAX, max_cq_period: u16::MAX },
            ..none
        };
        // SAFETY: the caller has `size` bytes there.
        unsafe { copy_sized(&answer, attr, size) };
        Ok(())
    })
}

/// Behind the inline ibv_query_rt_values_ex: the clock of completion timestamps.
pub unsafe extern "C" fn rt_values(_: *mut ibv_context, values: *mut ibv_values_ex) -> c_int {
    guard::code(|| {
        // SAFETY: the program passes its structure.
        let values = unsafe { &mut *values };
        if values.comp_mask & !IBV_VALUES_MASK_RAW_CLOCK != 0 {
            return Err(EOPNOTSUPP);
        }
        let now = cq_ex::now(libc::CLOCK_MONOTONIC);
        // As clock ticks, in the field for seconds' fractions: that is how every provider tells them.
        values.raw_clock = libc::timespec { tv_sec: 0, tv_nsec: now as i64 };
        values.comp_mask = IBV_VALUES_MASK_RAW_CLOCK;
        Ok(())
    })
}

/// Zeroes the client's structure of `size` bytes and fills in what both sides have.
///
/// # Safety
/// `to` has `size` bytes.
unsafe fn copy_sized<T>(from: &T, to: *mut T, size: usize) {
    // SAFETY: the caller's promise.
    unsafe { to.cast::<u8>().write_bytes(0, size) };
    let both = size.min(size_of::<T>());
    // SAFETY: neither side is exceeded.
    unsafe { std::ptr::copy_nonoverlapping(std::ptr::from_ref(from).cast::<u8>(), to.cast::<u8>(), both) };
}

fn port_attr(core: &client::Context, port: u32) -> Result<ibv_port_attr> {
    if port != u32::from(PORT) {
        return Err(EINVAL);
    }
    // SAFETY: integers only: all zeroes is valid; there is no subnet manager and no counter.
    let none: ibv_port_attr = unsafe { zeroed() };
    Ok(ibv_port_attr {
        state: IBV_PORT_ACTIVE,
        max_mtu: IBV_MTU_4096,
        active_mtu: IBV_MTU_4096,
        gid_tbl_len: core.gid().table().len() as c_int,
        port_cap_flags: IBV_PORT_CM_SUP | IBV_PORT_IP_BASED_GIDS,
        max_msg_sz: limits::MESSAGE as u32,
        pkey_tbl_len: 1,
        // Beyond RoCE: so that programs with no notion of GIDs work too. Those that know the flag below use the GID.
        lid: core.gid().lid(),
        max_vl_num: 1,
        active_width: WIDTH,
        active_speed: SPEED,
        phys_state: 5, // LinkUp
        link_layer: IBV_LINK_LAYER_ETHERNET as u8,
        flags: IB_UVERBS_QPF_GRH_REQUIRED as u8,
        ..none
    })
}

/// The exported function, for callers compiled with the 48-byte structure (slot 1 of the operations too).
///
/// # Safety
/// `context` is live and `attr` has room for the 48-byte structure.
pub unsafe extern "C" fn ibv_query_port(
    context: *mut ibv_context,
    port: u8,
    attr: *mut _compat_ibv_port_attr,
) -> c_int {
    guard::code(|| {
        // SAFETY: the caller passes a live context.
        let answer = port_attr(unsafe { context::core(context) }, port.into())?;
        // SAFETY: the caller's promise.
        unsafe { copy_sized(&answer, attr.cast(), COMPAT_PORT_ATTR_SIZE) };
        Ok(())
    })
}

/// Behind the ibv_query_port macro: `size` is the client's sizeof.
pub unsafe extern "C" fn port_ex(
    context: *mut ibv_context,
    port: u8,
    attr: *mut ibv_port_attr,
    size: usize,
) -> c_int {
    guard::code(|| {
        // SAFETY: the caller passes a live context.
        let answer = port_attr(unsafe { context::core(context) }, port.into())?;
        // SAFETY: the caller has `size` bytes there.
        unsafe { copy_sized(&answer, attr, size) };
        Ok(())
    })
}

/// # Safety
/// `context` is a live context and `gid` has room, as the C prototype demands.
pub unsafe extern "C" fn ibv_query_gid(
    context: *mut ibv_context,
    port: u8,
    index: c_int,
    gid: *mut ibv_gid,
) -> c_int {
    guard::number(|| {
        // SAFETY: the caller's promise.
        let found = gid_at(unsafe { context::core(context) }, port.into(), index as u32)?;
        let raw = found.unwrap_or_default().0;
        // SAFETY: the caller's promise.
        unsafe { gid.write(ibv_gid { raw }) };
        Ok(0)
    })
}

/// The port and index of the one entry the P_Key table has.
fn check_entry(port: u32, index: u32) -> Result<()> {
    if port == u32::from(PORT) && index == 0 { Ok(()) } else { Err(EINVAL) }
}

/// An entry of the GID table; None: it is empty.
fn gid_at(core: &client::Context, port: u32, index: u32) -> Result<Option<Gid>> {
    let table = core.gid().table();
    let entry = table.get(index as usize).filter(|_| port == u32::from(PORT));
    entry.copied().ok_or(EINVAL)
}

/// The private function ibv_devinfo and pyverbs import.
///
/// # Safety
/// `context` is a live context and `kind` has room, as the C prototype demands.
pub unsafe extern "C" fn ibv_query_gid_type(
    context: *mut ibv_context,
    port: u8,
    index: u32,
    kind: *mut ibv_gid_type,
) -> c_int {
    guard::number(|| {
        // Its own enumeration: 0 is IB and RoCE v1 alike, and what an empty entry has, 1 is RoCE v2.
        // SAFETY: the caller's promise.
        let found = gid_at(unsafe { context::core(context) }, port.into(), index)?;
        // SAFETY: the caller's promise.
        unsafe { kind.write(found.is_some().into()) };
        Ok(0)
    })
}

fn gid_entry(core: &client::Context, gid_index: u32) -> Result<ibv_gid_entry> {
    let gid = gid_at(core, PORT.into(), gid_index)?.ok_or(Errno(libc::ENODATA))?;
    Ok(ibv_gid_entry {
        gid: ibv_gid { raw: gid.0 },
        gid_index,
        port_num: PORT.into(),
        gid_type: IBV_GID_TYPE_ROCE_V2,
        ndev_ifindex: interface_of(core.gid().ip()).unwrap_or(0),
    })
}

/// # Safety
/// `context` is a live context and `entry` has `entry_size` bytes, as the C prototype demands.
pub unsafe extern "C" fn _ibv_query_gid_ex(
    context: *mut ibv_context,
    port: u32,
    index: u32,
    entry: *mut ibv_gid_entry,
    flags: u32,
    entry_size: usize,
) -> c_int {
    guard::code(|| {
        if port != u32::from(PORT) {
            return Err(EINVAL);
        }
        // SAFETY: the caller's promise.
        let answer = gid_entry(unsafe { context::core(context) }, index)?;
        if flags != 0 || entry_size < size_of::<ibv_gid_entry>() {
            return Err(EINVAL);
        }
        // SAFETY: the caller's promise.
        unsafe { copy_sized(&answer, entry, entry_size) };
        Ok(())
    })
}

/// Returns the number of entries written, or a negative errno.
///
/// # Safety
/// `context` is a live context and `entries` an array of `max` entries of `entry_size` bytes.
pub unsafe extern "C" fn _ibv_query_gid_table(
    context: *mut ibv_context,
    entries: *mut ibv_gid_entry,
    max: usize,
    flags: u32,
    entry_size: usize,
) -> isize {
    let mut written = 0;
    // SAFETY: the caller's promise.
    let table = unsafe { context::core(context) }.gid().table();
    for (index, _) in table.iter().enumerate().filter(|(_, gid)| gid.is_some()) {
        if written == max {
            return -(EINVAL.0 as isize);
        }
        let entry = entries.wrapping_byte_add(written * entry_size);
        // SAFETY: the caller's promise; this writes one entry, and there is room for more than `written`.
        let error =
            unsafe { _ibv_query_gid_ex(context, PORT.into(), index as u32, entry, flags, entry_size) };
        if error != 0 {
            return -(error as isize);
        }
        written += 1;
    }
    written as isize
}

/// # Safety
/// `pkey` has room, as the C prototype demands.
pub unsafe extern "C" fn ibv_query_pkey(
    _: *mut ibv_context,
    port: u8,
    index: c_int,
    pkey: *mut __be16,
) -> c_int {
    guard::number(|| {
        check_entry(port.into(), index as u32)?;
        // SAFETY: the caller's promise.
        unsafe { pkey.write(PKEY.to_be()) };
        Ok(0)
    })
}

pub extern "C" fn ibv_get_pkey_index(_: *mut ibv_context, port: u8, pkey: __be16) -> c_int {
    guard::number(|| {
        check_entry(port.into(), 0)?;
        if pkey == PKEY.to_be() { Ok(0) } else { Err(EINVAL) }
    })
}

/// The index of the network interface that has an address.
fn interface_of(ip: IpAddr) -> Option<u32> {
    let mut list = std::ptr::null_mut();
    // SAFETY: the place for the list is valid.
    if unsafe { libc::getifaddrs(&mut list) } != 0 {
        return None;
    }
    let mut found = None;
    let mut next: *mut libc::ifaddrs = list;
    // SAFETY: the list is linked and valid until freed.
    while let Some(entry) = unsafe { next.as_ref() } {
        // SAFETY: the address is NULL or a sockaddr of its family's size.
        if unsafe { address_of(entry.ifa_addr) } == Some(ip) {
            // SAFETY: the name is a C string.
            found = Some(unsafe { libc::if_nametoindex(entry.ifa_name) });
        }
        next = entry.ifa_next;
    }
    // SAFETY: getifaddrs made it.
    unsafe { libc::freeifaddrs(list) };
    found
}

/// # Safety
/// `address` is NULL or points to a sockaddr of its family's size.
unsafe fn address_of(address: *const libc::sockaddr) -> Option<IpAddr> {
    // SAFETY: the caller's promise.
    match c_int::from(unsafe { address.as_ref() }?.sa_family) {
        libc::AF_INET => {
            // SAFETY: that family's structure.
            let v4 = unsafe { &*address.cast::<libc::sockaddr_in>() };
            Some(IpAddr::from(v4.sin_addr.s_addr.to_ne_bytes()))
        }
        libc::AF_INET6 => {
            // SAFETY: that family's structure.
            let v6 = unsafe { &*address.cast::<libc::sockaddr_in6>() };
            Some(IpAddr::from(v6.sin6_addr.s6_addr))
        }
        _ => None,
    }
}

/// There is no Ethernet below us to resolve an address on.
pub extern "C" fn ibv_resolve_eth_l2_from_gid(
    _: *mut ibv_context,
    _: *mut ibv_ah_attr,
    _: *mut u8,
    _: *mut u16,
) -> c_int {
    -guard::code(|| Err(EOPNOTSUPP))
}
