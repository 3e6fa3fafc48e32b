//! Keys of the peer's that this end may use no more, because it told the peer to invalidate them.
//!
//! A SEND with invalidate is for the peer to carry out: it kills the key when it takes the message off its CQ, since only a
//! table's owner writes it. Until then this end remembers. Only a memory window of type 2 is invalidated so, and only the one
//! queue pair at this end could use it; its requests run one after the other, so nothing is under way under that key either.

use std::sync::{Mutex, MutexGuard, PoisonError};

use crate::ring::{MrEntry, mr::slot_of};

/// See the module.
#[derive(Debug, Default)]
pub struct Retired(Mutex<Vec<Binding>>);

/// A key, and which of the times that it was published.
type Binding = (u32, u32);

impl Retired {
    fn all(&self) -> MutexGuard<'_, Vec<Binding>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub fn has(&self, key: u32, epoch: u32) -> bool {
        self.all().contains(&(key, epoch))
    }

    /// Remembers one more, and forgets those that their owner has killed.
    pub fn add(&self, key: u32, epoch: u32, mrs: &[MrEntry]) {
        let lives = |(key, epoch): &Binding| {
            let entry = mrs.get(slot_of(*key)).and_then(|entry| entry.read(*key));
            entry.is_some_and(|view| view.epoch == *epoch)
        };
        let mut all = self.all();
        all.retain(lives);
        all.push((key, epoch));
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;
    use crate::ring::{MrView, mr::key_of};

    #[test]
    fn what_is_bound_anew_is_not_retired_and_what_is_dead_is_forgotten() {
        let mrs = [MrEntry::default(), MrEntry::default()];
        let (a, b) = (key_of(0, 0x101), key_of(1, 0x101));
        let bind = |key| mrs[slot_of(key)].publish(&MrView { key, ..MrView::default() });
        let retired = Retired::default();
        bind(a);
        retired.add(a, 1, &mrs);
        assert!(retired.has(a, 1));
        mrs[0].kill();
        bind(a);
        assert!(!retired.has(a, 2), "under the same key");
        bind(b);
        retired.add(b, 1, &mrs);
        assert_eq!(*retired.all(), [(b, 1)]);
    }
}
