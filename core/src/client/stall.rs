//! Send queues that wait: for a receive, for the peer, or for their turn in a large copy.
//!
//! Whoever polls moves them on; the helper thread does it for programs that sleep.

use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::Instant;

use arrayvec::ArrayVec;

use super::qp::Qp;

/// Why the head of a send queue does not move.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stall {
    /// Nothing waits.
    None,
    /// More bytes to copy.
    More,
    /// No receive is posted; give up at the deadline.
    Rnr { deadline: Option<Instant> },
    /// The peer does not answer; give up at the deadline.
    Absent { deadline: Option<Instant> },
    /// The router is needed, and away, or the peer has not come back to it: they say when they are there.
    Later,
}

/// The stalled send queues of a context.
#[derive(Debug, Default)]
pub struct Stalled {
    count: AtomicUsize,
    generation: AtomicUsize,
    /// The program polled since the helper last looked.
    polled: AtomicBool,
    /// Where the next poll begins, when there are more than it takes.
    turn: AtomicUsize,
    list: Mutex<Vec<Weak<Qp>>>,
}

/// Queues that one poll moves on.
const BATCH: usize = 16;

impl Stalled {
    /// Does any queue wait? One load: asked by every poll.
    pub fn any(&self) -> bool {
        self.count.load(Ordering::Relaxed) != 0
    }

    /// The caller has just marked the QP as listed.
    pub fn add(&self, qp: &Arc<Qp>) {
        let mut list = self.list.lock().unwrap_or_else(PoisonError::into_inner);
        list.push(Arc::downgrade(qp));
        self.count.store(list.len(), Ordering::Relaxed);
        self.generation.fetch_add(1, Ordering::SeqCst);
    }

    /// Changes with every [`Stalled::add`].
    pub fn generation(&self) -> usize {
        self.generation.load(Ordering::SeqCst)
    }

    /// The program polls: it moves its queues on itself, some of them if there are many, the others with its next polls.
    /// Skips queues that somebody else is busy with. Allocates nothing: it is part of the data path.
    pub fn poll(&self) {
        self.polled.store(true, Ordering::Relaxed);
        let mut batch = ArrayVec::<Arc<Qp>, BATCH>::new();
        {
            let list = self.list.lock().unwrap_or_else(PoisonError::into_inner);
            let first = if list.len() > BATCH { self.turn.fetch_add(BATCH, Ordering::Relaxed) } else { 0 };
            let from = first.checked_rem(list.len()).unwrap_or(0);
            let (later, sooner) = list.split_at(from);
            batch.extend(sooner.iter().chain(later).filter_map(Weak::upgrade).take(BATCH));
        }
        let mut moved_on = batch.is_empty();
        for qp in &batch {
            moved_on |= qp.try_progress() == Stall::None;
        }
        if moved_on {
            drop(self.unlist());
        }
    }

    /// Takes off the list what waits no more.
    fn unlist(&self) -> MutexGuard<'_, Vec<Weak<Qp>>> {
        let mut list = self.list.lock().unwrap_or_else(PoisonError::into_inner);
        list.retain(|qp| qp.upgrade().is_some_and(|qp| !qp.unlist_if_idle()));
        self.count.store(list.len(), Ordering::Relaxed);
        list
    }

    /// Helper: has the program polled since the last call? Then it needs no help.
    pub fn take_polled(&self) -> bool {
        self.polled.load(Ordering::Relaxed) && self.polled.swap(false, Ordering::Relaxed)
    }

    /// Moves every stalled queue on, for a thread that sleeps afterwards: the peers are asked to tell. Queues that still
    /// wait stay listed. Returns what each waits for.
    pub fn progress(&self) -> Vec<Stall> {
        self.round(|qp| qp.progress(true))
    }

    fn round(&self, step: impl Fn(&Arc<Qp>) -> Stall) -> Vec<Stall> {
        let qps: Vec<Arc<Qp>> = {
            let list = self.list.lock().unwrap_or_else(PoisonError::into_inner);
            list.iter().filter_map(Weak::upgrade).collect()
        };
        let mut waits: Vec<Stall> = qps.iter().map(step).collect();
        if !waits.is_empty() && waits.iter().all(|wait| *wait != Stall::None) {
            return waits;
        }
        let list = self.unlist();
        // A queue that stalled again before it was taken off was still listed, and so told nobody.
        for (qp, wait) in qps.iter().zip(&mut waits).filter(|(_, wait)| **wait == Stall::None) {
            if list.iter().any(|listed| std::ptr::eq(listed.as_ptr(), Arc::as_ptr(qp))) {
                *wait = Stall::More;
            }
        }
        waits
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_destroyed_queue_does_not_stay_listed() {
        let stalled = Stalled::default();
        stalled.list.lock().expect("list").push(Weak::new());
        stalled.count.store(1, Ordering::Relaxed);
        assert!(stalled.progress().is_empty());
        assert!(!stalled.any());
    }
}
