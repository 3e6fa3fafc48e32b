//! Does a process answer at once what is delivered to it? Waiting for one that does not costs time, so that is found out seldom.

/// Deliveries, as a power of two, that pass at most before the next is waited for, of a process that does not answer.
const RELUCTANCE: u32 = 10;
/// Deliveries that somebody unproven gets before the first is waited for.
const UNPROVEN: u32 = 32;

/// See the module.
#[derive(Debug, Default)]
pub struct Habit {
    /// Answers that were waited for in vain, in a row.
    missed: u32,
    /// Deliveries not to be waited for.
    pass: u32,
}

impl Habit {
    /// Of a process that must get a few deliveries before anything depends on its answer.
    pub fn unproven() -> Self {
        Habit { missed: 0, pass: UNPROVEN }
    }

    /// Is the next delivery's answer to be waited for?
    pub fn is_to_answer(&mut self) -> bool {
        let passed = self.pass > 0;
        self.pass = self.pass.saturating_sub(1);
        !passed
    }

    pub fn note(&mut self, answered: bool) {
        self.missed = if answered { 0 } else { (self.missed + 1).min(RELUCTANCE) };
        self.pass = (1 << self.missed) - 1;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_never_answers_is_waited_for_ever_less() {
        let mut habit = Habit::unproven();
        let mut waited = Vec::new();
        for delivery in 0..5000 {
            if habit.is_to_answer() {
                waited.push(delivery);
                habit.note(false);
            }
        }
        assert_eq!(waited[..4], [32, 34, 38, 46]);
        assert_eq!(waited.last().map(|last| last - waited[waited.len() - 2]), Some(1 << RELUCTANCE));
        habit.note(true);
        assert!(habit.is_to_answer(), "one answer is enough to be trusted again");
    }
}
