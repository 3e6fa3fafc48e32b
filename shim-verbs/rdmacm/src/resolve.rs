//! From addresses to a bound id: bind, listen, resolve.

use std::ffi::c_int;

use freeflow_core::ctl::cm::{CmAddr, CmBind, CmListen, CmResolveAddr, CmResolveRoute, cm_flags};
use freeflow_verbs_abi::rdma_cm_id;
use libc::sockaddr;

use crate::edge::{self, Errno, Result};
use crate::id::{Id, field};
use crate::{address, event};

/// `flag` if the address is on one of our own interfaces.
fn own(addr: &CmAddr, flag: u32) -> Result<u32> {
    Ok(if address::is_own(&addr.addr)? { flag } else { 0 })
}

/// Binds `id`; with a certain address it is attached to the device as well. Loopback is none: it leaves the choice open, as
/// the kernel has it, and programs that list devices by what they bound (libfabric) rely on that.
pub fn bind(id: &Id, addr: &CmAddr) -> Result<()> {
    let flags = id.state().flags | own(addr, cm_flags::OWN)?;
    let bound = id.session.call(&CmBind { id: id.number, flags, addr: *addr })?;
    id.state().bound = true;
    id.set_local(&bound);
    if !address::is_wildcard(&bound) && !address::is_loopback(&bound) {
        id.attach()?;
    }
    Ok(())
}

/// Resolves `dst`; the answer is an event.
pub fn resolve_addr(id: &Id, src: Option<CmAddr>, dst: CmAddr) -> Result<()> {
    let src_flags = src.as_ref().map_or(Ok(0), |src| own(src, cm_flags::SRC_OWN))?;
    let flags = id.state().flags | own(&dst, cm_flags::OWN)? | src_flags;
    let src = src.unwrap_or_default();
    id.session.call(&CmResolveAddr { id: id.number, flags, src, dst })?;
    id.state().bound = true;
    id.set_remote(&dst);
    event::complete(id)
}

pub fn resolve_route(id: &Id) -> Result<()> {
    id.session.call(&CmResolveRoute { id: id.number, _pad: 0 })?;
    event::complete(id)
}

pub unsafe extern "C" fn rdma_bind_addr(id: *mut rdma_cm_id, addr: *mut sockaddr) -> c_int {
    edge::code(|| {
        // SAFETY: the program's id.
        let id = unsafe { Id::from_raw(id) }?;
        // SAFETY: the program's address.
        bind(id, &unsafe { address::read(addr) }?)
    })
}

/// Listens; as in the kernel, no backlog means the most there can be.
pub fn listen(id: &Id, backlog: u32) -> Result<()> {
    let bound = id.session.call(&CmListen { id: id.number, backlog })?;
    id.state().bound = true;
    id.set_local(&bound);
    Ok(())
}

pub unsafe extern "C" fn rdma_listen(id: *mut rdma_cm_id, backlog: c_int) -> c_int {
    // A strange backlog is none.
    let backlog = u32::try_from(backlog).unwrap_or(0);
    // SAFETY: the program's id.
    edge::code(|| listen(unsafe { Id::from_raw(id) }?, backlog))
}

/// The timeout is the real library's for ARP: here the router knows at once.
pub unsafe extern "C" fn rdma_resolve_addr(
    id: *mut rdma_cm_id,
    src: *mut sockaddr,
    dst: *mut sockaddr,
    _timeout_ms: c_int,
) -> c_int {
    edge::code(|| {
        // SAFETY: the program's id.
        let id = unsafe { Id::from_raw(id) }?;
        // SAFETY: the program's address.
        let dst = unsafe { address::read(dst) }?;
        // SAFETY: the program's address.
        let src = if src.is_null() { None } else { Some(unsafe { address::read(src) }?) };
        resolve_addr(id, src, dst)
    })
}

pub unsafe extern "C" fn rdma_resolve_route(id: *mut rdma_cm_id, _timeout_ms: c_int) -> c_int {
    edge::code(|| {
        // SAFETY: the program's id.
        let id = unsafe { Id::from_raw(id) }?;
        if field!(id, verbs).is_null() {
            return Err(Errno::INVAL);
        }
        resolve_route(id)
    })
}
