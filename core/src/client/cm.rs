//! The connection manager for doors that poll: a connection with the router of its own, one event channel, and each
//! id's events in a queue of its own. No call here waits for a peer.
//!
//! librdmacm does not use this: its programs wait on the channels themselves, so that it hands them the sockets.

use std::collections::{HashMap, VecDeque};
use std::os::fd::{AsFd, OwnedFd};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use rustix::io::Errno;
use rustix::net::RecvFlags;

use crate::ctl::cm::*;
use crate::ctl::{Socket, SocketError, purpose};
use crate::error::{Error, Result};
use crate::verbs::Gid;

use super::conn::{Conn, Opened};
use super::fork;
use super::ledger::Record;

/// A process's line to the connection manager.
#[derive(Debug)]
pub struct Cm {
    conn: Conn,
    /// Nothing comes on it: the manager's events come as tickets.
    events: Socket,
    /// One ticket for each event that waits in the router.
    tickets: Socket,
    channel: u32,
    queues: Mutex<HashMap<u32, VecDeque<CmNext>>>,
}

/// An id: a listener or one end of a connection. Dropping it ends what it was doing, without waiting for anybody.
#[derive(Debug)]
pub struct CmId {
    cm: Arc<Cm>,
    number: u32,
}

impl Cm {
    /// Connects to the router.
    pub fn open() -> Result<Arc<Cm>> {
        let Opened { conn, events, .. } = Conn::open(purpose::CM)?;
        let (channel, fds) = conn.call(&CmOpenChannel {}, &[])?;
        let no_socket = || Error::Disconnected("no socket came with CmOpenChannel".into());
        let tickets: OwnedFd = fds.into_iter().next().ok_or_else(no_socket)?;
        fork::neutralize_in_child(tickets.as_fd());
        let (tickets, queues) = (Socket::new(tickets), Mutex::default());
        Ok(Arc::new(Cm { conn, events, tickets, channel: channel.id, queues }))
    }

    /// This container's address.
    pub fn gid(&self) -> Gid {
        Gid(self.conn.hello.vip)
    }

    /// Listens on a port of the router's choice.
    pub fn listen(self: &Arc<Self>, backlog: u32) -> Result<(CmId, u16)> {
        let id = self.create()?;
        let addr = CmAddr { family: family(self.gid()), ..CmAddr::default() };
        self.conn.ask(&CmBind { id: id.number, flags: 0, addr })?;
        let bound = self.conn.ask(&CmListen { id: id.number, backlog })?;
        Ok((id, bound.port))
    }

    /// Begins to look for the way to a listener: ADDR_RESOLVED or ADDR_ERROR will follow.
    pub fn resolve(self: &Arc<Self>, to: Gid, port: u16) -> Result<CmId> {
        let id = self.create()?;
        let dst = CmAddr { addr: to.0, port, family: family(to), scope: 0 };
        self.conn.ask(&CmResolveAddr { id: id.number, flags: 0, src: CmAddr::default(), dst })?;
        Ok(id)
    }

    fn create(self: &Arc<Self>) -> Result<CmId> {
        let number = self.conn.ask(&CmCreate { channel: self.channel, space: cm_space::TCP })?.id;
        Ok(self.adopt(number))
    }

    fn adopt(self: &Arc<Self>, number: u32) -> CmId {
        self.queues().entry(number).or_default();
        CmId { cm: Arc::clone(self), number }
    }

    fn queues(&self) -> MutexGuard<'_, HashMap<u32, VecDeque<CmNext>>> {
        self.queues.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Ends an id, and the requests to it that nobody has taken.
    fn destroy(&self, number: u32) {
        // A router that is gone has forgotten it.
        let _ = self.conn.ask(&CmDestroy { id: number });
        let left = self.queues().remove(&number).unwrap_or_default();
        left.iter().filter(|event| event.kind == cm_event::CONNECT_REQUEST).for_each(|r| self.destroy(r.id));
    }

    /// Fetches what has arrived and puts it where its id looks.
    fn fetch(&self, queues: &mut HashMap<u32, VecDeque<CmNext>>) -> Result<()> {
        if self.conn.is_inherited() {
            return Err(Error::Disconnected("the connection manager belongs to the parent process".into()));
        }
        loop {
            match self.tickets.recv(RecvFlags::DONTWAIT) {
                Ok(_) => {}
                Err(SocketError::System(_, Errno::AGAIN)) => return Ok(()),
                Err(error) => return Err(Error::Disconnected(format!("connection manager: {error}"))),
            }
            let event = self.conn.ask(&CmNextEvent { channel: self.channel })?;
            let request = event.kind == cm_event::CONNECT_REQUEST;
            let about = if request { event.listener } else { event.id };
            if request {
                queues.entry(event.id).or_default();
            }
            // An id that was destroyed meanwhile has no queue.
            if let Some(queue) = queues.get_mut(&about) {
                queue.push_back(event);
            }
        }
    }
}

fn family(gid: Gid) -> u16 {
    if gid.ip().is_ipv4() { cm_family::V4 } else { cm_family::V6 }
}

impl CmId {
    /// The next event, if one has arrived. An error: the router is gone.
    pub fn next(&self) -> Result<Option<CmNext>> {
        let mut queues = self.cm.queues();
        if let Some(event) = queues.get_mut(&self.number).and_then(VecDeque::pop_front) {
            return Ok(Some(event));
        }
        self.cm.fetch(&mut queues)?;
        Ok(queues.get_mut(&self.number).and_then(VecDeque::pop_front))
    }

    /// The id of a CONNECT_REQUEST that this listener got.
    pub fn requested(&self, event: &CmNext) -> CmId {
        self.cm.adopt(event.id)
    }

    /// After ADDR_RESOLVED: ROUTE_RESOLVED will follow.
    pub fn resolve_route(&self) -> Result<()> {
        self.ask(&CmResolveRoute { id: self.number, _pad: 0 })
    }

    /// After ROUTE_RESOLVED: CONNECT_RESPONSE, REJECTED or UNREACHABLE will follow.
    pub fn connect(&self, params: CmParams, data: CmData) -> Result<()> {
        self.ask(&CmConnect { id: self.number, params, data })
    }

    /// Answers a CONNECT_REQUEST: ESTABLISHED will follow, or REJECTED, UNREACHABLE.
    pub fn accept(&self, params: CmParams, data: CmData) -> Result<()> {
        self.ask(&CmAccept { id: self.number, params, data })
    }

    /// After CONNECT_RESPONSE: this side is ready.
    pub fn establish(&self) -> Result<()> {
        self.ask(&CmEstablish { id: self.number, _pad: 0 })
    }

    fn ask<T: Record>(&self, request: &T) -> Result<()> {
        self.cm.conn.ask(request).map(drop)
    }
}

impl Drop for CmId {
    fn drop(&mut self) {
        if self.cm.conn.is_inherited() {
            return;
        }
        self.cm.destroy(self.number);
    }
}

impl Drop for Cm {
    fn drop(&mut self) {
        fork::forget(self.events.as_fd());
        fork::forget(self.tickets.as_fd());
    }
}
