//! Async events: getting and acknowledging them.

use crate::context::Context;
use crate::cq::Cq;
use crate::guard::{self, Result};
use crate::object::Acks;
use crate::qp::Qp;
use crate::srq::Srq;
use freeflow_core::client::{AsyncEvent, AsyncKind};
use freeflow_verbs_abi::*;
use std::ffi::c_int;

/// Waits for the next event, unless the program made the descriptor non-blocking.
///
/// # Safety
/// `context` is a live context and `event` has room, as the C prototype demands.
pub unsafe extern "C" fn ibv_get_async_event(
    context: *mut ibv_context,
    event: *mut ibv_async_event,
) -> c_int {
    guard::number(|| {
        // SAFETY: the caller's promise.
        let answer = unsafe { next_event(context) }?;
        // SAFETY: the caller's promise.
        unsafe { event.write(answer) };
        Ok(0)
    })
}

/// The next event whose object lives, counted as delivered.
///
/// # Safety
/// `context` is a live context of this library.
unsafe fn next_event(context: *mut ibv_context) -> Result<ibv_async_event> {
    // SAFETY: the caller's promise.
    let rust = unsafe { &Context::of_ibv(context).rust };
    loop {
        let AsyncEvent { kind, cookie } = rust.core.next_async_event()?;
        let event_type = kind as u32;
        let (element, delivered) = match kind {
            AsyncKind::DeviceFatal => {
                let element = ibv_async_event__bindgen_ty_1 { port_num: 0 };
                return Ok(ibv_async_event { element, event_type });
            }
            AsyncKind::CqErr => {
                let cq = cookie as *mut ibv_cq;
                // SAFETY: the cookie is the address of the CQ, which is live while this runs.
                let count = || unsafe { Cq::of(cq) }.rust.async_events.add();
                (ibv_async_event__bindgen_ty_1 { cq }, rust.live.with(cookie, count))
            }
            AsyncKind::SrqLimit => {
                let srq = cookie as *mut ibv_srq;
                // SAFETY: as above, for shared receive queues.
                let count = || unsafe { Srq::of(srq) }.rust.async_events.add();
                (ibv_async_event__bindgen_ty_1 { srq }, rust.live.with(cookie, count))
            }
            AsyncKind::QpFatal
            | AsyncKind::QpReqErr
            | AsyncKind::QpAccessErr
            | AsyncKind::CommEst
            | AsyncKind::SqDrained
            | AsyncKind::QpLastWqe => {
                let qp = cookie as *mut ibv_qp;
                // SAFETY: as above, for QPs.
                let count = || unsafe { Qp::of(qp) }.rust.async_events.add();
                (ibv_async_event__bindgen_ty_1 { qp }, rust.live.with(cookie, count))
            }
        };
        if delivered {
            return Ok(ibv_async_event { element, event_type });
        }
    }
}

/// # Safety
/// `event` came from [`ibv_get_async_event`].
pub unsafe extern "C" fn ibv_ack_async_event(event: *mut ibv_async_event) {
    guard::nothing(|| {
        // SAFETY: the caller's promise.
        let event = unsafe { &*event };
        // SAFETY: the caller's promise.
        if let Some(acks) = unsafe { acks_of(event) } {
            acks.add(1);
        }
    });
}

/// # Safety
/// The event came from [`ibv_get_async_event`] and was not acknowledged, so its object lives.
unsafe fn acks_of(event: &ibv_async_event) -> Option<Acks> {
    match event.event_type {
        IBV_EVENT_CQ_ERR => {
            // SAFETY: the event's type says what its element is.
            let cq = unsafe { event.element.cq };
            // SAFETY: the caller's promise.
            Some(unsafe { Cq::of(cq) }.async_acks())
        }
        IBV_EVENT_SRQ_ERR | IBV_EVENT_SRQ_LIMIT_REACHED => {
            // SAFETY: the event's type says what its element is.
            let srq = unsafe { event.element.srq };
            // SAFETY: the caller's promise.
            Some(unsafe { Srq::of(srq) }.acks())
        }
        IBV_EVENT_QP_FATAL
        | IBV_EVENT_QP_REQ_ERR
        | IBV_EVENT_QP_ACCESS_ERR
        | IBV_EVENT_COMM_EST
        | IBV_EVENT_SQ_DRAINED
        | IBV_EVENT_PATH_MIG
        | IBV_EVENT_PATH_MIG_ERR
        | IBV_EVENT_QP_LAST_WQE_REACHED => {
            // SAFETY: the event's type says what its element is.
            let qp = unsafe { event.element.qp };
            // SAFETY: the caller's promise.
            Some(unsafe { Qp::of(qp) }.acks())
        }
        _ => None,
    }
}
