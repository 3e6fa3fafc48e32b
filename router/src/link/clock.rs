//! The time that counts against others: what passes while this router does not run is nobody's silence.
//!
//! A router without a processor for a second finds, when it runs again, that a timer is over and that its sockets were not
//! read since. So this clock advances by no more than what its thread meant to sleep, and a little: before much of it can have
//! passed, the sockets were read many times.

use std::time::{Duration, Instant};

/// So much later than it was meant to be a turn may be, and still counts whole.
const LATE: Duration = Duration::from_millis(20);

/// See the module. Its instants are compared with its own only.
#[derive(Debug)]
pub struct Clock {
    /// Of the last turn, by the system's clock and by this one.
    looked: Instant,
    now: Instant,
    /// How long the thread means to sleep since.
    sleep: Duration,
}

impl Clock {
    pub fn new(system: Instant) -> Self {
        Clock { looked: system, now: system, sleep: Duration::ZERO }
    }

    pub fn now(&self, system: Instant) -> Instant {
        self.now + system.saturating_duration_since(self.looked).min(self.sleep + LATE)
    }

    /// A turn begins.
    pub fn turn(&mut self, system: Instant) -> Instant {
        self.now = self.now(system);
        (self.looked, self.sleep) = (system, Duration::ZERO);
        self.now
    }

    /// So much later it is, for a test that does not wait.
    #[cfg(test)]
    pub fn pass(&mut self, time: Duration) {
        self.now += time;
    }

    /// The thread means to sleep so long.
    pub fn sleep(&mut self, meant: Duration) {
        self.sleep = meant;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn time_without_a_processor_does_not_count() {
        let start = Instant::now();
        let at = |ms| start + Duration::from_millis(ms);
        let mut clock = Clock::new(start);
        assert_eq!(clock.turn(at(5)), at(5));
        clock.sleep(Duration::from_millis(20));
        assert_eq!(clock.now(at(30)), at(30), "a little late");
        assert_eq!(clock.turn(at(5005)), at(45), "it was to sleep until 25 and came five seconds later");
        assert_eq!(clock.now(at(5007)), at(47));
        clock.sleep(Duration::from_secs(1));
        assert_eq!(clock.turn(at(6005)), at(1045), "it slept for as long as it meant to");
    }
}
