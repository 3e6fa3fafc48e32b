//! Send queues that wait: for a receive, for the peer, or for their turn in a large copy.
//!
//! Whoever polls moves them on; the helper thread does it for programs that sleep.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::time::Instant;

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
}

/// The stalled send queues of a context.
#[derive(Debug, Default)]
pub struct Stalled {
    count: AtomicUsize,
    generation: AtomicUsize,
    list: Mutex<Vec<Weak<Qp>>>,
}

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

    /// Moves every stalled queue on. Queues that still wait stay listed. Returns what each waits for. The helper, which
    /// sleeps afterwards, asks the peers to be told (`sleeping`).
    pub fn progress(&self, sleeping: bool) -> Vec<Stall> {
        let qps: Vec<Arc<Qp>> = {
            let list = self.list.lock().unwrap_or_else(PoisonError::into_inner);
            list.iter().filter_map(Weak::upgrade).collect()
        };
        let waits: Vec<Stall> = qps.iter().map(|qp| qp.progress(sleeping)).collect();
        let mut list = self.list.lock().unwrap_or_else(PoisonError::into_inner);
        list.retain(|qp| qp.upgrade().is_some_and(|qp| !qp.unlist_if_idle()));
        self.count.store(list.len(), Ordering::Relaxed);
        waits
    }
}
