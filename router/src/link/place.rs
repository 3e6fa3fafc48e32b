//! Where the link's thread runs: for small messages at the processor that receives the packets which wake it, for bulk at another.
//!
//! Waking a thread on another processor takes an interrupt there. In a virtual machine that is two exits to its host, some 14 us, of
//! which the waker pays ten: more than everything else that a small message needs. The scheduler does not mend that: a thread that goes
//! to sleep where a program spins stays with that processor for a while (Linux 6.12: it is dequeued when its lag is paid), so
//! one that is woken often is woken there for ever. With bulk it is the other way round: packets are taken in by one processor while
//! another copies what they brought, but who is woken by packets is woken where they come in. So the thread looks where that is
//! (SO_INCOMING_CPU, socket(7)), and goes there, or away, when it finds itself wrong some times in a row.

use std::os::fd::BorrowedFd;
use std::time::{Duration, Instant};

use rustix::net::sockopt::socket_incoming_cpu;
use rustix::thread::{CpuSet, sched_getaffinity, sched_getcpu, sched_setaffinity};

/// One wake in so many is looked at: asking costs a system call.
const LOOK: u32 = 8;
/// So many looks in a row must find it wrong.
const LOOKS: u32 = 4;

/// What a connection brings.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Traffic {
    #[default]
    Small,
    Bulk,
}

impl Traffic {
    /// Moving costs some 20 us. Two routers that share processors and both get bulk may run after each other.
    fn rest(self) -> Duration {
        match self {
            Traffic::Small => Duration::from_millis(1),
            Traffic::Bulk => Duration::from_millis(50),
        }
    }
}

/// See the module.
#[derive(Debug, Default)]
pub struct Place {
    wakes: u32,
    traffic: Traffic,
    wrong: u32,
    moved: Option<Instant>,
    /// The processors that it may use, while it keeps off one of them.
    allowed: Option<CpuSet>,
}

impl Place {
    /// This thread was woken by `socket`.
    pub fn woken_by(&mut self, socket: BorrowedFd<'_>, traffic: Traffic, now: Instant) {
        self.wakes = self.wakes.wrapping_add(1);
        if !self.wakes.is_multiple_of(LOOK) {
            return;
        }
        let Ok(there) = socket_incoming_cpu(socket).map(|cpu| cpu as usize) else { return };
        if there < CpuSet::MAX_CPU && self.is_wrong(traffic, sched_getcpu(), there, now) {
            // Where it may not go it stays.
            let _ = match traffic {
                Traffic::Small => self.go_to(there),
                Traffic::Bulk => self.leave(there),
            };
        }
    }

    fn is_wrong(&mut self, traffic: Traffic, here: usize, there: usize, now: Instant) -> bool {
        let wrong = (here == there) == (traffic == Traffic::Bulk);
        let again = wrong && std::mem::replace(&mut self.traffic, traffic) == traffic;
        self.wrong = if again { self.wrong + 1 } else { u32::from(wrong) };
        let move_now = self.wrong >= LOOKS && self.moved.is_none_or(|then| now >= then + traffic.rest());
        if move_now {
            (self.wrong, self.moved) = (0, Some(now));
        }
        move_now
    }

    /// Moves this thread to a processor. The scheduler may move it on.
    fn go_to(&mut self, cpu: usize) -> rustix::io::Result<()> {
        let allowed = self.allowed()?;
        let mut one = CpuSet::new();
        one.set(cpu);
        if allowed.is_set(cpu) {
            sched_setaffinity(None, &one)?;
        }
        sched_setaffinity(None, &allowed)?;
        self.allowed = None;
        Ok(())
    }

    /// Keeps this thread off a processor, if it has others.
    fn leave(&mut self, cpu: usize) -> rustix::io::Result<()> {
        let allowed = self.allowed()?;
        let mut others = allowed;
        others.unset(cpu);
        if others.count() > 0 {
            sched_setaffinity(None, &others)?;
            self.allowed = Some(allowed);
        }
        Ok(())
    }

    fn allowed(&self) -> rustix::io::Result<CpuSet> {
        self.allowed.map_or_else(|| sched_getaffinity(None), Ok)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SMALL: Traffic = Traffic::Small;
    const BULK: Traffic = Traffic::Bulk;

    #[test]
    fn packets_that_keep_coming_from_elsewhere_are_followed() {
        let (mut place, now) = (Place::default(), Instant::now());
        let mut wrong =
            |traffic, here, there, ms| place.is_wrong(traffic, here, there, now + Duration::from_millis(ms));
        assert!((1..LOOKS).all(|_| !wrong(SMALL, 0, 1, 0)), "a few may be chance");
        assert!(!wrong(SMALL, 0, 0, 0), "one from here");
        assert!((1..LOOKS).all(|_| !wrong(SMALL, 0, 1, 0)), "begins anew");
        assert!(wrong(SMALL, 0, 1, 0));
        assert!((0..2 * LOOKS).all(|_| !wrong(SMALL, 1, 0, 0)), "moving has its price");
        assert!(wrong(SMALL, 1, 0, 1));
    }

    #[test]
    fn bulk_is_avoided_and_a_mixture_is_neither() {
        let (mut place, now) = (Place::default(), Instant::now());
        assert!((0..2 * LOOKS).all(|_| !place.is_wrong(BULK, 0, 1, now)));
        assert!((1..LOOKS).all(|_| !place.is_wrong(BULK, 0, 0, now)));
        assert!(place.is_wrong(BULK, 0, 0, now));
        let later = now + BULK.rest();
        let mixed = |_| place.is_wrong(BULK, 0, 0, later) || place.is_wrong(SMALL, 0, 1, later);
        assert!(!(0..2 * LOOKS).any(mixed));
    }

    #[test]
    fn a_thread_that_moved_may_run_where_it_might_before() {
        let all = sched_getaffinity(None).expect("always readable");
        let mut place = Place::default();
        for cpu in (0..CpuSet::MAX_CPU).step_by(7) {
            place.go_to(cpu).expect("a processor that is allowed, or nothing happens");
            assert_eq!(sched_getaffinity(None).expect("always readable"), all);
            place.leave(cpu).expect("others, or nothing happens");
            let left = sched_getaffinity(None).expect("always readable");
            assert!(left == all || !left.is_set(cpu));
        }
        place.go_to(0).expect("back");
        assert_eq!(sched_getaffinity(None).expect("always readable"), all);
    }
}
