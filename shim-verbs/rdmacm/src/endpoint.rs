//! `rdma_create_ep`: a synchronous id made from an rdma_addrinfo, with its route and QP.

use std::ffi::c_int;

use freeflow_verbs_abi::*;

use crate::edge::{self, Errno, Result};
use crate::id::{self, Id, set_field};
use crate::{address, queues, resolve};

/// Prepares a listener: where it listens and which QP each request gets.
fn passive(id: &Id, res: &rdma_addrinfo, pd: *mut ibv_pd, attr: Option<&mut ibv_qp_init_attr>) -> Result<()> {
    // SAFETY: the address of the program's rdma_addrinfo.
    resolve::bind(id, &unsafe { address::read(res.ai_src_addr) }?)?;
    if !pd.is_null() {
        set_field!(id, pd = pd);
    }
    if let Some(attr) = attr {
        let qp_type = res.ai_qp_type as ibv_qp_type;
        id.state().accept_qp = Some(ibv_qp_init_attr { qp_type, ..*attr });
    }
    Ok(())
}

/// Prepares a connection: address, route, QP and private data.
fn active(id: &Id, res: &rdma_addrinfo, pd: *mut ibv_pd, attr: Option<&mut ibv_qp_init_attr>) -> Result<()> {
    // SAFETY: the address of the program's rdma_addrinfo.
    let dst = unsafe { address::read(res.ai_dst_addr) }?;
    let src = match res.ai_src_addr.is_null() {
        true => None,
        // SAFETY: the address of the program's rdma_addrinfo.
        false => Some(unsafe { address::read(res.ai_src_addr) }?),
    };
    resolve::resolve_addr(id, src, dst)?;
    if res.ai_route_len != 0 {
        return Err(Errno::OPNOTSUPP);
    }
    resolve::resolve_route(id)?;
    if let Some(attr) = attr {
        attr.qp_type = res.ai_qp_type as ibv_qp_type;
        queues::create_qp(id, pd, attr)?;
    }
    if res.ai_connect_len != 0 && !res.ai_connect.is_null() {
        // SAFETY: the program's buffer, of the length it says.
        let data = unsafe { std::slice::from_raw_parts(res.ai_connect.cast::<u8>(), res.ai_connect_len) };
        id.state().connect_data = data.to_vec();
    }
    Ok(())
}

pub unsafe extern "C" fn rdma_create_ep(
    id: *mut *mut rdma_cm_id,
    res: *mut rdma_addrinfo,
    pd: *mut ibv_pd,
    attr: *mut ibv_qp_init_attr,
) -> c_int {
    edge::code(|| {
        // SAFETY: NULL or the program's structure.
        let res = unsafe { res.as_ref() }.ok_or(Errno::INVAL)?;
        if id.is_null() {
            return Err(Errno::INVAL);
        }
        // SAFETY: NULL or the program's structure.
        let attr = unsafe { attr.as_mut() };
        let (ps, qp_type) = (res.ai_port_space as rdma_port_space, res.ai_qp_type as ibv_qp_type);
        let made = id::create(std::ptr::null_mut(), std::ptr::null_mut(), ps, qp_type)?;
        // SAFETY: just made; nobody else has it yet.
        let fresh = unsafe { &*made };
        let prepared = match res.ai_flags as u32 & RAI_PASSIVE {
            0 => active(fresh, res, pd, attr),
            _ => passive(fresh, res, pd, attr),
        };
        if let Err(errno) = prepared {
            // SAFETY: just made; nobody else has it.
            let _ = unsafe { destroy(made) };
            return Err(errno);
        }
        // SAFETY: the caller's pointer to fill in.
        unsafe { *id = made.cast() };
        Ok(())
    })
}

/// # Safety
/// As for [`Id::destroy`].
unsafe fn destroy(id: *mut Id) -> Result<()> {
    {
        // SAFETY: the caller's promise.
        let this = unsafe { &*id };
        queues::destroy_qp(this)?;
        queues::destroy_srq(this)?;
    }
    // SAFETY: the caller's promise.
    unsafe { Id::destroy(id) }
}

pub unsafe extern "C" fn rdma_destroy_ep(id: *mut rdma_cm_id) {
    edge::nothing(|| match id.is_null() {
        true => Err(Errno::INVAL),
        // SAFETY: the program's id, given up by this call.
        false => unsafe { destroy(id.cast()) },
    });
}
