//! Connections to other hosts: who dials, which connection counts when both did, what is lost with one, and silence.

use std::os::fd::AsFd as _;
use std::sync::Arc;
use std::time::Instant;

use super::alive;
use super::conn::{Conn, End};
use super::engine::{Engine, Slot};
use super::inbound::open_message;
use super::meeting::{Attempt, Conns, Greeted};
use super::remote::{Remote, SILENCE};
use super::wire::{CHANNELS, Header, Kind, Malformed, PROMPT, VERSION};
use super::words::Words;
use crate::cluster::Stream;
use crate::state::Notice;

impl Engine {
    /// Sees to it that there are connections to a host, now or soon.
    pub fn reach(&mut self, host: &Arc<str>, now: Instant) {
        let remote = self.remotes.entry(host.clone()).or_insert_with(|| Remote::new(now));
        self.reaching |= !remote.is_up();
        if let Some(attempt) = remote.meeting.dial(now) {
            self.to_dial.push((host.clone(), attempt));
        }
    }

    /// True: it is the first time since the host was reached.
    pub fn dial_failed(&mut self, host: &Arc<str>, attempt: u32) -> bool {
        let now = self.now();
        self.learned = true;
        let Some(remote) = self.remotes.get_mut(host) else { return false };
        let first = !remote.meeting.has_failed();
        let ended = remote.meeting.dial_failed(attempt, now);
        ended.is_some_and(|ended| {
            self.part(host, ended);
            first
        })
    }

    /// A connection that was dialed is there.
    pub fn dialed(&mut self, stream: Stream, host: &Arc<str>, attempt: u32, channel: usize) {
        if !self.remotes.get(host).is_some_and(|remote| remote.meeting.is_dialing(attempt)) {
            return;
        }
        let mut conn = Conn::new(stream, host.clone(), Some(attempt), None);
        conn.send_bytes(&hello(channel, self.own.boot, attempt), &[]);
        if let Err(errno) = self.add(conn) {
            tracing::warn!("cannot watch a connection to host {host}: {errno}");
        }
    }

    /// Another router connected.
    pub fn accepted(&mut self, stream: Stream) {
        let host = stream.peer().clone();
        let conn = Conn::new(stream, host.clone(), None, None);
        if let Err(errno) = self.add(conn) {
            tracing::warn!("cannot watch a connection from host {host}: {errno}");
        }
    }

    /// The other side's first word: from now on the connection carries messages, or it is one too many.
    pub fn hello(&mut self, index: usize, conn: &mut Conn, header: &Header, now: Instant) -> Result<(), End> {
        let channel = header.to as usize;
        if header.seq != VERSION || channel >= CHANNELS || conn.channel.is_some() {
            tracing::warn!("host {} speaks version {} of the protocol, not {VERSION}", conn.host, header.seq);
            return Err(Malformed::Content("a hello of another version").into());
        }
        let (host, lower) = (conn.host.clone(), *self.own.name < *conn.host);
        self.met(&host, header.a, conn.dialed, now);
        let of = conn.dialed.map_or(Attempt::Theirs(header.b as u32), Attempt::Ours);
        let remote = self.remotes.entry(host.clone()).or_insert_with(|| Remote::new(now));
        match remote.meeting.greeted(index, channel, of, lower, now) {
            Greeted::Refused => return Err(End::Closed),
            Greeted::Counts { ended } => self.part(&host, ended),
        }
        conn.channel = Some(channel);
        if let Attempt::Theirs(attempt) = of {
            conn.send_bytes(&hello(channel, self.own.boot, attempt), &[]);
        }
        let Some(remote) = self.remotes.get_mut(&host) else { return Ok(()) };
        remote.heard = now;
        tracing::debug!("host {host}: channel {channel} is there ({of:?})");
        if remote.is_up() {
            self.up(index, conn, &host);
        }
        Ok(())
    }

    /// Another start of a host's router knows nothing of what was. `ours`: the attempt by which it was met.
    fn met(&mut self, host: &Arc<str>, boot: u64, ours: Option<u32>, now: Instant) {
        let remote = self.remotes.entry(host.clone()).or_insert_with(|| Remote::new(now));
        if remote.boot.replace(boot).is_some_and(|before| before != boot) {
            tracing::info!("the router of host {host} has restarted");
            remote.words = Words::default();
            // An attempt that nobody has greeted was not with the earlier one.
            let meeting = &mut remote.meeting;
            if meeting.conns() != [None; CHANNELS] && !ours.is_some_and(|attempt| meeting.is_dialing(attempt))
            {
                let ended = meeting.end(now);
                self.part(host, ended);
            }
            self.hosts_gone.push(host.clone());
            self.end_of(host, |slot| slot.endpoint.responder.is_open() || slot.endpoint.requester.is_open());
        }
    }

    /// All channels are there: queue pairs say again who they are.
    fn up(&mut self, index: usize, conn: &mut Conn, host: &Arc<str>) {
        let Some(remote) = self.remotes.get_mut(host) else { return };
        let (prompt, kept) = (remote.meeting.conn(PROMPT), remote.take_kept());
        let mut messages = self.introduce_groups(host);
        messages.extend(kept);
        let slots = self.slots.values_mut().filter(|slot| slot.host == *host && !slot.dead);
        messages.extend(slots.map(open_message));
        // The connection at hand is not in its place.
        let prompt = match prompt {
            Some(at) if at == index => Some(conn),
            Some(at) => self.conns.get_mut(at).and_then(Option::as_mut),
            None => None,
        };
        if let Some(prompt) = prompt {
            messages.iter().for_each(|message| prompt.send_raw(message));
        }
    }

    /// Says to the peer of a new queue pair who that is.
    pub fn open(&mut self, qpn: u32) {
        let Some(slot) = self.slots.get_mut(&qpn) else { return };
        let Some(remote) = self.remotes.get(&slot.host) else { return };
        let message = open_message(slot);
        if let Some(conn) = remote.meeting.conn(PROMPT).and_then(|at| self.conns.get_mut(at)?.as_mut()) {
            conn.send_raw(&message);
        }
    }

    pub fn say_closed(&mut self, slot: &Slot, died: bool) {
        let Some(remote) = self.remotes.get(&slot.host) else { return };
        let (from, to) = (slot.endpoint.qp.qpn, slot.endpoint.qp.dest_qpn);
        // What was carried out and is not acknowledged yet is now.
        let (seq, epoch) = (slot.endpoint.responder.expected(), slot.endpoint.responder.epoch());
        if let Some(conn) = remote.meeting.conn(PROMPT).and_then(|at| self.conns.get_mut(at)?.as_mut()) {
            let close = Header { status: u8::from(died), seq, epoch, ..Header::new(Kind::Close, from, to) };
            conn.send_bytes(&close, &[]);
        }
    }

    /// The peer of a queue pair left.
    pub fn closed(&mut self, qpn: u32, died: bool, now: Instant) {
        let Some(slot) = self.slots.get_mut(&qpn) else { return };
        slot.endpoint.give_up();
        slot.endpoint.responder.close();
        let requester = &mut slot.endpoint.requester;
        requester.on_absent(requester.epoch(), now);
        self.tell(qpn, if died { Notice::PeerGone { qpn } } else { Notice::PeerLeft { qpn } });
    }

    /// A connection ended, and those with it that are nothing without it. Their host is to be connected anew.
    pub fn lost(&mut self, index: usize, conn: Conn, end: &End) {
        let (host, now) = (conn.host.clone(), self.now());
        let Some(remote) = self.remotes.get_mut(&host) else { return };
        let was_up = remote.is_up();
        let Some(ended) = remote.meeting.lost(index, conn.dialed, now) else { return };
        match end {
            End::Malformed(_) => tracing::warn!("connection with host {host} ended: {end}"),
            _ if was_up => tracing::info!("connection with host {host} ended: {end}"),
            _ => tracing::debug!("an attempt to connect with host {host} ended: {end}"),
        }
        drop(conn);
        self.part(&host, ended);
        if self.is_wanted(&host) {
            self.reach(&host, now);
        }
    }

    /// Connections do not count any more, nor any of an attempt that was given up.
    fn part(&mut self, host: &Arc<str>, ended: Conns) {
        let Some(remote) = self.remotes.get(host) else { return };
        let given_up = |conn: &mut Conn| {
            conn.host == *host && conn.dialed.is_some_and(|attempt| !remote.meeting.is_dialing(attempt))
        };
        for (index, place) in self.conns.iter_mut().enumerate() {
            place.take_if(|conn| ended.contains(&Some(index)) || given_up(conn));
        }
        if ended == [None; CHANNELS] {
            return;
        }
        for slot in self.slots.values_mut().filter(|slot| slot.host == *host) {
            slot.endpoint.give_up();
            slot.endpoint.requester.reopen();
            slot.queued = [false; CHANNELS];
            slot.served_by = None;
        }
    }

    /// Queue pairs whose peers are gone for good.
    fn end_of(&mut self, host: &Arc<str>, ends: impl Fn(&Slot) -> bool) {
        let ended = self.slots.iter_mut().filter(|(_, slot)| slot.host == *host && ends(slot));
        let ended: Vec<u32> = ended
            .map(|(qpn, slot)| {
                slot.endpoint.give_up();
                slot.endpoint.responder.close();
                if !slot.endpoint.requester.is_idle() {
                    slot.endpoint.requester.give_up();
                }
                slot.dead = true;
                *qpn
            })
            .collect();
        for qpn in ended {
            self.report(qpn);
            self.tell(qpn, Notice::PeerGone { qpn });
        }
    }

    /// A container is on another host than before.
    pub fn moved(&mut self, tenant: &str, gid: freeflow_core::verbs::Gid, to: &str) {
        let hosts: Vec<Arc<str>> = self.remotes.keys().cloned().collect();
        for host in hosts.iter().filter(|host| ***host != *to) {
            self.end_of(host, |slot| *slot.endpoint.qp.tenant == *tenant && slot.endpoint.qp.dest == gid);
        }
    }

    /// Time has passed: silent hosts are asked, given up, dialed again; what waited too long fails.
    pub fn tick(&mut self, now: Instant) {
        let hosts: Vec<Arc<str>> = self.remotes.keys().cloned().collect();
        self.reaching = false;
        let owing: std::collections::HashSet<Arc<str>> =
            self.busy.iter().filter_map(|qpn| Some(self.slots.get(qpn)?.host.clone())).collect();
        for host in hosts {
            self.look_after(&host, owing.contains(&host), now);
        }
        let late: Vec<u32> = self.busy.iter().copied().filter(|qpn| self.is_late(*qpn, now)).collect();
        for qpn in late {
            let Some(slot) = self.slots.get_mut(&qpn) else { continue };
            tracing::debug!("QP {qpn:#x}: nothing came of host {} in time", slot.host);
            let requester = &mut slot.endpoint.requester;
            let open = requester.is_open();
            requester.give_up();
            let goes_on = open && requester.failure().is_none();
            self.report(qpn);
            if goes_on {
                self.open(qpn); // of what was lost nothing more may come
            }
        }
    }

    fn is_late(&self, qpn: u32, now: Instant) -> bool {
        let Some(slot) = self.slots.get(&qpn) else { return false };
        let Some(remote) = self.remotes.get(&slot.host) else { return false };
        let late = slot.endpoint.requester.deadline(remote.alive()).is_some_and(|deadline| now >= deadline);
        late && (slot.endpoint.requester.is_absent() || remote.was_asked(now))
    }

    /// Is there anything for which the host must be connected?
    fn is_wanted(&self, host: &Arc<str>) -> bool {
        let waits = self.remotes.get(host).is_some_and(|remote| remote.is_to_know || remote.is_owed());
        waits || self.slots.values().any(|slot| slot.host == *host)
    }

    fn look_after(&mut self, host: &Arc<str>, owes: bool, now: Instant) {
        let Some(remote) = self.remotes.get_mut(host) else { return };
        if !remote.is_up() {
            if let Some(ended) = remote.meeting.expire(now) {
                self.part(host, ended);
            }
            if self.is_wanted(host) {
                self.reach(host, now);
            }
            return;
        }
        if now >= remote.heard + SILENCE {
            tracing::info!("host {host} is silent: its connections are ended");
            let ended = remote.meeting.end(now);
            self.part(host, ended);
            return;
        }
        let Some(conn) = remote.meeting.conn(PROMPT).and_then(|at| self.conns.get_mut(at)?.as_mut()) else {
            return;
        };
        if remote.ask(owes, now) {
            conn.send_bytes(&Header::new(Kind::Ping, 0, 0), &[]);
        }
        if owes
            && remote.is_silent(now)
            && let Some(ago) = alive::acknowledged(conn.as_fd())
        {
            remote.acknowledged(now, ago);
        }
    }
}

fn hello(channel: usize, boot: u64, attempt: u32) -> Header {
    Header { seq: VERSION, a: boot, b: attempt.into(), ..Header::new(Kind::Hello, 0, channel as u32) }
}
