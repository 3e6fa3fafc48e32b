//! Sizes and offsets against numbers that a C compiler gave for NCCL's own headers (x86-64).

use std::mem::{offset_of, size_of};

use freeflow_nccl_abi::{v6, v7, v8, v9, v10, v11, v12};

macro_rules! offsets {
    ($ty:ty { $($field:ident = $at:literal,)* } size $size:literal) => {
        $(assert_eq!(offset_of!($ty, $field), $at, concat!(stringify!($ty), ".", stringify!($field)));)*
        assert_eq!(size_of::<$ty>(), $size, stringify!($ty));
    };
}

#[test]
fn properties() {
    offsets!(v6::Props {
        name = 0, pci_path = 8, guid = 16, ptr_support = 24, speed = 28, port = 32, latency = 36, max_comms = 40,
        max_recvs = 44,
    } size 48);
    offsets!(v7::Props {
        ptr_support = 24, speed = 28, max_recvs = 44, net_device_type = 48, net_device_version = 52,
    } size 56);
    offsets!(v8::Props {
        ptr_support = 24, reg_is_global = 28, speed = 32, port = 36, latency = 40, max_comms = 44, max_recvs = 48,
        net_device_type = 52, net_device_version = 56,
    } size 64);
    offsets!(v9::Props {
        reg_is_global = 28, force_flush = 32, speed = 36, port = 40, latency = 44, max_comms = 48, max_recvs = 52,
        net_device_type = 56, net_device_version = 60, v_props = 64, max_p2p_bytes = 88, max_coll_bytes = 96,
    } size 104);
    offsets!(v10::Props { v_props = 64, max_p2p_bytes = 88, max_coll_bytes = 96, } size 104);
    offsets!(v11::Props {
        v_props = 64, max_p2p_bytes = 88, max_coll_bytes = 96, max_multi_request_size = 104,
    } size 112);
    offsets!(v12::Props {
        v_props = 64, max_p2p_bytes = 104, max_coll_bytes = 112, max_multi_request_size = 120, rail_id = 124,
        plane_id = 126,
    } size 128);
}

#[test]
fn functions() {
    offsets!(v6::Net { name = 0, init = 8, connect = 40, reg_mr_dma_buf = 64, test = 104, close_listen = 128, } size 136);
    offsets!(v7::Net { init = 8, connect = 40, isend = 80, get_device_mr = 136, irecv_consumed = 144, } size 152);
    offsets!(v8::Net { init = 8, irecv = 88, get_device_mr = 136, irecv_consumed = 144, } size 152);
    offsets!(v9::Net { init = 8, iflush = 96, irecv_consumed = 144, make_v_device = 152, } size 160);
    offsets!(v10::Net { init = 8, connect = 40, make_v_device = 152, } size 160);
    offsets!(v11::Net { init = 8, listen = 32, make_v_device = 152, finalize = 160, set_net_attr = 168, } size 176);
    offsets!(v12::Net { init = 8, listen = 32, make_v_device = 152, finalize = 160, set_net_attr = 168, } size 176);
}
