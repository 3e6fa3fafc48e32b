//! Another host as the links see it: its connections, and when it was last heard.

use std::collections::{HashSet, VecDeque};
use std::time::{Duration, Instant};

use super::meeting::Meeting;
use super::requester::Nonsense;
use super::words::Words;
use crate::directory::Tenant;

/// Datagrams kept for a host while it is being connected.
const KEPT: usize = 256;
/// Asked whether it is there after such a silence, while something is owed by it, and while nothing is.
const ANXIOUS: Duration = Duration::from_millis(50);
const CALM: Duration = Duration::from_secs(1);
/// It has so long to answer before requests fail.
const PATIENCE: Duration = Duration::from_millis(100);
/// Given up, and connected anew, after such a silence.
pub const SILENCE: Duration = Duration::from_secs(5);

/// A datagram: the bytes of its message.
pub type Datagram = Vec<u8>;

#[derive(Debug)]
pub struct Remote {
    /// Its connections.
    pub meeting: Meeting,
    /// The start of its router that its connections are with.
    pub boot: Option<u64>,
    /// Its router was.
    pub heard: Instant,
    /// Its kernel was, since.
    acknowledged: Instant,
    asked: Instant,
    /// The first time since it was heard.
    asked_first: Instant,
    kept: VecDeque<Datagram>,
    /// What connection managers say to each other.
    pub words: Words,
    /// It may have containers of a tenant of whose groups containers here are members.
    pub is_to_know: bool,
    /// Tenants of whose groups it was told since it was connected.
    pub told: HashSet<Tenant>,
    /// Numbers of the last `Member` that it was told, and of the last that it has heard.
    said: u32,
    known: u32,
    /// Members of groups that it has told of.
    pub members: usize,
}

impl Remote {
    pub fn new(now: Instant) -> Self {
        Remote {
            meeting: Meeting::new(now),
            boot: None,
            heard: now,
            acknowledged: now,
            asked: now,
            asked_first: now,
            kept: VecDeque::new(),
            words: Words::default(),
            is_to_know: false,
            told: HashSet::new(),
            said: 0,
            known: 0,
            members: 0,
        }
    }

    pub fn is_up(&self) -> bool {
        self.meeting.is_up()
    }

    /// Is there something for it that waits until it is connected?
    pub fn is_owed(&self) -> bool {
        !self.kept.is_empty() || self.words.are_unheard()
    }

    /// Is it time to ask whether it is there?
    pub fn ask(&mut self, owes: bool, now: Instant) -> bool {
        let patience = if owes { ANXIOUS } else { CALM };
        let due = now >= self.heard + patience && now >= self.asked + patience;
        if due {
            if self.asked <= self.alive() {
                self.asked_first = now;
            }
            self.asked = now;
        }
        due
    }

    /// Has it had time to say that it is there, since it was last heard? One that is not connected cannot be asked.
    pub fn was_asked(&self, now: Instant) -> bool {
        !self.is_up() || (self.asked > self.alive() && now >= self.asked_first + PATIENCE)
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

    /// It is being reached, and keeps as many datagrams as it may: the next wait at their sender. (A host that could not be
    /// reached holds nobody up.)
    pub fn is_full(&self) -> bool {
        self.kept.len() == KEPT && !self.meeting.has_failed()
    }

    /// The number of the next `Member`.
    pub fn next_said(&mut self) -> u32 {
        self.said = self.said.wrapping_add(1);
        self.said
    }

    pub fn knows(&mut self, seq: u32) -> Result<(), Nonsense> {
        if self.said.wrapping_sub(seq) > self.said.wrapping_sub(self.known) {
            return Err(Nonsense);
        }
        self.known = seq;
        Ok(())
    }

    /// Will it soon know of groups what it does not know yet? (A host that could not be reached may never.)
    pub fn is_to_learn(&self) -> bool {
        self.is_to_know && if self.is_up() { self.known != self.said } else { !self.meeting.has_failed() }
    }

    /// Keeps a datagram until the host is connected; the oldest one goes if there are too many.
    pub fn keep(&mut self, datagram: Datagram) {
        if self.kept.len() == KEPT {
            self.kept.pop_front();
        }
        self.kept.push_back(datagram);
    }

    /// What is to be sent now that it is connected.
    pub fn take_kept(&mut self) -> Vec<Vec<u8>> {
        self.words.unheard().chain(self.kept.drain(..)).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::super::meeting::Attempt;
    use super::super::wire::CHANNELS;
    use super::*;

    #[test]
    fn a_host_is_not_silent_before_it_was_asked() {
        let start = Instant::now();
        let at = |ms| start + Duration::from_millis(ms);
        let mut host = Remote::new(start);
        assert!(host.was_asked(at(0)), "it is not connected");
        for channel in 0..CHANNELS {
            host.meeting.greeted(channel, channel, Attempt::Theirs(1), true, start);
        }
        assert!(!host.was_asked(at(5000)), "it may have had nothing to say");
        assert!(
            !host.ask(true, at(49))
                && host.ask(true, at(50))
                && !host.ask(true, at(99))
                && host.ask(true, at(100))
        );
        assert!(!host.was_asked(at(149)) && host.was_asked(at(150)));
        host.acknowledged(at(160), Duration::from_millis(20));
        assert!(!host.was_asked(at(5000)), "its kernel was heard after that");
        assert!(host.ask(true, at(200)) && !host.was_asked(at(299)) && host.was_asked(at(300)));
    }
}
