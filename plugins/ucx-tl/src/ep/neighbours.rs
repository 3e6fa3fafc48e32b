//! Processes whose memory this one can map: queue pairs that lead to them, for keys that are used without an endpoint.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

use freeflow_core::client::Qp;

struct Neighbour {
    gid: [u8; 16],
    client: u32,
    qp: Weak<Qp>,
}

static ALL: Mutex<Vec<Neighbour>> = Mutex::new(Vec::new());

fn all() -> MutexGuard<'static, Vec<Neighbour>> {
    ALL.lock().unwrap_or_else(PoisonError::into_inner)
}

/// `qp` leads to process `client` of the container at `gid`, directly.
pub fn add(gid: [u8; 16], client: u32, qp: &Arc<Qp>) {
    let mut all = all();
    all.retain(|known| known.qp.strong_count() > 0);
    all.push(Neighbour { gid, client, qp: Arc::downgrade(qp) });
}

/// The first result that a queue pair to that process gives.
pub fn find<T>(gid: [u8; 16], client: u32, look: impl Fn(&Arc<Qp>) -> Option<T>) -> Option<T> {
    let there = |known: &Neighbour| known.gid == gid && known.client == client;
    // Not under the lock: the last reference may be dropped here, which ends a queue pair.
    let qps: Vec<_> =
        all().iter().filter(|known| there(known)).filter_map(|known| known.qp.upgrade()).collect();
    qps.iter().find_map(look)
}
