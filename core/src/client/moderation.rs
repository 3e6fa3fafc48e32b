//! Events of CQs that come less often than completions: ibv_modify_cq(3).
//!
//! Completers count (`ring::cq`), but cannot wait for time to pass. So the helper thread hears the bell of a channel with such a CQ:
//! it tells the program at once of an event that is due, and after the CQ's period of one for which there are too few completions.

use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::time::{Duration, Instant};

use super::channel::Channel;

/// How rare a CQ's events are.
#[derive(Debug, Default)]
pub struct Moderation {
    /// How long an event waits for more completions; zero: for ever.
    pub period: Duration,
    /// The end of that for the event that is held back.
    pub until: Option<Instant>,
}

impl Moderation {
    /// An event is held back at `now`: until when?
    pub fn hold(&mut self, now: Instant) -> Option<Instant> {
        if self.until.is_none() && !self.period.is_zero() {
            self.until = Some(now + self.period);
        }
        self.until
    }
}

/// A channel with a moderated CQ.
#[derive(Debug)]
struct Moderated {
    heard: Arc<OwnedFd>,
    channel: Weak<Channel>,
}

/// Those of a context.
#[derive(Debug, Default)]
pub struct ModeratedChannels(Mutex<Vec<Moderated>>);

impl ModeratedChannels {
    pub fn add(&self, heard: &Arc<OwnedFd>, channel: Weak<Channel>) {
        let heard = Arc::clone(heard);
        self.0.lock().unwrap_or_else(PoisonError::into_inner).push(Moderated { heard, channel });
    }

    /// Helper: the bells to hear. A channel is not kept alive by that.
    pub fn bells(&self) -> Vec<Arc<OwnedFd>> {
        let mut list = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        list.retain(|moderated| moderated.channel.strong_count() > 0);
        list.iter().map(|moderated| Arc::clone(&moderated.heard)).collect()
    }

    /// Helper: passes events on; returns how long until it has to again.
    pub fn pass_on(&self) -> Option<Duration> {
        let channels: Vec<Arc<Channel>> = {
            let list = self.0.lock().unwrap_or_else(PoisonError::into_inner);
            list.iter().filter_map(|moderated| moderated.channel.upgrade()).collect()
        };
        let now = Instant::now();
        let next = channels.iter().filter_map(|channel| channel.pass_on(now)).min();
        next.map(|next| next.saturating_duration_since(now))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_event_waits_from_when_it_was_held_first() {
        let (start, period) = (Instant::now(), Duration::from_micros(7));
        let mut moderation = Moderation { period, until: None };
        assert_eq!(moderation.hold(start), Some(start + period));
        assert_eq!(moderation.hold(start + period * 9), Some(start + period));
        assert_eq!(Moderation::default().hold(start), None, "for ever");
    }
}
