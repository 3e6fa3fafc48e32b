//! Opening and closing an interface, and the table of functions that UCX calls it by.

use std::ffi::{CStr, c_int, c_uint, c_void};
use std::mem::MaybeUninit;
use std::sync::Arc;

use freeflow_core::verbs::{Access, Sge};

use super::{Config, Event, Iface, progress, query};
use crate::connect::make_ud;
use crate::device::{Device, Presence};
use crate::ep::{self, am, atomic, rma};
use crate::md::{Md, unsupported};
use crate::perf;
use crate::uct::abi::InternalOp;
use crate::uct::symbols::{Level, Ucx};
use crate::uct::types::{DEVICE_FIELD, IfaceParams, OPEN_MODE_DEVICE, OPEN_MODE_FIELD, Status};
use crate::wire::Datagram;

/// Datagrams that may wait. One that finds none is sent again.
const DATAGRAMS: usize = 256;
/// Of a receive's buffer: a routing header comes first.
pub const DATAGRAM_ROOM: usize = 128;
pub const ROUTING_HEADER: usize = 40;
const _: () = assert!(ROUTING_HEADER + size_of::<Datagram>() <= DATAGRAM_ROOM);

/// `UCT_PROGRESS_SEND | UCT_PROGRESS_RECV`.
const ALL_PROGRESS: c_uint = 3;
const CQ_DEPTH: u32 = 4096;

/// `uct_iface_ops_t`, in its order. None is null: UCX calls some without looking.
fn ops(ucx: &Ucx) -> [*const c_void; 50] {
    let mut all = [unsupported as *const c_void; 50];
    let mut set = |slot: usize, call: *const c_void| all[slot] = call;
    set(0, rma::put_short as _);
    set(1, rma::put_bcopy as _);
    set(2, rma::put_zcopy as _);
    set(3, rma::get_short as _);
    set(4, rma::get_bcopy as _);
    set(5, rma::get_zcopy as _);
    set(6, am::short as _);
    set(7, am::short_iov as _);
    set(8, am::bcopy as _);
    set(9, am::zcopy as _);
    set(10, atomic::cswap64 as _);
    set(11, atomic::cswap32 as _);
    set(12, atomic::post32 as _);
    set(13, atomic::post64 as _);
    set(14, atomic::fetch32 as _);
    set(15, atomic::fetch64 as _);
    // Tag matching: the bcopy one returns a length.
    set(17, unsupported_len as _);
    set(24, ep::pending::add as _);
    set(25, ep::pending::purge as _);
    set(26, ep::flush as _);
    set(27, ep::fence as _);
    set(28, ep::check as _);
    set(29, ep::create as _);
    set(33, ep::destroy as _);
    set(38, progress::flush as _);
    set(39, progress::fence as _);
    set(40, ucx.call.uct_base_iface_progress_enable as _);
    set(41, ucx.call.uct_base_iface_progress_disable as _);
    set(42, progress::progress as _);
    set(43, progress::event_fd as _);
    set(44, progress::arm as _);
    set(45, close as _);
    set(46, query::query as _);
    set(47, query::device_address as _);
    set(48, query::address as _);
    set(49, query::is_reachable as _);
    all
}

extern "C" fn unsupported_len() -> isize {
    Status::UNSUPPORTED.as_len()
}

/// `uct_iface_internal_ops_t` in the order of this UCX.
fn internal_ops(ucx: &Ucx) -> *const c_void {
    let calls: Vec<*const c_void> = ucx
        .abi
        .internal_ops
        .iter()
        .map(|op| match op {
            InternalOp::EstimatePerf => perf::estimate as *const c_void,
            InternalOp::VfsRefresh => nothing as *const c_void,
            InternalOp::IsReachableV2 => query::is_reachable_v2 as *const c_void,
            InternalOp::IsConnected => ep::is_connected as *const c_void,
            InternalOp::Invalidate => ep::invalidate as *const c_void,
            InternalOp::Unsupported => unsupported as *const c_void,
        })
        .collect();
    // One for each interface, as long as the process: UCX may look at it while it takes the interface apart.
    Box::leak(calls.into_boxed_slice()).as_ptr().cast()
}

unsafe extern "C" fn nothing(_: *mut c_void) {}

/// What a configuration cannot be.
fn check(config: &Config) -> Result<(), &'static str> {
    let fifo_fits = config.fifo_size.is_power_of_two() && (2..=65_536).contains(&config.fifo_size);
    let segment_fits = |size| (256..=65_535).contains(&size);
    let pool_fits = config.pool_size >= 4 * config.seg_size && config.pool_size <= 1 << 30;
    let queue_fits = (1..=4096).contains(&config.rx_queue_len);
    let rules = [
        (fifo_fits, "UCX_FF_FIFO_SIZE must be a power of two from 2 to 65536"),
        (segment_fits(config.seg_size), "UCX_FF_SEG_SIZE must be 256 to 65535"),
        (segment_fits(config.net_seg_size), "UCX_FF_NET_SEG_SIZE must be 256 to 65535"),
        (pool_fits, "UCX_FF_POOL_SIZE must be at least four segments, and at most 1 GiB"),
        (queue_fits, "UCX_FF_RX_QUEUE_LEN must be 1 to 4096"),
        (config.bandwidth > 0.0, "UCX_FF_BW must be positive"),
        (config.net_bandwidth > 0.0, "UCX_FF_NET_BW must be positive"),
    ];
    rules.iter().find(|(holds, _)| !holds).map_or(Ok(()), |(_, why)| Err(*why))
}

/// `iface_open`.
pub unsafe extern "C" fn open(
    md: *mut c_void,
    worker: *mut c_void,
    params: *const IfaceParams,
    config: *const Config,
    iface: *mut *mut c_void,
) -> Status {
    // SAFETY: a domain of ours.
    let domain = unsafe { Md::from_raw(md) };
    // SAFETY: UCX's structure.
    let given = unsafe { &*params };
    // SAFETY: filled by UCX from our own table.
    let values = unsafe { *config };
    if given.field_mask & OPEN_MODE_FIELD == 0 {
        return Status::INVALID_PARAM;
    }
    if given.open_mode & OPEN_MODE_DEVICE == 0 {
        domain.ucx.log(Level::Error, "ff: only UCT_IFACE_OPEN_MODE_DEVICE is supported");
        return Status::UNSUPPORTED;
    }
    if let Err(why) = check(&values) {
        domain.ucx.log(Level::Error, &format!("ff: {why}"));
        return Status::INVALID_PARAM;
    }
    // SAFETY: UCX's structure, with the field if the mask says so.
    let Some(device) = (unsafe { device_of(given) }) else {
        domain.ucx.log(Level::Error, "ff: no such device");
        return Status::NO_DEVICE;
    };
    let made = match make(domain, device, values.on(device)) {
        Ok(made) => made,
        Err(error) => {
            domain.ucx.log(Level::Error, &format!("ff: cannot open an interface: {error}"));
            return Status::NO_DEVICE;
        }
    };
    let this = Box::into_raw(made);
    let mut count: c_int = 1;
    let ops = ops(domain.ucx);
    // SAFETY: `this` begins with room for a uct_base_iface_t, which the constructor fills; UCX's own arguments.
    let status = unsafe {
        (domain.ucx.call.uct_base_iface_t_init)(
            this.cast(),
            domain.ucx.iface_class,
            &mut count,
            ops.as_ptr().cast(),
            internal_ops(domain.ucx),
            md,
            worker,
            params.cast(),
            config.cast(),
        )
    };
    if status != Status::OK {
        // SAFETY: made above, seen by nobody.
        drop(unsafe { Box::from_raw(this) });
        return status;
    }
    // SAFETY: UCX's place for the result.
    unsafe { iface.write(this.cast()) };
    Status::OK
}

/// The device that it is to be opened on.
///
/// # Safety
/// If the mask says that there is a name, it is one.
unsafe fn device_of(given: &IfaceParams) -> Option<Device> {
    if given.field_mask & DEVICE_FIELD == 0 || given.dev_name.is_null() {
        return Some(Device::Here);
    }
    // SAFETY: by the caller's promise.
    Device::named(unsafe { CStr::from_ptr(given.dev_name) })
}

fn make(md: &Md, device: Device, config: Config) -> freeflow_core::error::Result<Box<Iface>> {
    let channel = md.context.create_channel()?;
    let depth = CQ_DEPTH.min(md.context.limits().max_cqe);
    let cq = md.context.create_cq(depth, 0, Some(Arc::clone(&channel)))?;
    cq.have_marked();
    progress::never_block(&channel)?;
    let ud = make_ud(&md.pd, &cq, DATAGRAMS as u32)?;
    let datagrams = md.pd.allocate((DATAGRAMS * DATAGRAM_ROOM) as u64, Access::LOCAL_WRITE)?;
    // SAFETY: plain words and pointers, filled by UCX's constructor before anybody looks.
    let base = unsafe { MaybeUninit::zeroed().assume_init() };
    let iface = Box::new(Iface {
        base,
        presence: Presence::new(device, &md.opened),
        config,
        cq,
        channel,
        ud,
        datagrams,
        incoming: Default::default(),
        eps: Default::default(),
        waiting: Default::default(),
        ops: Default::default(),
        asked: Default::default(),
        bounce: Default::default(),
        jobs: Default::default(),
        failed: Default::default(),
        connecting: Default::default(),
        queued: Default::default(),
        polled: Default::default(),
        work: Default::default(),
        ticks: Default::default(),
        serials: Default::default(),
    });
    (0..DATAGRAMS).for_each(|buffer| iface.post_datagram(buffer));
    Ok(iface)
}

impl Iface {
    /// Receives into buffer `buffer`, again.
    pub(super) fn post_datagram(&self, buffer: usize) {
        let addr = self.datagrams.addr() + (buffer * DATAGRAM_ROOM) as u64;
        let sge = Sge { addr, length: DATAGRAM_ROOM as u32, lkey: self.datagrams.key() };
        let _ = self.ud.post_recv(Event::Datagram(buffer).pack(), &[sge]);
    }

    /// The bytes of a datagram that came.
    pub(super) fn datagram(&self, buffer: usize, len: usize) -> Option<Datagram> {
        let at = self.datagrams.addr() + (buffer * DATAGRAM_ROOM + ROUTING_HEADER) as u64;
        let len = len.checked_sub(ROUTING_HEADER).filter(|len| *len <= DATAGRAM_ROOM - ROUTING_HEADER)?;
        let mut bytes = [0u8; DATAGRAM_ROOM];
        // SAFETY: memory of ours; a peer that still writes there changes what is copied, which is judged afterwards.
        unsafe { std::ptr::copy_nonoverlapping(at as *const u8, bytes.as_mut_ptr(), len) };
        Datagram::parse(&bytes[..len])
    }
}

/// `iface_close`.
unsafe extern "C" fn close(iface: *mut c_void) {
    // SAFETY: an interface of ours.
    let ucx = unsafe { Iface::from_raw(iface) }.md().ucx;
    // SAFETY: UCX's own function on its own object: no progress from now on.
    unsafe { (ucx.call.uct_base_iface_progress_disable)(iface, ALL_PROGRESS) };
    // SAFETY: takes its own class apart, all of it.
    unsafe { (ucx.call.ucs_class_call_cleanup_chain)(ucx.iface_class, iface, -1) };
    // SAFETY: from open(), closed once; the base has no destructor of Rust's.
    drop(unsafe { Box::from_raw(iface.cast::<Iface>()) });
}

const _: () = assert!(size_of::<c_uint>() == 4);
