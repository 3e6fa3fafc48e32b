//! The processor, offered to others by a thread that waits for another host by polling.
//!
//! Who yields gives up the rest of its time slice. Beside a program that computes that is milliseconds each time, although what is
//! waited for comes in microseconds: a thread that yields whenever it has polled in vain for some microseconds then gets next to nothing of the
//! processor, and one that never yields gets its share. So others are offered the processor at once, but when they have kept it for a
//! while twice in a row, this thread keeps it for as long as they did. Not after the first time: among others that wait for each other on this
//! processor one now and then has to give way to somebody else.

use std::cell::Cell;
use std::time::{Duration, Instant};

/// Others that are done sooner, a router or a program that answers, were waiting for just this processor. Who computes keeps it for a time slice
/// (Linux: 0.7 to 4 ms).
const BRIEF: Duration = Duration::from_micros(500);
/// A machine that stood still for longer owes this thread nothing.
const LONG: Duration = Duration::from_millis(20);

/// Whose turn it is.
#[derive(Debug, Clone, Copy)]
struct Turn {
    /// Until then it is this thread's.
    ours: Option<Instant>,
    /// Others kept it when it was last offered.
    kept: bool,
}

impl Turn {
    const fn new() -> Self {
        Turn { ours: None, kept: false }
    }

    fn is_ours(&self, now: Instant) -> bool {
        self.ours.is_some_and(|until| now < until)
    }

    /// Others had the processor, or nobody wanted it.
    fn others_had(&mut self, from: Instant, to: Instant) {
        let took = to.saturating_duration_since(from);
        let kept = took >= BRIEF;
        let again = std::mem::replace(&mut self.kept, kept);
        self.ours = (kept && again).then(|| to + took.min(LONG));
    }
}

thread_local! {
    static TURN: Cell<Turn> = const { Cell::new(Turn::new()) };
}

/// Lets others have the processor, if it is their turn.
pub fn offer_processor() {
    let (mut turn, before) = (TURN.get(), Instant::now());
    if turn.is_ours(before) {
        return;
    }
    std::thread::yield_now();
    turn.others_had(before, Instant::now());
    TURN.set(turn);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_others_kept_this_thread_keeps_as_long() {
        let start = Instant::now();
        let at = |us| start + Duration::from_micros(us);
        let mut turn = Turn::new();
        assert!(!turn.is_ours(at(0)));
        turn.others_had(at(0), at(499));
        assert!(!turn.is_ours(at(499)), "they were brief");
        turn.others_had(at(500), at(2500));
        assert!(!turn.is_ours(at(2500)), "once may be chance");
        turn.others_had(at(2600), at(4600));
        assert!(turn.is_ours(at(4600)) && turn.is_ours(at(6599)));
        assert!(!turn.is_ours(at(6600)), "now it is theirs again");
        turn.others_had(at(6600), at(8600));
        assert!(turn.is_ours(at(8600)), "as before");
        turn.others_had(at(10_600), at(10_601));
        assert!(!turn.is_ours(at(10_601)), "nobody wanted it");
        turn.others_had(at(20_000), at(22_000));
        turn.others_had(at(30_000), at(9_000_000));
        assert!(turn.is_ours(at(9_019_999)) && !turn.is_ours(at(9_020_000)), "the machine was stopped");
    }
}
