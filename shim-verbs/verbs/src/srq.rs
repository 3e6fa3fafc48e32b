//! Shared receive queues, XRC's too.

use crate::cq::Cq;
use crate::guard::{self, EINVAL, EOPNOTSUPP, Errno, Result};
use crate::lend::{Loans, with_loans};
use crate::object::{Acks, Delivered, Live, Object, Users};
use crate::pd::Pd;
use crate::post::sges;
use crate::xrc::Xrcd;
use freeflow_core::client::{self, SrqInit};
use freeflow_verbs_abi::*;
use std::ffi::c_int;
use std::mem::zeroed;
use std::sync::Arc;

pub struct Rust {
    pub core: Arc<client::Srq>,
    /// QPs.
    pub users: Users,
    /// Async events that the program got.
    pub async_events: Delivered,
    loans: Option<Arc<Loans>>,
    live: Arc<Live>,
    /// Of XRC: the domain and the CQ it was made with.
    xrcd: *mut ibv_xrcd,
    cq: *mut ibv_cq,
}

pub type Srq = Object<ibv_srq, Rust>;

impl Srq {
    pub fn acks(&self) -> Acks {
        let c = self.c();
        // SAFETY: a field of the live C structure.
        let mutex = unsafe { &raw mut (*c).mutex };
        // SAFETY: a field of the live C structure.
        let cond = unsafe { &raw mut (*c).cond };
        // SAFETY: a field of the live C structure.
        let completed = unsafe { &raw mut (*c).events_completed };
        Acks { mutex, cond, completed }
    }
}

/// Makes a queue; `xrcd` and `cq` are NULL for one that is not XRC's.
///
/// # Safety
/// Pointers are live objects of this library, or NULL where said.
unsafe fn create(
    pd: *mut ibv_pd,
    attr: &mut ibv_srq_init_attr,
    xrcd: *mut ibv_xrcd,
    cq: *mut ibv_cq,
) -> Result<*mut ibv_srq> {
    if pd.is_null() {
        return Err(EINVAL);
    }
    // SAFETY: the caller's promise.
    let domain = unsafe { Pd::of(pd) };
    let place = Srq::reserve();
    let ibv_srq_attr { max_wr, max_sge, srq_limit } = attr.attr;
    // SAFETY: the caller's promise.
    let xrc = (!xrcd.is_null()).then(|| unsafe { Xrcd::of(xrcd) });
    let core_xrc = xrc.map(|x| {
        // SAFETY: the caller's promise: an XRC queue has a CQ.
        let cq = unsafe { Cq::of(cq) };
        (Arc::clone(&x.rust.domain.core), Arc::clone(&cq.rust.core))
    });
    let init = SrqInit { max_wr, max_sge, limit: srq_limit, cookie: place.cookie(), xrc: core_xrc };
    let (core, loans) = with_loans(domain.loans(), |lender| domain.rust.core.create_srq_in(init, lender))?;
    attr.attr.max_wr = core.max_wr();
    attr.attr.max_sge = core.max_sge();
    // SAFETY: integers and nullable pointers: all zeroes is valid.
    let mut c: ibv_srq = unsafe { zeroed() };
    // SAFETY: a field of a live C structure.
    c.context = unsafe { (*pd).context };
    c.srq_context = attr.srq_context;
    c.pd = pd;
    c.handle = core.number();
    c.mutex = libc::PTHREAD_MUTEX_INITIALIZER;
    c.cond = libc::PTHREAD_COND_INITIALIZER;
    domain.rust.users.add();
    domain.rust.live.insert(place.cookie());
    if let Some(x) = xrc {
        x.rust.users.add();
        // SAFETY: as above.
        unsafe { Cq::of(cq) }.rust.users.add();
    }
    let live = Arc::clone(&domain.rust.live);
    let (users, async_events) = (Users::default(), Delivered::default());
    Ok(place.fill(c, Rust { core, users, async_events, loans, live, xrcd, cq }))
}

/// # Safety
/// `pd` is a live PD of this library and `attr` points to attributes, as the C prototype demands.
pub unsafe extern "C" fn ibv_create_srq(pd: *mut ibv_pd, attr: *mut ibv_srq_init_attr) -> *mut ibv_srq {
    guard::pointer(|| {
        // SAFETY: the caller's promise.
        let attr = unsafe { &mut *attr };
        // SAFETY: the caller's promise.
        unsafe { create(pd, attr, std::ptr::null_mut(), std::ptr::null_mut()) }
    })
}

/// Behind the inline ibv_create_srq_ex, whose attributes begin with those of ibv_create_srq.
pub unsafe extern "C" fn create_ex(_: *mut ibv_context, attr: *mut ibv_srq_init_attr_ex) -> *mut ibv_srq {
    guard::pointer(|| {
        // SAFETY: the program passes its attributes.
        let ex = unsafe { &*attr };
        let named = |bit: u32| ex.comp_mask & bit != 0;
        let kind = if named(IBV_SRQ_INIT_ATTR_TYPE) { ex.srq_type } else { IBV_SRQT_BASIC };
        let none: *mut ibv_xrcd = std::ptr::null_mut();
        let (xrcd, cq) = match kind {
            IBV_SRQT_BASIC => (none, none.cast()),
            IBV_SRQT_XRC if named(IBV_SRQ_INIT_ATTR_XRCD) && named(IBV_SRQ_INIT_ATTR_CQ) => (ex.xrcd, ex.cq),
            IBV_SRQT_XRC => return Err(EINVAL),
            _ => return Err(EOPNOTSUPP),
        };
        if !named(IBV_SRQ_INIT_ATTR_PD) || (kind == IBV_SRQT_XRC && (xrcd.is_null() || cq.is_null())) {
            return Err(EINVAL);
        }
        let pd = ex.pd;
        // SAFETY: the two structures share their beginning; `ex` is not used any more.
        let attr = unsafe { &mut *attr.cast::<ibv_srq_init_attr>() };
        // SAFETY: the objects named are live.
        unsafe { create(pd, attr, xrcd, cq) }
    })
}

/// # Safety
/// `srq` is a live queue of this library and `attr` points to attributes.
pub unsafe extern "C" fn ibv_modify_srq(srq: *mut ibv_srq, attr: *mut ibv_srq_attr, mask: c_int) -> c_int {
    guard::code(|| {
        let mask = mask as u32;
        if mask & !(IBV_SRQ_MAX_WR | IBV_SRQ_LIMIT) != 0 {
            return Err(EINVAL);
        }
        if mask & IBV_SRQ_MAX_WR != 0 {
            return Err(EOPNOTSUPP); // no IBV_DEVICE_SRQ_RESIZE
        }
        if mask & IBV_SRQ_LIMIT != 0 {
            // SAFETY: the caller's promise.
            let limit = unsafe { (*attr).srq_limit };
            // SAFETY: the caller's promise.
            unsafe { Srq::of(srq) }.rust.core.arm(limit)?;
        }
        Ok(())
    })
}

/// # Safety
/// `srq` is a live queue of this library and `attr` has room.
pub unsafe extern "C" fn ibv_query_srq(srq: *mut ibv_srq, attr: *mut ibv_srq_attr) -> c_int {
    guard::code(|| {
        // SAFETY: the caller's promise.
        let core = unsafe { &Srq::of(srq).rust.core };
        let answer = ibv_srq_attr { max_wr: core.max_wr(), max_sge: core.max_sge(), srq_limit: core.limit() };
        // SAFETY: the caller's promise.
        unsafe { attr.write(answer) };
        Ok(())
    })
}

/// Behind the inline ibv_get_srq_num.
pub unsafe extern "C" fn number(srq: *mut ibv_srq, number: *mut u32) -> c_int {
    guard::code(|| {
        // SAFETY: called through a live queue.
        let own = unsafe { &Srq::of(srq).rust };
        if own.xrcd.is_null() {
            return Err(EINVAL);
        }
        // SAFETY: the program passes a place for it.
        unsafe { number.write(own.core.number()) };
        Ok(())
    })
}

/// # Safety
/// `srq` is a live queue of this library.
pub unsafe extern "C" fn ibv_destroy_srq(srq: *mut ibv_srq) -> c_int {
    guard::code(|| {
        // SAFETY: the caller's promise.
        let queue = unsafe { Srq::of(srq) };
        queue.rust.users.check_none()?;
        queue.rust.live.remove(srq as u64);
        queue.acks().wait(&queue.rust.async_events);
        // SAFETY: a field of a live C structure.
        let pd = unsafe { (*srq).pd };
        let (xrcd, cq, loans) = (queue.rust.xrcd, queue.rust.cq, queue.rust.loans.clone());
        // SAFETY: the C API forbids any use after this.
        unsafe { Srq::free(srq) };
        loans.inspect(|loans| loans.settle());
        // SAFETY: a queue keeps its PD alive.
        unsafe { Pd::of(pd) }.rust.users.sub();
        if !xrcd.is_null() {
            // SAFETY: an XRC queue keeps its domain alive.
            unsafe { Xrcd::of(xrcd) }.rust.users.sub();
            // SAFETY: and its CQ.
            unsafe { Cq::of(cq) }.rust.users.sub();
        }
        Ok(())
    })
}

/// Posts a list; stops at the first request that is refused and tells which.
pub unsafe extern "C" fn post_recv(
    srq: *mut ibv_srq,
    wr: *mut ibv_recv_wr,
    bad_wr: *mut *mut ibv_recv_wr,
) -> c_int {
    // SAFETY: called through a live queue, as the C API demands.
    let core = unsafe { &Srq::of(srq).rust.core };
    let mut next = wr;
    // SAFETY: the program passes a NULL-terminated list.
    while let Some(request) = unsafe { next.as_ref() } {
        // SAFETY: as above.
        let list = unsafe { sges(request.sg_list, request.num_sge, core.max_sge()) };
        if let Err(Errno(error)) = list.and_then(|l| Ok(core.post(request.wr_id, l)?)) {
            // SAFETY: the program passes a place for the first request that was not posted.
            unsafe { bad_wr.write(next) };
            return error;
        }
        next = request.next;
    }
    0
}
