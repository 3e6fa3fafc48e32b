//! Queue pairs: making, modifying, querying and destroying them. Posting is in post.rs and wr_builder.rs.

use crate::convert::{caps_from_c, caps_to_c, mask_from_c, qp_attr_from_c, qp_attr_to_c};
use crate::cq::Cq;
use crate::guard::{self, EINVAL, EOPNOTSUPP, Result};
use crate::object::{Acks, Delivered, Object};
use crate::pd::Pd;
use crate::wr_builder::{self, Builder};
use freeflow_core::client::{self, QpInit};
use freeflow_core::verbs::{QpAttrMask, QpCaps, QpType};
use freeflow_verbs_abi::*;
use std::ffi::c_int;
use std::mem::{size_of, zeroed};
use std::sync::Arc;

const NEWER: usize = (QP_EX_MAX_SIZE - size_of::<ibv_qp_ex>()) / size_of::<usize>();

/// A QP as clients see it, as long as the longest release of rdma-core has it.
#[repr(C)]
pub struct Extended {
    ex: ibv_qp_ex,
    /// Functions that newer releases append.
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

/// What both create functions share.
///
/// # Safety
/// `pd` and the objects in `init` are live ones of this library, or NULL.
unsafe fn create(pd: *mut ibv_pd, init: &mut ibv_qp_init_attr, send_ops: Option<u64>) -> Result<*mut ibv_qp> {
    let kind = QpType::try_from(init.qp_type).map_err(|_| EOPNOTSUPP)?;
    if !init.srq.is_null() {
        return Err(EOPNOTSUPP);
    }
    if pd.is_null() || init.send_cq.is_null() || init.recv_cq.is_null() {
        return Err(EINVAL);
    }
    // SAFETY: the caller's promise.
    let domain = unsafe { Pd::of(pd) };
    // SAFETY: the caller's promise.
    let send = unsafe { Cq::of(init.send_cq) };
    // SAFETY: the caller's promise.
    let recv = unsafe { Cq::of(init.recv_cq) };
    let place = Qp::reserve();
    let sq_sig_all = init.sq_sig_all != 0;
    let core = domain.rust.core.create_qp(QpInit {
        kind,
        send_cq: Arc::clone(&send.rust.core),
        recv_cq: Arc::clone(&recv.rust.core),
        caps: caps_from_c(&init.cap),
        sq_sig_all,
        cookie: place.cookie(),
    })?;
    let caps = core.caps();
    init.cap = caps_to_c(&caps);
    // SAFETY: integers, nullable pointers and functions: all zeroes is valid.
    let mut c: Extended = unsafe { zeroed() };
    let base = &mut c.ex.qp_base;
    // SAFETY: a field of a live C structure.
    base.context = unsafe { (*pd).context };
    base.qp_context = init.qp_context;
    base.pd = pd;
    base.send_cq = init.send_cq;
    base.recv_cq = init.recv_cq;
    base.handle = core.qpn();
    base.qp_num = core.qpn();
    base.state = IBV_QPS_RESET;
    base.qp_type = init.qp_type;
    base.mutex = libc::PTHREAD_MUTEX_INITIALIZER;
    base.cond = libc::PTHREAD_COND_INITIALIZER;
    if send_ops.is_some() {
        wr_builder::install(&mut c.ex);
        c.newer = [Some(wr_builder::UNBUILT); NEWER];
    }
    let builder = send_ops.map(|ops| Builder::new(&caps, ops));
    domain.rust.live.insert(place.cookie());
    let qp =
        place.fill(c, Rust { core, kind, caps, sq_sig_all, builder, async_events: Delivered::default() });
    domain.rust.users.add();
    send.rust.users.add();
    recv.rust.users.add();
    Ok(qp.cast())
}

/// # Safety
/// `pd` and the objects in `init` are live ones of this library, as the C prototype demands.
pub unsafe extern "C" fn ibv_create_qp(pd: *mut ibv_pd, init: *mut ibv_qp_init_attr) -> *mut ibv_qp {
    guard::pointer(|| {
        // SAFETY: the caller's promise.
        let init = unsafe { &mut *init };
        // SAFETY: the caller's promise.
        unsafe { create(pd, init, None) }
    })
}

/// Behind the inline ibv_create_qp_ex, whose attributes begin with those of ibv_create_qp.
pub unsafe extern "C" fn create_ex(_: *mut ibv_context, init: *mut ibv_qp_init_attr_ex) -> *mut ibv_qp {
    guard::pointer(|| {
        // SAFETY: the program passes its attributes.
        let ex = unsafe { &*init };
        let named = |bit: u32| ex.comp_mask & bit != 0;
        let known = IBV_QP_INIT_ATTR_PD | IBV_QP_INIT_ATTR_SEND_OPS_FLAGS | IBV_QP_INIT_ATTR_CREATE_FLAGS;
        if !named(IBV_QP_INIT_ATTR_PD) {
            return Err(EINVAL);
        }
        if ex.comp_mask & !known != 0 || (named(IBV_QP_INIT_ATTR_CREATE_FLAGS) && ex.create_flags != 0) {
            return Err(EOPNOTSUPP);
        }
        let send_ops = named(IBV_QP_INIT_ATTR_SEND_OPS_FLAGS).then_some(ex.send_ops_flags);
        if send_ops.is_some_and(|ops| ops & !wr_builder::SUPPORTED_OPS != 0) {
            return Err(EOPNOTSUPP);
        }
        let pd = ex.pd;
        // SAFETY: the two structures share their beginning; `ex` is not used any more.
        let init = unsafe { &mut *init.cast::<ibv_qp_init_attr>() };
        // SAFETY: the objects named are live.
        unsafe { create(pd, init, send_ops) }
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

/// # Safety
/// `qp` is a live QP of this library and `attr` points to attributes.
pub unsafe extern "C" fn ibv_modify_qp(qp: *mut ibv_qp, attr: *mut ibv_qp_attr, attr_mask: c_int) -> c_int {
    guard::code(|| {
        let mask = mask_from_c(attr_mask)?;
        // SAFETY: the caller's promise.
        let new = qp_attr_from_c(unsafe { &*attr }, mask)?;
        // SAFETY: the caller's promise.
        unsafe { Qp::of(qp) }.rust.core.modify(&new, mask)?;
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
        // SAFETY: a QP keeps its PD alive.
        let domain = unsafe { Pd::of(base.pd) };
        domain.rust.live.remove(qp as u64);
        pair.rust.core.close();
        pair.acks().wait(&pair.rust.async_events);
        // SAFETY: the C API forbids any use after this.
        unsafe { Qp::free(qp) };
        domain.rust.users.sub();
        for cq in [base.send_cq, base.recv_cq] {
            // SAFETY: a QP keeps its CQs alive.
            unsafe { Cq::of(cq) }.rust.users.sub();
        }
        Ok(())
    })
}

/// Bytes of a message may become visible in any order.
pub extern "C" fn ibv_query_qp_data_in_order(_: *mut ibv_qp, _: ibv_wr_opcode, _: u32) -> c_int {
    0
}

/// There are no vendor options: the answer is an empty set.
///
/// # Safety
/// `ece` has room, as the C prototype demands.
pub unsafe extern "C" fn ibv_query_ece(_: *mut ibv_qp, ece: *mut ibv_ece) -> c_int {
    guard::code(|| {
        // SAFETY: the caller's promise.
        unsafe { ece.write(ibv_ece { vendor_id: 0, options: 0, comp_mask: 0 }) };
        Err(EOPNOTSUPP)
    })
}

pub extern "C" fn ibv_set_ece(_: *mut ibv_qp, _: *mut ibv_ece) -> c_int {
    guard::code(|| Err(EOPNOTSUPP))
}
