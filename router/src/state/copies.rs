//! Copies the router makes between two processes: who may, and how they end when a region is revoked.

use std::fs::File;
use std::sync::Arc;

use freeflow_core::ring::mr::domain;
use freeflow_core::verbs::Gid;

use super::{MrTable, Owner, State};
use rustix::io::Errno;

use crate::refusal::{Refusal, Result};

/// The two ends of a copy.
#[derive(Debug, Clone)]
pub struct CopyPlan {
    pub local: Arc<File>,
    pub remote: Arc<File>,
    /// The peer's table of memory regions.
    pub table: Arc<MrTable>,
    pub peer_client: u32,
    /// The PDs of the peer's queue pair and of its receives: the region must be in one.
    pub peer_pds: Vec<u32>,
    /// As what a memory window says that it is the queue pair's.
    pub windows: [u32; 2],
}

impl State {
    /// Finds both ends as Resolve would.
    pub fn plan_copy(&mut self, owner: Owner, qpn: u32, dest_qpn: u32, gid: Gid) -> Result<CopyPlan> {
        let peer = self.find_peer(owner, qpn, dest_qpn, gid)?.ok_or(Refusal::NoPeer)?;
        let (them, qp) = self.qps.get(peer).ok_or(Refusal::NoPeer)?;
        let (peer_client, peer_pds) = (them.client, self.domains_of(them, qp));
        let windows = [domain::window_of_pd(qp.pd), domain::window_of_qp(peer)];
        if self.is_resuming(peer_client) {
            return Err(Refusal::NoPeer); // its keys are not all back
        }
        let reach = |client: u32| {
            let memory = self.client(client)?.memory.clone();
            let closed =
                Refusal::System { what: "memory of an end, which was not opened", errno: Errno::PERM };
            memory.map_err(|_| closed)
        };
        let table = self.client(peer_client)?.mr_table.clone().ok_or(Refusal::NoPeer)?;
        Ok(CopyPlan {
            local: reach(owner.client)?,
            remote: reach(peer_client)?,
            table,
            peer_client,
            peer_pds,
            windows,
        })
    }

    /// A piece of a copy into or out of region `key` begins. Each must end in [`State::leave_copy`].
    pub fn enter_copy(&mut self, client: u32, key: u32, pds: &[u32]) -> Result<()> {
        let mr = self.clients.get_mut(&client).and_then(|c| c.mrs.get_mut(key));
        let mr = mr.filter(|mr| !mr.revoked && pds.contains(&mr.pd));
        let mr = mr.ok_or(Refusal::Access("no such key in the peer's protection domain"))?;
        mr.copies += 1;
        Ok(())
    }

    /// The piece ended. True when a deregistration waits for it.
    pub fn leave_copy(&mut self, client: u32, key: u32) -> bool {
        let Some(mr) = self.clients.get_mut(&client).and_then(|c| c.mrs.get_mut(key)) else { return false };
        mr.copies -= 1;
        mr.revoked && mr.copies == 0
    }
}

#[cfg(test)]
mod tests {
    use super::super::testing::*;
    use super::*;

    #[test]
    fn an_end_that_could_not_be_opened_is_not_a_wrong_key() {
        let mut w = World::new();
        let c = w.container("a", [10, 0, 0, 1], "red");
        let (me, gid) = (w.owner_of_new_client(c), Gid::of([10, 0, 0, 1].into()));
        let qpn = w.qp(me, freeflow_core::verbs::QpType::Rc);
        w.state.connect(me, qpn, qpn, gid).expect("connect");
        let refused = w.state.plan_copy(me, qpn, qpn, gid).expect_err("clients of this world have no memory");
        assert_eq!(refused.errno(), Errno::PERM);
    }

    #[test]
    fn a_revoked_region_takes_no_new_copy_and_ends_with_the_last() {
        let mut w = World::new();
        let c = w.container("a", [10, 0, 0, 1], "red");
        let me = w.owner_of_new_client(c);
        let (pd, other_pd) = (w.pd(me), w.pd(me));
        let key = w.state.reg_mr(me, pd, 0, 10).expect("mr");
        assert!(matches!(w.state.enter_copy(me.client, key ^ 0x100_0000, &[pd]), Err(Refusal::Access(_))));
        assert!(matches!(w.state.enter_copy(me.client, key, &[other_pd]), Err(Refusal::Access(_))));
        w.state.enter_copy(me.client, key, &[pd]).expect("alive");
        w.state.enter_copy(me.client, key, &[pd]).expect("alive");
        assert_eq!(w.state.revoke_mr(me, key), Ok(false));
        assert!(matches!(w.state.enter_copy(me.client, key, &[pd]), Err(Refusal::Access(_))));
        assert!(!w.state.leave_copy(me.client, key));
        assert!(w.state.leave_copy(me.client, key));
        assert_eq!(w.state.revoke_mr(me, key), Ok(true));
    }
}
