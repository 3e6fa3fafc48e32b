//! QPs, SRQs and the CQs made for them on an id.
//!
//! Fills the id's fields as `rdma_create_qp` promises: inline functions of rdma_verbs.h go through them.

use std::ffi::c_int;

use freeflow_verbs_abi::*;

use crate::edge::{self, Errno, Result};
use crate::id::{Id, field, set_field};
use crate::modify;
use crate::verbs::verbs;

/// Makes the CQs and completion channels that are missing; 0 means not missing.
fn create_cqs(id: &Id, send: u32, recv: u32) -> Result<()> {
    let made = try_create_cqs(id, send, recv);
    if made.is_err() {
        destroy_cqs(id);
    }
    made
}

fn try_create_cqs(id: &Id, send: u32, recv: u32) -> Result<()> {
    let (verbs, context) = (verbs()?, field!(id, verbs));
    if recv > 0 {
        set_field!(id, recv_cq_channel = verbs.create_channel(context)?);
        let channel = field!(id, recv_cq_channel);
        set_field!(id, recv_cq = verbs.create_cq(context, recv, id.public().cast(), channel)?);
    }
    if send > 0 {
        set_field!(id, send_cq_channel = verbs.create_channel(context)?);
        let channel = field!(id, send_cq_channel);
        set_field!(id, send_cq = verbs.create_cq(context, send, id.public().cast(), channel)?);
    }
    Ok(())
}

/// Destroys the CQs and channels that `create_cqs` made.
fn destroy_cqs(id: &Id) {
    let Ok(verbs) = verbs() else { return };
    let (recv, send) = (field!(id, recv_cq), field!(id, send_cq));
    if !recv.is_null() {
        verbs.destroy_cq(recv);
    }
    if !send.is_null() && send != recv {
        verbs.destroy_cq(send);
    }
    set_field!(id, recv_cq = std::ptr::null_mut());
    set_field!(id, send_cq = std::ptr::null_mut());
    let (recv, send) = (field!(id, recv_cq_channel), field!(id, send_cq_channel));
    if !recv.is_null() {
        verbs.destroy_channel(recv);
    }
    if !send.is_null() && send != recv {
        verbs.destroy_channel(send);
    }
    set_field!(id, recv_cq_channel = std::ptr::null_mut());
    set_field!(id, send_cq_channel = std::ptr::null_mut());
}

/// The plain attributes inside extended ones.
fn plain(attr: &ibv_qp_init_attr_ex) -> ibv_qp_init_attr {
    ibv_qp_init_attr {
        qp_context: attr.qp_context,
        send_cq: attr.send_cq,
        recv_cq: attr.recv_cq,
        srq: attr.srq,
        cap: attr.cap,
        qp_type: attr.qp_type,
        sq_sig_all: attr.sq_sig_all,
    }
}

/// Which CQs, SRQ and PD a QP of this id uses.
fn complete(id: &Id, attr: &mut ibv_qp_init_attr_ex) -> Result<()> {
    if !field!(id, qp).is_null() || field!(id, verbs).is_null() {
        return Err(Errno::INVAL);
    }
    if attr.comp_mask & IBV_QP_INIT_ATTR_PD == 0 || attr.pd.is_null() {
        attr.comp_mask |= IBV_QP_INIT_ATTR_PD;
        attr.pd = field!(id, pd);
    // SAFETY: the program's PD, a live object of libibverbs.
    } else if unsafe { (*attr.pd).context } != field!(id, verbs) {
        return Err(Errno::INVAL);
    }
    let (send, recv) = (field!(id, send_cq), field!(id, recv_cq));
    let differ =
        |ours: *mut ibv_cq, theirs: *mut ibv_cq| !ours.is_null() && !theirs.is_null() && ours != theirs;
    if differ(send, attr.send_cq) || differ(recv, attr.recv_cq) {
        return Err(Errno::INVAL);
    }
    if field!(id, qp_type) == IBV_QPT_XRC_RECV {
        if attr.comp_mask & IBV_QP_INIT_ATTR_XRCD == 0 || attr.xrcd.is_null() {
            attr.comp_mask |= IBV_QP_INIT_ATTR_XRCD;
            attr.xrcd = id.session.device.xrcd()?;
        }
        // What it receives goes to shared queues, which have CQs of their own.
        return Ok(());
    }
    let missing = |ours: *mut ibv_cq, theirs: *mut ibv_cq, size| {
        if ours.is_null() && theirs.is_null() { size } else { 0 }
    };
    let (send_size, recv_size) = (attr.cap.max_send_wr, attr.cap.max_recv_wr);
    create_cqs(id, missing(send, attr.send_cq, send_size), missing(recv, attr.recv_cq, recv_size))?;
    if attr.send_cq.is_null() {
        attr.send_cq = field!(id, send_cq);
    }
    if attr.recv_cq.is_null() {
        attr.recv_cq = field!(id, recv_cq);
    }
    if attr.srq.is_null() {
        attr.srq = field!(id, srq);
    }
    Ok(())
}

/// Creates the QP and takes it to INIT.
fn create_qp_ex(id: &Id, attr: &mut ibv_qp_init_attr_ex) -> Result<()> {
    complete(id, attr)?;
    let made = make_qp(id, attr);
    match made {
        Ok(qp) => {
            // SAFETY: just created by libibverbs.
            let pd = unsafe { (*qp).pd };
            // An XRC target has none.
            if !pd.is_null() {
                set_field!(id, pd = pd);
            }
            set_field!(id, qp = qp);
            Ok(())
        }
        Err(errno) => {
            destroy_cqs(id);
            Err(errno)
        }
    }
}

fn make_qp(id: &Id, attr: &mut ibv_qp_init_attr_ex) -> Result<*mut ibv_qp> {
    let verbs = verbs()?;
    let qp = if attr.comp_mask == IBV_QP_INIT_ATTR_PD {
        // Nothing in it that the plain call does not have.
        let mut short = plain(attr);
        let qp = verbs.create_qp(attr.pd, &mut short)?;
        attr.cap = short.cap;
        qp
    } else {
        verbs.create_qp_ex(field!(id, verbs), attr)?
    };
    modify::to_init(id, qp).inspect_err(|_| verbs.destroy_qp(qp))?;
    Ok(qp)
}

/// Creates a QP on `pd`, or on the id's default one.
pub fn create_qp(id: &Id, pd: *mut ibv_pd, attr: &mut ibv_qp_init_attr) -> Result<()> {
    // SAFETY: pointers and integers, for which zero is valid.
    let mut whole: ibv_qp_init_attr_ex = unsafe { std::mem::zeroed() };
    whole.qp_context = attr.qp_context;
    whole.send_cq = attr.send_cq;
    whole.recv_cq = attr.recv_cq;
    whole.srq = attr.srq;
    whole.cap = attr.cap;
    whole.qp_type = attr.qp_type;
    whole.sq_sig_all = attr.sq_sig_all;
    whole.comp_mask = IBV_QP_INIT_ATTR_PD;
    whole.pd = pd;
    let made = create_qp_ex(id, &mut whole);
    *attr = plain(&whole);
    made
}

pub unsafe extern "C" fn rdma_create_qp(
    id: *mut rdma_cm_id,
    pd: *mut ibv_pd,
    attr: *mut ibv_qp_init_attr,
) -> c_int {
    edge::code(|| {
        // SAFETY: the program's id.
        let id = unsafe { Id::from_raw(id) }?;
        // SAFETY: the program's structure.
        create_qp(id, pd, unsafe { attr.as_mut() }.ok_or(Errno::INVAL)?)
    })
}

pub unsafe extern "C" fn rdma_create_qp_ex(id: *mut rdma_cm_id, attr: *mut ibv_qp_init_attr_ex) -> c_int {
    edge::code(|| {
        // SAFETY: the program's id.
        let id = unsafe { Id::from_raw(id) }?;
        // SAFETY: the program's structure.
        create_qp_ex(id, unsafe { attr.as_mut() }.ok_or(Errno::INVAL)?)
    })
}

/// Destroys the id's QP and the CQs made with it.
pub fn destroy_qp(id: &Id) -> Result<()> {
    let qp = field!(id, qp);
    if !qp.is_null() {
        verbs()?.destroy_qp(qp);
        set_field!(id, qp = std::ptr::null_mut());
    }
    // An XRC target's belong to its shared queue.
    if field!(id, qp_type) != IBV_QPT_XRC_RECV || field!(id, srq).is_null() {
        destroy_cqs(id);
    }
    Ok(())
}

pub unsafe extern "C" fn rdma_destroy_qp(id: *mut rdma_cm_id) {
    // SAFETY: the program's id.
    edge::nothing(|| destroy_qp(unsafe { Id::from_raw(id) }?));
}

/// Which domain and CQ an XRC shared queue of this id uses.
fn complete_xrc(id: &Id, attr: &mut ibv_srq_init_attr_ex) -> Result<()> {
    if attr.comp_mask & IBV_SRQ_INIT_ATTR_XRCD == 0 || attr.xrcd.is_null() {
        attr.comp_mask |= IBV_SRQ_INIT_ATTR_XRCD;
        attr.xrcd = id.session.device.xrcd()?;
    }
    if attr.comp_mask & IBV_SRQ_INIT_ATTR_CQ == 0 || attr.cq.is_null() {
        if field!(id, recv_cq).is_null() {
            create_cqs(id, 0, attr.attr.max_wr)?;
        }
        attr.comp_mask |= IBV_SRQ_INIT_ATTR_CQ;
        attr.cq = field!(id, recv_cq);
    }
    Ok(())
}

fn create_srq_ex(id: &Id, attr: &mut ibv_srq_init_attr_ex) -> Result<()> {
    if attr.comp_mask & IBV_SRQ_INIT_ATTR_TYPE == 0 {
        return Err(Errno::INVAL);
    }
    if attr.comp_mask & IBV_SRQ_INIT_ATTR_PD == 0 || attr.pd.is_null() {
        attr.comp_mask |= IBV_SRQ_INIT_ATTR_PD;
        attr.pd = field!(id, pd);
    }
    if attr.srq_type == IBV_SRQT_XRC {
        complete_xrc(id, attr)?;
    }
    let verbs = verbs()?;
    let simple = IBV_SRQ_INIT_ATTR_TYPE | IBV_SRQ_INIT_ATTR_PD;
    let srq = if attr.comp_mask == simple && attr.srq_type == IBV_SRQT_BASIC {
        let mut short = ibv_srq_init_attr { srq_context: attr.srq_context, attr: attr.attr };
        let srq = verbs.create_srq(attr.pd, &mut short)?;
        attr.attr = short.attr;
        srq
    } else {
        verbs.create_srq_ex(field!(id, verbs), attr)?
    };
    if field!(id, pd).is_null() {
        set_field!(id, pd = attr.pd);
    }
    set_field!(id, srq = srq);
    Ok(())
}

pub unsafe extern "C" fn rdma_create_srq(
    id: *mut rdma_cm_id,
    pd: *mut ibv_pd,
    attr: *mut ibv_srq_init_attr,
) -> c_int {
    edge::code(|| {
        // SAFETY: the program's id.
        let id = unsafe { Id::from_raw(id) }?;
        // SAFETY: the program's structure.
        let attr = unsafe { attr.as_mut() }.ok_or(Errno::INVAL)?;
        // SAFETY: pointers and integers, for which zero is valid.
        let mut whole: ibv_srq_init_attr_ex = unsafe { std::mem::zeroed() };
        whole.srq_context = attr.srq_context;
        whole.attr = attr.attr;
        whole.comp_mask = IBV_SRQ_INIT_ATTR_TYPE | IBV_SRQ_INIT_ATTR_PD;
        let target = field!(id, qp_type) == IBV_QPT_XRC_RECV;
        whole.srq_type = if target { IBV_SRQT_XRC } else { IBV_SRQT_BASIC };
        whole.pd = pd;
        let made = create_srq_ex(id, &mut whole);
        attr.attr = whole.attr;
        made
    })
}

pub unsafe extern "C" fn rdma_create_srq_ex(id: *mut rdma_cm_id, attr: *mut ibv_srq_init_attr_ex) -> c_int {
    edge::code(|| {
        // SAFETY: the program's id.
        let id = unsafe { Id::from_raw(id) }?;
        // SAFETY: the program's structure.
        create_srq_ex(id, unsafe { attr.as_mut() }.ok_or(Errno::INVAL)?)
    })
}

/// Destroys the id's SRQ.
pub fn destroy_srq(id: &Id) -> Result<()> {
    let srq = field!(id, srq);
    if !srq.is_null() {
        verbs()?.destroy_srq(srq);
        set_field!(id, srq = std::ptr::null_mut());
    }
    // CQs that a QP still uses go with that QP.
    if field!(id, qp).is_null() {
        destroy_cqs(id);
    }
    Ok(())
}

pub unsafe extern "C" fn rdma_destroy_srq(id: *mut rdma_cm_id) {
    // SAFETY: the program's id.
    edge::nothing(|| destroy_srq(unsafe { Id::from_raw(id) }?));
}
