//! Datagram sockets: messages over UD, each behind a header with its sender's address.
//!
//! A bound socket's cm id listens in the UDP port space, where `service` answers who asks for its queue pair. A sender
//! asks once for each address, and again when it has not asked for a second: the peer may be another process by then.
//! What finds no receive is lost, as datagrams are.

mod lookup;
mod ports;

use std::collections::HashMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use freeflow_core::ctl::cm::{CmAddr, cm_family};
use freeflow_verbs_abi::*;
use libc::{POLLERR, POLLIN, POLLOUT, iovec, sockaddr, socklen_t};

use self::lookup::{Dest, Lookup};
use self::ports::Ports;
use super::api::{self, read_address};
use super::cm::Cm;
use super::socket::{Body, Socket};
use super::table;
use super::wait::{self, Deadline, Fds};
use crate::address;
use crate::edge::{Errno, Result};
use crate::resolve;

/// How long an answer counts.
const FRESH: Duration = Duration::from_secs(1);
/// Addresses remembered at most.
const MAX_PEERS: usize = 4096;
/// Header of a message: family, port, address.
const HEADER: usize = 20;

/// Whom an address belongs to.
type Key = ([u8; 16], u16);

#[derive(Debug)]
enum Peer {
    Asked(Lookup),
    Known(Dest, Instant),
}

/// A datagram socket. The queue pair goes before the id it is on.
#[derive(Debug)]
pub struct Datagram {
    peers: HashMap<Key, Peer>,
    ports: Option<Ports>,
    cm: Cm,
    peer: Option<CmAddr>,
    error: Option<Errno>,
}

/// A message that was received.
#[derive(Debug, Clone, Copy)]
pub struct Received {
    pub from: CmAddr,
    /// Its length, and how much of it fitted.
    pub len: usize,
    pub copied: usize,
}

fn key(addr: &CmAddr) -> Key {
    (addr.addr, addr.port)
}

fn encode(from: &CmAddr) -> [u8; HEADER] {
    let mut bytes = [0; HEADER];
    bytes[..2].copy_from_slice(&from.family.to_be_bytes());
    bytes[2..4].copy_from_slice(&from.port.to_be_bytes());
    bytes[4..].copy_from_slice(&from.addr);
    bytes
}

fn decode(bytes: &[u8; HEADER]) -> Option<CmAddr> {
    let [f0, f1, p0, p1, addr @ ..] = *bytes;
    let family = u16::from_be_bytes([f0, f1]);
    let port = u16::from_be_bytes([p0, p1]);
    matches!(family, cm_family::V4 | cm_family::V6).then_some(CmAddr { addr, port, family, scope: 0 })
}

impl Datagram {
    pub fn create() -> Result<Datagram> {
        let cm = Cm::create(RDMA_PS_UDP, IBV_QPT_UD)?;
        Ok(Datagram { peers: HashMap::new(), ports: None, cm, peer: None, error: None })
    }

    pub fn cm(&self) -> &Cm {
        &self.cm
    }

    /// Binds, opens the queue pair and listens for who asks for it.
    pub fn bind(&mut self, addr: &CmAddr) -> Result<()> {
        if self.ports.is_some() {
            return Err(Errno::INVAL);
        }
        let id = self.cm.id();
        if !id.state().bound {
            resolve::bind(id, addr)?;
        }
        id.attach()?;
        self.ports = Some(Ports::open(id)?);
        resolve::listen(id, 0)
    }

    pub fn is_bound(&self) -> bool {
        self.ports.is_some()
    }

    /// Where messages without an address go, and where they come from.
    pub fn connect(&mut self, to: CmAddr) -> Result<()> {
        self.peer = Some(to);
        Ok(())
    }

    pub fn peer(&self) -> Option<CmAddr> {
        self.peer
    }

    pub fn take_error(&mut self) -> Option<Errno> {
        self.error.take()
    }

    /// Answers who asks where this socket's queue pair is.
    pub fn serve(&mut self) -> bool {
        let Some(ports) = &self.ports else { return false };
        while let Ok(Some(event)) = self.cm.next() {
            if let Some(request) = event.request {
                // One that cannot be answered asks again.
                let _ = request.answer(ports.number());
            }
        }
        false
    }

    /// Where `to` is, if that is known: EAGAIN until then.
    fn dest(&mut self, to: &CmAddr, now: Instant) -> Result<&Dest> {
        let fresh = |peer: &Peer| match peer {
            Peer::Asked(_) => true,
            Peer::Known(_, since) => now.saturating_duration_since(*since) < FRESH,
        };
        if !self.peers.get(&key(to)).is_some_and(fresh) {
            if self.peers.len() >= MAX_PEERS {
                self.peers.retain(|_, peer| fresh(peer));
            }
            self.peers.insert(key(to), Peer::Asked(Lookup::begin(*to)?));
        }
        self.progress(&key(to), now);
        match self.peers.get(&key(to)) {
            Some(Peer::Known(dest, _)) => Ok(dest),
            Some(Peer::Asked(_)) => Err(Errno::AGAIN),
            None => Err(self.error.take().unwrap_or(Errno::HOSTUNREACH)),
        }
    }

    /// Looks whether an answer has come.
    fn progress(&mut self, who: &Key, now: Instant) {
        let Some(Peer::Asked(lookup)) = self.peers.get_mut(who) else { return };
        let Some(answer) = lookup.progress(self.ports.as_ref()) else { return };
        match answer {
            Ok(dest) => drop(self.peers.insert(*who, Peer::Known(dest, now))),
            Err(errno) => {
                self.peers.remove(who);
                self.error = Some(errno);
            }
        }
    }

    fn asked(&self) -> impl Iterator<Item = &Lookup> {
        self.peers.values().filter_map(|peer| match peer {
            Peer::Asked(lookup) => Some(lookup),
            Peer::Known(..) => None,
        })
    }

    /// # Safety
    /// The buffers are readable.
    unsafe fn send(&mut self, list: &[iovec], to: &CmAddr, from: &CmAddr) -> Result<usize> {
        let now = Instant::now();
        let dest = self.dest(to, now)?;
        // One that is bound to all its addresses is known by the one that leads there.
        let addr = if address::is_wildcard(from) { dest.source } else { from.addr };
        let (from, qpn, qkey, ah) = (CmAddr { addr, ..*from }, dest.qpn, dest.qkey, dest.ah());
        let ports = self.ports.as_mut().ok_or(Errno::NOTCONN)?;
        ports.pump();
        // SAFETY: the caller's promise.
        unsafe { ports.send(&encode(&from), list, (ah, qpn, qkey)) }
    }

    /// # Safety
    /// The buffers are writable.
    unsafe fn receive(&mut self, list: &[iovec], peek: bool) -> Result<Received> {
        let peer = self.peer;
        let ports = self.ports.as_mut().ok_or(Errno::AGAIN)?;
        ports.pump();
        while let Some((header, len)) = ports.first() {
            let from = decode(&header);
            let welcome = from.filter(|from| peer.is_none_or(|peer| key(&peer) == key(from)));
            let Some(from) = welcome else {
                ports.done_with_first()?;
                continue;
            };
            // SAFETY: the caller's promise.
            let copied = unsafe { ports.copy_first(list) };
            if !peek {
                ports.done_with_first()?;
            }
            return Ok(Received { from, len, copied });
        }
        Err(Errno::AGAIN)
    }

    // ---- waiting

    pub fn advance(&mut self) -> bool {
        let now = Instant::now();
        let asked: Vec<Key> = self
            .peers
            .iter()
            .filter(|(_, peer)| matches!(peer, Peer::Asked(_)))
            .map(|(key, _)| *key)
            .collect();
        let before = asked.len();
        asked.iter().for_each(|who| self.progress(who, now));
        self.ports.as_mut().is_some_and(Ports::pump) || self.asked().count() != before
    }

    pub fn arm(&mut self) -> bool {
        self.ports.as_mut().is_some_and(Ports::arm)
    }

    pub fn fds(&self, fds: &mut Fds) {
        fds.extend(self.asked().map(Lookup::fd));
        fds.extend(self.ports.as_ref().map(Ports::fd));
    }

    pub fn woken(&mut self) -> bool {
        let any = self.ports.as_mut().is_some_and(Ports::woken);
        self.advance() || any
    }

    pub fn ready(&self) -> i16 {
        let readable = self.ports.as_ref().is_some_and(Ports::is_readable);
        let writable = self.ports.as_ref().is_none_or(Ports::is_writable) && self.asked().next().is_none();
        let flags = [(readable, POLLIN), (writable, POLLOUT), (self.error.is_some(), POLLERR)];
        flags.iter().filter(|(is_so, _)| *is_so).fold(0, |all, (_, flag)| all | flag)
    }
}

/// The socket's state as a datagram socket's.
fn with<T>(socket: &Socket, work: impl FnOnce(&mut Datagram) -> Result<T>) -> Result<T> {
    match &mut socket.lock()?.body {
        Body::Datagram(datagram) => work(datagram),
        Body::Stream(_) => Err(Errno::OPNOTSUPP),
        Body::Closed => Err(Errno::BADF),
    }
}

/// A socket that sends is bound.
fn ensure_bound(socket: &Arc<Socket>) -> Result<()> {
    if with(socket, |datagram| Ok(datagram.is_bound()))? {
        return Ok(());
    }
    let family = if socket.domain == libc::AF_INET6 { cm_family::V6 } else { cm_family::V4 };
    with(socket, |datagram| datagram.bind(&CmAddr { family, ..Default::default() }))?;
    table::service().map(|service| service.add(socket))
}

/// Sends one message; waits for the peer's address and for room.
///
/// # Safety
/// The buffers are readable; the address is NULL or as long as said.
pub unsafe fn send(
    socket: &Arc<Socket>,
    list: &[iovec],
    to: (*const sockaddr, socklen_t),
    until: Deadline,
) -> Result<usize> {
    let to = match to.0.is_null() {
        true => with(socket, |datagram| datagram.peer().ok_or(Errno::DESTADDRREQ))?,
        // SAFETY: the caller's promise.
        false => unsafe { read_address(to.0, to.1) }?,
    };
    ensure_bound(socket)?;
    let from = api::local(socket)?;
    loop {
        // SAFETY: the caller's promise.
        match with(socket, |datagram| unsafe { datagram.send(list, &to, &from) }) {
            Err(Errno::AGAIN) => wait::one(socket, POLLOUT, until)?,
            done => return done,
        }
    }
}

/// Receives one message.
///
/// # Safety
/// The buffers are writable.
pub unsafe fn receive(socket: &Arc<Socket>, list: &[iovec], peek: bool, until: Deadline) -> Result<Received> {
    loop {
        // SAFETY: the caller's promise.
        match with(socket, |datagram| unsafe { datagram.receive(list, peek) }) {
            Err(Errno::AGAIN) => wait::one(socket, POLLIN, until)?,
            done => return done,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn headers_carry_addresses() {
        let addr = std::net::Ipv4Addr::new(10, 1, 2, 3).to_ipv6_mapped().octets();
        let from = CmAddr { addr, port: 0x1234, family: cm_family::V4, scope: 0 };
        let bytes = encode(&from);
        assert_eq!(&bytes[..4], [0, 4, 0x12, 0x34]);
        assert_eq!(decode(&bytes), Some(from));
        assert_eq!(decode(&[9; HEADER]), None);
    }
}
