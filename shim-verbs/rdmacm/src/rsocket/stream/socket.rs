//! A stream socket as its program sees it: bound, listening, connecting, connected, over.
//!
//! Owns the cm id and, once there is a peer, the connection. Every function returns at once.

use std::collections::VecDeque;
use std::os::fd::RawFd;
use std::sync::Arc;

use freeflow_core::ctl::cm::CmAddr;
use freeflow_verbs_abi::*;
use libc::{POLLERR, POLLHUP, POLLIN, POLLOUT, POLLRDHUP};

use super::conn::{Conn, Sizes};
use super::hello::Hello;
use crate::connect;
use crate::edge::{Errno, Result};
use crate::id::field;
use crate::resolve;
use crate::rsocket::cm::{Cm, Event, Request};
use crate::rsocket::socket::Socket;
use crate::rsocket::wait::{FLUSHED, Fds};

/// How far a socket is.
#[derive(Debug)]
enum Phase {
    Idle,
    Listening(Queue),
    /// The way to the peer is looked for, then the peer asked.
    Connecting,
    /// The peer asked and was told yes; it is not ready yet.
    Accepting,
    Connected,
    /// Connecting failed; a new attempt is possible.
    Failed(Errno),
}

/// What a listener has besides its id.
#[derive(Debug, Default)]
struct Queue {
    backlog: usize,
    /// To be accepted by the program.
    ready: VecDeque<Arc<Socket>>,
    /// Not yet connected.
    pending: Vec<Arc<Socket>>,
}

/// A stream socket. The connection goes before the id that its queue pair is on.
#[derive(Debug)]
pub struct Stream {
    pub conn: Option<Conn>,
    cm: Cm,
    phase: Phase,
    sizes: Sizes,
    /// The program reads no more.
    deaf: bool,
    /// The router is gone, and with it the CM. The connection itself does not need it.
    orphaned: bool,
}

/// Why a handshake failed, as connect(2) says it.
fn reason(event: &Event) -> Errno {
    match (event.kind, event.status) {
        (RDMA_CM_EVENT_REJECTED, _) => Errno::CONNREFUSED,
        (_, status) if status < 0 => Errno::from_raw_os_error(-status),
        (RDMA_CM_EVENT_UNREACHABLE, _) => Errno::TIMEDOUT,
        _ => Errno::CONNABORTED,
    }
}

impl Stream {
    pub fn create(sizes: Sizes) -> Result<Stream> {
        let cm = Cm::create(RDMA_PS_TCP, IBV_QPT_RC)?;
        Ok(Stream { conn: None, cm, phase: Phase::Idle, sizes, deaf: false, orphaned: false })
    }

    /// The passive end of a request: says yes to it.
    pub fn answer(request: Request, hello: &[u8], sizes: Sizes) -> Result<Stream> {
        let peer = Hello::decode(hello).ok_or(Errno::PROTO)?;
        let cm = Cm::adopt(request)?;
        let mut conn = Conn::open(cm.id(), sizes)?;
        conn.meet(peer);
        connect::accept(cm.id(), Some(&param(&conn.hello().encode())))?;
        Ok(Stream { conn: Some(conn), cm, phase: Phase::Accepting, sizes, deaf: false, orphaned: false })
    }

    pub fn cm(&self) -> &Cm {
        &self.cm
    }

    /// Sizes count until there is a connection.
    pub fn set_sizes(&mut self, sizes: Sizes) {
        self.sizes = sizes;
    }

    /// Whether sizes count no more.
    pub fn has_begun(&self) -> bool {
        matches!(self.phase, Phase::Connecting | Phase::Accepting | Phase::Connected)
    }

    pub fn is_connected(&self) -> bool {
        matches!(self.phase, Phase::Connected)
    }

    pub fn bind(&mut self, addr: &CmAddr) -> Result<()> {
        match self.phase {
            Phase::Idle => resolve::bind(self.cm.id(), addr),
            _ => Err(Errno::INVAL),
        }
    }

    // ---- listening

    /// Listens; again, only the backlog changes.
    pub fn listen(&mut self, backlog: usize) -> Result<()> {
        let backlog = backlog.max(1);
        match &mut self.phase {
            Phase::Idle => {
                // Requests beyond the queue wait at the router, as many as it lets.
                resolve::listen(self.cm.id(), 0)?;
                self.phase = Phase::Listening(Queue { backlog, ..Default::default() });
                Ok(())
            }
            Phase::Listening(queue) => {
                queue.backlog = backlog;
                Ok(())
            }
            _ => Err(Errno::INVAL),
        }
    }

    /// A connection for the program, if one is there.
    pub fn accept(&mut self) -> Result<Arc<Socket>> {
        match &mut self.phase {
            Phase::Listening(queue) => queue.ready.pop_front().ok_or(Errno::AGAIN),
            _ => Err(Errno::INVAL),
        }
    }

    /// Descriptors that the service looks at for a listener.
    pub fn served(&self, fds: &mut Vec<RawFd>) {
        if let Phase::Listening(queue) = &self.phase {
            if queue.has_room() {
                fds.push(self.cm.fd());
            }
            fds.extend(queue.pending.iter().filter_map(|child| child.handshake()));
        }
    }

    /// Takes requests and moves handshakes on; says whether the program has something to accept now.
    pub fn serve(&mut self, adopt: impl Fn(Request, &[u8]) -> Result<Arc<Socket>>) -> bool {
        let Phase::Listening(queue) = &mut self.phase else { return false };
        let mut lost = None;
        while queue.has_room() {
            let event = match self.cm.next() {
                Ok(Some(event)) => event,
                Ok(None) => break,
                Err(errno) => {
                    lost = Some(errno);
                    break;
                }
            };
            // One that cannot be answered is turned down as its request is dropped.
            let child = event.request.and_then(|request| adopt(request, &event.data).ok());
            queue.pending.extend(child);
        }
        let before = queue.ready.len();
        queue.pending.retain(|child| {
            let state = child.progress();
            if state == Ok(true) {
                queue.ready.push_back(Arc::clone(child));
            }
            state == Ok(false)
        });
        let any = queue.ready.len() > before;
        if let Some(errno) = lost {
            self.phase = Phase::Failed(errno);
        }
        any
    }

    /// Takes the connections that nobody will accept.
    pub fn abandon(&mut self) -> Vec<Arc<Socket>> {
        match &mut self.phase {
            Phase::Listening(queue) => queue.ready.drain(..).chain(queue.pending.drain(..)).collect(),
            _ => Vec::new(),
        }
    }

    // ---- connecting

    /// Begins to connect.
    pub fn connect(&mut self, to: CmAddr) -> Result<()> {
        match self.phase {
            Phase::Idle => {}
            Phase::Failed(_) => self.cm.renew()?,
            Phase::Connecting => return Err(Errno::ALREADY),
            Phase::Connected | Phase::Accepting => return Err(Errno::ISCONN),
            Phase::Listening(_) => return Err(Errno::OPNOTSUPP),
        }
        resolve::resolve_addr(self.cm.id(), None, to)?;
        self.phase = Phase::Connecting;
        Ok(())
    }

    /// How connecting went: true once connected.
    pub fn outcome(&self) -> Result<bool> {
        match self.phase {
            Phase::Connected => Ok(true),
            Phase::Connecting | Phase::Accepting => Ok(false),
            Phase::Failed(errno) => Err(errno),
            _ => Err(Errno::NOTCONN),
        }
    }

    /// Takes the CM's events; says whether there were any.
    pub fn progress(&mut self) -> bool {
        let mut any = false;
        if self.orphaned || matches!(self.phase, Phase::Listening(_)) {
            return any;
        }
        loop {
            match self.cm.next() {
                Ok(Some(event)) => self.react(&event),
                Ok(None) => return any,
                Err(errno) => {
                    self.orphan(errno);
                    return true;
                }
            }
            any = true;
        }
    }

    fn react(&mut self, event: &Event) {
        let next = match (&self.phase, event.kind) {
            (Phase::Connecting, RDMA_CM_EVENT_ADDR_RESOLVED) => resolve::resolve_route(self.cm.id()),
            (Phase::Connecting, RDMA_CM_EVENT_ROUTE_RESOLVED) => self.ask(),
            (Phase::Connecting, RDMA_CM_EVENT_ESTABLISHED) => self.meet(&event.data),
            (Phase::Accepting, RDMA_CM_EVENT_ESTABLISHED) => {
                self.phase = Phase::Connected;
                Ok(())
            }
            (Phase::Connecting | Phase::Accepting, _) => Err(reason(event)),
            (_, RDMA_CM_EVENT_DISCONNECTED) => {
                self.hung_up();
                Ok(())
            }
            _ => Ok(()),
        };
        if let Err(errno) = next {
            self.conn = None;
            self.phase = Phase::Failed(errno);
        }
    }

    /// The other side has hung up; what has arrived comes first.
    fn hung_up(&mut self) {
        if let Some(conn) = &mut self.conn {
            conn.pump();
            conn.break_off(Errno::PIPE);
        }
    }

    /// The CM can say no more.
    fn orphan(&mut self, errno: Errno) {
        self.orphaned = true;
        if !matches!(self.phase, Phase::Connected) {
            self.phase = Phase::Failed(errno);
        }
    }

    fn ask(&mut self) -> Result<()> {
        let conn = self.conn.insert(Conn::open(self.cm.id(), self.sizes)?);
        connect::connect(self.cm.id(), Some(&param(&conn.hello().encode())))
    }

    fn meet(&mut self, data: &[u8]) -> Result<()> {
        let peer = Hello::decode(data).ok_or(Errno::PROTO)?;
        self.conn.as_mut().ok_or(Errno::PROTO)?.meet(peer);
        self.phase = Phase::Connected;
        Ok(())
    }

    // ---- connected

    /// The connection, if bytes can go over it.
    pub fn connected(&mut self) -> Result<&mut Conn> {
        match (&self.phase, &mut self.conn) {
            (Phase::Connected, Some(conn)) => Ok(conn),
            (Phase::Connecting | Phase::Accepting, _) => Err(Errno::AGAIN),
            _ => Err(Errno::NOTCONN),
        }
    }

    /// send(2), as far as it goes now: EAGAIN if that is nowhere.
    ///
    /// # Safety
    /// `from` points to `len` readable bytes.
    pub unsafe fn send(&mut self, from: *const u8, len: usize) -> Result<usize> {
        let conn = self.connected()?;
        if conn.fin_sent {
            return Err(Errno::PIPE);
        }
        if len == 0 {
            return Ok(0);
        }
        for pumped in [false, true] {
            if pumped {
                conn.pump();
            }
            if let Some(errno) = conn.broken {
                return Err(errno);
            }
            // SAFETY: the caller's promise.
            match unsafe { conn.send(from, len) }? {
                0 => {}
                sent => return Ok(sent),
            }
        }
        Err(Errno::AGAIN)
    }

    /// recv(2), as far as it goes now: 0 at the end, EAGAIN before it.
    ///
    /// # Safety
    /// `to` points to `len` writable bytes.
    pub unsafe fn receive(&mut self, to: *mut u8, len: usize, peek: bool) -> Result<usize> {
        let deaf = self.deaf;
        let conn = self.connected()?;
        conn.pump();
        if deaf || len == 0 {
            return Ok(0);
        }
        if conn.unread() > 0 {
            // SAFETY: the caller's promise.
            return unsafe { conn.receive(to, len, peek) };
        }
        match (conn.fin_received, conn.broken) {
            // A peer that ended without a word has sent all it will.
            (true, _) | (false, Some(Errno::PIPE)) => Ok(0),
            (false, Some(errno)) => Err(errno),
            (false, None) => Err(Errno::AGAIN),
        }
    }

    pub fn shutdown(&mut self, reading: bool, writing: bool) -> Result<()> {
        if matches!(self.phase, Phase::Listening(_)) && reading {
            return Ok(());
        }
        let conn = self.connected().map_err(|_| Errno::NOTCONN)?;
        if writing {
            conn.finish()?;
        }
        self.deaf |= reading;
        Ok(())
    }

    /// After the last byte: hangs up.
    pub fn hang_up(&mut self) {
        if self.conn.is_some() {
            // The peer may have done so first.
            let _ = connect::disconnect(self.cm.id());
        }
    }

    // ---- waiting

    pub fn advance(&mut self) -> bool {
        match self.phase {
            Phase::Connecting | Phase::Accepting => self.progress(),
            _ => self.conn.as_mut().is_some_and(Conn::pump),
        }
    }

    pub fn arm(&mut self) -> bool {
        match self.phase {
            Phase::Connected => self.conn.as_mut().is_some_and(Conn::arm),
            _ => false,
        }
    }

    pub fn fds(&self, fds: &mut Fds) {
        match self.phase {
            Phase::Connecting | Phase::Accepting => fds.push(self.cm.fd()),
            Phase::Connected => {
                // Who knows that the connection is over need not be told.
                if !self.orphaned && self.conn.as_ref().is_some_and(|conn| conn.broken.is_none()) {
                    fds.push(self.cm.fd());
                }
                fds.extend(self.conn.as_ref().map(Conn::fd));
            }
            _ => {}
        }
    }

    pub fn woken(&mut self) -> bool {
        let any = self.progress();
        self.conn.as_mut().is_some_and(Conn::woken) || any
    }

    /// poll(2)'s flags of what is so now.
    pub fn ready(&self) -> i16 {
        match (&self.phase, &self.conn) {
            (Phase::Listening(queue), _) if !queue.ready.is_empty() => POLLIN,
            (Phase::Connected, Some(conn)) => self.ready_connected(conn),
            (Phase::Failed(_), _) => POLLIN | POLLOUT | POLLERR | POLLHUP | FLUSHED,
            (Phase::Idle, _) => POLLOUT | POLLHUP,
            _ => 0,
        }
    }

    fn ready_connected(&self, conn: &Conn) -> i16 {
        let flags = [
            (conn.is_readable() || self.deaf, POLLIN),
            (conn.is_writable(), POLLOUT),
            (conn.fin_received || self.deaf, POLLRDHUP),
            (conn.broken.is_some() || conn.fin_sent && conn.fin_received, POLLHUP),
            (conn.broken.is_some_and(|errno| errno != Errno::PIPE), POLLERR),
            (conn.is_flushed(), FLUSHED),
        ];
        flags.iter().filter(|(is_so, _)| *is_so).fold(0, |all, (_, flag)| all | flag)
    }

    /// The error that SO_ERROR reports.
    pub fn error(&self) -> Option<Errno> {
        match (&self.phase, &self.conn) {
            (Phase::Failed(errno), _) => Some(*errno),
            (_, Some(conn)) => conn.broken.filter(|errno| *errno != Errno::PIPE),
            _ => None,
        }
    }

    /// One path MTU of payload, for TCP_MAXSEG.
    pub fn segment(&self) -> i32 {
        let path = field!(self.cm.id(), route.path_rec);
        // SAFETY: NULL or the id's path, which lives as long as the id.
        let path = unsafe { path.as_ref() };
        path.map_or(2048, |path| 128 << path.mtu.min(5))
    }
}

impl Queue {
    fn has_room(&self) -> bool {
        self.ready.len() + self.pending.len() < self.backlog
    }
}

/// Parameters of a connection that never gives up on a receiver, with our word as private data.
fn param(hello: &[u8]) -> rdma_conn_param {
    rdma_conn_param {
        private_data: hello.as_ptr().cast(),
        private_data_len: hello.len() as u8,
        responder_resources: 0,
        initiator_depth: 0,
        flow_control: 1,
        retry_count: 7,
        rnr_retry_count: 7,
        srq: 0,
        qp_num: 0,
    }
}
