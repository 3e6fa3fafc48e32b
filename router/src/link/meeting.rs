//! Who dials whom, and which connections count when both did.
//!
//! Two routers that have something for each other at the same moment both dial, and their connections cross. An attempt is one
//! set of connections, which counts as a whole or not at all. While the host with the lower name dials, it refuses what the
//! other one dialed; and the other one gives up its own attempt, or whatever it still holds, for one of the lower name. Of two
//! attempts by the same host the later one counts: it would not have dialed with the first one in its hands.

use std::time::{Duration, Instant};

use super::wire::CHANNELS;

/// More than connecting to a host, and both greetings, may take.
const DIALING: Duration = Duration::from_secs(20);
/// Between attempts to reach a host.
const BACKOFF: (Duration, Duration) = (Duration::from_millis(20), Duration::from_secs(1));

/// The places of connections, by channel.
pub type Conns = [Option<usize>; CHANNELS];

/// Connections that belong together.
#[derive(Debug)]
struct Set {
    dialed_here: bool,
    /// Counted by the side that dials.
    attempt: u32,
    since: Instant,
    /// Those that both sides have greeted.
    conns: Conns,
}

/// What becomes of a connection that the other side has greeted.
#[derive(Debug, PartialEq, Eq)]
pub enum Greeted {
    /// It is one too many.
    Refused,
    /// It counts, and these do not any more.
    Counts { ended: Conns },
}

/// The connections to one host, or the attempt to make them.
#[derive(Debug)]
pub struct Meeting {
    set: Option<Set>,
    attempts: u32,
    next_dial: Instant,
    backoff: Duration,
}

impl Meeting {
    pub fn new(now: Instant) -> Self {
        Meeting { set: None, attempts: 0, next_dial: now, backoff: BACKOFF.0 }
    }

    /// Those that count.
    pub fn conns(&self) -> Conns {
        self.set.as_ref().map_or([None; CHANNELS], |set| set.conns)
    }

    /// The one of a channel, if all are there.
    pub fn conn(&self, channel: usize) -> Option<usize> {
        self.set.as_ref().filter(|set| set.is_whole())?.conns[channel]
    }

    /// All channels are there.
    pub fn is_up(&self) -> bool {
        self.set.as_ref().is_some_and(Set::is_whole)
    }

    /// The last attempt came to nothing.
    pub fn has_failed(&self) -> bool {
        self.backoff != BACKOFF.0
    }

    /// May the host be dialed now? Then it is, by the attempt of this number.
    pub fn dial(&mut self, now: Instant) -> Option<u32> {
        if self.set.is_some() || now < self.next_dial {
            return None;
        }
        self.attempts = self.attempts.wrapping_add(1);
        self.set = Some(Set::new(true, self.attempts, now));
        Some(self.attempts)
    }

    /// Is it still of use to go on with an attempt?
    pub fn is_dialing(&self, attempt: u32) -> bool {
        self.set.as_ref().is_some_and(|set| set.is(true, attempt))
    }

    /// The other side's first word came on a connection: of an attempt of its own, if none of ours. `lower`: this host has the
    /// lower name.
    pub fn greeted(
        &mut self,
        index: usize,
        channel: usize,
        of: Attempt,
        lower: bool,
        now: Instant,
    ) -> Greeted {
        let (dialed_here, attempt) = match of {
            Attempt::Ours(attempt) => (true, attempt),
            Attempt::Theirs(attempt) => (false, attempt),
        };
        let mut ended = [None; CHANNELS];
        if !self.set.as_ref().is_some_and(|set| set.is(dialed_here, attempt)) {
            let is_older = |set: &Set| set.attempt.wrapping_sub(attempt) < u32::MAX / 2;
            let stays = |set: &Set| if set.dialed_here { lower } else { is_older(set) };
            if dialed_here || self.set.as_ref().is_some_and(stays) {
                return Greeted::Refused;
            }
            ended = self.conns();
            self.set = Some(Set::new(false, attempt, now));
        }
        let Some(set) = &mut self.set else { return Greeted::Refused };
        if set.conns[channel].is_some() {
            return Greeted::Refused;
        }
        set.conns[channel] = Some(index);
        if set.is_whole() {
            (self.backoff, self.next_dial) = (BACKOFF.0, now);
        }
        Greeted::Counts { ended }
    }

    /// A connection ended. If it was one of the set, that has ended, too: returns what there is of it.
    pub fn lost(&mut self, index: usize, ours: Option<u32>, now: Instant) -> Option<Conns> {
        let set = self.set.as_ref()?;
        let was_in = set.conns.contains(&Some(index)) || ours.is_some_and(|attempt| set.is(true, attempt));
        was_in.then(|| self.end(now))
    }

    /// Ends an attempt of ours.
    pub fn dial_failed(&mut self, attempt: u32, now: Instant) -> Option<Conns> {
        self.is_dialing(attempt).then(|| self.end(now))
    }

    /// Ends an attempt that has taken too long.
    pub fn expire(&mut self, now: Instant) -> Option<Conns> {
        let late = self.set.as_ref().is_some_and(|set| !set.is_whole() && now >= set.since + DIALING);
        late.then(|| self.end(now))
    }

    /// Ends what there is.
    pub fn end(&mut self, now: Instant) -> Conns {
        let Some(set) = self.set.take() else { return [None; CHANNELS] };
        if !set.is_whole() {
            self.next_dial = now + self.backoff;
            self.backoff = (self.backoff * 2).min(BACKOFF.1);
        }
        set.conns
    }
}

/// The attempt that a connection is of.
#[derive(Debug, Clone, Copy)]
pub enum Attempt {
    Ours(u32),
    Theirs(u32),
}

impl Set {
    fn new(dialed_here: bool, attempt: u32, since: Instant) -> Self {
        Set { dialed_here, attempt, since, conns: [None; CHANNELS] }
    }

    fn is(&self, dialed_here: bool, attempt: u32) -> bool {
        (self.dialed_here, self.attempt) == (dialed_here, attempt)
    }

    fn is_whole(&self) -> bool {
        self.conns.iter().all(Option::is_some)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::VecDeque;

    /// A connection between side 0, which has the lower name, and side 1.
    struct Wire {
        dialer: usize,
        attempt: u32,
        channel: usize,
        open: [bool; 2],
        greeted: [bool; 2],
        /// On the way to each side.
        coming: [VecDeque<Word>; 2],
    }

    #[derive(Clone, Copy)]
    enum Word {
        Hello,
        End,
    }

    /// Two routers and the connections between them.
    struct World {
        sides: [Meeting; 2],
        wires: Vec<Wire>,
        /// Channels that are still to be dialed, in their order.
        dialing: [VecDeque<(u32, usize)>; 2],
        now: Instant,
    }

    impl World {
        fn new() -> Self {
            let now = Instant::now();
            let sides = [(); 2].map(|()| Meeting::new(now));
            World { sides, wires: vec![], dialing: Default::default(), now }
        }

        /// A side wants to reach the other.
        fn reach(&mut self, side: usize) {
            if let Some(ended) = self.sides[side].expire(self.now) {
                self.end(side, ended);
            }
            if let Some(attempt) = self.sides[side].dial(self.now) {
                self.dialing[side].extend((0..CHANNELS).map(|channel| (attempt, channel)));
            }
        }

        /// Its thread gets on with dialing.
        fn dial(&mut self, side: usize) -> bool {
            let Some((attempt, channel)) = self.dialing[side].pop_front() else { return false };
            if self.sides[side].is_dialing(attempt) {
                let coming =
                    if side == 0 { [vec![], vec![Word::Hello]] } else { [vec![Word::Hello], vec![]] };
                let coming = coming.map(VecDeque::from);
                let (open, greeted) = ([true; 2], [false; 2]);
                self.wires.push(Wire { dialer: side, attempt, channel, open, greeted, coming });
            }
            true
        }

        fn hang_up(&mut self, side: usize, index: usize) {
            let wire = &mut self.wires[index];
            if std::mem::replace(&mut wire.open[side], false) {
                wire.coming[side].clear();
                wire.coming[1 - side].push_back(Word::End);
            }
        }

        fn end(&mut self, side: usize, ended: Conns) {
            ended.into_iter().flatten().for_each(|index| self.hang_up(side, index));
            for index in 0..self.wires.len() {
                let wire = &self.wires[index];
                if wire.dialer == side && !self.sides[side].is_dialing(wire.attempt) {
                    self.hang_up(side, index);
                }
            }
        }

        /// The next word of a connection arrives.
        fn arrive(&mut self, side: usize, index: usize) -> bool {
            let wire = &mut self.wires[index];
            let Some(word) = wire.coming[side].pop_front() else { return false };
            if !wire.open[side] {
                return true;
            }
            let ours = (wire.dialer == side).then_some(wire.attempt);
            match word {
                Word::End => {
                    wire.open[side] = false;
                    if let Some(ended) = self.sides[side].lost(index, ours, self.now) {
                        self.end(side, ended);
                    }
                }
                Word::Hello => {
                    let of = ours.map_or(Attempt::Theirs(wire.attempt), Attempt::Ours);
                    match self.sides[side].greeted(index, wire.channel, of, side == 0, self.now) {
                        Greeted::Refused => {
                            self.hang_up(side, index);
                            if let Some(ended) = self.sides[side].lost(index, ours, self.now) {
                                self.end(side, ended);
                            }
                        }
                        Greeted::Counts { ended } => {
                            self.wires[index].greeted[side] = true;
                            if ours.is_none() {
                                self.wires[index].coming[1 - side].push_back(Word::Hello);
                            }
                            self.end(side, ended);
                        }
                    }
                }
            }
            true
        }

        /// Connections that count are open, and were greeted.
        fn check(&self) {
            for (side, meeting) in self.sides.iter().enumerate() {
                for index in meeting.conns().into_iter().flatten() {
                    assert!(self.wires[index].open[side] && self.wires[index].greeted[side]);
                }
            }
        }

        /// Everything that is on its way arrives, and both sides want to be connected.
        fn settle(&mut self) {
            for _ in 0..200 {
                let mut any = false;
                for side in 0..2 {
                    self.reach(side);
                    while self.dial(side) {}
                    any |= (0..self.wires.len()).any(|index| self.arrive(side, index));
                    self.check();
                }
                if !any && self.sides.iter().all(Meeting::is_up) {
                    return;
                }
                self.now += BACKOFF.0;
            }
            panic!("{:?} do not meet", self.sides);
        }
    }

    proptest! {
        #[test]
        fn whatever_crosses_they_meet(steps in prop::collection::vec((0u8..8, 0usize..2, any::<prop::sample::Index>()), 0..80)) {
            let mut world = World::new();
            for (step, side, which) in steps {
                let some = (!world.wires.is_empty()).then(|| which.index(world.wires.len()));
                match (step, some) {
                    (0, _) => world.reach(side),
                    (1, _) => _ = world.dial(side),
                    (2, _) => world.now += BACKOFF.0,
                    (3, Some(index)) if which.index(4) == 0 => {
                        // The network ends it: both sides will hear.
                        world.wires[index].coming.iter_mut().for_each(|coming| coming.push_back(Word::End));
                    }
                    (_, Some(index)) => _ = world.arrive(side, index),
                    _ => {}
                }
                world.check();
            }
            world.settle();
            let [here, there] = &world.sides;
            prop_assert_eq!(here.conns(), there.conns());
            let open = world.wires.iter().filter(|wire| wire.open.contains(&true)).count();
            prop_assert_eq!(open, CHANNELS, "nothing else stays open");
        }
    }

    #[test]
    fn a_host_is_dialed_once_at_a_time() {
        let start = Instant::now();
        let mut host = Meeting::new(start);
        assert_eq!(host.dial(start), Some(1));
        assert_eq!((host.dial(start + DIALING / 2), host.expire(start + DIALING / 2)), (None, None));
        assert!(host.expire(start + DIALING).is_some() && host.has_failed());
        assert_eq!(host.dial(start + DIALING), None);
        assert_eq!(host.dial(start + DIALING + BACKOFF.0), Some(2));
        assert!(host.dial_failed(1, start + DIALING).is_none(), "that is over");
    }

    #[test]
    fn the_lower_name_counts_when_both_dial() {
        let now = Instant::now();
        for lower in [true, false] {
            let mut host = Meeting::new(now);
            assert_eq!(host.dial(now), Some(1));
            let said = host.greeted(7, 0, Attempt::Theirs(1), lower, now);
            assert_eq!(said == Greeted::Refused, lower);
            assert_eq!(host.is_dialing(1), lower);
        }
    }

    #[test]
    fn a_later_attempt_takes_the_place_of_an_earlier_one() {
        let now = Instant::now();
        let mut host = Meeting::new(now);
        for channel in 0..CHANNELS {
            host.greeted(channel, channel, Attempt::Theirs(5), true, now);
        }
        assert!(host.is_up());
        assert_eq!(host.greeted(9, 0, Attempt::Theirs(4), true, now), Greeted::Refused);
        let said = host.greeted(9, 0, Attempt::Theirs(6), true, now);
        assert_eq!(said, Greeted::Counts { ended: [Some(0), Some(1)] });
        assert!(!host.is_up());
        assert_eq!(host.greeted(10, 0, Attempt::Theirs(6), true, now), Greeted::Refused, "a channel has one");
    }
}
