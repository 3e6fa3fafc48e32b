//! What comes in: each message judged, then carried out or answered.
//!
//! The other host is believed nothing: it may name only queue pairs that are connected to one of its own, with requests that
//! the executor checks as it checks a peer's. What no honest host sends ends the connection.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

use freeflow_core::exec::UdDest;
use freeflow_core::verbs::{Gid, QpType, SendOp, WcStatus};

use super::conn::{Conn, End, Incoming};
use super::endpoint::{Endpoint, Served};
use super::engine::{Delivered, Engine, Held, Target};
use super::memory::Input;
use super::outbound::enqueue;
use super::requester::Nonsense;
use super::responder::{PendingRead, Verdict};
use super::wire::{self, Addresses, Header, Kind, Malformed, Opening};
use crate::directory::Tenant;
use crate::shared::Shared;

/// Datagrams of a burst that may wait for a receive, per queue pair, and how long: the receiver, which had receives a moment
/// ago, may not have had a processor since. Others are dropped at once.
const HELD: usize = 512;
const HOLD: Duration = Duration::from_millis(5);
/// Bytes taken off one connection before others have their turn.
const TURN: usize = 1 << 20;

impl From<Nonsense> for End {
    fn from(_: Nonsense) -> Self {
        Malformed::Content("an answer to what was not asked").into()
    }
}

impl Engine {
    /// Takes what a connection has. True: there may be more.
    pub fn pull(&mut self, index: usize, now: Instant) -> bool {
        self.with_conn(index, |engine, conn| {
            if !conn.readable {
                return Ok(false);
            }
            let mut taken = 0;
            while taken < TURN {
                let Some(incoming) = conn.next()? else { return Ok(taken > 0) };
                engine.heard(conn, now);
                taken += engine.accept(index, conn, incoming, now)?;
            }
            Ok(true)
        })
    }

    fn heard(&mut self, conn: &Conn, now: Instant) {
        if let Some(remote) = self.remotes.get_mut(&conn.host) {
            remote.heard = now;
        }
    }

    /// Handles a message or a part of one; returns its size.
    fn accept(
        &mut self,
        index: usize,
        conn: &mut Conn,
        incoming: Incoming,
        now: Instant,
    ) -> Result<usize, End> {
        let (kind, header, at, len) = match incoming {
            Incoming::Whole(kind, header) => (kind, header, 0, header.len),
            Incoming::Part { kind, header, at, len } => (kind, header, at, len),
        };
        if conn.channel.is_none() && kind != Kind::Hello {
            return Err(Malformed::Content("the first message must be Hello").into());
        }
        let taken = match kind {
            Kind::Request | Kind::ReadData => {
                let piece = Header { offset: header.offset.saturating_add(at), len, ..header };
                let (taken, reply) = {
                    let mut input = conn.input(len);
                    let reply = match kind {
                        Kind::Request => self.request(index, &conn.host, &piece, &mut input)?,
                        _ => self.read_data(&conn.host, &piece, &mut input, now),
                    };
                    let taken = if let Input::Socket { taken, .. } = input { Some(taken) } else { None };
                    (taken, reply)
                };
                self.answer(index, conn, &piece, reply);
                taken
            }
            _ => {
                self.control(index, conn, kind, &header, now)?;
                None
            }
        };
        conn.consumed(len, taken)?;
        Ok(len as usize + wire::HEADER)
    }

    fn control(
        &mut self,
        index: usize,
        conn: &mut Conn,
        kind: Kind,
        header: &Header,
        now: Instant,
    ) -> Result<(), End> {
        match kind {
            Kind::Hello => return self.hello(index, conn, header, now),
            Kind::Open => {
                let payload = conn.payload(header.len).to_vec();
                self.opening(index, conn, header, &payload)?;
            }
            Kind::Datagram => self.datagram(&conn.host, header, conn.payload(header.len))?,
            Kind::Ping => conn.send_bytes(&Header::new(Kind::Pong, 0, 0), &[]),
            Kind::Pong => {}
            Kind::Member => self.member(conn, header)?,
            Kind::Known => self.known(&conn.host, header.seq)?,
            Kind::Cm => self.hear_cm(conn, header)?,
            Kind::CmHeard => {
                let remote = self.remotes.get_mut(&conn.host);
                remote.map_or(Ok(()), |remote| remote.words.were_heard(header.seq))?;
            }
            _ => self.word(&conn.host.clone(), kind, header, now)?,
        }
        Ok(())
    }

    /// Is `header` from the peer of the queue pair that it is for?
    fn addressed(&self, host: &str, header: &Header) -> bool {
        self.slots
            .get(&header.to)
            .is_some_and(|slot| *slot.host == *host && slot.endpoint.qp.dest_qpn == header.from && !slot.dead)
    }

    /// A message without payload to one queue pair.
    fn word(&mut self, host: &str, kind: Kind, header: &Header, now: Instant) -> Result<(), End> {
        if !self.addressed(host, header) {
            return Ok(());
        }
        let qpn = header.to;
        let Some(slot) = self.slots.get_mut(&qpn) else { return Ok(()) };
        let requester = &mut slot.endpoint.requester;
        let (seq, epoch) = (header.seq, header.epoch);
        let status = WcStatus::try_from(u32::from(header.status)).ok().filter(|s| *s != WcStatus::Success);
        match kind {
            Kind::Ack => requester.on_ack(seq, epoch, now)?,
            Kind::Nak => requester.on_nak(seq, status.unwrap_or(WcStatus::RemOpErr), epoch, now)?,
            Kind::RnrNak => {
                let counts = header.flags & wire::flags::BUSY == 0;
                requester.on_rnr(seq, header.imm, counts, epoch, now)?;
            }
            Kind::Opened => requester.on_opened(seq, epoch, now)?,
            Kind::Absent => requester.on_absent(epoch, now),
            Kind::AtomicResult => {
                if let Some(wr) = requester.awaiting(seq, epoch).cloned() {
                    let bytes = header.a.to_ne_bytes();
                    self.answered(qpn, &wr, header, &mut Input::Bytes(&bytes), 8, now);
                }
            }
            Kind::Close => {
                requester.on_ack(seq, epoch, now)?;
                self.closed(qpn, header.status == 1, now);
            }
            _ => {}
        }
        self.go_on(qpn, now);
        Ok(())
    }

    /// Something changed for a queue pair's requests: there may be room for more, and more to send.
    fn go_on(&mut self, qpn: u32, now: Instant) {
        self.take(qpn, now);
        self.line_up(qpn, now);
    }

    /// Puts an answer in place.
    fn answered(
        &mut self,
        qpn: u32,
        wr: &super::requester::Wr,
        header: &Header,
        input: &mut Input<'_>,
        len: u32,
        now: Instant,
    ) {
        let Some(slot) = self.slots.get_mut(&qpn) else { return };
        let offset = if wr.op == SendOp::Read { header.offset } else { 0 };
        let placed = slot.endpoint.place_answer(wr, offset, len, input);
        match placed {
            Ok(()) => slot.endpoint.requester.on_answer(header.seq, len, now),
            Err(status) => slot.endpoint.requester.on_bad_answer(header.seq, status),
        }
    }

    fn read_data(
        &mut self,
        host: &str,
        header: &Header,
        input: &mut Input<'_>,
        now: Instant,
    ) -> Option<Served> {
        if !self.addressed(host, header) {
            return None;
        }
        let qpn = header.to;
        let requester = &self.slots.get(&qpn)?.endpoint.requester;
        let wr = requester.reading(header.seq, header.offset, header.len, header.epoch)?.clone();
        self.answered(qpn, &wr, header, input, header.len, now);
        self.go_on(qpn, now);
        None
    }

    /// A piece of a request.
    fn request(
        &mut self,
        index: usize,
        host: &str,
        header: &Header,
        input: &mut Input<'_>,
    ) -> Result<Option<Served>, End> {
        if !self.addressed(host, header) {
            return Ok(Some(Served::Absent));
        }
        let op = SendOp::try_from(u32::from(header.op));
        let op = op.map_err(|_| Malformed::Content("a request of unknown kind"))?;
        self.learn_queue(header);
        let Some(slot) = self.slots.get_mut(&header.to) else { return Ok(None) };
        slot.served_by = Some(index);
        let responder = &mut slot.endpoint.responder;
        match responder.judge(header, op) {
            Verdict::Nonsense => Err(Malformed::Content("a request out of its order").into()),
            Verdict::Discard => Ok(None),
            Verdict::Again => {
                if op == SendOp::Read {
                    responder.read(header);
                    return Ok(Some(Served::Done));
                }
                responder.ack_due = true;
                Ok(responder
                    .remembered(header.seq)
                    .map_or(Some(Served::Done), |old| Some(Served::Result(old))))
            }
            Verdict::Execute if op == SendOp::Read => Ok(Some(begin_read(&mut slot.endpoint, header))),
            Verdict::Execute => {
                let served = execute(&mut slot.endpoint, header, op, input);
                if let Some(srq) = slot.endpoint.take_limited() {
                    self.tell(header.to, crate::state::Notice::SrqLimit { srq });
                }
                Ok(Some(served))
            }
        }
    }

    /// Finds the shared receive queue that an XRC request names for the first time.
    fn learn_queue(&mut self, header: &Header) {
        let (qpn, srqn) = (header.to, header.srqn);
        let Some(slot) = self.slots.get_mut(&qpn).filter(|slot| slot.endpoint.lacks(srqn)) else { return };
        if let Some(Ok(domain)) =
            self.shared.upgrade().map(|shared| shared.with(|state| state.far_queue(qpn, srqn)))
        {
            slot.endpoint.learn_queue(srqn, domain);
        }
    }

    /// What a request's sender is told, or will be.
    fn answer(&mut self, index: usize, conn: &mut Conn, header: &Header, served: Option<Served>) {
        let Some(served) = served else { return };
        let (qpn, to, seq, epoch) = (header.to, header.from, header.seq, header.epoch);
        match served {
            Served::Partly => {}
            Served::Done => {
                self.lines[index].acks.push(qpn);
                let Some(slot) = self.slots.get_mut(&qpn) else { return };
                if ![SendOp::Read as u8, SendOp::Flush as u8].contains(&header.op) {
                    let (client, woken) = (slot.endpoint.qp.client, slot.endpoint.has_woken());
                    let among_others =
                        self.delivered.is_some_and(|other| other.client != client || other.among_others);
                    self.delivered = Some(Delivered { client, woken, among_others });
                }
                if let Some(channel) = conn.channel
                    && !slot.endpoint.responder.reads.is_empty()
                {
                    enqueue(&mut self.lines, slot, qpn, (index, channel));
                }
            }
            Served::Result(a) => {
                self.lines[index].acks.push(qpn);
                let result = Header { seq, epoch, a, ..Header::new(Kind::AtomicResult, qpn, to) };
                conn.send_bytes(&result, &[]);
            }
            Served::NotReady { timer } => {
                let nak = Header { seq, epoch, imm: timer, ..Header::new(Kind::RnrNak, qpn, to) };
                conn.send_bytes(&nak, &[]);
            }
            Served::Busy => {
                let timer = self.slots.get_mut(&qpn).map_or(0, |slot| slot.endpoint.responder.busy());
                let flags = wire::flags::BUSY;
                let nak = Header { seq, epoch, flags, imm: timer, ..Header::new(Kind::RnrNak, qpn, to) };
                conn.send_bytes(&nak, &[]);
            }
            Served::Absent if !self.slots.contains_key(&qpn) => {
                conn.send_bytes(&Header { epoch, ..Header::new(Kind::Absent, qpn, to) }, &[]);
            }
            other => self.refuse(conn, qpn, seq, other),
        }
    }

    // ---- datagrams

    fn datagram(&mut self, host: &str, header: &Header, payload: &[u8]) -> Result<(), End> {
        let (to, tenant, payload) = wire::split::<Addresses>(payload, |head, _| head.tenant.into())?;
        let Some(shared) = self.shared.upgrade() else { return Ok(()) };
        let (tenant, from, dgid): (Tenant, _, _) = (tenant.into(), Gid(to.from), Gid(to.to));
        let speaks = shared.cluster.get().and_then(|cluster| cluster.hosts.find(&tenant, from.ip()));
        if speaks.is_none_or(|speaker| *speaker.name != *host) {
            return Ok(()); // it does not have that container
        }
        let Addresses { qkey, traffic_class, hop_limit, .. } = to;
        let dest = UdDest { dgid, qpn: header.to, qkey, traffic_class, hop_limit };
        if dgid.is_multicast() {
            for (vip, qpn) in shared.with(|state| state.members_here(&tenant, dgid)) {
                self.deliver(&shared, (&tenant, vip), header, from, UdDest { qpn, ..dest }, payload);
            }
        } else {
            self.deliver(&shared, (&tenant, dgid), header, from, dest, payload);
        }
        Ok(())
    }

    /// Delivers a datagram to a queue pair at a container's address, if that receives.
    fn deliver(
        &mut self,
        shared: &Shared,
        (tenant, vip): (&Tenant, Gid),
        header: &Header,
        from: Gid,
        dest: UdDest,
        payload: &[u8],
    ) {
        let (qpn, now) = (dest.qpn, self.now());
        let known = |t: &Target| t.endpoint.qp.tenant == *tenant && t.endpoint.qp.vip == vip;
        if !self.targets.get(&qpn).is_some_and(known) {
            let Ok(qp) = shared.with(|state| state.far_datagram(tenant, vip, qpn)) else { return };
            let endpoint = Endpoint::new(qp, 0);
            let target = Target { endpoint, held: VecDeque::new(), delivered: None };
            self.targets.insert(qpn, target);
        }
        let Some(target) = self.targets.get_mut(&qpn) else { return };
        if target.held.is_empty() && target.endpoint.has_receive() {
            target.endpoint.datagram(header, from, dest, payload);
            target.delivered = Some(now);
        } else if target.held.len() < HELD && target.delivered.is_some_and(|then| now < then + HOLD) {
            let held = Held { header: *header, from, dest, payload: payload.to_vec() };
            target.held.push_back((now + HOLD, held));
        }
    }

    /// Delivers datagrams that waited for a receive, and drops those that waited long.
    pub fn retry_datagrams(&mut self, now: Instant) {
        for target in self.targets.values_mut() {
            while let Some((until, _)) = target.held.front() {
                if now < *until && !target.endpoint.has_receive() {
                    break;
                }
                let Some((_, Held { header, from, dest, payload })) = target.held.pop_front() else { break };
                target.endpoint.datagram(&header, from, dest, &payload);
                target.delivered = Some(now);
            }
        }
    }

    // ---- opening

    /// The other end of a queue pair says that it is connected to it.
    fn opening(&mut self, index: usize, conn: &mut Conn, header: &Header, payload: &[u8]) -> Result<(), End> {
        let (ends, tenant, _) = wire::split::<Opening>(payload, |_, rest| rest.len())?;
        let qpn = header.to;
        let kind = QpType::try_from(u32::from(header.op)).ok();
        let absent = Header { epoch: header.epoch, ..Header::new(Kind::Absent, qpn, header.from) };
        let agrees = self.addressed(&conn.host, header)
            && self.slots.get(&qpn).is_some_and(|slot| {
                let qp = &slot.endpoint.qp;
                *qp.tenant == *tenant
                    && qp.dest == Gid(ends.from)
                    && qp.vip == Gid(ends.to)
                    && Some(qp.kind.counterpart()) == kind
            });
        tracing::debug!("QP {:#x} of host {} opens to {qpn:#x}: {agrees}", header.from, conn.host);
        let Some(slot) = self.slots.get_mut(&qpn).filter(|_| agrees) else {
            conn.send_bytes(&absent, &[]);
            return Ok(());
        };
        slot.endpoint.give_up();
        slot.served_by = Some(index);
        let expected = slot.endpoint.responder.open(header);
        let opened =
            Header { seq: expected, epoch: header.epoch, ..Header::new(Kind::Opened, qpn, header.from) };
        conn.send_bytes(&opened, &[]);
        if slot.endpoint.requester.is_absent() {
            // It is there now.
            let message = open_message(slot);
            conn.send_raw(&message);
        }
        Ok(())
    }
}

/// Checks a READ when its turn comes, before what follows it is carried out; its bytes go out later.
fn begin_read(endpoint: &mut Endpoint, header: &Header) -> Served {
    if let Err(refused) = endpoint.serve_read(&PendingRead::of(header), 0) {
        return refused;
    }
    endpoint.responder.read(header);
    endpoint.responder.executed();
    Served::Done
}

/// Runs a piece of a request, and notes how far that got.
fn execute(endpoint: &mut Endpoint, header: &Header, op: SendOp, input: &mut Input<'_>) -> Served {
    let whole = header.offset + header.len == header.total || op.is_atomic();
    let served = match endpoint.qp.kind {
        QpType::Uc => deliver_or_lose(endpoint, header, op, input, whole),
        _ => endpoint.serve(header, op, input),
    };
    let responder = &mut endpoint.responder;
    match served {
        Served::Done if whole => responder.executed(),
        Served::Result(old) => {
            responder.remember(header.seq, old);
            responder.executed();
        }
        Served::Partly if !whole => responder.came += header.len,
        // The rest of it is on its way: nothing of that counts.
        Served::NotReady { .. } | Served::Busy | Served::Absent => responder.not_ready(),
        Served::Failed { .. } => {}
        // The receive that was being filled was lost on the way.
        Served::Partly | Served::Done => return Served::Failed { status: WcStatus::RemOpErr, fault: false },
    }
    served
}

/// What cannot be delivered of an unreliable connection is lost, to its end, and nobody is told.
fn deliver_or_lose(
    endpoint: &mut Endpoint,
    header: &Header,
    op: SendOp,
    input: &mut Input<'_>,
    whole: bool,
) -> Served {
    if !endpoint.responder.lost {
        let served = endpoint.serve(header, op, input);
        if matches!((served, whole), (Served::Done, true) | (Served::Partly, false)) {
            return served;
        }
        endpoint.give_up();
        endpoint.responder.lost = true;
    }
    if whole { Served::Done } else { Served::Partly }
}

/// The Open of a queue pair, as it is now.
pub fn open_message(slot: &mut super::engine::Slot) -> Vec<u8> {
    use zerocopy::IntoBytes as _;
    let endpoint = &mut slot.endpoint;
    let (seq, epoch) = endpoint.requester.reopen();
    let qp = &endpoint.qp;
    let opening = Opening { from: qp.vip.0, to: qp.dest.0 };
    let header = Header {
        op: qp.kind as u8,
        len: (size_of::<Opening>() + qp.tenant.len()) as u32,
        seq,
        epoch,
        a: endpoint.incarnation,
        ..Header::new(Kind::Open, qp.qpn, qp.dest_qpn)
    };
    [header.as_bytes(), opening.as_bytes(), qp.tenant.as_bytes()].concat()
}
