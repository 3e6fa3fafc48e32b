//! The program's side of the handshake: connect, accept, reject, establish, disconnect.

use std::ffi::{c_int, c_void};

use freeflow_core::ctl::cm::*;
use freeflow_verbs_abi::*;

use crate::edge::{self, Errno, Result};
use crate::id::{Id, field, set_field};
use crate::{event, modify, queues};

/// Retry counts have three bits.
const MAX_RETRY: u8 = 7;

/// Depths that the device allows; `RDMA_MAX_*` asks for the most.
fn check_depths(id: &Id, param: Option<&rdma_conn_param>) -> Result<()> {
    if field!(id, ps) != RDMA_PS_TCP {
        return Ok(());
    }
    let open = id.state().attached.ok_or(Errno::INVAL)?;
    let Some(param) = param else {
        return if field!(id, qp).is_null() { Err(Errno::INVAL) } else { Ok(()) };
    };
    let fits = |asked: u8, limit: u8| u32::from(asked) == RDMA_MAX_RESP_RES || asked <= limit;
    match fits(param.responder_resources, open.max_responder_resources)
        && fits(param.initiator_depth, open.max_initiator_depth)
    {
        true => Ok(()),
        false => Err(Errno::INVAL),
    }
}

/// `asked` if the program named a depth, else `most`.
fn depth(asked: Option<u8>, most: u8) -> u8 {
    asked.filter(|asked| u32::from(*asked) != RDMA_MAX_INIT_DEPTH).unwrap_or(most)
}

/// The private data of a call.
///
/// # Safety
/// `data` is NULL or points to `len` readable bytes.
unsafe fn private_data(before: &[u8], data: *const c_void, len: u8, limit: usize) -> Result<CmData> {
    let given = match data.is_null() {
        true => &[],
        // SAFETY: the caller's promise.
        false => unsafe { std::slice::from_raw_parts(data.cast::<u8>(), usize::from(len)) },
    };
    CmData::new(&[before, given].concat(), limit).ok_or(Errno::INVAL)
}

/// The parameters of our half: depths from the id, the rest from the program, the QP from the id if it has one.
fn params(id: &Id, param: Option<&rdma_conn_param>, psn: u32) -> CmParams {
    let qp = field!(id, qp);
    // SAFETY: NULL or the id's QP, which libibverbs keeps until rdma_destroy_qp.
    let (qpn, srq) = match unsafe { qp.as_ref() } {
        Some(qp) => (qp.qp_num, !qp.srq.is_null()),
        None => param.map_or((0, false), |param| (param.qp_num, param.srq != 0)),
    };
    let state = id.state();
    CmParams {
        responder_resources: state.responder_resources,
        initiator_depth: state.initiator_depth,
        flow_control: param.map_or(0, |param| param.flow_control),
        retry_count: param.map_or(MAX_RETRY, |param| param.retry_count.min(MAX_RETRY)),
        rnr_retry_count: param.map_or(MAX_RETRY, |param| param.rnr_retry_count.min(MAX_RETRY)),
        srq: u8::from(srq),
        _pad: 0,
        qpn: qpn & 0x00ff_ffff,
        qkey: RDMA_UDP_QKEY,
        psn,
        ece_vendor: state.local_ece.0,
        ece_options: state.local_ece.1,
    }
}

/// Asks the peer for a connection.
pub fn connect(id: &Id, param: Option<&rdma_conn_param>) -> Result<()> {
    check_depths(id, param)?;
    let open = id.state().attached.ok_or(Errno::INVAL)?;
    let limit = if id.is_datagram() { cm_data::SIDR_REQUEST } else { cm_data::REQUEST };
    let (data, len) = param.map_or((std::ptr::null(), 0), |p| (p.private_data, p.private_data_len));
    // SAFETY: the program's buffer, of the length it says.
    let data = unsafe { private_data(&id.state().connect_data, data, len, limit) }?;
    let psn = id.session.packet_number();
    {
        let mut state = id.state();
        state.initiator_depth = depth(param.map(|p| p.initiator_depth), open.max_initiator_depth);
        state.responder_resources = depth(param.map(|p| p.responder_resources), open.max_responder_resources);
        state.retry_count = param.map_or(MAX_RETRY, |p| p.retry_count.min(MAX_RETRY));
        state.psn = psn;
    }
    id.session.call(&CmConnect { id: id.number, params: params(id, param, psn), data })?;
    id.state().connect_data.clear();
    event::complete(id)
}

/// Says yes to a request.
pub fn accept(id: &Id, param: Option<&rdma_conn_param>) -> Result<()> {
    if param.is_none() && field!(id, qp).is_null() {
        return Err(Errno::INVAL);
    }
    check_depths(id, param)?;
    let open = id.state().attached.ok_or(Errno::INVAL)?;
    let limit = if id.is_datagram() { cm_data::SIDR_REPLY } else { cm_data::REPLY };
    let (data, len) = param.map_or((std::ptr::null(), 0), |p| (p.private_data, p.private_data_len));
    // SAFETY: the program's buffer, of the length it says.
    let data = unsafe { private_data(&[], data, len, limit) }?;
    let psn = id.session.packet_number();
    {
        let mut state = id.state();
        let most = state.initiator_depth.min(open.max_initiator_depth);
        state.initiator_depth = depth(param.map(|p| p.initiator_depth), most);
        let most = state.responder_resources.min(open.max_responder_resources);
        state.responder_resources = depth(param.map(|p| p.responder_resources), most);
        state.psn = psn;
    }
    if !id.is_datagram() {
        modify::to_rts(id)?;
    }
    let mut params = params(id, param, psn);
    params.ece_vendor = id.state().remote_ece.0;
    let sent = id.session.call(&CmAccept { id: id.number, params, data });
    if let Err(errno) = sent {
        // Nobody is at the other end of the QP.
        let _ = modify::to_error(id);
        return Err(errno);
    }
    if id.is_datagram() {
        id.drop_event();
        return Ok(());
    }
    event::complete(id)
}

pub unsafe extern "C" fn rdma_connect(id: *mut rdma_cm_id, param: *mut rdma_conn_param) -> c_int {
    edge::code(|| {
        // SAFETY: the program's id.
        let id = unsafe { Id::from_raw(id) }?;
        // SAFETY: NULL or the program's structure.
        connect(id, unsafe { param.as_ref() })
    })
}

pub unsafe extern "C" fn rdma_accept(id: *mut rdma_cm_id, param: *mut rdma_conn_param) -> c_int {
    edge::code(|| {
        // SAFETY: the program's id.
        let id = unsafe { Id::from_raw(id) }?;
        // SAFETY: NULL or the program's structure.
        accept(id, unsafe { param.as_ref() })
    })
}

/// # Safety
/// `id` is the program's id, `data` NULL or `len` readable bytes.
unsafe fn reject(id: *mut rdma_cm_id, data: *const c_void, len: u8, reason: u32) -> Result<()> {
    // SAFETY: the caller's promise.
    let id = unsafe { Id::from_raw(id) }?;
    let limit = if id.is_datagram() { cm_data::SIDR_REPLY } else { cm_data::REJECT };
    // SAFETY: the caller's promise.
    let data = unsafe { private_data(&[], data, len, limit) }?;
    id.session.call(&CmReject { id: id.number, reason, data }).map(|_| ())
}

pub unsafe extern "C" fn rdma_reject(id: *mut rdma_cm_id, data: *const c_void, len: u8) -> c_int {
    // SAFETY: the program's id and buffer.
    edge::code(|| unsafe { reject(id, data, len, 0) })
}

pub unsafe extern "C" fn rdma_reject_ece(id: *mut rdma_cm_id, data: *const c_void, len: u8) -> c_int {
    // SAFETY: the program's id and buffer.
    edge::code(|| unsafe { reject(id, data, len, cm_reason::VENDOR_OPTION) })
}

pub unsafe extern "C" fn rdma_establish(id: *mut rdma_cm_id) -> c_int {
    edge::code(|| {
        // SAFETY: the program's id.
        let id = unsafe { Id::from_raw(id) }?;
        // With a QP of ours the library has done it already.
        if !field!(id, qp).is_null() {
            return Err(Errno::INVAL);
        }
        id.session.call(&CmEstablish { id: id.number, _pad: 0 }).map(|_| ())
    })
}

/// Hangs up, or answers the other side's hanging up.
pub fn disconnect(id: &Id) -> Result<()> {
    if field!(id, verbs).is_null() {
        return Err(Errno::INVAL);
    }
    modify::to_error(id)?;
    id.session.call(&CmDisconnect { id: id.number, _pad: 0 })?;
    event::complete(id)
}

pub unsafe extern "C" fn rdma_disconnect(id: *mut rdma_cm_id) -> c_int {
    // SAFETY: the program's id.
    edge::code(|| disconnect(unsafe { Id::from_raw(id) }?))
}

/// The next connection request of a synchronous listener.
fn get_request(listener: &Id) -> Result<*mut rdma_cm_id> {
    if !listener.state().sync {
        return Err(Errno::INVAL);
    }
    listener.drop_event();
    let event = event::next(listener.channel())?;
    // SAFETY: just handed out; the structure is plain data.
    let seen = unsafe { *event };
    let judged = match (seen.event, seen.status) {
        (RDMA_CM_EVENT_REJECTED, _) => Err(Errno::CONNREFUSED),
        (RDMA_CM_EVENT_CONNECT_REQUEST, 0) => Ok(()),
        (_, 0) => Err(Errno::INVAL),
        (_, status) => Err(Errno::from_raw_os_error(status.abs())),
    };
    let template = listener.state().accept_qp;
    let made = judged.and_then(|()| match template {
        None => Ok(()),
        Some(mut attr) => {
            // SAFETY: the new id of the event just handed out.
            let id = unsafe { Id::from_raw(seen.id) }?;
            queues::create_qp(id, field!(listener, pd), &mut attr)
        }
    });
    if let Err(errno) = made {
        set_field!(listener, event = event);
        return Err(errno);
    }
    // SAFETY: the new id of the event just handed out.
    let id = unsafe { Id::from_raw(seen.id) }?;
    set_field!(id, event = event);
    Ok(seen.id)
}

pub unsafe extern "C" fn rdma_get_request(listen: *mut rdma_cm_id, id: *mut *mut rdma_cm_id) -> c_int {
    edge::code(|| {
        // SAFETY: the program's id.
        let listener = unsafe { Id::from_raw(listen) }?;
        if id.is_null() {
            return Err(Errno::INVAL);
        }
        let got = get_request(listener)?;
        // SAFETY: the caller's pointer to fill in.
        unsafe { *id = got };
        Ok(())
    })
}
