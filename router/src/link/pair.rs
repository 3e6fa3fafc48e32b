//! Two hosts and a network that delivers, delays and cuts in any order: whatever happens, requests are carried out, each once.
//!
//! The engines are the real ones, without their threads; the network is this test, byte by byte.

use std::collections::VecDeque;
use std::io::{ErrorKind, Read as _, Write as _};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::time::Duration;

use freeflow_core::ring::Wqe;
use freeflow_core::verbs::{QpType, SendOp};
use proptest::prelude::*;
use rustix::event::{PollFd, PollFlags, Timespec, poll};

use super::engine::Most;
use super::testing::{DEPTH, FILE, Host, KEY, PAGE, wire};
use super::wire::CHANNELS;
use crate::cluster::Stream;

const NAMES: [&str; 2] = ["h1", "h2"];
const ADDRESSES: [[u8; 4]; 2] = [[10, 0, 0, 1], [10, 0, 0, 2]];
/// In each host's memory: what is read and sent, where answers come, where the other side writes, and counts.
const SOURCE: u64 = PAGE;
const ANSWERS: u64 = 8 * PAGE;
const WRITTEN: u64 = 16 * PAGE;
const COUNTER: u64 = 24 * PAGE;
const COUNTS: u64 = 25 * PAGE;
const AREA: u64 = 7 * PAGE;
/// Large requests in many pieces, of which few are under way when a connection is cut; in some; and in one, as usual.
const SIZES: [Most; 3] =
    [Most { piece: 1000, waiting: 1 }, Most { piece: 10_000, waiting: 12_000 }, Most::USUAL];
/// What passes when nothing moves.
const PAUSE: Duration = Duration::from_millis(20);

/// A connection: each host's end of it until that takes it, the network's, and what that has in its hands for each.
struct Wire {
    dialed: (usize, u32, usize),
    new: [Option<Stream>; 2],
    ends: [UnixStream; 2],
    held: [VecDeque<u8>; 2],
}

impl Wire {
    /// Hands on up to `most` bytes to a side, or that the other one hung up.
    fn carry(&mut self, to: usize, most: usize) -> bool {
        let mut bytes = vec![0; most];
        let came = match self.ends[1 - to].read(&mut bytes) {
            Ok(0) => None,
            Ok(came) => Some(came),
            Err(e) if e.kind() == ErrorKind::WouldBlock => Some(0),
            Err(_) => None, // it hung up with unread bytes
        };
        self.held[to].extend(&bytes[..came.unwrap_or(0)]);
        let sent = self.ends[to].write(self.held[to].make_contiguous()).unwrap_or(0);
        self.held[to].drain(..sent);
        if came.is_none() && self.held[to].is_empty() {
            let _ = self.ends[to].shutdown(Shutdown::Both); // it may have hung up, too
        }
        came.is_some_and(|came| came > 0) || sent > 0
    }

    fn cut(&self) {
        self.ends.iter().for_each(|end| _ = end.shutdown(Shutdown::Both)); // cut already
    }
}

struct Pair {
    hosts: [Host; 2],
    wires: Vec<Wire>,
    /// Attempts, and the channels that are still to be dialed.
    dialing: [VecDeque<(u32, usize)>; 2],
    posted: [Vec<Wqe>; 2],
    /// Words of connection managers: how many each side has said, and those that it heard.
    said: [u8; 2],
    heard: [Vec<u8>; 2],
}

fn pattern(side: usize) -> Vec<u8> {
    (0..AREA).map(|at| (at as u8).wrapping_mul(7) ^ (side as u8 + 1)).collect()
}

impl Pair {
    fn new(most: Most) -> Self {
        let mut hosts = [0, 1].map(|side| Host::new(NAMES[side], ADDRESSES[side], QpType::Rc));
        let numbers = [hosts[0].qpn, hosts[1].qpn];
        for (side, host) in hosts.iter_mut().enumerate() {
            assert_eq!(
                rustix::io::pwrite(&host.file, &pattern(side), SOURCE).expect("pwrite"),
                AREA as usize
            );
            host.engine.most = most;
            host.connect(NAMES[1 - side], ADDRESSES[1 - side], numbers[1 - side]);
        }
        let (dialing, posted, heard) = Default::default();
        Pair { hosts, wires: vec![], dialing, posted, said: [0; 2], heard }
    }

    fn post(&mut self, side: usize, choice: u16) {
        let nth = self.posted[side].len() as u64;
        if nth == u64::from(DEPTH) {
            return;
        }
        let total = u32::from(choice) % AREA as u32;
        let (op, total, addr, at) = match choice % 3 {
            0 => (SendOp::Write, total, WRITTEN, SOURCE),
            1 => (SendOp::Read, total, SOURCE, ANSWERS),
            _ => (SendOp::FetchAdd, 8, COUNTER, COUNTS + nth * 8),
        };
        let wqe = Wqe { op: op as u8, total, addr, rkey: KEY, compare_add: 1, ..Wqe::default() };
        self.hosts[side].post(&wqe, at);
        self.posted[side].push(wqe);
    }

    fn say(&mut self, side: usize) {
        self.hosts[side].engine.send_cm(&NAMES[1 - side].into(), &[self.said[side]]);
        self.said[side] = self.said[side].saturating_add(1);
    }

    fn turn(&mut self, side: usize) -> bool {
        let host = &mut self.hosts[side];
        let moved = host.note() | host.engine.turn();
        for (_, attempt) in std::mem::take(&mut host.engine.to_dial) {
            self.dialing[side].extend((0..CHANNELS).map(|channel| (attempt, channel)));
        }
        self.heard[side].extend(host.engine.cm_inbox.drain(..).flat_map(|(_, word)| word));
        moved
    }

    /// Connects the next channel that a side dials; each engine is told in a step of its own.
    fn dial(&mut self, side: usize) -> bool {
        let Some((attempt, channel)) = self.dialing[side].pop_front() else { return false };
        let (streams, ends): (Vec<_>, Vec<_>) = [1, 0].map(|peer| wire(NAMES[peer])).into_iter().unzip();
        let new = <[Stream; 2]>::try_from(streams).expect("two").map(Some);
        let ends = ends.try_into().expect("two");
        self.wires.push(Wire { dialed: (side, attempt, channel), new, ends, held: Default::default() });
        true
    }

    /// A side takes its end of a connection.
    fn take(&mut self, side: usize, which: usize) -> bool {
        let wire = &mut self.wires[which];
        let Some(stream) = wire.new[side].take() else { return false };
        let (dialer, attempt, channel) = wire.dialed;
        let engine = &mut self.hosts[side].engine;
        match dialer == side {
            true => engine.dialed(stream, &NAMES[1 - side].into(), attempt, channel),
            false => engine.accepted(stream),
        }
        true
    }

    fn cut(&mut self) {
        self.wires.iter().for_each(Wire::cut);
    }

    fn pass(&mut self, side: usize) {
        self.hosts[side].engine.pass(PAUSE);
    }

    fn step(&mut self, (kind, side, choice): (u8, usize, u16)) {
        // One of the latest connections: those before have ended, or soon will.
        let latest = self.wires.len().min(2 * CHANNELS);
        let which = (latest > 0).then(|| self.wires.len() - 1 - usize::from(choice) % latest);
        match (kind, which) {
            (0..8, _) => _ = self.turn(side),
            (8..10, _) => _ = self.dial(side),
            (10..13, Some(which)) => _ = self.take(side, which),
            (13..18, Some(which)) => _ = self.wires[which].carry(side, usize::from(choice) + 1),
            (18, Some(which)) => _ = self.wires[which].carry(side, usize::from(choice % 200) + 1),
            (19 | 20, _) => self.post(side, choice),
            (21, _) => self.pass(side),
            (22, _) => self.say(side),
            (23, Some(_)) if choice % 16 == 0 => self.cut(),
            _ => {}
        }
    }

    /// Is everything done that was asked for?
    fn is_done(&self) -> bool {
        let heard = [0, 1].map(|side| self.heard[1 - side].len() == usize::from(self.said[side]));
        heard == [true; 2] && self.are_carried_out()
    }

    fn are_carried_out(&self) -> bool {
        self.hosts.iter().zip(&self.posted).all(|(host, posted)| {
            let (done, well) = host.done();
            assert!(well, "a request failed after {done}");
            done as usize == posted.len()
        })
    }

    /// Nothing is held up any longer: everything comes to its end, within some seconds of the engines' time.
    fn settle(&mut self) {
        let mut pauses = 0;
        for _ in 0..5000 {
            let mut moved = false;
            for side in 0..2 {
                moved |= self.dial(side);
                for which in 0..self.wires.len() {
                    moved |= self.take(side, which) | self.wires[which].carry(side, 1 << 16);
                }
                moved |= self.turn(side);
            }
            if self.is_done() {
                return;
            }
            if !moved {
                pauses += 1;
                if pauses == 500 {
                    break;
                }
                (0..2).for_each(|side| self.pass(side));
                self.wait();
            }
        }
        let done: Vec<_> = self.hosts.iter().map(Host::done).collect();
        panic!("stands still: {done:?} of {:?}, {:?} of {:?} heard", self.posted, self.heard, self.said);
    }

    /// For a timer of the system's, which is no longer than that.
    fn wait(&self) {
        let mut fds = [0, 1].map(|side| PollFd::new(&*self.hosts[side].engine.epoll, PollFlags::IN));
        let most = Timespec { tv_sec: 0, tv_nsec: 1_000_000 };
        poll(&mut fds, Some(&most)).expect("poll");
    }

    /// What was written is there, what was read is here, and each atomic was carried out, and each word heard, once and in order.
    fn check(&self) {
        for (side, posted) in self.posted.iter().enumerate() {
            let (here, there) = (&self.hosts[side], &self.hosts[1 - side]);
            let most = |op: SendOp| {
                let totals = posted.iter().filter(|wqe| wqe.op == op as u8).map(|wqe| wqe.total as usize);
                totals.max().unwrap_or(0)
            };
            let (written, read) = (most(SendOp::Write), most(SendOp::Read));
            assert_eq!(there.memory(WRITTEN, written), pattern(side)[..written]);
            assert_eq!(here.memory(ANSWERS, read), pattern(1 - side)[..read]);
            let counts = posted.iter().enumerate().filter(|(_, wqe)| wqe.op == SendOp::FetchAdd as u8);
            let counted = counts.map(|(nth, _)| here.memory(COUNTS + nth as u64 * 8, 8)).zip(0u64..);
            let last = counted.inspect(|(was, count)| assert_eq!(*was, count.to_ne_bytes())).count();
            assert_eq!(there.memory(COUNTER, 8), (last as u64).to_ne_bytes());
            assert_eq!(self.heard[1 - side], (0..self.said[side]).collect::<Vec<u8>>());
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(1000))]

    #[test]
    fn whatever_the_network_does_all_is_carried_out_once(
        most in prop::sample::select(&SIZES),
        steps in prop::collection::vec((0u8..24, 0usize..2, any::<u16>()), 0..1500),
    ) {
        const { assert!(COUNTS + DEPTH as u64 * 8 <= FILE && ANSWERS + AREA <= WRITTEN) };
        let mut pair = Pair::new(most);
        steps.into_iter().for_each(|step| pair.step(step));
        pair.settle();
        pair.check();
    }
}
