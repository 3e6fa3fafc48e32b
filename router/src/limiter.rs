//! A token bucket, for failures and log lines that a container can cause at will.
//!
//! Owns the arithmetic; time is an argument.

use std::time::{Duration, Instant};

/// `burst` at once, then `per_second`.
#[derive(Debug, Clone)]
pub struct Limiter {
    tokens: f64,
    burst: f64,
    per_second: f64,
    last: Option<Instant>,
    /// Calls refused since the last one that passed.
    pub suppressed: u64,
}

impl Limiter {
    pub fn new(burst: u32, per_second: u32) -> Self {
        Limiter {
            tokens: burst.into(),
            burst: burst.into(),
            per_second: per_second.into(),
            last: None,
            suppressed: 0,
        }
    }

    fn refill(&mut self, now: Instant) {
        let passed = self.last.map_or(Duration::ZERO, |last| now.saturating_duration_since(last));
        self.last = Some(now);
        self.tokens = (self.tokens + passed.as_secs_f64() * self.per_second).min(self.burst);
    }

    /// Is there a token? Takes none.
    pub fn open(&mut self, now: Instant) -> bool {
        self.refill(now);
        self.tokens >= 1.0
    }

    /// Takes a token; `Some(n)` when there was one, `n` being how many calls were refused before it.
    pub fn pass(&mut self, now: Instant) -> Option<u64> {
        if !self.open(now) {
            self.suppressed += 1;
            return None;
        }
        self.tokens -= 1.0;
        Some(std::mem::take(&mut self.suppressed))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_burst_then_a_rate() {
        let start = Instant::now();
        let mut limiter = Limiter::new(3, 2);
        let passed = (0..10).filter(|_| limiter.pass(start).is_some()).count();
        assert_eq!((passed, limiter.suppressed), (3, 7));
        assert!(!limiter.open(start + Duration::from_millis(400)));
        assert_eq!(limiter.pass(start + Duration::from_millis(500)), Some(7));
        assert_eq!(limiter.pass(start + Duration::from_millis(500)), None);
        let later = start + Duration::from_secs(100);
        assert_eq!((0..10).filter(|_| limiter.pass(later).is_some()).count(), 3, "no more than the burst");
    }
}
