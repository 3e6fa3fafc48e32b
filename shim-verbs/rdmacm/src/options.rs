//! What programs set on an id: options, enhancements, and the word that data has arrived.

use std::ffi::{c_int, c_void};

use freeflow_core::ctl::cm::{CmNotify, cm_flags};
use freeflow_verbs_abi::*;

use crate::edge::{self, Errno, Result};
use crate::id::{Id, field};

/// Reads an option's value, which must have exactly its type's size.
///
/// # Safety
/// `value` points to `len` readable bytes.
unsafe fn option<T: Copy>(value: *const c_void, len: usize) -> Result<T> {
    if value.is_null() || len != size_of::<T>() {
        return Err(Errno::INVAL);
    }
    // SAFETY: the caller's promise and the check above.
    Ok(unsafe { value.cast::<T>().read_unaligned() })
}

pub unsafe extern "C" fn rdma_set_option(
    id: *mut rdma_cm_id,
    level: c_int,
    name: c_int,
    value: *mut c_void,
    len: usize,
) -> c_int {
    edge::code(|| {
        // SAFETY: the program's id.
        let id = unsafe { Id::from_raw(id) }?;
        let mut state = id.state();
        match (level as u32, name as u32) {
            // SAFETY: the caller's buffer.
            (RDMA_OPTION_ID, RDMA_OPTION_ID_TOS) => state.tos = unsafe { option::<u8>(value, len) }?,
            (RDMA_OPTION_ID, RDMA_OPTION_ID_ACK_TIMEOUT) => {
                // SAFETY: the caller's buffer.
                let timeout = unsafe { option::<u8>(value, len) }?;
                // Five bits in the QP; 0 means forever.
                state.ack_timeout = if timeout < 32 { timeout } else { return Err(Errno::INVAL) };
            }
            (RDMA_OPTION_ID, which @ (RDMA_OPTION_ID_REUSEADDR | RDMA_OPTION_ID_AFONLY)) => {
                // SAFETY: the caller's buffer.
                let on = unsafe { option::<c_int>(value, len) }? != 0;
                // They decide what a bind may share and covers: too late afterwards.
                if state.bound {
                    return Err(Errno::INVAL);
                }
                let flag = if which == RDMA_OPTION_ID_AFONLY { cm_flags::AF_ONLY } else { cm_flags::REUSE };
                state.flags = if on { state.flags | flag } else { state.flags & !flag };
            }
            (RDMA_OPTION_IB, RDMA_OPTION_IB_PATH) => return Err(Errno::OPNOTSUPP),
            _ => return Err(Errno::NOSYS),
        }
        Ok(())
    })
}

pub unsafe extern "C" fn rdma_notify(id: *mut rdma_cm_id, event: ibv_event_type) -> c_int {
    edge::code(|| {
        // SAFETY: the program's id.
        let id = unsafe { Id::from_raw(id) }?;
        if event != IBV_EVENT_COMM_EST {
            return Err(Errno::INVAL);
        }
        id.session.call(&CmNotify { id: id.number, _pad: 0 }).map(|_| ())
    })
}

pub unsafe extern "C" fn rdma_set_local_ece(id: *mut rdma_cm_id, ece: *mut ibv_ece) -> c_int {
    edge::code(|| {
        // SAFETY: the program's id.
        let id = unsafe { Id::from_raw(id) }?;
        // SAFETY: NULL or the program's structure.
        let ece = unsafe { ece.as_ref() }.ok_or(Errno::INVAL)?;
        if !field!(id, qp).is_null() || ece.vendor_id == 0 || ece.comp_mask != 0 {
            return Err(Errno::INVAL);
        }
        id.state().local_ece = (ece.vendor_id, ece.options);
        Ok(())
    })
}

pub unsafe extern "C" fn rdma_get_remote_ece(id: *mut rdma_cm_id, ece: *mut ibv_ece) -> c_int {
    edge::code(|| {
        // SAFETY: the program's id.
        let id = unsafe { Id::from_raw(id) }?;
        if !field!(id, qp).is_null() || ece.is_null() {
            return Err(Errno::INVAL);
        }
        let (vendor_id, options) = id.state().remote_ece;
        // SAFETY: the program's structure.
        unsafe { ece.write(ibv_ece { vendor_id, options, comp_mask: 0 }) };
        Ok(())
    })
}
