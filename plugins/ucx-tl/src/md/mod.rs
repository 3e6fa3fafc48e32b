//! The memory domain: one open device and one protection domain, in which UCX registers, allocates and packs keys.

mod cache;
mod unmaps;

use std::ffi::{c_char, c_int, c_uint, c_void};
use std::sync::{Arc, Mutex, PoisonError};

use freeflow_core::client::{Context, Mr, Pd};
use freeflow_core::verbs::Access;

use crate::component::ucx_of;
use crate::device::Opened;
use crate::perf;
use crate::rkey::Packed;
use crate::uct::abi::MdOp;
use crate::uct::symbols::{Level, Ucx};
use crate::uct::types::{Completion, MemDeregParams, MemRegParams, Status, dereg, md_flag, mem_flag};
use cache::Cache;
use unmaps::Unmaps;

/// `UCS_BIT(UCS_MEMORY_TYPE_HOST)`.
const HOST: u64 = 1;
/// `UCT_MD_MKEY_PACK_FLAG_INVALIDATE_RMA`, `..._AMO`, and the bit that says that there are flags.
const PACK_INVALIDATE: c_uint = 3;
const PACK_FIELD_FLAGS: u64 = 1;

/// What peers and we ourselves may do with registered memory.
const ALL: Access = Access::REMOTE.union(Access::LOCAL_WRITE);

/// A `uct_md_t` of ours.
#[repr(C)]
pub struct Md {
    ops: *const c_void,
    component: *const c_void,
    pub ucx: &'static Ucx,
    pub context: Arc<Context>,
    pub pd: Arc<Pd>,
    cache: Mutex<Cache>,
    /// Its interfaces.
    pub opened: Arc<Opened>,
}

/// A `uct_mem_h`.
struct Memory {
    mr: Mutex<Arc<Mr>>,
    /// Nobody else's region: its key dies with it.
    own: bool,
}

impl Md {
    /// # Safety
    /// `md` came from [`open`] and is not closed.
    pub unsafe fn from_raw<'a>(md: *const c_void) -> &'a Md {
        // SAFETY: by the caller's promise.
        unsafe { &*md.cast() }
    }

    /// Registers `[addr, addr+len)`, or finds it registered.
    pub fn register(&self, addr: u64, len: u64) -> freeflow_core::error::Result<Arc<Mr>> {
        self.cache.lock().unwrap_or_else(PoisonError::into_inner).get(&self.pd, addr, len)
    }

    fn say(&self, hide: bool, text: &str) {
        self.ucx.log(if hide { Level::Diag } else { Level::Error }, text);
    }
}

/// Registers with all rights that the memory can give: UCX asks for put, get and atomics of memory that will see one of them.
fn register_anew(pd: &Arc<Pd>, addr: u64, len: u64) -> freeflow_core::error::Result<Arc<Mr>> {
    let no_atomics = ALL.difference(Access::REMOTE_ATOMIC);
    // A stack, a file: nobody else's processor reaches it. Memory that may not be written: for reading.
    pd.reg_mr(addr, len, addr, ALL)
        .or_else(|_| pd.reg_mr(addr, len, addr, no_atomics))
        .or_else(|error| pd.reg_mr(addr, len, addr, Access::REMOTE_READ).map_err(|_| error))
}

/// `md_open`.
pub unsafe extern "C" fn open(
    component: *mut c_void,
    _name: *const c_char,
    _config: *const c_void,
    md: *mut *mut c_void,
) -> Status {
    // SAFETY: UCX calls it on our component.
    let ucx = unsafe { ucx_of(component) };
    let opened = Context::open().and_then(|context| Ok((context.alloc_pd()?, context)));
    let (pd, context) = match opened {
        Ok(opened) => opened,
        Err(error) => {
            ucx.log(Level::Diag, &format!("ff: cannot open the device: {error}"));
            return Status::NO_DEVICE;
        }
    };
    let cache = Mutex::new(Cache::new(Unmaps::watch(ucx)));
    let opened = Box::new(Md { ops: ops(ucx), component, ucx, context, pd, cache, opened: Arc::default() });
    // SAFETY: UCX's place for the result.
    unsafe { md.write(Box::into_raw(opened).cast()) };
    Status::OK
}

/// `uct_md_ops_t` in the order of this UCX. One for each domain: there are few.
fn ops(ucx: &Ucx) -> *const c_void {
    let version = ucx.abi.version;
    let pick = |new: bool, a: *const c_void, b: *const c_void| if new { a } else { b };
    let calls: Vec<*const c_void> = ucx
        .abi
        .md_ops
        .iter()
        .map(|op| match op {
            MdOp::Close => close as *const c_void,
            MdOp::Query => query as *const c_void,
            MdOp::MemAlloc => pick(version.has_sys_devices(), mem_alloc_on as _, mem_alloc as _),
            MdOp::MemFree => mem_free as *const c_void,
            MdOp::MemReg => pick(version.has_v2_memory(), mem_reg_v2 as _, mem_reg as _),
            MdOp::MemDereg => mem_dereg as *const c_void,
            MdOp::MkeyPack => pick(version.packs_ranges(), mkey_pack_range as _, mkey_pack as _),
            MdOp::Unsupported => unsupported as *const c_void,
            MdOp::No => no as *const c_void,
        })
        .collect();
    Box::leak(calls.into_boxed_slice()).as_ptr().cast()
}

pub extern "C" fn unsupported() -> Status {
    Status::UNSUPPORTED
}

extern "C" fn no() -> c_int {
    0
}

unsafe extern "C" fn close(md: *mut c_void) {
    // SAFETY: from open(), closed once; UCX has closed all interfaces on it.
    drop(unsafe { Box::from_raw(md.cast::<Md>()) });
}

unsafe extern "C" fn query(md: *mut c_void, attr: *mut u8) -> Status {
    // SAFETY: a domain of ours.
    let layout = &unsafe { Md::from_raw(md) }.ucx.abi.md_attr;
    let keep = if layout.has_mask { 8 } else { 0 };
    // SAFETY: UCX's structure of that size.
    unsafe { attr.wrapping_add(keep).write_bytes(0, layout.size - keep) };
    // SAFETY: the table's offsets are inside it.
    let put = |offset: usize, value: u64| unsafe { attr.wrapping_add(offset).cast::<u64>().write(value) };
    put(layout.max_alloc, u64::MAX);
    put(layout.max_reg, u64::MAX);
    put(layout.flags, md_flag::REG | md_flag::ALLOC | md_flag::NEED_RKEY | md_flag::INVALIDATE);
    put(layout.reg_mem_types, HOST);
    put(layout.alloc_mem_types, HOST);
    put(layout.access_mem_types, HOST);
    put(layout.rkey_packed_size, size_of::<Packed>() as u64);
    if let Some(offset) = layout.cache_mem_types {
        put(offset, HOST);
    }
    if let Some(offset) = layout.reg_alignment {
        put(offset, 1);
    }
    put(layout.reg_cost, perf::REGISTRATION.c.to_bits());
    put(layout.reg_cost + 8, perf::REGISTRATION.m.to_bits());
    (0..16).for_each(|word| put(layout.local_cpus + word * 8, u64::MAX));
    Status::OK
}

/// Registers for UCX.
unsafe fn mem_reg_with(md: *mut c_void, addr: u64, len: u64, flags: u64, memh: *mut *mut c_void) -> Status {
    // SAFETY: a domain of ours.
    let md = unsafe { Md::from_raw(md) };
    match md.register(addr, len.max(1)) {
        Ok(mr) => {
            let memory = Box::new(Memory { mr: Mutex::new(mr), own: false });
            // SAFETY: UCX's place for the handle.
            unsafe { memh.write(Box::into_raw(memory).cast()) };
            Status::OK
        }
        Err(error) => {
            let hide = flags & mem_flag::HIDE_ERRORS != 0;
            md.say(hide, &format!("ff: cannot register {addr:#x}+{len:#x}: {error}"));
            Status::IO_ERROR
        }
    }
}

unsafe extern "C" fn mem_reg(
    md: *mut c_void,
    addr: *mut c_void,
    len: usize,
    flags: c_uint,
    memh: *mut *mut c_void,
) -> Status {
    // SAFETY: UCX's own arguments.
    unsafe { mem_reg_with(md, addr as u64, len as u64, u64::from(flags), memh) }
}

unsafe extern "C" fn mem_reg_v2(
    md: *mut c_void,
    addr: *mut c_void,
    len: usize,
    params: *const MemRegParams,
    memh: *mut *mut c_void,
) -> Status {
    // SAFETY: UCX's structure.
    let MemRegParams { field_mask, flags } = unsafe { params.read() };
    let flags = if field_mask & 1 != 0 { flags } else { 0 };
    // SAFETY: UCX's own arguments.
    unsafe { mem_reg_with(md, addr as u64, len as u64, flags, memh) }
}

unsafe extern "C" fn mem_dereg(_md: *mut c_void, params: *const MemDeregParams) -> Status {
    // SAFETY: UCX's structure, of which only the fields in the mask count.
    let params = unsafe { &*params };
    if params.field_mask & dereg::FIELD_MEMH == 0 || params.memh.is_null() {
        return Status::INVALID_PARAM;
    }
    let flags = if params.field_mask & dereg::FIELD_FLAGS != 0 { params.flags } else { 0 };
    let comp =
        if params.field_mask & dereg::FIELD_COMPLETION != 0 { params.comp } else { std::ptr::null_mut() };
    let invalidate = flags & dereg::INVALIDATE != 0;
    if invalidate && comp.is_null() {
        return Status::INVALID_PARAM;
    }
    // SAFETY: a handle of ours, given back once.
    let memory = unsafe { Box::from_raw(params.memh.cast::<Memory>()) };
    // One of its own: the key is dead when this returns, and no copy is under way. Another may be in the cache.
    drop(memory);
    if invalidate {
        // SAFETY: UCX's completion, counting this.
        unsafe { Completion::done(comp, Status::OK) };
    }
    Status::OK
}

unsafe fn allocate(
    md: *mut c_void,
    len: *mut usize,
    addr: *mut *mut c_void,
    flags: c_uint,
    memh: *mut *mut c_void,
) -> Status {
    // SAFETY: a domain of ours.
    let md = unsafe { Md::from_raw(md) };
    if u64::from(flags) & mem_flag::FIXED != 0 {
        return Status::UNSUPPORTED;
    }
    // SAFETY: UCX's place for the length.
    let wanted = unsafe { len.read() };
    match md.pd.allocate(wanted as u64, ALL) {
        Ok(mr) => {
            // SAFETY: UCX's places for the results.
            unsafe { len.write(mr.len() as usize) };
            // SAFETY: as above.
            unsafe { addr.write(mr.addr() as *mut c_void) };
            let memory = Box::new(Memory { mr: Mutex::new(mr), own: true });
            // SAFETY: as above.
            unsafe { memh.write(Box::into_raw(memory).cast()) };
            Status::OK
        }
        Err(error) => {
            md.say(true, &format!("ff: cannot allocate {wanted} bytes: {error}"));
            Status::NO_MEMORY
        }
    }
}

unsafe extern "C" fn mem_alloc(
    md: *mut c_void,
    len: *mut usize,
    addr: *mut *mut c_void,
    _mem_type: c_uint,
    flags: c_uint,
    _name: *const c_char,
    memh: *mut *mut c_void,
) -> Status {
    // SAFETY: UCX's own arguments.
    unsafe { allocate(md, len, addr, flags, memh) }
}

unsafe extern "C" fn mem_alloc_on(
    md: *mut c_void,
    len: *mut usize,
    addr: *mut *mut c_void,
    _mem_type: c_uint,
    _sys_device: u8,
    flags: c_uint,
    _name: *const c_char,
    memh: *mut *mut c_void,
) -> Status {
    // SAFETY: UCX's own arguments.
    unsafe { allocate(md, len, addr, flags, memh) }
}

unsafe extern "C" fn mem_free(_md: *mut c_void, memh: *mut c_void) -> Status {
    // SAFETY: a handle of mem_alloc's, given back once.
    drop(unsafe { Box::from_raw(memh.cast::<Memory>()) });
    Status::OK
}

/// `uct_md_mkey_pack_params_t`.
#[repr(C)]
struct PackParams {
    field_mask: u64,
    flags: c_uint,
}

unsafe extern "C" fn mkey_pack(
    md: *mut c_void,
    memh: *mut c_void,
    params: *const PackParams,
    buffer: *mut Packed,
) -> Status {
    // SAFETY: a domain of ours.
    let md = unsafe { Md::from_raw(md) };
    // SAFETY: a handle of ours.
    let memory = unsafe { &mut *memh.cast::<Memory>() };
    // SAFETY: null, or UCX's structure.
    let params = unsafe { params.as_ref() };
    let flags = params.filter(|p| p.field_mask & PACK_FIELD_FLAGS != 0).map_or(0, |p| p.flags);
    let mr = memory.mr.get_mut().unwrap_or_else(PoisonError::into_inner);
    if flags & PACK_INVALIDATE != 0 && !memory.own {
        // A key that can be killed must not be another handle's too.
        match register_anew(&md.pd, mr.addr(), mr.len()) {
            Ok(own) => (*mr, memory.own) = (own, true),
            Err(error) => {
                md.say(false, &format!("ff: no key that can be invalidated: {error}"));
                return Status::NO_MEMORY;
            }
        }
    }
    let packed = Packed::new(&md.context, mr);
    // SAFETY: UCX's buffer of rkey_packed_size bytes, of no alignment.
    unsafe { buffer.write_unaligned(packed) };
    Status::OK
}

unsafe extern "C" fn mkey_pack_range(
    md: *mut c_void,
    memh: *mut c_void,
    _addr: *mut c_void,
    _len: usize,
    params: *const PackParams,
    buffer: *mut Packed,
) -> Status {
    // SAFETY: UCX's own arguments.
    unsafe { mkey_pack(md, memh, params, buffer) }
}
