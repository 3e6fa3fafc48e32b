//! Multicast groups of an id. The router only gives the answer its place among the events; being in a group is the queue
//! pair's business, which libibverbs attaches when the event passes.

use std::ffi::{c_int, c_void};

use freeflow_core::ctl::RawGid;
use freeflow_core::ctl::cm::CmJoin;
use freeflow_verbs_abi::*;
use libc::sockaddr;

use crate::edge::{self, Errno, Result};
use crate::id::{Id, field};
use crate::verbs::verbs;
use crate::{address, event, modify};

/// The queue pair number of every group.
const EVERYBODY: u32 = 0x00ff_ffff;

/// A group that an id has asked for.
#[derive(Debug)]
pub struct Group {
    gid: RawGid,
    /// Gets back to the program with the answer.
    context: *mut c_void,
    /// It sends only.
    send_only: bool,
    attached: bool,
}

// SAFETY: `context` is the program's and never followed here.
unsafe impl Send for Group {}

/// Asks for a group; the answer is an event.
///
/// # Safety
/// `addr` is NULL or the program's address.
unsafe fn join(id: &Id, addr: *const sockaddr, flags: u32, context: *mut c_void) -> Result<()> {
    // SAFETY: the caller's promise.
    let addr = unsafe { address::read(addr) }?;
    if field!(id, verbs).is_null() || !id.is_datagram() {
        return Err(Errno::INVAL);
    }
    let send_only = flags == RDMA_MC_JOIN_FLAG_SENDONLY_FULLMEMBER;
    {
        let groups = &mut id.state().groups;
        if groups.iter().any(|group| group.gid == addr.addr) {
            return Err(Errno::ADDRINUSE);
        }
        groups.push(Group { gid: addr.addr, context, send_only, attached: false });
    }
    if let Err(errno) = id.session.call(&CmJoin { id: id.number, _pad: 0, addr }) {
        id.state().groups.retain(|group| group.gid != addr.addr);
        return Err(errno);
    }
    event::complete(id)
}

/// What the answer means: the queue pair is in the group from now on. `None` if the program has left it meanwhile.
pub fn joined(id: &Id, gid: RawGid, public: &mut rdma_cm_event) -> Option<()> {
    let (context, send_only) = {
        let state = id.state();
        let group = state.groups.iter().find(|group| group.gid == gid)?;
        (group.context, group.send_only)
    };
    let qp = field!(id, qp);
    let attached = match qp.is_null() || send_only {
        true => Ok(false),
        false => verbs().and_then(|verbs| verbs.attach_mcast(qp, gid)).map(|()| true),
    };
    let mut state = id.state();
    match attached {
        Ok(attached) => {
            let group = state.groups.iter_mut().find(|group| group.gid == gid)?;
            group.attached = attached;
        }
        Err(errno) => {
            state.groups.retain(|group| group.gid != gid);
            public.event = RDMA_CM_EVENT_MULTICAST_ERROR;
            public.status = -errno.raw_os_error();
        }
    }
    public.param.ud = rdma_ud_param {
        private_data: context,
        private_data_len: 0,
        ah_attr: modify::ah_attr(gid, state.tos),
        qp_num: EVERYBODY,
        qkey: RDMA_UDP_QKEY,
    };
    Some(())
}

pub unsafe extern "C" fn rdma_join_multicast(
    id: *mut rdma_cm_id,
    addr: *mut sockaddr,
    context: *mut c_void,
) -> c_int {
    edge::code(|| {
        // SAFETY: the program's id.
        let id = unsafe { Id::from_raw(id) }?;
        // SAFETY: the program's address.
        unsafe { join(id, addr, RDMA_MC_JOIN_FLAG_FULLMEMBER, context) }
    })
}

pub unsafe extern "C" fn rdma_join_multicast_ex(
    id: *mut rdma_cm_id,
    attr: *mut rdma_cm_join_mc_attr_ex,
    context: *mut c_void,
) -> c_int {
    edge::code(|| {
        // SAFETY: the program's id.
        let id = unsafe { Id::from_raw(id) }?;
        // SAFETY: NULL or the program's structure.
        let attr = unsafe { attr.as_ref() }.ok_or(Errno::INVAL)?;
        if attr.comp_mask >= RDMA_CM_JOIN_MC_ATTR_RESERVED {
            return Err(Errno::OPNOTSUPP);
        }
        let named = |bit| attr.comp_mask & bit != 0;
        let flags = if named(RDMA_CM_JOIN_MC_ATTR_JOIN_FLAGS) { attr.join_flags } else { 0 };
        if !named(RDMA_CM_JOIN_MC_ATTR_ADDRESS) || flags >= RDMA_MC_JOIN_FLAG_RESERVED {
            return Err(Errno::INVAL);
        }
        // SAFETY: the program's address.
        unsafe { join(id, attr.addr, flags, context) }
    })
}

pub unsafe extern "C" fn rdma_leave_multicast(id: *mut rdma_cm_id, addr: *mut sockaddr) -> c_int {
    edge::code(|| {
        // SAFETY: the program's id.
        let id = unsafe { Id::from_raw(id) }?;
        // SAFETY: the program's address.
        let gid = unsafe { address::read(addr) }?.addr;
        let group = {
            let groups = &mut id.state().groups;
            let at = groups.iter().position(|group| group.gid == gid).ok_or(Errno::ADDRNOTAVAIL)?;
            groups.swap_remove(at)
        };
        let qp = field!(id, qp);
        if group.attached && !qp.is_null() {
            verbs()?.detach_mcast(qp, gid)?;
        }
        Ok(())
    })
}
