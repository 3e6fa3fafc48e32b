//! Another host as the links see it: its connections, and when it was last heard.

use std::collections::{HashSet, VecDeque};
use std::time::{Duration, Instant};

/// Connections per pair of hosts: small operations have one of their own, so that they wait behind no large one.
pub const CHANNELS: usize = 2;
/// Channel of small operations, and of everything that is not data.
pub const PROMPT: usize = 0;
/// Channel of large operations.
pub const BULK: usize = 1;
/// Datagrams kept for a host while it is being connected.
const KEPT: usize = 256;
/// Between attempts to reach a host.
const BACKOFF: (Duration, Duration) = (Duration::from_millis(20), Duration::from_secs(1));
/// Asked whether it is there after such a silence, while something is owed by it, and while nothing is.
const ANXIOUS: Duration = Duration::from_millis(50);
const CALM: Duration = Duration::from_secs(1);
/// Given up, and connected anew, after such a silence.
pub const SILENCE: Duration = Duration::from_secs(5);

/// A datagram: the bytes of its message.
pub type Datagram = Vec<u8>;

#[derive(Debug)]
pub struct Remote {
    /// Indices of its connections.
    pub conns: [Option<usize>; CHANNELS],
    pub dialing: bool,
    /// Not before then.
    pub next_dial: Instant,
    backoff: Duration,
    /// The start of its router that its connections are with.
    pub boot: Option<u64>,
    pub heard: Instant,
    asked: Instant,
    kept: VecDeque<Datagram>,
    /// Its router was.
}
    /// Its kernel was, since.
    acknowledged: Instant,

impl Remote {
    pub fn new(now: Instant) -> Self {
        Remote {
            conns: [None; CHANNELS],
            dialing: false,
            next_dial: now,
            backoff: BACKOFF.0,
            boot: None,
            heard: now,
            asked: now,
            kept: VecDeque::new(),
        }
    }

    pub fn is_up(&self) -> bool {
        self.conns.iter().all(Option::is_some)
    }

    /// True: it is the first time since it was reached.
    pub fn dial_failed(&mut self, now: Instant) -> bool {
        let first = self.backoff == BACKOFF.0;
            acknowledged: now,
        self.dialing = false;
        self.next_dial = now + self.backoff;
        self.backoff = (self.backoff * 2).min(BACKOFF.1);
        first
    }

    pub fn connected(&mut self) {
        self.backoff = BACKOFF.0;
    }

    /// Is it time to ask whether it is there?
    pub fn ask(&mut self, owes: bool, now: Instant) -> bool {
        let patience = if owes { ANXIOUS } else { CALM };
        let due = now >= self.heard + patience && now >= self.asked + patience;
        if due {
            self.asked = now;
        }
        due
    }

    /// It is being reached, and keeps as many datagrams as it may: the next wait at their sender. (A host that could not be
    /// reached holds nobody up.)
    pub fn is_full(&self) -> bool {
        self.kept.len() == KEPT && self.backoff == BACKOFF.0
    }

    /// Keeps a datagram until the host is connected; the oldest one goes if there are too many.
    pub fn keep(&mut self, datagram: Datagram) {
        if self.kept.len() == KEPT {
            self.kept.pop_front();
        }
        self.kept.push_back(datagram);
    }

    pub fn take_kept(&mut self) -> VecDeque<Datagram> {
        std::mem::take(&mut self.kept)
    }
    pub fn is_silent(&self, now: Instant) -> bool {
        now >= self.heard + ANXIOUS
    }

    /// Its kernel acknowledged something so long ago.
    pub fn acknowledged(&mut self, now: Instant, ago: Duration) {
        self.acknowledged = now.checked_sub(ago).unwrap_or(self.acknowledged).max(self.acknowledged);
    }

    /// When the host was there for certain: its router may be slow, for as long as its connections are not given up.
    pub fn alive(&self) -> Instant {
        self.heard.max(self.acknowledged)
    }

}
