//! What never moved between UCX 1.13 and 1.22: statuses, flags and the structures of the hot path (uct.h, uct_iface.h).

use std::ffi::{c_char, c_int, c_uint, c_void};

/// `ucs_status_t`: a packed enum.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(transparent)]
pub struct Status(pub i8);

impl Status {
    pub const OK: Status = Status(0);
    pub const INPROGRESS: Status = Status(1);
    pub const NO_RESOURCE: Status = Status(-2);
    pub const IO_ERROR: Status = Status(-3);
    pub const NO_MEMORY: Status = Status(-4);
    pub const INVALID_PARAM: Status = Status(-5);
    pub const UNREACHABLE: Status = Status(-6);
    pub const INVALID_ADDR: Status = Status(-7);
    pub const NO_DEVICE: Status = Status(-14);
    pub const BUSY: Status = Status(-15);
    pub const CANCELED: Status = Status(-16);
    pub const UNSUPPORTED: Status = Status(-22);
    pub const NOT_CONNECTED: Status = Status(-24);
    pub const CONNECTION_RESET: Status = Status(-25);
    pub const ENDPOINT_TIMEOUT: Status = Status(-80);

    pub fn is_error(self) -> bool {
        self.0 < 0
    }

    /// As the bcopy calls return it, in place of a length.
    pub fn as_len(self) -> isize {
        isize::from(self.0)
    }
}

/// `UCT_IFACE_FLAG_*`.
pub mod cap {
    pub const AM_SHORT: u64 = 1;
    pub const AM_BCOPY: u64 = 1 << 1;
    pub const AM_ZCOPY: u64 = 1 << 2;
    pub const PENDING: u64 = 1 << 3;
    pub const PUT_SHORT: u64 = 1 << 4;
    pub const PUT_BCOPY: u64 = 1 << 5;
    pub const PUT_ZCOPY: u64 = 1 << 6;
    pub const GET_SHORT: u64 = 1 << 8;
    pub const GET_BCOPY: u64 = 1 << 9;
    pub const GET_ZCOPY: u64 = 1 << 10;
    pub const ATOMIC_CPU: u64 = 1 << 30;
    pub const ERRHANDLE_PEER_FAILURE: u64 = 1 << 38;
    pub const EP_CHECK: u64 = 1 << 39;
    pub const CONNECT_TO_IFACE: u64 = 1 << 40;
    pub const CB_SYNC: u64 = 1 << 44;
    pub const INTER_NODE: u64 = 1 << 54;
}

/// `UCT_IFACE_FLAG_EVENT_*`.
pub mod event_cap {
    pub const SEND_COMP: u64 = 1;
    pub const RECV: u64 = 1 << 1;
    pub const FD: u64 = 1 << 3;
}

/// `UCT_EVENT_*`, as uct_iface_event_arm takes them.
pub mod event {
    pub const SEND_COMP: std::ffi::c_uint = 1;
}

/// `UCT_MD_FLAG_*`.
pub mod md_flag {
    pub const ALLOC: u64 = 1;
    pub const REG: u64 = 1 << 1;
    pub const NEED_RKEY: u64 = 1 << 3;
    pub const INVALIDATE: u64 = 1 << 8;
}

/// `UCT_MD_MEM_*`, flags of a registration.
pub mod mem_flag {
    pub const FIXED: u64 = 1 << 1;
    pub const HIDE_ERRORS: u64 = 1 << 3;
}

/// `uct_atomic_op_t`.
pub mod atomic {
    use std::ffi::c_uint;

    pub const ADD: c_uint = 0;
    pub const AND: c_uint = 1;
    pub const OR: c_uint = 2;
    pub const XOR: c_uint = 3;
    pub const SWAP: c_uint = 4;
    pub const CSWAP: c_uint = 5;
    pub const POST: u64 = 0xf;
    pub const FETCH: u64 = 0x3f;
}

pub type AmCallback =
    unsafe extern "C" fn(arg: *mut c_void, data: *mut c_void, len: usize, flags: c_uint) -> Status;
pub type PackCallback = unsafe extern "C" fn(dest: *mut c_void, arg: *mut c_void) -> usize;
pub type UnpackCallback = unsafe extern "C" fn(arg: *mut c_void, data: *const c_void, len: usize);
pub type PurgeCallback = unsafe extern "C" fn(req: *mut PendingReq, arg: *mut c_void);

/// `uct_am_handler_t`.
#[derive(Clone, Copy)]
#[repr(C)]
pub struct AmHandler {
    pub callback: Option<AmCallback>,
    pub arg: *mut c_void,
    pub flags: u32,
}

/// Active message ids.
pub const AM_IDS: usize = 32;

/// `uct_base_iface_t`, of a build without statistics. UCX's constructor fills it.
#[repr(C)]
pub struct BaseIface {
    ops: [*const c_void; 50],
    internal_ops: *const c_void,
    pub md: *mut c_void,
    worker: *mut c_void,
    /// UCX's constructor puts a handler into each.
    pub am: [AmHandler; AM_IDS],
    rest: [u64; 11],
}

const _: () = assert!(size_of::<BaseIface>() == 1280 && std::mem::offset_of!(BaseIface, am) == 424);

/// `ucm_event_t` of memory that is about to be unmapped.
#[repr(C)]
pub struct UnmapEvent {
    pub address: u64,
    pub size: u64,
}

/// `uct_completion_t`.
#[repr(C)]
pub struct Completion {
    func: unsafe extern "C" fn(*mut Completion),
    count: c_int,
    status: Status,
}

impl Completion {
    /// `uct_invoke_completion`: one of the operations it counts has ended.
    ///
    /// # Safety
    /// `this` is null or a live completion that counts the operation.
    pub unsafe fn done(this: *mut Completion, status: Status) {
        // SAFETY: live, by the caller's promise; UCX calls the transport from one thread at a time.
        let Some(completion) = (unsafe { this.as_mut() }) else { return };
        if status.is_error() && completion.status == Status::OK {
            completion.status = status;
        }
        completion.count -= 1;
        if completion.count == 0 {
            // SAFETY: the user's own function for it.
            unsafe { (completion.func)(this) };
        }
    }
}

impl Completion {
    /// It waits for so many more operations.
    ///
    /// # Safety
    /// `this` is null or a live completion.
    pub unsafe fn expect(this: *mut Completion, more: c_int) {
        // SAFETY: live, by the caller's promise.
        if let Some(completion) = unsafe { this.as_mut() } {
            completion.count += more;
        }
    }
}

/// `uct_pending_req_t`.
#[repr(C)]
pub struct PendingReq {
    pub func: unsafe extern "C" fn(*mut PendingReq) -> Status,
    private: [u8; 40],
}

/// `uct_iov_t`.
#[derive(Clone, Copy)]
#[repr(C)]
pub struct Iov {
    pub buffer: *mut c_void,
    pub length: usize,
    pub memh: *mut c_void,
    pub stride: usize,
    pub count: c_uint,
}

impl Iov {
    /// UCX's list.
    ///
    /// # Safety
    /// `first` has `count` entries behind it, while the result is used.
    pub unsafe fn list<'a>(first: *const Iov, count: usize) -> &'a [Iov] {
        if count == 0 {
            return &[];
        }
        // SAFETY: by the caller's promise.
        unsafe { std::slice::from_raw_parts(first, count) }
    }

    pub fn total(&self) -> usize {
        self.length * self.count as usize
    }
}

/// `uct_ep_params_t`, its first fields.
#[repr(C)]
pub struct EpParams {
    pub field_mask: u64,
    pub iface: *mut c_void,
    pub user_data: *mut c_void,
    pub dev_addr: *const u8,
    pub iface_addr: *const u8,
}

/// `UCT_EP_PARAM_FIELD_*`.
pub mod ep_field {
    pub const IFACE: u64 = 1;
    pub const DEV_ADDR: u64 = 1 << 2;
    pub const IFACE_ADDR: u64 = 1 << 3;
}

/// `uct_iface_params_t`, its first fields.
#[repr(C)]
pub struct IfaceParams {
    pub field_mask: u64,
    cpu_mask: [u64; 16],
    pub open_mode: u64,
    tl_name: *const c_char,
    pub dev_name: *const c_char,
}

/// `UCT_IFACE_PARAM_FIELD_OPEN_MODE`, `..._DEVICE`, `UCT_IFACE_OPEN_MODE_DEVICE`.
pub const OPEN_MODE_FIELD: u64 = 1 << 1;
pub const DEVICE_FIELD: u64 = 1 << 2;
pub const OPEN_MODE_DEVICE: u64 = 1;

/// `uct_iface_is_reachable_params_t`. Only the fields in the mask are there.
#[repr(C)]
pub struct ReachableParams {
    pub field_mask: u64,
    pub device_addr: *const u8,
    pub iface_addr: *const u8,
    pub info: *mut c_char,
    pub info_len: usize,
}

/// The same of 1.16 and later.
#[repr(C)]
pub struct ScopedParams {
    pub known: ReachableParams,
    pub scope: c_uint,
}

/// `UCT_IFACE_IS_REACHABLE_FIELD_*`.
pub mod reachable {
    pub const DEVICE_ADDR: u64 = 1;
    pub const IFACE_ADDR: u64 = 1 << 1;
    pub const INFO: u64 = 1 << 2 | 1 << 3;
    pub const SCOPE: u64 = 1 << 4;
    /// `UCT_IFACE_REACHABILITY_SCOPE_DEVICE`: is it on this host?
    pub const SCOPE_DEVICE: std::ffi::c_uint = 0;
}

/// `uct_md_mem_reg_params_t`, its first fields (UCX 1.14 and later).
#[repr(C)]
pub struct MemRegParams {
    pub field_mask: u64,
    pub flags: u64,
}

/// `uct_md_mem_dereg_params_t`.
#[repr(C)]
pub struct MemDeregParams {
    pub field_mask: u64,
    pub flags: c_uint,
    pub memh: *mut c_void,
    pub comp: *mut Completion,
}

/// `UCT_MD_MEM_DEREG_FIELD_*`, `UCT_MD_MEM_DEREG_FLAG_INVALIDATE`.
pub mod dereg {
    pub const FIELD_MEMH: u64 = 1;
    pub const FIELD_FLAGS: u64 = 1 << 1;
    pub const FIELD_COMPLETION: u64 = 1 << 2;
    pub const INVALIDATE: std::ffi::c_uint = 1;
}

/// A transfer rate: `uct_ppn_bandwidth_t`.
#[derive(Debug, Clone, Copy, Default)]
#[repr(C)]
pub struct Bandwidth {
    pub dedicated: f64,
    pub shared: f64,
}

/// `ucs_linear_func_t`: `c + m x`.
#[derive(Debug, Clone, Copy, Default)]
#[repr(C)]
pub struct Linear {
    pub c: f64,
    pub m: f64,
}

/// Limits of put and get in `uct_iface_attr_t`.
#[derive(Debug, Clone, Copy, Default)]
#[repr(C)]
pub struct RmaLimits {
    pub max_short: usize,
    pub max_bcopy: usize,
    pub min_zcopy: usize,
    pub max_zcopy: usize,
    pub opt_zcopy_align: usize,
    pub align_mtu: usize,
    pub max_iov: usize,
}

/// Limits of active messages.
#[derive(Debug, Clone, Copy, Default)]
#[repr(C)]
pub struct AmLimits {
    pub max_short: usize,
    pub max_bcopy: usize,
    pub min_zcopy: usize,
    pub max_zcopy: usize,
    pub opt_zcopy_align: usize,
    pub align_mtu: usize,
    pub max_hdr: usize,
    pub max_iov: usize,
}

/// Operations without and with a result.
#[derive(Debug, Clone, Copy, Default)]
#[repr(C)]
pub struct AtomicCaps {
    pub op_flags: u64,
    pub fop_flags: u64,
}

/// `uct_iface_attr_t`. (1.22 put `ctl_device` into the padding; uct_base_iface_query clears all of it.)
#[derive(Clone, Copy)]
#[repr(C)]
pub struct IfaceAttr {
    pub put: RmaLimits,
    pub get: RmaLimits,
    pub am: AmLimits,
    tag: [usize; 11],
    pub atomic32: AtomicCaps,
    pub atomic64: AtomicCaps,
    pub flags: u64,
    pub event_flags: u64,
    pub device_addr_len: usize,
    pub iface_addr_len: usize,
    ep_addr_len: usize,
    max_conn_priv: usize,
    listen_sockaddr: [u64; 16],
    pub overhead: f64,
    pub bandwidth: Bandwidth,
    pub latency: Linear,
    pub priority: u8,
    max_num_eps: usize,
    dev_num_paths: c_uint,
}

const _: () = assert!(size_of::<IfaceAttr>() == 536 && std::mem::offset_of!(IfaceAttr, overhead) == 472);
const _: () =
    assert!(size_of::<Completion>() == 16 && size_of::<PendingReq>() == 48 && size_of::<Iov>() == 40);
