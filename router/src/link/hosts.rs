//! Connections to other hosts: who dials, which connection counts when both did, what is lost with one, and silence.

use std::os::fd::AsFd as _;
use std::sync::Arc;
use std::time::Instant;

use super::alive;
use super::conn::{Conn, End};
use super::engine::{Engine, Slot};
use super::inbound::open_message;
use super::remote::{CHANNELS, PROMPT, Remote, SILENCE};
use super::wire::{Header, Kind, Malformed, VERSION};
use super::words::Words;
use crate::cluster::Stream;
use crate::state::Notice;

impl Engine {
    fn own_name(&self) -> Arc<str> {
        let shared = self.shared.upgrade();
        shared.and_then(|s| s.cluster.get().map(|c| c.hosts.own().into())).unwrap_or_else(|| "".into())
    }

    fn boot(&self) -> u64 {
        self.shared.upgrade().map_or(0, |shared| shared.boot)
    }

    /// Sees to it that there are connections to a host, now or soon.
    pub fn reach(&mut self, host: &Arc<str>, now: Instant) {
        let remote = self.remotes.entry(host.clone()).or_insert_with(|| Remote::new(now));
        if !remote.is_up() && remote.dial(now) {
            self.to_dial.push(host.clone());
        }
    }

    /// True: it is the first time since the host was reached.
    pub fn dial_failed(&mut self, host: &Arc<str>) -> bool {
        let now = self.now();
        self.learned = true;
        self.remotes.get_mut(host).is_some_and(|remote| remote.dial_failed(now))
    }

    /// A connection that was dialed is there.
    pub fn dialed(&mut self, stream: Stream, host: &Arc<str>, channel: usize) {
        let mut conn = Conn::new(stream, host.clone(), true, None);
        conn.send_bytes(&hello(channel, self.boot()), &[]);
        if let Err(errno) = self.add(conn) {
            tracing::warn!("cannot watch a connection to host {host}: {errno}");
        }
    }

    /// Another router connected.
    pub fn accepted(&mut self, stream: Stream) {
        let host = stream.peer().clone();
        let conn = Conn::new(stream, host.clone(), false, None);
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
        let (host, own) = (conn.host.clone(), self.own_name());
        self.met(&host, header.a, now);
        let remote = self.remotes.entry(host.clone()).or_insert_with(|| Remote::new(now));
        let rival = remote.conns[channel].and_then(|at| self.conns.get(at)?.as_ref());
        // Of two connections that crossed, the one counts that the host with the lower name dialed.
        let loses = |dialed: bool| dialed != (*own < *host);
        if rival.is_some_and(|rival| rival.dialed != conn.dialed && loses(conn.dialed)) {
            return Err(End::Closed);
        }
        conn.channel = Some(channel);
        if !conn.dialed {
            let boot = self.boot();
            conn.send_bytes(&hello(channel, boot), &[]);
        }
        let Some(remote) = self.remotes.get_mut(&host) else { return Ok(()) };
        let before = remote.conns[channel].replace(index);
        remote.heard = now;
        if let Some(old) = before.filter(|old| *old != index) {
            self.conns[old] = None;
        }
        tracing::debug!("host {host}: channel {channel} is there (dialed here: {})", conn.dialed);
        if self.remotes.get(&host).is_some_and(|remote| remote.is_up()) {
            self.up(index, conn, &host, now);
        }
        Ok(())
    }

    /// Another start of a host's router knows nothing of what was.
    fn met(&mut self, host: &Arc<str>, boot: u64, now: Instant) {
        let remote = self.remotes.entry(host.clone()).or_insert_with(|| Remote::new(now));
        if remote.boot.replace(boot).is_some_and(|before| before != boot) {
            tracing::info!("the router of host {host} has restarted");
            let stale = std::mem::replace(&mut remote.conns, [None; CHANNELS]);
            stale.into_iter().flatten().for_each(|at| self.conns[at] = None);
            remote.words = Words::default();
            self.hosts_gone.push(host.clone());
            self.end_of(host, |slot| slot.endpoint.responder.is_open() || slot.endpoint.requester.is_open());
        }
    }

    /// All channels are there: queue pairs say again who they are.
    fn up(&mut self, index: usize, conn: &mut Conn, host: &Arc<str>, now: Instant) {
        let Some(remote) = self.remotes.get_mut(host) else { return };
        remote.connected(now);
        let (prompt, kept) = (remote.conns[PROMPT], remote.take_kept());
        let mut messages = self.introduce_groups(host);
        messages.extend(kept);
        for slot in self.slots.values_mut().filter(|slot| slot.host == *host && !slot.dead) {
            slot.queued = [false; CHANNELS];
            slot.served_by = None;
            messages.push(open_message(slot));
        }
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
        let Some(remote) = self.remotes.get(&slot.host).filter(|remote| remote.is_up()) else { return };
        let message = open_message(slot);
        if let Some(conn) = remote.conns[PROMPT].and_then(|at| self.conns.get_mut(at)?.as_mut()) {
            conn.send_raw(&message);
        }
    }

    pub fn say_closed(&mut self, slot: &Slot, died: bool) {
        let Some(remote) = self.remotes.get(&slot.host).filter(|remote| remote.is_up()) else { return };
        let (from, to) = (slot.endpoint.qp.qpn, slot.endpoint.qp.dest_qpn);
        if let Some(conn) = remote.conns[PROMPT].and_then(|at| self.conns.get_mut(at)?.as_mut()) {
            conn.send_bytes(&Header { status: u8::from(died), ..Header::new(Kind::Close, from, to) }, &[]);
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

    /// A connection ended. If it counted, its host is to be connected anew.
    pub fn lost(&mut self, index: usize, conn: Conn, end: &End) {
        let host = conn.host.clone();
        let now = self.now();
        let Some(remote) = self.remotes.get_mut(&host) else { return };
        let counted = remote.conns.contains(&Some(index));
        if !remote.is_up() && (counted || conn.dialed) {
            remote.dial_failed(now); // it was one of an attempt
        }
        if !counted {
            return;
        }
        match end {
            End::Malformed(_) => tracing::warn!("connection with host {host} ended: {end}"),
            _ => tracing::info!("connection with host {host} ended: {end}"),
        }
        drop(conn);
        self.down(&host);
        if self.is_wanted(&host) {
            self.reach(&host, now);
        }
    }

    fn down(&mut self, host: &Arc<str>) {
        let Some(remote) = self.remotes.get_mut(host) else { return };
        for index in std::mem::replace(&mut remote.conns, [None; CHANNELS]).into_iter().flatten() {
            self.conns[index] = None;
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
        let knows = self.remotes.get(host).is_some_and(|remote| remote.is_to_know);
        knows || self.slots.values().any(|slot| slot.host == *host)
    }

    fn look_after(&mut self, host: &Arc<str>, owes: bool, now: Instant) {
        if self.remotes.get(host).is_some_and(|remote| !remote.is_up()) {
            if self.is_wanted(host) {
                self.reach(host, now);
            }
            return;
        }
        let Some(remote) = self.remotes.get_mut(host) else { return };
        if now >= remote.heard + SILENCE {
            tracing::info!("host {host} is silent: its connections are ended");
            self.down(host);
            return;
        }
        let Some(conn) = remote.conns[PROMPT].and_then(|at| self.conns.get_mut(at)?.as_mut()) else { return };
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

fn hello(channel: usize, boot: u64) -> Header {
    Header { seq: VERSION, a: boot, ..Header::new(Kind::Hello, 0, channel as u32) }
}
