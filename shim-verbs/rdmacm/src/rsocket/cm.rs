//! A cm id with an event channel of its own, both non-blocking and destroyed together.

use std::os::fd::{AsRawFd, RawFd};

use freeflow_verbs_abi::*;
use rustix::fs::{OFlags, fcntl_setfl};

use crate::channel::{Channel, migrate};
use crate::connect;
use crate::edge::{Errno, Result};
use crate::id::{self, Id, field};
use crate::session::Session;
use crate::{event, queues};

/// The id and its channel.
#[derive(Debug)]
pub struct Cm {
    id: *mut Id,
    channel: *mut rdma_event_channel,
}

// SAFETY: ids and channels may be used by any thread, one at a time, and belong to this value alone.
unsafe impl Send for Cm {}

// SAFETY: as for `Cm`.
unsafe impl Send for Request {}

/// What a socket needs to know of an event.
pub struct Event {
    pub kind: rdma_cm_event_type,
    pub status: i32,
    /// A connection request's new id, to be adopted.
    pub request: Option<Request>,
    pub data: Vec<u8>,
    /// UD: where the peer is.
    pub ud: Option<(ibv_ah_attr, u32, u32)>,
}

/// The id of a connection request, still on its listener's channel. Dropping it turns the request down.
#[derive(Debug)]
pub struct Request(*mut Id);

fn open_channel() -> Result<*mut rdma_event_channel> {
    let raw = Channel::open(Session::current()?)?;
    // SAFETY: just opened.
    let channel = unsafe { Channel::from_raw(raw) };
    match fcntl_setfl(channel.fd(), OFlags::NONBLOCK) {
        Ok(()) => Ok(raw),
        Err(errno) => {
            // SAFETY: opened above, and no id is on it.
            unsafe { Channel::destroy(raw) };
            Err(errno)
        }
    }
}

impl Cm {
    pub fn create(ps: rdma_port_space, qp_type: ibv_qp_type) -> Result<Cm> {
        let channel = open_channel()?;
        match id::create(channel, std::ptr::null_mut(), ps, qp_type) {
            Ok(id) => Ok(Cm { id, channel }),
            Err(errno) => {
                // SAFETY: opened above, and no id is on it.
                unsafe { Channel::destroy(channel) };
                Err(errno)
            }
        }
    }

    /// Gives a request's id a channel of its own.
    pub fn adopt(request: Request) -> Result<Cm> {
        let channel = open_channel()?;
        // SAFETY: the request's id, which nobody else has.
        match migrate(unsafe { &*request.0 }, channel) {
            Ok(()) => Ok(Cm { id: std::mem::ManuallyDrop::new(request).0, channel }),
            Err(errno) => {
                // SAFETY: opened above, and no id is on it.
                unsafe { Channel::destroy(channel) };
                Err(errno)
            }
        }
    }

    /// Another id on the same channel, with the same options, in place of one that is used up.
    pub fn renew(&mut self) -> Result<()> {
        let (ps, qp_type) = (field!(self.id(), ps), field!(self.id(), qp_type));
        let fresh = id::create(self.channel, std::ptr::null_mut(), ps, qp_type)?;
        {
            // SAFETY: just made.
            let (mut to, from) = (unsafe { &*fresh }.state(), self.id().state());
            (to.flags, to.tos) = (from.flags, from.tos);
        }
        // SAFETY: given up here, and all its events were given back.
        unsafe { Id::destroy(std::mem::replace(&mut self.id, fresh)) }
    }

    pub fn id(&self) -> &Id {
        // SAFETY: destroyed by this value's drop only.
        unsafe { &*self.id }
    }

    /// Readable while events wait.
    pub fn fd(&self) -> RawFd {
        // SAFETY: destroyed by this value's drop only.
        unsafe { Channel::from_raw(self.channel) }.fd().as_raw_fd()
    }

    /// The next event, if one waits.
    pub fn next(&self) -> Result<Option<Event>> {
        // SAFETY: destroyed by this value's drop only.
        let raw = match event::next(unsafe { Channel::from_raw(self.channel) }) {
            Ok(raw) => raw,
            Err(Errno::AGAIN) => return Ok(None),
            Err(errno) => return Err(errno),
        };
        // SAFETY: just handed out; the structure is plain data.
        let seen = unsafe { raw.read() };
        // SAFETY: both members are plain data, and their private data is at the same place.
        let conn = unsafe { seen.param.conn };
        let data = match conn.private_data.is_null() {
            true => Vec::new(),
            // SAFETY: the event's buffer, of the length it says.
            false => unsafe {
                std::slice::from_raw_parts(conn.private_data.cast::<u8>(), conn.private_data_len.into())
            }
            .to_vec(),
        };
        let request = (seen.event == RDMA_CM_EVENT_CONNECT_REQUEST).then(|| Request(seen.id.cast()));
        let ud = self.id().is_datagram().then(|| {
            // SAFETY: plain data; for datagrams this is the member that was filled in.
            let ud = unsafe { seen.param.ud };
            (ud.ah_attr, ud.qp_num, ud.qkey)
        });
        // SAFETY: an event of ours, not used after this.
        unsafe { event::give_back(raw) };
        Ok(Some(Event { kind: seen.event, status: seen.status, request, data, ud }))
    }
}

impl Request {
    /// Tells who asked for a datagram socket where its queue pair is.
    pub fn answer(self, qp_num: u32) -> Result<()> {
        // SAFETY: integers and a pointer, for which zero is valid.
        let param = rdma_conn_param { qp_num, ..unsafe { std::mem::zeroed() } };
        // SAFETY: the request's id, which nobody else has.
        connect::accept(unsafe { &*self.0 }, Some(&param))
    }
}

impl Drop for Request {
    fn drop(&mut self) {
        // SAFETY: the request's id, given up here; its event was given back.
        let _ = unsafe { Id::destroy(self.0) };
    }
}

impl Drop for Cm {
    fn drop(&mut self) {
        // What fails here fails because the router is gone; there is nobody to tell.
        let _ = queues::destroy_qp(self.id());
        // SAFETY: given up by this drop, and all its events were given back.
        let _ = unsafe { Id::destroy(self.id) };
        // SAFETY: the id was the only one on it.
        unsafe { Channel::destroy(self.channel) };
    }
}
