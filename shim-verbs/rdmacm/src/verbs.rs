//! libibverbs, by its public API: found with dlopen at first use, called through its exported functions.
//!
//! Owns the function pointers. Each method is the C function of that name; those of `verbs.h` that are inline reach
//! through the context, as the header does.

use std::ffi::{c_int, c_uint, c_void};
use std::mem::MaybeUninit;
use std::sync::OnceLock;

use freeflow_core::ctl::RawGid;
use freeflow_verbs_abi::*;
use libloading::os::unix::Library;

use crate::edge::{Errno, Result, checked, last_errno};

macro_rules! functions {
    ($($name:ident: fn($($arg:ident: $ty:ty),*) -> $ret:ty;)*) => {
        #[derive(Debug)]
        struct Table { $($name: unsafe extern "C" fn($($ty),*) -> $ret,)* }

        impl Table {
            fn load(library: &Library) -> std::result::Result<Self, libloading::Error> {
                Ok(Table { $($name: {
                    // SAFETY: libibverbs exports this name with the type verbs.h declares, which is the one above.
                    let symbol = unsafe { library.get(concat!(stringify!($name), "\0").as_bytes())? };
                    *symbol
                },)* })
            }
        }
    };
}

functions! {
    ibv_get_device_list: fn(count: *mut c_int) -> *mut *mut ibv_device;
    ibv_free_device_list: fn(list: *mut *mut ibv_device) -> ();
    ibv_open_device: fn(device: *mut ibv_device) -> *mut ibv_context;
    ibv_close_device: fn(context: *mut ibv_context) -> c_int;
    ibv_query_device: fn(context: *mut ibv_context, attr: *mut ibv_device_attr) -> c_int;
    ibv_query_port: fn(context: *mut ibv_context, port: u8, attr: *mut ibv_port_attr) -> c_int;
    ibv_alloc_pd: fn(context: *mut ibv_context) -> *mut ibv_pd;
    ibv_dealloc_pd: fn(pd: *mut ibv_pd) -> c_int;
    ibv_create_comp_channel: fn(context: *mut ibv_context) -> *mut ibv_comp_channel;
    ibv_destroy_comp_channel: fn(channel: *mut ibv_comp_channel) -> c_int;
    ibv_create_cq: fn(context: *mut ibv_context, cqe: c_int, user: *mut c_void, channel: *mut ibv_comp_channel, vector: c_int) -> *mut ibv_cq;
    ibv_destroy_cq: fn(cq: *mut ibv_cq) -> c_int;
    ibv_get_cq_event: fn(channel: *mut ibv_comp_channel, cq: *mut *mut ibv_cq, user: *mut *mut c_void) -> c_int;
    ibv_ack_cq_events: fn(cq: *mut ibv_cq, count: c_uint) -> ();
    ibv_reg_mr: fn(pd: *mut ibv_pd, addr: *mut c_void, len: usize, access: c_int) -> *mut ibv_mr;
    ibv_dereg_mr: fn(mr: *mut ibv_mr) -> c_int;
    ibv_create_ah: fn(pd: *mut ibv_pd, attr: *mut ibv_ah_attr) -> *mut ibv_ah;
    ibv_destroy_ah: fn(ah: *mut ibv_ah) -> c_int;
    ibv_create_srq: fn(pd: *mut ibv_pd, attr: *mut ibv_srq_init_attr) -> *mut ibv_srq;
    ibv_destroy_srq: fn(srq: *mut ibv_srq) -> c_int;
    ibv_create_qp: fn(pd: *mut ibv_pd, attr: *mut ibv_qp_init_attr) -> *mut ibv_qp;
    ibv_destroy_qp: fn(qp: *mut ibv_qp) -> c_int;
    ibv_attach_mcast: fn(qp: *mut ibv_qp, gid: *const ibv_gid, lid: u16) -> c_int;
    ibv_detach_mcast: fn(qp: *mut ibv_qp, gid: *const ibv_gid, lid: u16) -> c_int;
    ibv_modify_qp: fn(qp: *mut ibv_qp, attr: *mut ibv_qp_attr, mask: c_int) -> c_int;
}

/// The loaded library.
#[derive(Debug)]
pub struct Verbs {
    table: Table,
    /// Never closed: programs hold its objects.
    _library: std::mem::ManuallyDrop<Library>,
}

/// libibverbs, loaded when first asked for; ENODEV where there is none.
pub fn verbs() -> Result<&'static Verbs> {
    static VERBS: OnceLock<Option<Verbs>> = OnceLock::new();
    VERBS.get_or_init(load).as_ref().ok_or(Errno::NODEV)
}

fn load() -> Option<Verbs> {
    // SAFETY: libibverbs' initialisers only set up its own state; it is the library every verbs program has.
    let library = unsafe { Library::new("libibverbs.so.1") }.ok()?;
    let table = Table::load(&library).ok()?;
    Some(Verbs { table, _library: std::mem::ManuallyDrop::new(library) })
}

fn created<T>(object: *mut T) -> Result<*mut T> {
    if object.is_null() { Err(last_errno()) } else { Ok(object) }
}

/// All methods pass pointers on to libibverbs. They are `pub` within this crate only, and each caller has them from
/// the program or from libibverbs itself, which is what the C API demands and all that can be known.
impl Verbs {
    /// Opens the first device there is.
    pub fn open_first(&self) -> Result<*mut ibv_context> {
        let mut count = 0;
        // SAFETY: `count` is a valid int.
        let list = created(unsafe { (self.table.ibv_get_device_list)(&mut count) })?;
        // SAFETY: the list ends with NULL, so it has a first entry.
        let first = unsafe { *list };
        let context = match count > 0 && !first.is_null() {
            // SAFETY: a device from the list, which is still held.
            true => created(unsafe { (self.table.ibv_open_device)(first) }),
            false => Err(Errno::NODEV),
        };
        // SAFETY: got from ibv_get_device_list and not used after this.
        unsafe { (self.table.ibv_free_device_list)(list) };
        context
    }

    pub fn close(&self, context: *mut ibv_context) {
        // SAFETY: see the impl's comment.
        let _ = unsafe { (self.table.ibv_close_device)(context) };
    }

    pub fn query_device(&self, context: *mut ibv_context) -> Result<ibv_device_attr> {
        let mut attr = std::mem::MaybeUninit::<ibv_device_attr>::zeroed();
        // SAFETY: `attr` has room for what the function writes.
        checked(unsafe { (self.table.ibv_query_device)(context, attr.as_mut_ptr()) })?;
        // SAFETY: integers, valid in any bit pattern.
        Ok(unsafe { attr.assume_init() })
    }

    pub fn query_port(&self, context: *mut ibv_context, port: u8) -> Result<ibv_port_attr> {
        let mut attr = std::mem::MaybeUninit::<ibv_port_attr>::zeroed();
        // SAFETY: `attr` has room for what the function writes.
        checked(unsafe { (self.table.ibv_query_port)(context, port, attr.as_mut_ptr()) })?;
        // SAFETY: integers, valid in any bit pattern.
        Ok(unsafe { attr.assume_init() })
    }

    pub fn alloc_pd(&self, context: *mut ibv_context) -> Result<*mut ibv_pd> {
        // SAFETY: see the impl's comment.
        created(unsafe { (self.table.ibv_alloc_pd)(context) })
    }

    pub fn dealloc_pd(&self, pd: *mut ibv_pd) {
        // SAFETY: see the impl's comment.
        let _ = unsafe { (self.table.ibv_dealloc_pd)(pd) };
    }

    pub fn create_channel(&self, context: *mut ibv_context) -> Result<*mut ibv_comp_channel> {
        // SAFETY: see the impl's comment.
        created(unsafe { (self.table.ibv_create_comp_channel)(context) })
    }

    pub fn destroy_channel(&self, channel: *mut ibv_comp_channel) {
        // SAFETY: see the impl's comment.
        let _ = unsafe { (self.table.ibv_destroy_comp_channel)(channel) };
    }

    pub fn create_cq(
        &self,
        context: *mut ibv_context,
        cqe: u32,
        user: *mut c_void,
        channel: *mut ibv_comp_channel,
    ) -> Result<*mut ibv_cq> {
        let cqe = c_int::try_from(cqe).map_err(|_| Errno::INVAL)?;
        // SAFETY: see the impl's comment.
        created(unsafe { (self.table.ibv_create_cq)(context, cqe, user, channel, 0) })
    }

    pub fn destroy_cq(&self, cq: *mut ibv_cq) {
        // SAFETY: see the impl's comment.
        let _ = unsafe { (self.table.ibv_destroy_cq)(cq) };
    }

    /// Takes one completion event out of a channel, and acknowledges it; false if none was there.
    pub fn take_cq_event(&self, channel: *mut ibv_comp_channel) -> bool {
        let (mut cq, mut user) = (std::ptr::null_mut(), std::ptr::null_mut());
        // SAFETY: places for the two results.
        let code = unsafe { (self.table.ibv_get_cq_event)(channel, &mut cq, &mut user) };
        if code == 0 {
            // SAFETY: the CQ whose event was just taken.
            unsafe { (self.table.ibv_ack_cq_events)(cq, 1) };
        }
        code == 0
    }

    pub fn reg_mr(&self, pd: *mut ibv_pd, addr: *mut c_void, len: usize, access: u32) -> Result<*mut ibv_mr> {
        // SAFETY: see the impl's comment.
        created(unsafe { (self.table.ibv_reg_mr)(pd, addr, len, access as c_int) })
    }

    pub fn dereg_mr(&self, mr: *mut ibv_mr) {
        // SAFETY: see the impl's comment.
        let _ = unsafe { (self.table.ibv_dereg_mr)(mr) };
    }

    pub fn create_ah(&self, pd: *mut ibv_pd, attr: &mut ibv_ah_attr) -> Result<*mut ibv_ah> {
        // SAFETY: see the impl's comment.
        created(unsafe { (self.table.ibv_create_ah)(pd, attr) })
    }

    pub fn destroy_ah(&self, ah: *mut ibv_ah) {
        // SAFETY: see the impl's comment.
        let _ = unsafe { (self.table.ibv_destroy_ah)(ah) };
    }

    pub fn create_srq(&self, pd: *mut ibv_pd, attr: &mut ibv_srq_init_attr) -> Result<*mut ibv_srq> {
        // SAFETY: see the impl's comment.
        created(unsafe { (self.table.ibv_create_srq)(pd, attr) })
    }

    pub fn create_srq_ex(
        &self,
        context: *mut ibv_context,
        attr: &mut ibv_srq_init_attr_ex,
    ) -> Result<*mut ibv_srq> {
        let create = extended(context, |ops| ops.create_srq_ex)?;
        // SAFETY: see the impl's comment.
        created(unsafe { create(context, attr) })
    }

    pub fn destroy_srq(&self, srq: *mut ibv_srq) {
        // SAFETY: see the impl's comment.
        let _ = unsafe { (self.table.ibv_destroy_srq)(srq) };
    }

    pub fn create_qp(&self, pd: *mut ibv_pd, attr: &mut ibv_qp_init_attr) -> Result<*mut ibv_qp> {
        // SAFETY: see the impl's comment.
        created(unsafe { (self.table.ibv_create_qp)(pd, attr) })
    }

    /// A domain of this process alone, behind no file.
    pub fn open_xrcd(&self, context: *mut ibv_context) -> Result<*mut ibv_xrcd> {
        let open = extended(context, |ops| ops.open_xrcd)?;
        let comp_mask = IBV_XRCD_INIT_ATTR_FD | IBV_XRCD_INIT_ATTR_OFLAGS;
        let mut attr = ibv_xrcd_init_attr { comp_mask, fd: -1, oflags: libc::O_CREAT };
        // SAFETY: see the impl's comment.
        created(unsafe { open(context, &mut attr) })
    }

    pub fn create_qp_ex(
        &self,
        context: *mut ibv_context,
        attr: &mut ibv_qp_init_attr_ex,
    ) -> Result<*mut ibv_qp> {
        let create = extended(context, |ops| ops.create_qp_ex)?;
        // SAFETY: see the impl's comment.
        created(unsafe { create(context, attr) })
    }

    pub fn destroy_qp(&self, qp: *mut ibv_qp) {
        // SAFETY: see the impl's comment.
        let _ = unsafe { (self.table.ibv_destroy_qp)(qp) };
    }

    pub fn modify_qp(&self, qp: *mut ibv_qp, attr: &mut ibv_qp_attr, mask: c_int) -> Result<()> {
        // SAFETY: see the impl's comment.
        checked(unsafe { (self.table.ibv_modify_qp)(qp, attr, mask) })
    }
}

/// Multicast. Groups of RoCE have no LID.
impl Verbs {
    pub fn attach_mcast(&self, qp: *mut ibv_qp, raw: RawGid) -> Result<()> {
        let gid = ibv_gid { raw };
        // SAFETY: see the first impl's comment.
        checked(unsafe { (self.table.ibv_attach_mcast)(qp, &gid, 0) })
    }

    pub fn detach_mcast(&self, qp: *mut ibv_qp, raw: RawGid) -> Result<()> {
        let gid = ibv_gid { raw };
        // SAFETY: see the first impl's comment.
        checked(unsafe { (self.table.ibv_detach_mcast)(qp, &gid, 0) })
    }
}

/// The four calls of the data path, which verbs.h makes through the context.
impl Verbs {
    /// Posts a chain of requests.
    pub fn post_send(&self, qp: *mut ibv_qp, chain: &mut ibv_send_wr) -> Result<()> {
        // SAFETY: a live QP.
        let context = unsafe { (*qp).context };
        // SAFETY: a live QP's context.
        let post = unsafe { (*context).ops.post_send }.ok_or(Errno::OPNOTSUPP)?;
        let mut bad = std::ptr::null_mut();
        // SAFETY: see the impl's comment.
        checked(unsafe { post(qp, chain, &mut bad) })
    }

    /// Posts a chain of receives.
    pub fn post_recv(&self, qp: *mut ibv_qp, chain: &mut ibv_recv_wr) -> Result<()> {
        // SAFETY: a live QP.
        let context = unsafe { (*qp).context };
        // SAFETY: a live QP's context.
        let post = unsafe { (*context).ops.post_recv }.ok_or(Errno::OPNOTSUPP)?;
        let mut bad = std::ptr::null_mut();
        // SAFETY: see the impl's comment.
        checked(unsafe { post(qp, chain, &mut bad) })
    }

    /// Completions, as many as are there and fit.
    pub fn poll_cq<'a>(&self, cq: *mut ibv_cq, room: &'a mut [MaybeUninit<ibv_wc>]) -> Result<&'a [ibv_wc]> {
        // SAFETY: a live CQ.
        let context = unsafe { (*cq).context };
        // SAFETY: a live CQ's context.
        let poll = unsafe { (*context).ops.poll_cq }.ok_or(Errno::OPNOTSUPP)?;
        let most = room.len().min(c_int::MAX as usize) as c_int;
        // SAFETY: `room` has place for that many.
        let got = unsafe { poll(cq, most, room.as_mut_ptr().cast()) };
        let got = usize::try_from(got).map_err(|_| Errno::IO)?;
        // SAFETY: the call filled in the first `got`.
        Ok(unsafe { std::slice::from_raw_parts(room.as_ptr().cast(), got.min(room.len())) })
    }

    /// Asks for an event with the next completion.
    pub fn req_notify_cq(&self, cq: *mut ibv_cq) -> Result<()> {
        // SAFETY: a live CQ.
        let context = unsafe { (*cq).context };
        // SAFETY: a live CQ's context.
        let notify = unsafe { (*context).ops.req_notify_cq }.ok_or(Errno::OPNOTSUPP)?;
        // SAFETY: see the impl's comment.
        checked(unsafe { notify(cq, 0) })
    }
}

/// An operation of the `verbs_context` around `context`, found as verbs.h's `verbs_get_ctx` does.
fn extended<T>(context: *mut ibv_context, pick: impl FnOnce(&verbs_context) -> Option<T>) -> Result<T> {
    if context.is_null() {
        return Err(Errno::INVAL);
    }
    // SAFETY: an open context of libibverbs.
    let compat = unsafe { (*context).abi_compat };
    if compat.addr() != usize::MAX {
        return Err(Errno::OPNOTSUPP);
    }
    // SAFETY: `abi_compat` says that the context is the last member of a verbs_context.
    let whole = unsafe { context.byte_sub(CONTEXT_OFFSET) }.cast::<verbs_context>();
    // SAFETY: see above; the structure is written once, before the context is handed out.
    let ops = unsafe { &*whole };
    pick(ops).ok_or(Errno::OPNOTSUPP)
}
