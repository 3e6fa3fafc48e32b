//! Queue pairs: making, modifying, querying and destroying them. Posting is in post.rs and wr_builder.rs.

use crate::context::Context;
use crate::convert::{caps_from_c, caps_to_c, mask_from_c, qp_attr_from_c, qp_attr_to_c};
use crate::cq::Cq;
use crate::guard::{self, EBUSY, EINVAL, EOPNOTSUPP, Result};
use crate::lend::{Loans, with_loans};
use crate::object::{Acks, Delivered, Live, Object, Reserved, Users};
use crate::pd::Pd;
use crate::srq::Srq;
use crate::wr_builder::{self, Builder};
use crate::xrc::{Target, Xrcd};
use freeflow_core::client::{self, QpInit, Source};
use freeflow_core::verbs::device::VENDOR_ID;
use freeflow_core::verbs::{Gid, QpAttrMask, QpCaps, QpType};
use freeflow_verbs_abi::*;
use std::collections::HashSet;
use std::ffi::{c_int, c_void};
use std::mem::{size_of, zeroed};
use std::sync::{Arc, Mutex, PoisonError};

/// Inline data that a queue pair takes whatever was asked for: NICs have room for that in each entry, and programs that ask
/// for none (rdma_xclient) post some all the same.
const LEAST_INLINE: u32 = 64;

const NEWER: usize = (QP_EX_MAX_SIZE - size_of::<ibv_qp_ex>()) / size_of::<usize>() - 1;

/// A QP as clients see it, as long as the longest release of rdma-core has it.
#[repr(C)]
pub struct Extended {
    ex: ibv_qp_ex,
    wr_flush: Option<WrFlush>,
    /// Functions that newer releases append behind that.
    newer: [Option<unsafe extern "C" fn(*mut ibv_qp_ex)>; NEWER],
}

pub struct Rust {
    pub core: Arc<client::Qp>,
    pub kind: QpType,
    pub caps: QpCaps,
    sq_sig_all: bool,
    /// Of QPs made with send_ops_flags.
    pub builder: Option<Builder>,
    /// Async events that the program got.
    pub async_events: Delivered,
    loans: Option<Arc<Loans>>,
    /// Of XRC's target: its domain, and what its handles share.
    xrcd: *mut ibv_xrcd,
    target: Option<Arc<Target>>,
    /// Multicast groups it is attached to.
    pub groups: Mutex<HashSet<Gid>>,
    live: Arc<Live>,
}

pub type Qp = Object<Extended, Rust>;

impl Qp {
    pub fn acks(&self) -> Acks {
        let c = self.c().cast::<ibv_qp>();
        // SAFETY: a field of the live C structure.
        let mutex = unsafe { &raw mut (*c).mutex };
        // SAFETY: a field of the live C structure.
        let cond = unsafe { &raw mut (*c).cond };
        // SAFETY: a field of the live C structure.
        let completed = unsafe { &raw mut (*c).events_completed };
        Acks { mutex, cond, completed }
    }
}

/// Makes core's side of a QP with a PD: all types but XRC's target.
///
/// # Safety
/// `pd` and the objects in `init` are live ones of this library, or NULL.
unsafe fn create_core(
    kind: QpType,
    pd: *mut ibv_pd,
    init: &ibv_qp_init_attr,
    cookie: u64,
) -> Result<(Arc<client::Qp>, Option<Arc<Loans>>)> {
    let receives_nothing = kind == QpType::XrcSend;
    if pd.is_null() || init.send_cq.is_null() || (init.recv_cq.is_null() && !receives_nothing) {
        return Err(EINVAL);
    }
    // SAFETY: the caller's promise.
    let send = unsafe { Cq::of(init.send_cq) };
    // SAFETY: the caller's promise. XRC's initiator completes no receive.
    let recv = if receives_nothing { send } else { unsafe { Cq::of(init.recv_cq) } };
    // SAFETY: the caller's promise.
    let srq = (!init.srq.is_null()).then(|| unsafe { Srq::of(init.srq) });
    let mut caps = caps_from_c(&init.cap);
    caps.max_inline_data = caps.max_inline_data.max(LEAST_INLINE);
    if srq.is_some() || receives_nothing {
        (caps.max_recv_wr, caps.max_recv_sge) = (0, 0);
    }
    // SAFETY: the caller's promise.
    let domain = unsafe { Pd::of(pd) };
    let init = QpInit {
        kind,
        send_cq: Arc::clone(&send.rust.core),
        recv_cq: Arc::clone(&recv.rust.core),
        caps,
        sq_sig_all: init.sq_sig_all != 0,
        receives: srq.map(|srq| Source::Queue(Arc::clone(&srq.rust.core))),
        cookie,
    };
    Ok(with_loans(domain.loans(), |lender| domain.rust.core.create_qp_in(init, lender))?)
}

/// Counts a QP as a user of what it was made from, or not any more.
///
/// # Safety
/// The objects in `base` are live ones of this library, or NULL.
unsafe fn count(base: &ibv_qp, xrcd: *mut ibv_xrcd, change: fn(&Users)) {
    if !base.pd.is_null() {
        // SAFETY: the caller's promise.
        change(&unsafe { Pd::of(base.pd) }.rust.users);
    }
    for cq in [base.send_cq, base.recv_cq].into_iter().filter(|cq| !cq.is_null()) {
        // SAFETY: the caller's promise.
        change(&unsafe { Cq::of(cq) }.rust.users);
    }
    if !base.srq.is_null() {
        // SAFETY: the caller's promise.
        change(&unsafe { Srq::of(base.srq) }.rust.users);
    }
    if !xrcd.is_null() {
        // SAFETY: the caller's promise.
        change(&unsafe { Xrcd::of(xrcd) }.rust.users);
    }
}

/// What both create functions share. `xrcd` is NULL but for XRC's target, which has no PD.
///
/// # Safety
/// `context`, `pd`, `xrcd` and the objects in `init` are live ones of this library, or NULL but for the first.
unsafe fn create(
    context: *mut ibv_context,
    pd: *mut ibv_pd,
    xrcd: *mut ibv_xrcd,
    init: &mut ibv_qp_init_attr,
    send_ops: Option<u64>,
) -> Result<*mut ibv_qp> {
    let kind = QpType::try_from(init.qp_type).map_err(|_| EOPNOTSUPP)?;
    let place = Qp::reserve();
    if kind == QpType::XrcRecv {
        if xrcd.is_null() {
            return Err(EINVAL);
        }
        // SAFETY: the caller's promise.
        let target = unsafe { Xrcd::of(xrcd) }.rust.domain.create_target(place.cookie())?;
        init.cap = caps_to_c(&target.core.caps());
        // SAFETY: the caller's promise.
        return Ok(unsafe { fill_target(place, context, xrcd, target, init.qp_context) });
    }
    // SAFETY: the caller's promise.
    let (core, loans) = unsafe { create_core(kind, pd, init, place.cookie()) }?;
    let caps = core.caps();
    init.cap = caps_to_c(&caps);
    let mut c = c_part(&core, context, init.qp_context);
    let base = &mut c.ex.qp_base;
    (base.pd, base.send_cq, base.srq) = (pd, init.send_cq, init.srq);
    base.recv_cq = if kind == QpType::XrcSend { std::ptr::null_mut() } else { init.recv_cq };
    // SAFETY: the caller's promise: these are what the QP is made from.
    unsafe { count(base, xrcd, Users::add) };
    if send_ops.is_some() {
        wr_builder::install(&mut c.ex);
        c.wr_flush = Some(wr_builder::wr_flush);
        c.newer = [Some(wr_builder::UNBUILT); NEWER];
    }
    let builder = send_ops.map(|ops| Builder::new(&caps, ops));
    // SAFETY: the caller's promise.
    let live = unsafe { enter_live(context, place.cookie()) };
    let (sq_sig_all, async_events) = (init.sq_sig_all != 0, Delivered::default());
    let (groups, target) = (Mutex::default(), None);
    let rust =
        Rust { core, kind, caps, sq_sig_all, builder, async_events, loans, xrcd, target, groups, live };
    Ok(place.fill(c, rust).cast())
}

/// The C side of a QP, but for what it was made from.
fn c_part(core: &client::Qp, context: *mut ibv_context, qp_context: *mut c_void) -> Extended {
    // SAFETY: integers, nullable pointers and functions: all zeroes is valid.
    let mut c: Extended = unsafe { zeroed() };
    let base = &mut c.ex.qp_base;
    base.context = context;
    base.qp_context = qp_context;
    base.handle = core.qpn();
    base.qp_num = core.qpn();
    base.state = core.state() as u32;
    base.qp_type = core.kind() as u32;
    base.mutex = libc::PTHREAD_MUTEX_INITIALIZER;
    base.cond = libc::PTHREAD_COND_INITIALIZER;
    c
}

/// From now on the QP may have events.
///
/// # Safety
/// `context` is a live one of this library.
unsafe fn enter_live(context: *mut ibv_context, cookie: u64) -> Arc<Live> {
    // SAFETY: the caller's promise.
    let live = Arc::clone(&unsafe { Context::of_ibv(context) }.rust.live);
    live.insert(cookie);
    live
}

/// One handle of XRC's target.
///
/// # Safety
/// `context` and `xrcd` are live ones of this library.
unsafe fn fill_target(
    place: Reserved<Extended, Rust>,
    context: *mut ibv_context,
    xrcd: *mut ibv_xrcd,
    target: Arc<Target>,
    qp_context: *mut c_void,
) -> *mut ibv_qp {
    let core = Arc::clone(&target.core);
    let c = c_part(&core, context, qp_context);
    // SAFETY: the caller's promise.
    unsafe { count(&c.ex.qp_base, xrcd, Users::add) };
    let rust = Rust {
        kind: core.kind(),
        caps: core.caps(),
        core,
        sq_sig_all: false,
        builder: None,
        async_events: Delivered::default(),
        loans: None,
        xrcd,
        target: Some(target),
        groups: Mutex::default(),
        // SAFETY: the caller's promise.
        live: unsafe { enter_live(context, place.cookie()) },
    };
    place.fill(c, rust).cast()
}

/// # Safety
/// `pd` and the objects in `init` are live ones of this library, as the C prototype demands.
pub unsafe extern "C" fn ibv_create_qp(pd: *mut ibv_pd, init: *mut ibv_qp_init_attr) -> *mut ibv_qp {
    guard::pointer(|| {
        // SAFETY: the caller's promise.
        let init = unsafe { &mut *init };
        if pd.is_null() {
            return Err(EINVAL);
        }
        // SAFETY: a field of a live C structure.
        let context = unsafe { (*pd).context };
        // SAFETY: the caller's promise.
        unsafe { create(context, pd, std::ptr::null_mut(), init, None) }
    })
}

/// Behind the inline ibv_create_qp_ex, whose attributes begin with those of ibv_create_qp.
pub unsafe extern "C" fn create_ex(context: *mut ibv_context, init: *mut ibv_qp_init_attr_ex) -> *mut ibv_qp {
    guard::pointer(|| {
        // SAFETY: the program passes its attributes.
        let ex = unsafe { &*init };
        let named = |bit: u32| ex.comp_mask & bit != 0;
        let known = IBV_QP_INIT_ATTR_PD
            | IBV_QP_INIT_ATTR_XRCD
            | IBV_QP_INIT_ATTR_SEND_OPS_FLAGS
            | IBV_QP_INIT_ATTR_CREATE_FLAGS;
        let target = ex.qp_type == IBV_QPT_XRC_RECV;
        if !named(if target { IBV_QP_INIT_ATTR_XRCD } else { IBV_QP_INIT_ATTR_PD }) {
            return Err(EINVAL);
        }
        if ex.comp_mask & !known != 0 || (named(IBV_QP_INIT_ATTR_CREATE_FLAGS) && ex.create_flags != 0) {
            return Err(EOPNOTSUPP);
        }
        let send_ops = named(IBV_QP_INIT_ATTR_SEND_OPS_FLAGS).then_some(ex.send_ops_flags);
        if send_ops.is_some_and(|ops| ops & !wr_builder::SUPPORTED_OPS != 0) {
            return Err(EOPNOTSUPP);
        }
        let none = std::ptr::null_mut();
        let pd = if target { none } else { ex.pd };
        let xrcd = if target { ex.xrcd } else { none.cast() };
        // SAFETY: the two structures share their beginning; `ex` is not used any more.
        let init = unsafe { &mut *init.cast::<ibv_qp_init_attr>() };
        // SAFETY: the objects named are live.
        unsafe { create(context, pd, xrcd, init, send_ops) }
    })
}

/// Behind the inline ibv_open_qp: one more handle of a target of an XRC domain.
pub unsafe extern "C" fn open(context: *mut ibv_context, attr: *mut ibv_qp_open_attr) -> *mut ibv_qp {
    guard::pointer(|| {
        // SAFETY: the program passes its attributes.
        let attr = unsafe { &*attr };
        let needed = IBV_QP_OPEN_ATTR_NUM | IBV_QP_OPEN_ATTR_XRCD | IBV_QP_OPEN_ATTR_TYPE;
        let known = needed | IBV_QP_OPEN_ATTR_CONTEXT;
        if attr.comp_mask & needed != needed || attr.comp_mask & !known != 0 || attr.xrcd.is_null() {
            return Err(EINVAL);
        }
        if attr.qp_type != IBV_QPT_XRC_RECV {
            return Err(EINVAL);
        }
        let named = attr.comp_mask & IBV_QP_OPEN_ATTR_CONTEXT != 0;
        let qp_context = if named { attr.qp_context } else { std::ptr::null_mut() };
        let place = Qp::reserve();
        // SAFETY: the program names a live domain.
        let domain = &unsafe { Xrcd::of(attr.xrcd) }.rust.domain;
        let target = domain.open_target(attr.qp_num, place.cookie())?;
        // SAFETY: called through a live context, with a live domain.
        Ok(unsafe { fill_target(place, context, attr.xrcd, target, qp_context) })
    })
}

/// The extended interface of a QP that was made with send_ops_flags, else NULL.
///
/// # Safety
/// `qp` is a live QP of this library.
pub unsafe extern "C" fn ibv_qp_to_qp_ex(qp: *mut ibv_qp) -> *mut ibv_qp_ex {
    // SAFETY: the caller's promise.
    let extended = unsafe { Qp::of(qp) }.rust.builder.is_some();
    if extended { qp.cast() } else { std::ptr::null_mut() }
}

/// Attributes of the direction that one end of an XRC connection has not. Programs set them for both ends alike (perftest
/// does), and Linux takes no notice of them either.
fn passed_over(kind: QpType) -> QpAttrMask {
    match kind {
        QpType::XrcSend => QpAttrMask::MAX_DEST_RD_ATOMIC | QpAttrMask::MIN_RNR_TIMER,
        QpType::XrcRecv => QpAttrMask::MAX_QP_RD_ATOMIC | QpAttrMask::RETRY_CNT | QpAttrMask::RNR_RETRY,
        _ => QpAttrMask::empty(),
    }
}

/// # Safety
/// `qp` is a live QP of this library and `attr` points to attributes.
pub unsafe extern "C" fn ibv_modify_qp(qp: *mut ibv_qp, attr: *mut ibv_qp_attr, attr_mask: c_int) -> c_int {
    guard::code(|| {
        // SAFETY: the caller's promise.
        let rust = unsafe { &Qp::of(qp).rust };
        let mask = mask_from_c(attr_mask)?.difference(passed_over(rust.kind));
        // SAFETY: the caller's promise.
        let new = qp_attr_from_c(unsafe { &*attr }, mask)?;
        rust.core.modify(&new, mask)?;
        if mask.contains(QpAttrMask::STATE) {
            // SAFETY: a field of a live C structure.
            unsafe { (*qp).state = new.qp_state as u32 };
        }
        Ok(())
    })
}

/// # Safety
/// `qp` is a live QP of this library and the other pointers have room, as the C prototype demands.
pub unsafe extern "C" fn ibv_query_qp(
    qp: *mut ibv_qp,
    attr: *mut ibv_qp_attr,
    _attr_mask: c_int,
    init_attr: *mut ibv_qp_init_attr,
) -> c_int {
    guard::code(|| {
        // SAFETY: the caller's promise.
        let rust = unsafe { &Qp::of(qp).rust };
        let answer = qp_attr_to_c(&rust.core.query(), &rust.caps);
        // SAFETY: fields of a live C structure that do not change after creation.
        let base = unsafe { &*qp };
        let init = ibv_qp_init_attr {
            qp_context: base.qp_context,
            send_cq: base.send_cq,
            recv_cq: base.recv_cq,
            srq: base.srq,
            cap: caps_to_c(&rust.caps),
            qp_type: base.qp_type,
            sq_sig_all: rust.sq_sig_all.into(),
        };
        // SAFETY: the caller's promise.
        unsafe { init_attr.write(init) };
        // SAFETY: a field of a live C structure: the state may have become ERR by itself.
        unsafe { (*qp).state = answer.qp_state };
        // SAFETY: the caller's promise.
        unsafe { attr.write(answer) };
        Ok(())
    })
}

/// # Safety
/// `qp` is a live QP of this library.
pub unsafe extern "C" fn ibv_destroy_qp(qp: *mut ibv_qp) -> c_int {
    guard::code(|| {
        // SAFETY: the caller's promise.
        let pair = unsafe { Qp::of(qp) };
        // SAFETY: the live C structure, copied.
        let base = unsafe { qp.read() };
        if !pair.rust.groups.lock().unwrap_or_else(PoisonError::into_inner).is_empty() {
            return Err(EBUSY);
        }
        let (xrcd, loans) = (pair.rust.xrcd, pair.rust.loans.clone());
        pair.rust.live.remove(qp as u64);
        match &pair.rust.target {
            Some(target) => target.close(qp as u64),
            None => pair.rust.core.close(),
        }
        pair.acks().wait(&pair.rust.async_events);
        // SAFETY: the C API forbids any use after this.
        unsafe { Qp::free(qp) };
        loans.inspect(|loans| loans.settle());
        // SAFETY: a QP keeps what it was made from alive.
        unsafe { count(&base, xrcd, Users::sub) };
        Ok(())
    })
}

/// Bytes of a message may become visible in any order: memcpy has none.
pub extern "C" fn ibv_query_qp_data_in_order(_: *mut ibv_qp, _: ibv_wr_opcode, _: u32) -> c_int {
    0
}

/// Enhanced connection establishment: what two devices of this vendor may agree on. They have no options yet.
const ECE: ibv_ece = ibv_ece { vendor_id: VENDOR_ID, options: 0, comp_mask: 0 };

/// # Safety
/// `ece` has room, as the C prototype demands.
pub unsafe extern "C" fn ibv_query_ece(_: *mut ibv_qp, ece: *mut ibv_ece) -> c_int {
    guard::code(|| {
        // SAFETY: the caller's promise.
        unsafe { ece.write(ECE) };
        Ok(())
    })
}

/// Options of another vendor mean nothing here. Of this vendor's those that are known are accepted, and the answer says which.
///
/// # Safety
/// `ece` points to options, as the C prototype demands.
pub unsafe extern "C" fn ibv_set_ece(_: *mut ibv_qp, ece: *mut ibv_ece) -> c_int {
    guard::code(|| {
        // SAFETY: the caller's promise.
        let wished = unsafe { ece.read() };
        if wished.vendor_id != VENDOR_ID || wished.comp_mask != 0 {
            return Err(EINVAL);
        }
        // SAFETY: the caller's promise.
        unsafe { ece.write(ECE) };
        Ok(())
    })
}
