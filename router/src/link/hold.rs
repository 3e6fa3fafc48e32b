//! Acknowledgements that are held back for an answer to travel with.
//!
//! A process that polls may wait for the very processor that this thread runs on. It can answer only when this thread sleeps, and an
//! acknowledgement sent before that costs a message, and the other host's router two switches, more than the answer itself. So a
//! process that answers at once, as a rule, gets the processor first. One timer says when that was too long; it is left to run out, because setting
//! it costs as much as the acknowledgement where the timer is a virtual machine's (two exits, 8 us each).

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::{Duration, Instant};

use rustix::event::Timespec;
use rustix::time::{Itimerspec, TimerfdClockId, TimerfdFlags, TimerfdTimerFlags};

/// An acknowledgement waits so long at least, and twice that at most.
const LONG: Duration = Duration::from_micros(250);

/// See the module.
#[derive(Debug)]
pub struct Hold {
    timer: OwnedFd,
    runs: bool,
    /// The process whose answer is waited for, and since when.
    waits: Option<(u32, Instant)>,
}

impl Hold {
    pub fn new() -> rustix::io::Result<Self> {
        let flags = TimerfdFlags::CLOEXEC | TimerfdFlags::NONBLOCK;
        let timer = rustix::time::timerfd_create(TimerfdClockId::Monotonic, flags)?;
        Ok(Hold { timer, runs: false, waits: None })
    }

    pub fn is_on(&self) -> bool {
        self.waits.is_some()
    }

    /// Waits for an answer of `client`. If another's is waited for already, neither is.
    pub fn begin(&mut self, client: u32, now: Instant) {
        self.waits = match self.waits {
            None => self.run().then_some((client, now)),
            waits => waits.filter(|(waited_for, _)| *waited_for == client),
        };
    }

    fn run(&mut self) -> bool {
        if !self.runs {
            let it_value = Timespec { tv_sec: 0, tv_nsec: LONG.subsec_nanos().into() };
            let once = Itimerspec { it_interval: Timespec::default(), it_value };
            self.runs = rustix::time::timerfd_settime(&self.timer, TimerfdTimerFlags::empty(), &once).is_ok();
        }
        self.runs
    }

    /// `client` has submitted something. True: it was waited for.
    pub fn answered(&mut self, client: u32) -> bool {
        self.waits.take_if(|(waited_for, _)| *waited_for == client).is_some()
    }

    /// Nothing is held back any longer.
    pub fn end(&mut self) {
        self.waits = None;
    }

    /// The timer has run out. Returns a process that did not answer in time.
    pub fn rang(&mut self, now: Instant) -> Option<u32> {
        self.runs = false;
        let (client, since) = self.waits?;
        if now < since + LONG && self.run() {
            return None;
        }
        self.waits = None;
        Some(client)
    }
}

impl AsFd for Hold {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.timer.as_fd()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustix::event::{PollFd, PollFlags, poll};

    #[test]
    fn who_answers_is_waited_for_and_who_does_not_is_found() {
        let (mut hold, now) = (Hold::new().expect("a timer"), Instant::now());
        hold.begin(1, now);
        assert!(hold.is_on() && !hold.answered(2) && hold.answered(1) && !hold.is_on());
        hold.begin(1, now);
        assert_eq!(hold.rang(now), None, "the timer was an earlier one's");
        assert!(hold.is_on());
        assert_eq!(hold.rang(now + LONG), Some(1));
        assert_eq!(hold.rang(now + LONG), None);
        hold.begin(1, now);
        hold.begin(1, now);
        assert!(hold.is_on());
        hold.begin(2, now);
        assert!(!hold.is_on(), "two processes do not wait for each other");
    }

    #[test]
    fn the_timer_wakes() {
        let mut hold = Hold::new().expect("a timer");
        hold.begin(1, Instant::now());
        poll(&mut [PollFd::new(&hold, PollFlags::IN)], None).expect("it rings");
        assert_eq!(hold.rang(Instant::now()), Some(1));
    }
}
