//! What goes out: requests, answers to READs, acknowledgements, datagrams; each queue pair in its turn.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Instant;

use freeflow_core::exec::Target;
use freeflow_core::ring::{LinkDone, MAX_SGE};
use freeflow_core::verbs::{Gid, SendFlags, SendOp, Sge, limits};
use zerocopy::IntoBytes as _;

use super::conn::{Conn, End};
use super::endpoint::{Endpoint, Served, spans};
use super::engine::{Engine, Line, Slot, submissions};
use super::groups::hosts_of;
use super::remote::Remote;
use super::requester::Wr;
use super::wire::{self, Addresses, BULK, Header, Kind, PROMPT};
use crate::directory::Tenant;
use crate::shared::Shared;

/// Operations up to this size are small.
pub const SMALL: u32 = 16 << 10;
/// Small operations of one queue pair that go out in one turn.
const BURST: usize = 16;

/// What a turn of a queue pair came to.
#[derive(Debug, PartialEq, Eq)]
enum Turn {
    More,
    Nothing,
}

impl Slot {
    /// The channel for the next request: it changes only when nothing is on its way, so that order is kept.
    fn choose(&mut self, now: Instant) -> Option<usize> {
        let requester = &self.endpoint.requester;
        let total = requester.upcoming(now)?.total;
        let fits = total <= SMALL;
        if requester.is_quiet() {
            self.channel = if fits { PROMPT } else { BULK };
        }
        // A large one waits until what went by the small ones' channel is done.
        (fits || self.channel == BULK).then_some(self.channel)
    }
}

impl Engine {
    /// The queue pair may have something to send: it takes its place in line.
    pub fn line_up(&mut self, qpn: u32, now: Instant) {
        let Some(slot) = self.slots.get_mut(&qpn) else { return };
        let Some(remote) = self.remotes.get(&slot.host) else { return };
        if let Some(when) = slot.endpoint.requester.wakes().filter(|when| *when > now) {
            self.remind(qpn, when);
            return;
        }
        let Some(channel) = slot.choose(now) else { return };
        if let Some(index) = remote.meeting.conn(channel) {
            enqueue(&mut self.lines, slot, qpn, (index, channel));
        }
    }

    /// Lets queue pairs send on a connection while it takes more. True: there may be more to do.
    pub fn push(&mut self, index: usize, now: Instant) -> bool {
        self.with_conn(index, |engine, conn| {
            let mut any = false;
            for qpn in engine.acknowledgements_due(index, conn) {
                engine.slots.get_mut(&qpn).into_iter().for_each(|slot| acknowledge(slot, conn, qpn));
            }
            loop {
                while conn.has_room(engine.most.waiting) {
                    let Some(qpn) = engine.lines[index].ready.pop_front() else { break };
                    any = true;
                    if engine.serve_turn(index, conn, qpn, now) == Turn::More {
                        engine.lines[index].ready.push_back(qpn);
                    } else if let (Some(slot), Some(channel)) = (engine.slots.get_mut(&qpn), conn.channel) {
                        slot.queued[channel] = false;
                    }
                }
                if conn.is_drained() || !conn.writable {
                    break;
                }
                conn.flush()?;
                if engine.lines[index].ready.is_empty() {
                    break;
                }
            }
            Ok(any)
        })
    }

    /// Whose requests are to be acknowledged now: with whatever goes out, unless all is held back.
    fn acknowledgements_due(&mut self, index: usize, conn: &Conn) -> Vec<u32> {
        let line = &mut self.lines[index];
        let alone = conn.channel == Some(PROMPT) && conn.is_drained() && line.ready.is_empty();
        if alone && self.hold.is_on() { vec![] } else { std::mem::take(&mut line.acks) }
    }

    /// One queue pair's turn on a connection.
    fn serve_turn(&mut self, index: usize, conn: &mut Conn, qpn: u32, now: Instant) -> Turn {
        let Some(slot) = self.slots.get_mut(&qpn) else { return Turn::Nothing };
        let serves = slot.served_by == Some(index);
        let reads = serves && slot.endpoint.responder.reads.front().is_some();
        if reads {
            self.answer_read(conn, qpn);
        }
        let sent = self.send_requests(conn, qpn, now);
        let Some(slot) = self.slots.get(&qpn) else { return Turn::Nothing };
        let more_reads = serves && slot.endpoint.responder.reads.front().is_some();
        if sent || more_reads { Turn::More } else { Turn::Nothing }
    }

    /// Sends a piece of a large request, or some small ones. True: there may be more to send here.
    fn send_requests(&mut self, conn: &mut Conn, qpn: u32, now: Instant) -> bool {
        for _ in 0..BURST {
            let Some(slot) = self.slots.get_mut(&qpn) else { return false };
            if slot.choose(now) != conn.channel || !slot.endpoint.sends() {
                return false;
            }
            let Endpoint { requester, qp, .. } = &mut slot.endpoint;
            let (to, from) = (qp.dest_qpn, qpn);
            let Some(piece) = requester.piece(self.most.piece, now) else { return false };
            let header = request_header(piece.wr, from, to);
            let header =
                Header { seq: piece.seq, epoch: piece.epoch, offset: piece.offset, len: piece.len, ..header };
            let large = piece.len > SMALL;
            match spans(qp, piece.wr, header.offset, header.len) {
                Ok(spans) => conn.send(&header, if piece.wr.op.writes_locally() { vec![] } else { spans }),
                Err(status) => {
                    requester.fail_locally(header.seq, status);
                    self.report(qpn);
                    return false;
                }
            }
            if large {
                return true;
            }
        }
        true
    }

    /// Sends the next piece of the oldest READ's answer.
    fn answer_read(&mut self, conn: &mut Conn, qpn: u32) {
        let Some(slot) = self.slots.get_mut(&qpn) else { return };
        let endpoint = &mut slot.endpoint;
        let Some(read) = endpoint.responder.reads.front().copied() else { return };
        let (epoch, to) = (endpoint.responder.epoch(), endpoint.qp.dest_qpn);
        match endpoint.serve_read(&read, self.most.piece) {
            Ok(spans) => {
                let len = (read.total - read.sent).min(self.most.piece);
                let (seq, offset) = (read.seq, read.sent);
                let header = Header { seq, epoch, offset, len, ..Header::new(Kind::ReadData, qpn, to) };
                conn.send(&header, spans);
                let reads = &mut endpoint.responder.reads;
                match reads.front_mut().filter(|read| read.sent + len < read.total) {
                    Some(read) => read.sent += len,
                    None => _ = reads.pop_front(),
                }
            }
            Err(served) => {
                endpoint.responder.reads.clear();
                self.refuse(conn, qpn, read.seq, served);
            }
        }
    }

    /// A request of the peer failed.
    pub fn refuse(&mut self, conn: &mut Conn, qpn: u32, seq: u32, how: Served) {
        let Some(slot) = self.slots.get_mut(&qpn) else { return };
        let (epoch, to) = (slot.endpoint.responder.epoch(), slot.endpoint.qp.dest_qpn);
        match how {
            Served::Failed { status, fault } => {
                slot.endpoint.responder.failed = true;
                let nak = Header { seq, epoch, status: status as u8, ..Header::new(Kind::Nak, qpn, to) };
                conn.send_bytes(&nak, &[]);
                if fault {
                    self.tell(qpn, crate::state::Notice::PeerFault { qpn });
                }
            }
            _ => conn.send_bytes(&Header { epoch, ..Header::new(Kind::Absent, qpn, to) }, &[]),
        }
    }

    // ---- datagrams

    /// Sends what a process has submitted, as far as connections take it. True: there may be more.
    pub fn send_datagrams(&mut self, client: u32, now: Instant) -> bool {
        let Some(shared) = self.shared.upgrade() else { return false };
        let (mut sges, mut payload) = ([Sge::default(); MAX_SGE], Vec::new());
        loop {
            let Some(process) = self.processes.get_mut(&client) else { return false };
            let Some(datagrams) = &mut process.datagrams else { return false };
            let Some(ring) = submissions(&datagrams.ring) else { return false };
            if !matches!(ring.waiting(datagrams.next), Some(1..)) {
                return false;
            }
            let taken = ring.take(datagrams.next, &mut sges, &mut payload);
            let sane = taken.filter(|(_, list)| *list == 0 && payload.len() <= limits::MTU as usize);
            let addressed = sane.and_then(|(wqe, _)| {
                let owned =
                    shared.with(|state| state.qps.get(wqe.source).is_some_and(|(o, _)| o.client == client));
                let dest = Gid(wqe.dgid);
                owned.then(|| (wqe, dest, destinations(&shared, &process.tenant, dest)))
            });
            let crowded = |host: &Arc<str>| is_crowded(&self.remotes, &self.conns, self.most.waiting, host);
            if addressed.as_ref().is_some_and(|(.., hosts)| hosts.iter().any(crowded)) {
                self.held_up.push(client);
                return false;
            }
            datagrams.next = datagrams.next.wrapping_add(1);
            ring.header().finish(LinkDone { count: datagrams.next, status: 0 });
            let Some((wqe, dest, hosts)) = addressed else { continue };
            let addresses = Addresses {
                from: process.vip.0,
                to: dest.0,
                qkey: wqe.qkey,
                traffic_class: wqe.traffic_class,
                hop_limit: wqe.hop_limit,
                tenant: process.tenant.len() as u8,
                _pad: 0,
            };
            let len = size_of::<Addresses>() + process.tenant.len() + payload.len();
            let solicited = SendFlags::from_bits_truncate(wqe.flags.into()).contains(SendFlags::SOLICITED);
            let header = Header {
                op: wqe.op,
                flags: if solicited { wire::flags::SOLICITED } else { 0 },
                imm: wqe.imm,
                len: len as u32,
                ..Header::new(Kind::Datagram, wqe.source, wqe.dest_qpn)
            };
            let tenant = process.tenant.clone();
            let message = [header.as_bytes(), addresses.as_bytes(), tenant.as_bytes(), &payload].concat();
            hosts.iter().for_each(|host| self.post(host, message.clone(), now));
        }
    }

    /// Do all hosts take what there is for them?
    pub fn has_room(&self) -> bool {
        self.remotes.keys().all(|host| !is_crowded(&self.remotes, &self.conns, self.most.waiting, host))
    }

    pub fn send_cm(&mut self, host: &Arc<str>, bytes: &[u8]) {
        self.reach(host, self.now());
        let Some(remote) = self.remotes.get_mut(host) else { return };
        let prompt = remote.meeting.conn(PROMPT);
        let Some(message) = remote.words.say(bytes) else {
            tracing::warn!("host {host} answers no connection manager: a message for it is dropped");
            return;
        };
        if let Some(conn) = prompt.and_then(|index| self.conns.get_mut(index)?.as_mut()) {
            conn.send_raw(message);
        }
    }

    /// Another host's connection manager said something.
    pub fn hear_cm(&mut self, conn: &mut Conn, header: &Header) -> Result<(), End> {
        let Some(remote) = self.remotes.get_mut(&conn.host) else { return Ok(()) };
        if remote.words.hear(header.seq)? {
            self.cm_inbox.push((conn.host.clone(), conn.payload(header.len).to_vec()));
        }
        conn.send_bytes(&Header { seq: remote.words.heard(), ..Header::new(Kind::CmHeard, 0, 0) }, &[]);
        Ok(())
    }

    /// Sends a datagram to a host, or has it kept until that is connected.
    fn post(&mut self, host: &Arc<str>, datagram: Vec<u8>, now: Instant) {
        self.reach(host, now);
        let Some(remote) = self.remotes.get_mut(host) else { return };
        let prompt = remote.meeting.conn(PROMPT);
        match prompt.and_then(|index| self.conns.get_mut(index)?.as_mut()) {
            Some(conn) => conn.send_raw(&datagram),
            None => remote.keep(datagram),
        }
    }
}

/// The hosts that a datagram goes to.
fn destinations(shared: &Shared, tenant: &Tenant, dest: Gid) -> Vec<Arc<str>> {
    let Some(cluster) = shared.cluster.get() else { return vec![] };
    if dest.is_multicast() {
        let members = shared.with(|state| state.far_members(tenant, dest));
        return hosts_of(&cluster.hosts, tenant, &members);
    }
    cluster.hosts.find(tenant, dest.ip()).map(|host| host.name.clone()).into_iter().collect()
}

/// Does a host not take what there is for it? Then its datagrams wait where they are.
fn is_crowded(remotes: &HashMap<Arc<str>, Remote>, conns: &[Option<Conn>], most: usize, host: &str) -> bool {
    let Some(remote) = remotes.get(host) else { return false };
    match remote.meeting.conn(PROMPT).and_then(|at| conns.get(at)?.as_ref()) {
        Some(conn) => !conn.has_room(most),
        None => remote.is_full(),
    }
}

/// It has something to send on a certain connection, which is one of a certain channel.
pub fn enqueue(lines: &mut [Line], slot: &mut Slot, qpn: u32, (index, channel): (usize, usize)) {
    if !std::mem::replace(&mut slot.queued[channel], true) {
        lines[index].ready.push_back(qpn);
    }
}

/// Says what was carried out.
fn acknowledge(slot: &mut Slot, conn: &mut Conn, qpn: u32) {
    let (to, responder) = (slot.endpoint.qp.dest_qpn, &mut slot.endpoint.responder);
    if std::mem::take(&mut responder.ack_due) {
        let (seq, epoch) = (responder.expected(), responder.epoch());
        conn.send_bytes(&Header { seq, epoch, ..Header::new(Kind::Ack, qpn, to) }, &[]);
    }
}

fn request_header(wr: &Wr, from: u32, to: u32) -> Header {
    let solicited = wr.flags.contains(SendFlags::SOLICITED);
    let base = Header {
        op: wr.op as u8,
        flags: if solicited { wire::flags::SOLICITED } else { 0 },
        imm: wr.imm,
        total: wr.total,
        srqn: wr.srqn,
        ..Header::new(Kind::Request, from, to)
    };
    match wr.target {
        Target::Memory { addr, rkey } => Header { addr, rkey, ..base },
        Target::Atomic { addr, rkey, compare_add, swap } => {
            debug_assert!(SendOp::is_atomic(wr.op));
            Header { addr, rkey, a: compare_add, b: swap, ..base }
        }
        Target::Flush { addr, rkey, len, what } => {
            Header { addr, rkey, a: len, b: what.bits().into(), ..base }
        }
        _ => base,
    }
}
