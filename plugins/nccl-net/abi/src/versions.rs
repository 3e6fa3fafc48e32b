//! The two structures of each version, field by field as in its header.

use std::ffi::{c_char, c_float, c_int, c_void};

use crate::{DebugLogger, NcclResult, NetDeviceHandle, ProfilerCallback, VDeviceProps, call};

/// `Props` and `Net` of one version.
macro_rules! version {
    ($(#[$doc:meta])* $name:ident props { $($field:ident: $ty:ty,)* } net { $($call:ident: $fn:ty,)* }) => {
        $(#[$doc])*
        pub mod $name {
            #[allow(unused_imports, reason = "each version uses some of the shared names")]
            use super::*;

            /// `ncclNetProperties_v*_t`.
            #[repr(C)]
            #[derive(Debug, Clone, Copy)]
            pub struct Props { $(pub $field: $ty,)* }

            /// `ncclNet_v*_t`, the exported structure.
            #[repr(C)]
            #[derive(Debug, Clone, Copy)]
            pub struct Net {
                pub name: *const c_char,
                $(pub $call: Option<$fn>,)*
            }

            // SAFETY: function pointers, and a name that lives as long as the library.
            unsafe impl Sync for Net {}
            // SAFETY: as above.
            unsafe impl Send for Net {}

            /// `getProperties`.
            pub type GetProperties = unsafe extern "C" fn(c_int, *mut Props) -> NcclResult;
        }
    };
}

version! {
    /// NCCL 2.13 to 2.18.
    v6
    props {
        name: *mut c_char, pci_path: *mut c_char, guid: u64, ptr_support: c_int, speed: c_int, port: c_int,
        latency: c_float, max_comms: c_int, max_recvs: c_int,
    }
    net {
        init: call::Init, devices: call::Devices, get_properties: GetProperties, listen: call::Listen,
        connect: unsafe extern "C" fn(c_int, *mut c_void, *mut *mut c_void) -> NcclResult,
        accept: unsafe extern "C" fn(*mut c_void, *mut *mut c_void) -> NcclResult,
        reg_mr: call::RegMrInt, reg_mr_dma_buf: call::RegMrDmaBuf, dereg_mr: call::DeregMr,
        isend: call::IsendInt, irecv: call::IrecvInt, iflush: call::Iflush, test: call::Test,
        close_send: call::Close, close_recv: call::Close, close_listen: call::Close,
    }
}

version! {
    /// NCCL 2.19.
    v7
    props {
        name: *mut c_char, pci_path: *mut c_char, guid: u64, ptr_support: c_int, speed: c_int, port: c_int,
        latency: c_float, max_comms: c_int, max_recvs: c_int, net_device_type: c_int, net_device_version: c_int,
    }
    net {
        init: call::Init, devices: call::Devices, get_properties: GetProperties, listen: call::Listen,
        connect: call::Connect, accept: call::Accept,
        reg_mr: call::RegMrInt, reg_mr_dma_buf: call::RegMrDmaBuf, dereg_mr: call::DeregMr,
        isend: call::IsendInt, irecv: call::IrecvInt, iflush: call::Iflush, test: call::Test,
        close_send: call::Close, close_recv: call::Close, close_listen: call::Close,
        get_device_mr: call::GetDeviceMr, irecv_consumed: call::IrecvConsumed,
    }
}

version! {
    /// NCCL 2.20 to 2.23.
    v8
    props {
        name: *mut c_char, pci_path: *mut c_char, guid: u64, ptr_support: c_int, reg_is_global: c_int, speed: c_int,
        port: c_int, latency: c_float, max_comms: c_int, max_recvs: c_int, net_device_type: c_int,
        net_device_version: c_int,
    }
    net {
        init: call::Init, devices: call::Devices, get_properties: GetProperties, listen: call::Listen,
        connect: call::Connect, accept: call::Accept,
        reg_mr: call::RegMr, reg_mr_dma_buf: call::RegMrDmaBuf, dereg_mr: call::DeregMr,
        isend: call::IsendInt, irecv: call::IrecvInt, iflush: call::Iflush, test: call::Test,
        close_send: call::Close, close_recv: call::Close, close_listen: call::Close,
        get_device_mr: call::GetDeviceMr, irecv_consumed: call::IrecvConsumed,
    }
}

version! {
    /// NCCL 2.24 and 2.25.
    v9
    props {
        name: *mut c_char, pci_path: *mut c_char, guid: u64, ptr_support: c_int, reg_is_global: c_int,
        force_flush: c_int, speed: c_int, port: c_int, latency: c_float, max_comms: c_int, max_recvs: c_int,
        net_device_type: c_int, net_device_version: c_int, v_props: VDeviceProps<4>, max_p2p_bytes: usize,
        max_coll_bytes: usize,
    }
    net {
        init: call::Init, devices: call::Devices, get_properties: GetProperties, listen: call::Listen,
        connect: call::Connect, accept: call::Accept,
        reg_mr: call::RegMr, reg_mr_dma_buf: call::RegMrDmaBuf, dereg_mr: call::DeregMr,
        isend: unsafe extern "C" fn(
            *mut c_void, *mut c_void, usize, c_int, *mut c_void, *mut *mut c_void,
        ) -> NcclResult,
        irecv: unsafe extern "C" fn(
            *mut c_void, c_int, *mut *mut c_void, *mut usize, *mut c_int, *mut *mut c_void, *mut *mut c_void,
        ) -> NcclResult,
        iflush: call::Iflush, test: call::Test,
        close_send: call::Close, close_recv: call::Close, close_listen: call::Close,
        get_device_mr: call::GetDeviceMr, irecv_consumed: call::IrecvConsumed,
        make_v_device: unsafe extern "C" fn(*mut c_int, *mut VDeviceProps<4>) -> NcclResult,
    }
}

version! {
    /// NCCL 2.26 and 2.27.
    v10
    props {
        name: *mut c_char, pci_path: *mut c_char, guid: u64, ptr_support: c_int, reg_is_global: c_int,
        force_flush: c_int, speed: c_int, port: c_int, latency: c_float, max_comms: c_int, max_recvs: c_int,
        net_device_type: c_int, net_device_version: c_int, v_props: VDeviceProps<4>, max_p2p_bytes: usize,
        max_coll_bytes: usize,
    }
    net {
        init: unsafe extern "C" fn(Option<DebugLogger>, Option<ProfilerCallback>) -> NcclResult,
        devices: call::Devices, get_properties: GetProperties, listen: call::Listen,
        connect: unsafe extern "C" fn(
            c_int, *mut crate::CommConfig, *mut c_void, *mut *mut c_void, *mut *mut NetDeviceHandle,
        ) -> NcclResult,
        accept: call::Accept,
        reg_mr: call::RegMr, reg_mr_dma_buf: call::RegMrDmaBuf, dereg_mr: call::DeregMr,
        isend: call::Isend, irecv: call::Irecv, iflush: call::Iflush, test: call::Test,
        close_send: call::Close, close_recv: call::Close, close_listen: call::Close,
        get_device_mr: call::GetDeviceMr, irecv_consumed: call::IrecvConsumed,
        make_v_device: unsafe extern "C" fn(*mut c_int, *mut VDeviceProps<4>) -> NcclResult,
    }
}

version! {
    /// NCCL 2.28 and 2.29.
    v11
    props {
        name: *mut c_char, pci_path: *mut c_char, guid: u64, ptr_support: c_int, reg_is_global: c_int,
        force_flush: c_int, speed: c_int, port: c_int, latency: c_float, max_comms: c_int, max_recvs: c_int,
        net_device_type: c_int, net_device_version: c_int, v_props: VDeviceProps<4>, max_p2p_bytes: usize,
        max_coll_bytes: usize, max_multi_request_size: c_int,
    }
    net {
        init: call::InitCtx, devices: call::Devices, get_properties: GetProperties, listen: call::ListenCtx,
        connect: call::ConnectCtx, accept: call::Accept,
        reg_mr: call::RegMr, reg_mr_dma_buf: call::RegMrDmaBuf, dereg_mr: call::DeregMr,
        isend: call::Isend, irecv: call::Irecv, iflush: call::Iflush, test: call::Test,
        close_send: call::Close, close_recv: call::Close, close_listen: call::Close,
        get_device_mr: call::GetDeviceMr, irecv_consumed: call::IrecvConsumed,
        make_v_device: unsafe extern "C" fn(*mut c_int, *mut VDeviceProps<4>) -> NcclResult,
        finalize: call::Finalize, set_net_attr: call::SetNetAttr,
    }
}

version! {
    /// NCCL 2.30 and later.
    v12
    props {
        name: *mut c_char, pci_path: *mut c_char, guid: u64, ptr_support: c_int, reg_is_global: c_int,
        force_flush: c_int, speed: c_int, port: c_int, latency: c_float, max_comms: c_int, max_recvs: c_int,
        net_device_type: c_int, net_device_version: c_int, v_props: VDeviceProps<8>, max_p2p_bytes: usize,
        max_coll_bytes: usize, max_multi_request_size: c_int, rail_id: i16, plane_id: i16,
    }
    net {
        init: call::InitCtx, devices: call::Devices, get_properties: GetProperties, listen: call::ListenCtx,
        connect: call::ConnectCtx, accept: call::Accept,
        reg_mr: call::RegMr, reg_mr_dma_buf: call::RegMrDmaBuf, dereg_mr: call::DeregMr,
        isend: call::Isend, irecv: call::Irecv, iflush: call::Iflush, test: call::Test,
        close_send: call::Close, close_recv: call::Close, close_listen: call::Close,
        get_device_mr: call::GetDeviceMr, irecv_consumed: call::IrecvConsumed,
        make_v_device: unsafe extern "C" fn(*mut c_int, *mut VDeviceProps<8>) -> NcclResult,
        finalize: call::Finalize, set_net_attr: call::SetNetAttr,
    }
}
