//! Everything that moves: endpoints, processes, other hosts and the connections to them, under one lock.
//!
//! Owns who has something to do and whose turn it is. One thread works here ([`super::thread`]); sessions come in to connect and
//! disconnect queue pairs, dialers and the listener to bring connections. Requests in are in `inbound`, out in `outbound`, what
//! changes between hosts in `hosts`. Lock order: this one, then the state's.

use std::cmp::Reverse;
use std::collections::{BTreeMap, BinaryHeap, HashMap, HashSet, VecDeque};
use std::os::fd::{AsFd as _, OwnedFd};
use std::sync::{Arc, Weak};
use std::time::{Duration, Instant};

use freeflow_core::ring::{CqShared, Submissions};
use freeflow_core::shm::{View, hush};
use freeflow_core::verbs::Gid;
use rustix::event::epoll;

use super::clock::Clock;
use super::conn::{Conn, End};
use super::endpoint::Endpoint;
use super::habit::Habit;
use super::hold::Hold;
use super::place::{Place, Traffic};
use super::remote::Remote;
use super::wire::{FRAGMENT, PROMPT};
use crate::directory::Tenant;
use crate::shared::Shared;
use crate::state::{FarQp, FarRing, Notice};

/// Looks at deadlines while anything is owed.
const TICK: Duration = Duration::from_millis(20);
/// Tries datagrams again that met no receive.
const RETRY: Duration = Duration::from_micros(200);
/// Looks at silent hosts.
const CALM_TICK: Duration = Duration::from_secs(1);

/// How long a delivery may wait for its answer, so that one message acknowledges and answers: a program that polls for it
/// takes less, and one that has to be woken more.
const ANSWER: Duration = Duration::from_micros(4);
/// The same of a process that sleeps, and is being woken: on a processor at rest that takes some 15 us.
const WAKING: Duration = Duration::from_micros(40);
/// Rings of a bell before it is emptied: a byte each, in a pipe that holds 64 KiB and of which that takes 4 KiB.
const RINGS: u32 = 1024;

/// What an epoll event is about.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Token {
    Wake,
    Timer,
    Conn(usize),
    Process(u32),
}

impl Token {
    pub fn data(self) -> epoll::EventData {
        epoll::EventData::new_u64(match self {
            Token::Wake => u64::MAX,
            Token::Timer => u64::MAX - 1,
            Token::Conn(index) => (index as u64) << 1,
            Token::Process(client) => u64::from(client) << 1 | 1,
        })
    }

    pub fn of(data: epoll::EventData) -> Self {
        match data.u64() {
            u64::MAX => Token::Wake,
            last if last == u64::MAX - 1 => Token::Timer,
            process if process & 1 == 1 => Token::Process((process >> 1) as u32),
            conn => Token::Conn((conn >> 1) as usize),
        }
    }
}

/// An endpoint and its place among others.
#[derive(Debug)]
pub struct Slot {
    pub endpoint: Endpoint,
    pub host: Arc<str>,
    /// The channel its requests take.
    pub channel: usize,
    /// It stands in the line of the connection of this channel.
    pub queued: [bool; super::wire::CHANNELS],
    /// The connection that its peer's requests come by.
    pub served_by: Option<usize>,
    /// The router that had its peer is gone.
    pub dead: bool,
}

/// A UD queue pair that datagrams come to from elsewhere, and those that met no receive a moment ago: what a NIC's buffer
/// is for.
#[derive(Debug)]
pub struct Target {
    pub endpoint: Endpoint,
    pub held: VecDeque<(Instant, Held)>,
    /// When one was delivered last.
    pub delivered: Option<Instant>,
}

/// A datagram that waits for a receive.
#[derive(Debug)]
pub struct Held {
    pub header: super::wire::Header,
    pub from: Gid,
    pub dest: freeflow_core::exec::UdDest,
    pub payload: Vec<u8>,
}

/// Queue pairs that wait for a connection.
#[derive(Debug, Default)]
pub struct Line {
    /// Those with something to send, in turn.
    pub ready: VecDeque<u32>,
    /// Those with something to acknowledge.
    pub acks: Vec<u32>,
}

/// A process that submits.
#[derive(Debug)]
pub struct Process {
    pub tenant: Tenant,
    pub vip: Gid,
    doorbell: View<CqShared>,
    bell: OwnedFd,
    /// Since it was emptied.
    rings: u32,
    marks: HashMap<u32, Vec<u32>>,
    pub datagrams: Option<Datagrams>,
    /// Does it answer while this thread spins?
    spun: Habit,
    /// Does it when this thread sleeps?
    slept: Habit,
}

/// The ring of a process's datagrams.
#[derive(Debug)]
pub struct Datagrams {
    pub ring: FarRing,
    pub next: u32,
    pub bit: u32,
}

/// The process that something was delivered to in this turn.
#[derive(Debug, Clone, Copy)]
pub struct Delivered {
    pub client: u32,
    /// It was woken for that.
    pub woken: bool,
    /// Others got something too.
    pub among_others: bool,
}

/// This host, as it greets others.
#[derive(Debug)]
pub struct Own {
    pub name: Arc<str>,
    /// Random per start of the router.
    pub boot: u64,
}

/// How much goes out at once.
#[derive(Debug, Clone, Copy)]
pub struct Most {
    /// Payload of a message.
    pub piece: u32,
    /// Bytes that may wait for a socket before more are made.
    pub waiting: usize,
}

impl Most {
    pub const USUAL: Most = Most { piece: FRAGMENT, waiting: 256 << 10 };
}

#[derive(Debug)]
pub struct Engine {
    pub shared: Weak<Shared>,
    pub own: Own,
    pub epoll: Arc<OwnedFd>,
    pub slots: BTreeMap<u32, Slot>,
    /// UD queue pairs that got datagrams from elsewhere.
    pub targets: HashMap<u32, Target>,
    pub processes: HashMap<u32, Process>,
    /// Processes whose doorbell does not wake us: they are looked at.
    awake: Vec<u32>,
    pub delivered: Option<Delivered>,
    /// Acknowledgements of small operations wait.
    pub hold: Hold,
    /// Processes whose datagrams wait for connections that take no more.
    pub held_up: Vec<u32>,
    pub remotes: HashMap<Arc<str>, Remote>,
    pub conns: Vec<Option<Conn>>,
    /// Who waits for each of them; apart, because a connection at work is not in its place.
    pub lines: Vec<Line>,
    pub most: Most,
    /// Queue pairs whose requests are not all done.
    pub busy: HashSet<u32>,
    timers: BinaryHeap<Reverse<(Instant, u32)>>,
    ticked: Instant,
    clock: Clock,
    place: Place,
    seed: u64,
    /// A host has heard of a group, or cannot be reached: somebody may wait for that.
    pub learned: bool,
    /// Hosts to dial.
    pub to_dial: Vec<(Arc<str>, u32)>,
    /// Some host is wanted, and not connected.
    pub reaching: bool,
    /// For the connection manager, whose lock comes before this one: what other hosts' say, and which of those are gone.
    pub cm_inbox: Vec<(Arc<str>, Vec<u8>)>,
    pub hosts_gone: Vec<Arc<str>>,
}

impl Engine {
    pub fn new(shared: Weak<Shared>, epoll: Arc<OwnedFd>, own: Own) -> rustix::io::Result<Self> {
        let (now, hold) = (Instant::now(), Hold::new()?);
        epoll::add(&*epoll, &hold, Token::Timer.data(), epoll::EventFlags::IN | epoll::EventFlags::ET)?;
        Ok(Engine {
            shared,
            seed: own.boot,
            own,
            epoll,
            slots: BTreeMap::new(),
            targets: HashMap::new(),
            processes: HashMap::new(),
            awake: Vec::new(),
            delivered: None,
            hold,
            held_up: Vec::new(),
            remotes: HashMap::new(),
            conns: Vec::new(),
            lines: Vec::new(),
            most: Most::USUAL,
            busy: HashSet::new(),
            timers: BinaryHeap::new(),
            ticked: now,
            clock: Clock::new(now),
            place: Place::default(),
            learned: false,
            to_dial: Vec::new(),
            reaching: false,
            cm_inbox: Vec::new(),
            hosts_gone: Vec::new(),
        })
    }

    /// By the clock that all deadlines are measured with.
    pub fn now(&self) -> Instant {
        self.clock.now(Instant::now())
    }

    #[cfg(test)]
    pub fn pass(&mut self, time: Duration) {
        self.clock.pass(time);
    }

    /// A number nobody else has: splitmix64 of the router's random start.
    pub fn number(&mut self) -> u64 {
        self.seed = self.seed.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.seed;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    pub fn tell(&self, qpn: u32, notice: Notice) {
        if let Some(shared) = self.shared.upgrade() {
            shared.with(|state| state.tell_owner(qpn, notice));
        }
    }

    // ---- queue pairs and processes come and go

    pub fn connect(&mut self, qp: FarQp, host: Arc<str>) {
        let (qpn, now) = (qp.qpn, self.now());
        let incarnation = self.number();
        let endpoint = Endpoint::new(qp, incarnation);
        let slot = Slot {
            endpoint,
            host: host.clone(),
            channel: PROMPT,
            queued: [false; super::wire::CHANNELS],
            served_by: None,
            dead: false,
        };
        self.slots.insert(qpn, slot);
        self.reach(&host, now);
        self.open(qpn);
    }

    pub fn disconnect(&mut self, qpn: u32, died: bool) {
        self.targets.remove(&qpn);
        self.busy.remove(&qpn);
        let Some(mut slot) = self.slots.remove(&qpn) else { return };
        if !died {
            slot.endpoint.give_up();
        }
        if let Some(process) = self.processes.get_mut(&slot.endpoint.qp.client) {
            process.marks.values_mut().for_each(|qpns| qpns.retain(|other| *other != qpn));
        }
        self.say_closed(&slot, died);
    }

    pub fn open_doorbell(
        &mut self,
        client: u32,
        home: (Tenant, Gid),
        doorbell: View<CqShared>,
        bell: OwnedFd,
    ) -> rustix::io::Result<()> {
        let (tenant, vip) = home;
        let flags = epoll::EventFlags::IN | epoll::EventFlags::ET;
        epoll::add(&*self.epoll, &bell, Token::Process(client).data(), flags)?;
        let marks = HashMap::new();
        let (spun, slept) = (Habit::default(), Habit::unproven());
        let process = Process { tenant, vip, doorbell, bell, rings: 0, marks, datagrams: None, spun, slept };
        self.processes.insert(client, process);
        self.awake.push(client);
        Ok(())
    }

    pub fn attach(&mut self, client: u32, qpn: u32, ring: FarRing, bit: u32, send_bit: u32) -> bool {
        let Some(process) = self.processes.get_mut(&client) else { return false };
        if qpn == freeflow_core::ctl::DATAGRAMS {
            process.datagrams = Some(Datagrams { ring, next: 0, bit });
            return true;
        }
        let Some(slot) = self.slots.get_mut(&qpn).filter(|s| s.endpoint.qp.client == client) else {
            return false;
        };
        let again = slot.endpoint.attach(ring, send_bit);
        let marked = process.marks.entry(bit).or_default();
        if !marked.contains(&qpn) {
            marked.push(qpn);
        }
        if again {
            self.open(qpn);
        }
        true
    }

    pub fn forget_queue(&mut self, srqn: u32) {
        self.slots.values_mut().for_each(|slot| slot.endpoint.forget_queue(srqn));
    }

    /// A client is gone; its queue pairs were disconnected before.
    pub fn leave(&mut self, client: u32) {
        if let Some(process) = self.processes.remove(&client) {
            // It may be gone from there already.
            let _ = epoll::delete(&*self.epoll, &process.bell);
        }
        self.awake.retain(|other| *other != client);
    }

    // ---- turns

    pub fn note(&mut self, token: Token, flags: epoll::EventFlags) {
        match token {
            Token::Wake => {}
            Token::Timer => {
                if let Some(late) =
                    self.hold.rang(self.now()).and_then(|client| self.processes.get_mut(&client))
                {
                    late.slept.note(false);
                }
            }
            Token::Conn(index) => {
                if let Some(Some(conn)) = self.conns.get_mut(index) {
                    if let Some(channel) = conn.channel.filter(|_| flags.contains(epoll::EventFlags::IN)) {
                        let traffic = if channel == PROMPT { Traffic::Small } else { Traffic::Bulk };
                        self.place.woken_by(conn.as_fd(), traffic, Instant::now());
                    }
                    let ends = epoll::EventFlags::HUP | epoll::EventFlags::ERR | epoll::EventFlags::RDHUP;
                    conn.readable |= flags.intersects(epoll::EventFlags::IN | ends);
                    conn.writable |= flags.intersects(epoll::EventFlags::OUT | ends);
                }
            }
            Token::Process(client) => {
                if let Some(process) = self.processes.get_mut(&client) {
                    // Each ring is told; the pipe is emptied before it is full.
                    process.rings += 1;
                    if process.rings == RINGS {
                        hush(&process.bell);
                        process.rings = 0;
                    }
                    process.doorbell[0].take_rung();
                    self.awake.push(client);
                }
            }
        }
    }

    /// Does what there is to do. True: there may be more.
    pub fn turn(&mut self) -> bool {
        let now = self.clock.turn(Instant::now());
        let mut more = self.submissions(now);
        for index in 0..self.conns.len() {
            more |= self.pull(index, now);
        }
        if let Some(delivered) = self.delivered.take() {
            if self.await_answer(delivered) {
                more |= self.submissions(now);
            } else {
                self.hold_for(delivered, now);
            }
        }
        self.retry_datagrams(now);
        // Behind what came, which may be what somebody waits for; before what goes out, which may be due now.
        self.fire(now);
        for index in 0..self.conns.len() {
            more |= self.push(index, now);
        }
        more || (!self.held_up.is_empty() && self.has_room())
    }

    /// Waits a moment for what a process will submit now that something was delivered to it, if that is its habit: the
    /// answer then needs no waking here, and travels with the acknowledgement. True: there is one.
    fn await_answer(&mut self, Delivered { client, woken, .. }: Delivered) -> bool {
        let Some(process) = self.processes.get_mut(&client) else { return false };
        if !process.spun.is_to_answer() {
            return false;
        }
        let doorbell = &process.doorbell[0];
        if !self.awake.contains(&client) {
            doorbell.disarm();
            self.awake.push(client);
        }
        let end = Instant::now() + if woken { WAKING } else { ANSWER };
        while !doorbell.marks.any() && Instant::now() < end {
            std::hint::spin_loop();
        }
        let answered = doorbell.marks.any();
        process.spun.note(answered);
        answered
    }

    /// Lets a process have the processor before what it got is acknowledged, if it answers then.
    fn hold_for(&mut self, Delivered { client, among_others, .. }: Delivered, now: Instant) {
        let Some(process) = self.processes.get_mut(&client) else { return };
        if !among_others && process.slept.is_to_answer() {
            self.hold.begin(client, now);
        } else {
            self.hold.end();
        }
    }

    /// Looks at what awake processes have submitted.
    fn submissions(&mut self, now: Instant) -> bool {
        let mut marked = Vec::new();
        let mut more = false;
        for client in std::mem::take(&mut self.held_up) {
            self.send_datagrams(client, now);
        }
        for at in 0..self.awake.len() {
            let client = self.awake[at];
            let Some(process) = self.processes.get_mut(&client) else { continue };
            let (mut datagrams, before) = (false, marked.len());
            process.doorbell[0].marks.drain(|bit| {
                marked.extend(process.marks.get(&bit).into_iter().flatten());
                datagrams |= process.datagrams.as_ref().is_some_and(|ring| ring.bit == bit);
            });
            if marked.len() > before && self.hold.answered(client) {
                process.slept.note(true);
            }
            if datagrams {
                more |= self.send_datagrams(client, now);
            }
        }
        for qpn in &marked {
            self.take(*qpn, now);
        }
        more || !marked.is_empty()
    }

    /// Takes what a queue pair has in its ring.
    pub fn take(&mut self, qpn: u32, now: Instant) {
        let Some(slot) = self.slots.get_mut(&qpn) else { return };
        if slot.endpoint.take_submissions(now) {
            self.busy.insert(qpn);
            self.line_up(qpn, now);
        }
        self.report(qpn);
    }

    /// Says to the process what has changed for its requests.
    pub fn report(&mut self, qpn: u32) {
        let Some(slot) = self.slots.get_mut(&qpn) else { return };
        let failed = slot.endpoint.report();
        if slot.endpoint.requester.is_idle() {
            self.busy.remove(&qpn);
        }
        if failed {
            self.tell(qpn, Notice::PeerProgress { qpn });
        }
    }

    /// Has the queue pair looked at again at `when`.
    pub fn remind(&mut self, qpn: u32, when: Instant) {
        self.timers.push(Reverse((when, qpn)));
    }

    fn fire(&mut self, now: Instant) {
        while let Some(Reverse((when, qpn))) = self.timers.peek().copied() {
            if when > now {
                break;
            }
            self.timers.pop();
            self.line_up(qpn, now);
        }
        if now >= self.next_tick() {
            self.tick(now);
            self.ticked = now;
        }
    }

    /// It comes nearer when something is owed, or a host is not reached yet.
    fn next_tick(&self) -> Instant {
        self.ticked + if self.busy.is_empty() && !self.reaching { CALM_TICK } else { TICK }
    }

    /// Before sleeping: whoever submits from now on rings. False: something came meanwhile.
    pub fn arm(&mut self) -> bool {
        let now = self.now();
        for client in &self.awake {
            self.processes.get(client).into_iter().for_each(|process| process.doorbell[0].arm_for_others());
        }
        if self.submissions(now) {
            return false;
        }
        self.awake.clear();
        true
    }

    /// How long nothing needs to be done; the thread sleeps so long at most.
    pub fn patience(&mut self) -> Duration {
        let patience = self.time_left(self.now());
        self.clock.sleep(patience);
        patience
    }

    fn time_left(&self, now: Instant) -> Duration {
        let tick = self.next_tick().saturating_duration_since(now);
        let tick =
            if self.targets.values().any(|target| !target.held.is_empty()) { tick.min(RETRY) } else { tick };
        let timer = self.timers.peek().map(|Reverse((when, _))| when.saturating_duration_since(now));
        timer.map_or(tick, |timer| timer.min(tick))
    }

    // ---- connections

    pub fn add(&mut self, conn: Conn) -> rustix::io::Result<usize> {
        let index = self.conns.iter().position(Option::is_none).unwrap_or(self.conns.len());
        let flags =
            epoll::EventFlags::IN | epoll::EventFlags::OUT | epoll::EventFlags::RDHUP | epoll::EventFlags::ET;
        epoll::add(&*self.epoll, conn.as_fd(), Token::Conn(index).data(), flags)?;
        if index == self.conns.len() {
            self.conns.push(None);
            self.lines.push(Line::default());
        }
        self.conns[index] = Some(conn);
        self.lines[index] = Line::default();
        Ok(index)
    }

    /// Takes a connection out, works on it, and puts it back unless that ended it.
    pub fn with_conn(
        &mut self,
        index: usize,
        work: impl FnOnce(&mut Self, &mut Conn) -> Result<bool, End>,
    ) -> bool {
        let Some(mut conn) = self.conns.get_mut(index).and_then(Option::take) else { return false };
        match work(self, &mut conn) {
            Ok(more) => {
                self.conns[index] = Some(conn);
                more
            }
            Err(end) => {
                self.lost(index, conn, &end);
                true
            }
        }
    }
}

/// A submission ring as it was checked.
pub fn submissions(ring: &FarRing) -> Option<Submissions<'_>> {
    Submissions::new(&ring.header[0], &ring.words, ring.stride)
}
