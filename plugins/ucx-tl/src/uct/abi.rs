//! What moved between UCX's releases, one row each: sizes, offsets, the order of function tables, signatures.
//!
//! Taken from the headers of the tagged sources (`src/uct/base`, `uct_v2.h`, `src/ucs/config/parser.h`), on 64-bit
//! machines and builds without statistics. The first row is checked against Debian's source package by the tests, the
//! others by running traffic on each release.

/// A release series whose internals are the same.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Version {
    V1_13,
    V1_14,
    V1_15,
    V1_16,
    V1_17,
    V1_18,
    V1_19,
    V1_20,
    V1_21,
    V1_22,
}

use Version::*;

/// A symbol of libuct that came with a release, newest first.
pub const MARKS: [(&str, Version); 9] = [
    ("uct_ep_put_sgl_zcopy", V1_22),
    ("uct_md_mem_elem_pack", V1_21),
    ("uct_ep_get_device_ep", V1_20),
    ("uct_rkey_unpack_v2", V1_19),
    ("uct_iface_fill_info_str_buf", V1_18),
    ("uct_md_base_md_query", V1_17),
    ("uct_base_rkey_compare", V1_16),
    ("ucs_config_sscanf_uint_enum", V1_15),
    ("uct_md_query_v2", V1_14),
];
/// One that came after the newest release in the table.
pub const NEWER: &str = "uct_ep_get_sgl_zcopy";

/// `uct_component_t` up to `rkey_release` is the same everywhere.
#[derive(Debug, Clone, Copy)]
pub struct ComponentLayout {
    pub size: usize,
    /// None: the release does not compare keys.
    pub rkey_compare: Option<usize>,
    pub md_config: usize,
    pub cm_config: usize,
    pub tl_list: usize,
    pub md_vfs_init: usize,
}

/// `uct_tl_t`: name, query_devices and iface_open are the same everywhere.
#[derive(Debug, Clone, Copy)]
pub struct TlLayout {
    pub size: usize,
    pub config: usize,
}

/// A member of `uct_md_ops_t`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum MdOp {
    Close,
    Query,
    MemAlloc,
    MemFree,
    MemReg,
    MemDereg,
    MkeyPack,
    /// One that we do not have.
    Unsupported,
    /// `is_sockaddr_accessible`: an int.
    No,
}

/// A member of `uct_iface_internal_ops_t`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum InternalOp {
    EstimatePerf,
    VfsRefresh,
    IsReachableV2,
    IsConnected,
    Invalidate,
    Unsupported,
}

/// Offsets in `uct_md_attr_t` (1.13) or `uct_md_attr_v2_t`.
#[derive(Debug, Clone, Copy)]
pub struct MdAttrLayout {
    pub size: usize,
    /// A mask at the start says what the caller wants; it stays.
    pub has_mask: bool,
    pub max_alloc: usize,
    pub max_reg: usize,
    pub flags: usize,
    pub reg_mem_types: usize,
    pub cache_mem_types: Option<usize>,
    pub alloc_mem_types: usize,
    pub access_mem_types: usize,
    pub reg_cost: usize,
    pub rkey_packed_size: usize,
    pub local_cpus: usize,
    pub reg_alignment: Option<usize>,
}

/// Offsets in `uct_perf_attr_t` behind `bandwidth`, which is the same everywhere.
#[derive(Debug, Clone, Copy)]
pub struct PerfLayout {
    pub path_bandwidth: Option<usize>,
    pub latency: usize,
    pub max_inflight_eps: usize,
    pub flags: Option<usize>,
}

/// Everything that depends on the release.
#[derive(Debug, Clone, Copy)]
pub struct Abi {
    pub version: Version,
    pub component: ComponentLayout,
    pub tl: TlLayout,
    pub md_ops: &'static [MdOp],
    pub internal_ops: &'static [InternalOp],
    pub md_attr: MdAttrLayout,
    pub perf: PerfLayout,
    /// Size of `ucs_config_field_t`; from 1.17 its parser has a `doc` function.
    pub config_field: usize,
}

const COMPONENT_13: ComponentLayout = ComponentLayout {
    size: 208,
    rkey_compare: None,
    md_config: 64,
    cm_config: 112,
    tl_list: 160,
    md_vfs_init: 200,
};
const COMPONENT_15: ComponentLayout =
    ComponentLayout { size: 224, cm_config: 120, tl_list: 176, md_vfs_init: 216, ..COMPONENT_13 };
const COMPONENT_16: ComponentLayout = ComponentLayout {
    size: 232,
    rkey_compare: Some(64),
    md_config: 72,
    cm_config: 128,
    tl_list: 184,
    md_vfs_init: 224,
};

const TL_13: TlLayout = TlLayout { size: 96, config: 32 };
const TL_15: TlLayout = TlLayout { size: 104, config: 32 };

mod md_ops {
    use super::MdOp::{self, *};

    pub const V13: &[MdOp] = &[
        Close,
        Query,
        MemAlloc,
        MemFree,
        Unsupported,
        MemReg,
        MemDereg,
        Unsupported,
        MkeyPack,
        No,
        Unsupported,
    ];
    pub const V14: &[MdOp] = &[
        Close,
        Query,
        MemAlloc,
        MemFree,
        Unsupported,
        MemReg,
        MemDereg,
        Unsupported,
        MkeyPack,
        Unsupported,
        No,
        Unsupported,
    ];
    pub const V16: &[MdOp] = &[
        Close,
        Query,
        MemAlloc,
        MemFree,
        Unsupported,
        MemReg,
        MemDereg,
        Unsupported,
        MkeyPack,
        Unsupported,
        Unsupported,
    ];
    pub const V21: &[MdOp] = &[
        Close,
        Query,
        MemAlloc,
        MemFree,
        Unsupported,
        MemReg,
        MemDereg,
        Unsupported,
        MkeyPack,
        Unsupported,
        Unsupported,
        Unsupported,
    ];
}

mod internal_ops {
    use super::InternalOp::{self, *};

    // estimate_perf, vfs_refresh, ep_query, ep_invalidate; then connect_to_ep_v2; is_reachable_v2; is_connected.
    pub const V13: &[InternalOp] = &[EstimatePerf, VfsRefresh, Unsupported, Invalidate];
    pub const V14: &[InternalOp] = &[EstimatePerf, VfsRefresh, Unsupported, Invalidate, Unsupported];
    pub const V15: &[InternalOp] =
        &[EstimatePerf, VfsRefresh, Unsupported, Invalidate, Unsupported, IsReachableV2];
    pub const V16: &[InternalOp] =
        &[EstimatePerf, VfsRefresh, Unsupported, Invalidate, Unsupported, IsReachableV2, IsConnected];
    // iface_query_v2 first, iface_mem_element_pack in the middle, ep_get_device_ep last.
    pub const V20: &[InternalOp] = &[
        Unsupported,
        EstimatePerf,
        VfsRefresh,
        Unsupported,
        Unsupported,
        Invalidate,
        Unsupported,
        IsReachableV2,
        IsConnected,
        Unsupported,
    ];
    pub const V21: &[InternalOp] = &[
        EstimatePerf,
        VfsRefresh,
        Unsupported,
        Invalidate,
        Unsupported,
        IsReachableV2,
        IsConnected,
        Unsupported,
    ];
    // iface_query_v2 first again; ep_get_device_ep and ep_put_sgl_zcopy last.
    pub const V22: &[InternalOp] = &[
        Unsupported,
        EstimatePerf,
        VfsRefresh,
        Unsupported,
        Invalidate,
        Unsupported,
        IsReachableV2,
        IsConnected,
        Unsupported,
        Unsupported,
    ];
}

const ATTR_13: MdAttrLayout = MdAttrLayout {
    size: 224,
    has_mask: false,
    max_alloc: 0,
    max_reg: 8,
    flags: 16,
    reg_mem_types: 24,
    cache_mem_types: None,
    alloc_mem_types: 40,
    access_mem_types: 48,
    reg_cost: 56,
    rkey_packed_size: 88,
    local_cpus: 96,
    reg_alignment: None,
};
const ATTR_14: MdAttrLayout = MdAttrLayout {
    size: 512,
    has_mask: true,
    max_alloc: 8,
    max_reg: 16,
    flags: 24,
    reg_mem_types: 32,
    cache_mem_types: Some(40),
    alloc_mem_types: 56,
    access_mem_types: 64,
    reg_cost: 80,
    rkey_packed_size: 112,
    local_cpus: 120,
    reg_alignment: None,
};
const ATTR_15: MdAttrLayout = MdAttrLayout {
    size: 520,
    cache_mem_types: Some(48),
    alloc_mem_types: 64,
    access_mem_types: 72,
    reg_cost: 88,
    rkey_packed_size: 120,
    local_cpus: 128,
    ..ATTR_14
};
const ATTR_16: MdAttrLayout = MdAttrLayout { size: 528, reg_alignment: Some(520), ..ATTR_15 };
/// `gva_mem_types` behind `cache_mem_types`.
const ATTR_18: MdAttrLayout = MdAttrLayout {
    size: 536,
    alloc_mem_types: 72,
    access_mem_types: 80,
    reg_cost: 96,
    rkey_packed_size: 128,
    local_cpus: 136,
    reg_alignment: Some(528),
    ..ATTR_16
};
const ATTR_22: MdAttrLayout = MdAttrLayout { size: 544, ..ATTR_18 };

const PERF_13: PerfLayout =
    PerfLayout { path_bandwidth: None, latency: 64, max_inflight_eps: 80, flags: None };
const PERF_17: PerfLayout = PerfLayout { flags: Some(88), ..PERF_13 };
const PERF_19: PerfLayout =
    PerfLayout { path_bandwidth: Some(64), latency: 80, max_inflight_eps: 96, flags: Some(104) };

const A13: Abi = Abi {
    version: V1_13,
    component: COMPONENT_13,
    tl: TL_13,
    md_ops: md_ops::V13,
    internal_ops: internal_ops::V13,
    md_attr: ATTR_13,
    perf: PERF_13,
    config_field: 80,
};
const A14: Abi =
    Abi { version: V1_14, md_ops: md_ops::V14, internal_ops: internal_ops::V14, md_attr: ATTR_14, ..A13 };
const A15: Abi = Abi {
    version: V1_15,
    component: COMPONENT_15,
    tl: TL_15,
    internal_ops: internal_ops::V15,
    md_attr: ATTR_15,
    ..A14
};
const A16: Abi = Abi {
    version: V1_16,
    component: COMPONENT_16,
    md_ops: md_ops::V16,
    internal_ops: internal_ops::V16,
    md_attr: ATTR_16,
    ..A15
};
const A17: Abi = Abi { version: V1_17, perf: PERF_17, config_field: 88, ..A16 };
const A18: Abi = Abi { version: V1_18, md_attr: ATTR_18, ..A17 };
const A19: Abi = Abi { version: V1_19, perf: PERF_19, ..A18 };
const A20: Abi = Abi { version: V1_20, internal_ops: internal_ops::V20, ..A19 };
const A21: Abi = Abi { version: V1_21, md_ops: md_ops::V21, internal_ops: internal_ops::V21, ..A20 };
const A22: Abi = Abi { version: V1_22, internal_ops: internal_ops::V22, md_attr: ATTR_22, ..A21 };

static TABLE: [Abi; 10] = [A13, A14, A15, A16, A17, A18, A19, A20, A21, A22];

impl Abi {
    pub fn of(version: Version) -> &'static Abi {
        &TABLE[version as usize]
    }
}

impl Version {
    /// mem_reg takes a structure of parameters, and the MD's attributes have a mask.
    pub fn has_v2_memory(self) -> bool {
        self >= V1_14
    }

    /// mkey_pack takes the range.
    pub fn packs_ranges(self) -> bool {
        self >= V1_16
    }

    /// rkey_unpack takes parameters, mem_alloc a device.
    pub fn has_sys_devices(self) -> bool {
        self >= V1_19
    }

    /// The release's number, as "1.13".
    pub fn name(self) -> String {
        format!("1.{}", 13 + self as u32)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_version_has_its_row() {
        for (i, abi) in TABLE.iter().enumerate() {
            assert_eq!(abi.version as usize, i);
        }
        assert!(MARKS.iter().rev().map(|(_, v)| *v as usize).eq(1..TABLE.len()), "one mark for each step");
        assert_eq!((V1_13.name(), V1_22.name()), ("1.13".into(), "1.22".into()));
    }

    #[test]
    fn tables_have_the_sizes_of_the_headers() {
        let md: Vec<usize> = TABLE.iter().map(|abi| abi.md_ops.len() * 8).collect();
        assert_eq!(md, [88, 96, 96, 88, 88, 88, 88, 88, 96, 96]);
        let internal: Vec<usize> = TABLE.iter().map(|abi| abi.internal_ops.len() * 8).collect();
        assert_eq!(internal, [32, 40, 48, 56, 56, 56, 56, 80, 64, 80]);
    }

    /// `cargo xtask test` compiles tests/layout.c with the headers of Debian's source package, and runs this.
    #[test]
    #[ignore = "run by cargo xtask test, with FF_UCX_LAYOUT naming what tests/layout.c printed"]
    fn debian_has_the_first_row() {
        use crate::iface::Config;
        use crate::uct::types::{BaseIface, Completion, IfaceAttr, IfaceParams, Iov, PendingReq};
        use std::mem::offset_of;

        let path = std::env::var("FF_UCX_LAYOUT").expect("FF_UCX_LAYOUT names a file");
        let text = std::fs::read_to_string(path).expect("readable");
        let said: Vec<(&str, usize)> = text
            .lines()
            .map(|line| line.rsplit_once(' ').expect("a name and a number"))
            .map(|(name, value)| (name, value.parse().expect("a number")))
            .collect();
        let md_op = |op| A13.md_ops.iter().position(|o| *o == op).expect("in the table") * 8;
        let internal_op = |op| A13.internal_ops.iter().position(|o| *o == op).expect("in the table") * 8;
        let ours = [
            ("sizeof(uct_component_t)", A13.component.size),
            ("uct_component_t.rkey_unpack", 40),
            ("uct_component_t.md_config", A13.component.md_config),
            ("uct_component_t.cm_config", A13.component.cm_config),
            ("uct_component_t.tl_list", A13.component.tl_list),
            ("uct_component_t.md_vfs_init", A13.component.md_vfs_init),
            ("sizeof(uct_tl_t)", A13.tl.size),
            ("uct_tl_t.query_devices", 16),
            ("uct_tl_t.config", A13.tl.config),
            ("sizeof(uct_md_ops_t)", A13.md_ops.len() * 8),
            ("uct_md_ops_t.mem_alloc", md_op(MdOp::MemAlloc)),
            ("uct_md_ops_t.mem_reg", md_op(MdOp::MemReg)),
            ("uct_md_ops_t.mkey_pack", md_op(MdOp::MkeyPack)),
            ("sizeof(uct_iface_internal_ops_t)", A13.internal_ops.len() * 8),
            ("uct_iface_internal_ops_t.ep_invalidate", internal_op(InternalOp::Invalidate)),
            ("sizeof(uct_md_attr_t)", A13.md_attr.size),
            ("uct_md_attr_t.cap.flags", A13.md_attr.flags),
            ("uct_md_attr_t.cap.alloc_mem_types", A13.md_attr.alloc_mem_types),
            ("uct_md_attr_t.cap.access_mem_types", A13.md_attr.access_mem_types),
            ("uct_md_attr_t.reg_cost", A13.md_attr.reg_cost),
            ("uct_md_attr_t.rkey_packed_size", A13.md_attr.rkey_packed_size),
            ("uct_md_attr_t.local_cpus", A13.md_attr.local_cpus),
            ("sizeof(ucs_config_field_t)", A13.config_field),
            ("uct_perf_attr_t.bandwidth", 48),
            ("uct_perf_attr_t.latency", A13.perf.latency),
            ("uct_perf_attr_t.max_inflight_eps", A13.perf.max_inflight_eps),
            ("sizeof(uct_iface_ops_t)", 50 * 8),
            ("uct_iface_ops_t.ep_am_zcopy", 9 * 8),
            ("uct_iface_ops_t.ep_atomic64_fetch", 15 * 8),
            ("uct_iface_ops_t.ep_pending_add", 24 * 8),
            ("uct_iface_ops_t.ep_create", 29 * 8),
            ("uct_iface_ops_t.ep_destroy", 33 * 8),
            ("uct_iface_ops_t.iface_flush", 38 * 8),
            ("uct_iface_ops_t.iface_close", 45 * 8),
            ("uct_iface_ops_t.iface_is_reachable", 49 * 8),
            ("sizeof(uct_base_iface_t)", size_of::<BaseIface>()),
            ("uct_base_iface_t.am", offset_of!(BaseIface, am)),
            ("sizeof(uct_base_ep_t)", 8),
            ("sizeof(uct_iface_attr_t)", size_of::<IfaceAttr>()),
            ("uct_iface_attr_t.overhead", offset_of!(IfaceAttr, overhead)),
            ("uct_iface_attr_t.latency", offset_of!(IfaceAttr, latency)),
            ("uct_iface_params_t.open_mode", offset_of!(IfaceParams, open_mode)),
            ("sizeof(uct_iface_config_t)", offset_of!(Config, fifo_size)),
            ("sizeof(uct_completion_t)", size_of::<Completion>()),
            ("sizeof(uct_pending_req_t)", size_of::<PendingReq>()),
            ("sizeof(uct_iov_t)", size_of::<Iov>()),
            ("sizeof(ucs_status_t)", 1),
        ];
        assert_eq!(said, ours);
    }
}
