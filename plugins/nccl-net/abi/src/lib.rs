//! C types of NCCL's network plugin interface, v6 to v12: one module a version, and here what all of them share.
//!
//! Written after the public headers (`plugins/net/example/nccl/net_v*.h` in NCCL's repository). Nothing in here does
//! anything; `tests/layout.rs` holds sizes and offsets to numbers that do not come from these types.

use std::ffi::{c_char, c_int, c_ulong, c_void};

mod versions;
pub use versions::{v6, v7, v8, v9, v10, v11, v12};

/// `ncclResult_t`. A C enum: any number may come back from a plugin.
pub type NcclResult = c_int;

/// Values of [`NcclResult`] that a plugin returns.
pub mod result {
    use super::NcclResult;
    pub const SUCCESS: NcclResult = 0;
    pub const SYSTEM_ERROR: NcclResult = 2;
    pub const INTERNAL_ERROR: NcclResult = 3;
    pub const INVALID_ARGUMENT: NcclResult = 4;
    pub const INVALID_USAGE: NcclResult = 5;
    pub const REMOTE_ERROR: NcclResult = 6;
}

/// `ncclDebugLogLevel`.
pub mod log_level {
    use super::c_int;
    pub const WARN: c_int = 2;
    pub const INFO: c_int = 3;
}

/// `ncclDebugLogSubSys`: a bit each.
pub mod subsystem {
    use super::c_ulong;
    pub const INIT: c_ulong = 1;
    pub const NET: c_ulong = 16;
}

/// `ptrSupport` and the `type` of a registration: a bit each.
pub mod ptr {
    use super::c_int;
    pub const HOST: c_int = 1;
    pub const CUDA: c_int = 2;
    pub const DMABUF: c_int = 4;
}

/// Bytes of the buffer that carries a handle.
pub const HANDLE_MAXSIZE: usize = 128;
/// Requests in flight per comm, since v7 (8 before).
pub const MAX_REQUESTS: usize = 32;
/// `*request` on entry to irecv when its completion is optional.
pub const OPTIONAL_RECV_COMPLETION: usize = 1;
/// `trafficClass` when the user chose none.
pub const TRAFFIC_CLASS_UNDEF: c_int = -1;
/// `railId` and `planeId` when there is none.
pub const NET_ID_UNDEF: i16 = -1;
/// `netDeviceType` of a NIC that the host drives.
pub const NET_DEVICE_HOST: c_int = 0;

/// `ncclDebugLogger_t`: level, subsystems, file, line, format.
pub type DebugLogger = unsafe extern "C" fn(c_int, c_ulong, *const c_char, c_int, *const c_char, ...);

/// `ncclProfilerCallback_t`: event handle, type, parent handle, plugin id, data.
pub type ProfilerCallback =
    unsafe extern "C" fn(*mut *mut c_void, c_int, *mut c_void, i64, *mut c_void) -> NcclResult;

/// `ncclNetDeviceHandle_v*_t`: only for NICs that the GPU drives.
#[repr(C)]
#[derive(Debug)]
pub struct NetDeviceHandle {
    _opaque: [u8; 0],
}

/// `ncclNetCommConfig_v10_t` and later.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub struct CommConfig {
    pub traffic_class: c_int,
}

/// `ncclNetVDeviceProps_v*_t`: the physical devices of a virtual one, at most `N`.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub struct VDeviceProps<const N: usize> {
    pub ndevs: c_int,
    pub devs: [c_int; N],
}

/// Shared signatures.
pub mod call {
    use super::*;

    pub type Devices = unsafe extern "C" fn(*mut c_int) -> NcclResult;
    pub type RegMr =
        unsafe extern "C" fn(*mut c_void, *mut c_void, usize, c_int, *mut *mut c_void) -> NcclResult;
    pub type RegMrInt =
        unsafe extern "C" fn(*mut c_void, *mut c_void, c_int, c_int, *mut *mut c_void) -> NcclResult;
    pub type RegMrDmaBuf = unsafe extern "C" fn(
        *mut c_void,
        *mut c_void,
        usize,
        c_int,
        u64,
        c_int,
        *mut *mut c_void,
    ) -> NcclResult;
    pub type DeregMr = unsafe extern "C" fn(*mut c_void, *mut c_void) -> NcclResult;
    pub type Iflush = unsafe extern "C" fn(
        *mut c_void,
        c_int,
        *mut *mut c_void,
        *mut c_int,
        *mut *mut c_void,
        *mut *mut c_void,
    ) -> NcclResult;
    pub type Test = unsafe extern "C" fn(*mut c_void, *mut c_int, *mut c_int) -> NcclResult;
    pub type Close = unsafe extern "C" fn(*mut c_void) -> NcclResult;
    pub type GetDeviceMr = unsafe extern "C" fn(*mut c_void, *mut c_void, *mut *mut c_void) -> NcclResult;
    pub type IrecvConsumed = unsafe extern "C" fn(*mut c_void, c_int, *mut c_void) -> NcclResult;
    /// Up to v10.
    pub type Listen = unsafe extern "C" fn(c_int, *mut c_void, *mut *mut c_void) -> NcclResult;
    /// Since v11.
    pub type ListenCtx =
        unsafe extern "C" fn(*mut c_void, c_int, *mut c_void, *mut *mut c_void) -> NcclResult;
    /// Since v7.
    pub type Accept =
        unsafe extern "C" fn(*mut c_void, *mut *mut c_void, *mut *mut NetDeviceHandle) -> NcclResult;
    /// v7 to v9.
    pub type Connect =
        unsafe extern "C" fn(c_int, *mut c_void, *mut *mut c_void, *mut *mut NetDeviceHandle) -> NcclResult;
    /// Since v11.
    pub type ConnectCtx = unsafe extern "C" fn(
        *mut c_void,
        c_int,
        *mut c_void,
        *mut *mut c_void,
        *mut *mut NetDeviceHandle,
    ) -> NcclResult;
    /// v6 to v9.
    pub type Init = unsafe extern "C" fn(Option<DebugLogger>) -> NcclResult;
    /// Since v11: context, communicator, configuration, logger, profiler.
    pub type InitCtx = unsafe extern "C" fn(
        *mut *mut c_void,
        u64,
        *mut CommConfig,
        Option<DebugLogger>,
        Option<ProfilerCallback>,
    ) -> NcclResult;
    /// Up to v8.
    pub type IsendInt = unsafe extern "C" fn(
        *mut c_void,
        *mut c_void,
        c_int,
        c_int,
        *mut c_void,
        *mut *mut c_void,
    ) -> NcclResult;
    /// Up to v8.
    pub type IrecvInt = unsafe extern "C" fn(
        *mut c_void,
        c_int,
        *mut *mut c_void,
        *mut c_int,
        *mut c_int,
        *mut *mut c_void,
        *mut *mut c_void,
    ) -> NcclResult;
    /// Since v10: with a profiler's handle before the request.
    pub type Isend = unsafe extern "C" fn(
        *mut c_void,
        *mut c_void,
        usize,
        c_int,
        *mut c_void,
        *mut c_void,
        *mut *mut c_void,
    ) -> NcclResult;
    /// Since v10: with profilers' handles before the request.
    pub type Irecv = unsafe extern "C" fn(
        *mut c_void,
        c_int,
        *mut *mut c_void,
        *mut usize,
        *mut c_int,
        *mut *mut c_void,
        *mut *mut c_void,
        *mut *mut c_void,
    ) -> NcclResult;
    pub type Finalize = unsafe extern "C" fn(*mut c_void) -> NcclResult;
    pub type SetNetAttr = unsafe extern "C" fn(*mut c_void, *mut c_void) -> NcclResult;
}
