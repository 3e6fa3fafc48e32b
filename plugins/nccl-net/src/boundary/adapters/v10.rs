//! NCCL 2.26 and 2.27.

use std::ffi::{c_int, c_void};

use freeflow_nccl_abi::v10::{Net, Props};
use freeflow_nccl_abi::{
    CommConfig, DebugLogger, NET_DEVICE_HOST, NcclResult, NetDeviceHandle, ProfilerCallback, VDeviceProps,
};

use super::super::calls;
use super::NAME;
use crate::device::{self, Properties, Style};

unsafe extern "C" fn init(logger: Option<DebugLogger>, _profiler: Option<ProfilerCallback>) -> NcclResult {
    calls::init(10, logger)
}

unsafe extern "C" fn get_properties(dev: c_int, props: *mut Props) -> NcclResult {
    let make = |p: &Properties| Props {
        name: device::NAME.as_ptr().cast_mut(),
        pci_path: std::ptr::null_mut(),
        guid: p.guid,
        ptr_support: p.ptr_support,
        reg_is_global: 1,
        force_flush: 0,
        speed: p.speed,
        port: p.port,
        latency: p.latency,
        max_comms: p.max_comms,
        max_recvs: p.max_recvs,
        net_device_type: NET_DEVICE_HOST,
        net_device_version: 0,
        v_props: VDeviceProps { ndevs: 1, devs: [0; 4] },
        max_p2p_bytes: device::MAX_BYTES,
        max_coll_bytes: device::MAX_BYTES,
    };
    // SAFETY: NCCL's contract.
    unsafe { calls::properties(dev, props, make) }
}

unsafe extern "C" fn connect(
    dev: c_int,
    config: *mut CommConfig,
    handle: *mut c_void,
    comm: *mut *mut c_void,
    device_handle: *mut *mut NetDeviceHandle,
) -> NcclResult {
    // SAFETY: NCCL's contract.
    unsafe { calls::no_device_handle(device_handle) };
    // SAFETY: NCCL's contract.
    unsafe { calls::connect(dev, Some(config), Style::V8, handle, comm) }
}

#[unsafe(no_mangle)]
#[allow(non_upper_case_globals, reason = "NCCL looks it up by this name")]
pub static ncclNetPlugin_v10: Net = Net {
    name: NAME,
    init: Some(init),
    devices: Some(calls::devices),
    get_properties: Some(get_properties),
    listen: Some(calls::listen),
    connect: Some(connect),
    accept: Some(calls::accept),
    reg_mr: Some(calls::reg_mr),
    reg_mr_dma_buf: Some(calls::reg_mr_dma_buf),
    dereg_mr: Some(calls::dereg_mr),
    isend: Some(calls::isend),
    irecv: Some(calls::irecv),
    iflush: Some(calls::iflush),
    test: Some(calls::test),
    close_send: Some(calls::close),
    close_recv: Some(calls::close),
    close_listen: Some(calls::close_listen),
    get_device_mr: None,
    irecv_consumed: None,
    make_v_device: None,
};
