//! Multicast groups across hosts: which containers of this host are in one, and which of others, as their routers say.
//!
//! What another router says is kept as it says it; whether it has that container is judged when a datagram is to go there
//! ([`crate::link`]), because the directory may learn of a container later than its neighbours do.

use std::collections::BTreeSet;
use std::sync::Arc;

use freeflow_core::verbs::Gid;

use super::State;
use crate::directory::Tenant;

/// That a container, or which one, is in a group.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Joining {
    pub tenant: Tenant,
    pub mgid: Gid,
    pub vip: Gid,
}

/// Another host, and its container that is said to be in a group.
pub type FarMember = (Arc<str>, Gid);

impl State {
    /// All containers of this host in all groups.
    pub fn joined(&self) -> BTreeSet<Joining> {
        let of = |(tenant, mgid, qpn): (&Tenant, Gid, u32)| {
            Some(Joining { tenant: tenant.clone(), mgid, vip: self.vip_of_qp(qpn)? })
        };
        let groups = self.groups.iter();
        groups
            .flat_map(|(tenant, groups)| groups.all().map(move |(mgid, qpn)| (tenant, mgid, qpn)))
            .filter_map(of)
            .collect()
    }

    pub fn is_joined(&self, joining: &Joining) -> bool {
        self.members_here(&joining.tenant, joining.mgid).iter().any(|(vip, _)| *vip == joining.vip)
    }

    /// The queue pairs of this host in a group, and where they are.
    pub fn members_here(&self, tenant: &Tenant, mgid: Gid) -> Vec<(Gid, u32)> {
        let members = self.groups.get(tenant).map(|groups| groups.of(mgid));
        members.into_iter().flatten().filter_map(|qpn| Some((self.vip_of_qp(qpn)?, qpn))).collect()
    }

    fn vip_of_qp(&self, qpn: u32) -> Option<Gid> {
        Some(self.home_of(self.qps.get(qpn)?.0).ok()?.1)
    }

    /// `host` says that a container of its is in a group. False: it has said so before.
    pub fn far_joins(&mut self, host: &Arc<str>, joining: &Joining) -> bool {
        let key = (joining.tenant.clone(), joining.mgid);
        let new = self.far_groups.entry(key).or_default().insert((host.clone(), joining.vip));
        self.far_changed(&joining.tenant, new);
        new
    }

    /// And that it is not any more.
    pub fn far_leaves(&mut self, host: &Arc<str>, joining: &Joining) -> bool {
        let key = (joining.tenant.clone(), joining.mgid);
        let Some(members) = self.far_groups.get_mut(&key) else { return false };
        let was = members.remove(&(host.clone(), joining.vip));
        if members.is_empty() {
            self.far_groups.remove(&key);
        }
        self.far_changed(&joining.tenant, was);
        was
    }

    /// Nothing is known of the groups of `host`.
    pub fn far_forget(&mut self, host: &str) {
        let mut changed = BTreeSet::new();
        self.far_groups.retain(|(tenant, _), members| {
            let before = members.len();
            members.retain(|(theirs, _)| **theirs != *host);
            if members.len() != before {
                changed.insert(tenant.clone());
            }
            !members.is_empty()
        });
        changed.iter().for_each(|tenant| self.far_changed(tenant, true));
    }

    /// Who is said to be in a group on other hosts.
    pub fn far_members(&self, tenant: &Tenant, mgid: Gid) -> Vec<FarMember> {
        self.far_groups.get(&(tenant.clone(), mgid)).into_iter().flatten().cloned().collect()
    }

    pub(super) fn is_elsewhere(&self, tenant: &Tenant, mgid: Gid) -> bool {
        self.far_groups.contains_key(&(tenant.clone(), mgid))
    }

    fn far_changed(&self, tenant: &Tenant, changed: bool) {
        self.groups.get(tenant).filter(|_| changed).into_iter().for_each(super::mcast::Groups::changed);
    }
}

#[cfg(test)]
mod tests {
    use super::super::testing::*;
    use super::*;
    use freeflow_core::verbs::{MULTICAST_QPN, QpType};

    fn group(last: u8) -> Gid {
        Gid::of([239, 1, 1, last].into())
    }

    fn joining(tenant: &str, last: u8, vip: [u8; 4]) -> Joining {
        Joining { tenant: tenant.into(), mgid: group(last), vip: Gid::of(vip.into()) }
    }

    #[test]
    fn a_container_is_in_a_group_while_one_of_its_queue_pairs_is() {
        let mut w = World::new();
        let c = w.container("a", [10, 0, 0, 1], "red");
        let me = w.owner_of_new_client(c);
        let (a, b) = (w.qp(me, QpType::Ud), w.qp(me, QpType::Ud));
        let mine = joining("red", 1, [10, 0, 0, 1]);
        for qpn in [a, b] {
            w.state.attach_mcast(me, qpn, group(1)).expect("attached");
        }
        assert_eq!(w.state.outbox.groups, [mine.clone(), mine.clone()]);
        assert_eq!(w.state.joined(), BTreeSet::from([mine.clone()]));
        w.state.detach_mcast(me, a, group(1)).expect("attached");
        assert!(w.state.is_joined(&mine));
        assert_eq!(w.state.members_here(&"red".into(), group(1)), [(mine.vip, b)]);
        w.state.outbox.groups.clear();
        w.state.destroy_qp(me, b).expect("mine");
        assert_eq!(w.state.outbox.groups, std::slice::from_ref(&mine));
        assert!(!w.state.is_joined(&mine) && w.state.joined().is_empty());
    }

    #[test]
    fn a_sender_learns_that_other_hosts_have_members_of_its_tenant() {
        let mut w = World::new();
        let c = w.container("a", [10, 0, 0, 1], "red");
        let me = w.owner_of_new_client(c);
        let list = |w: &mut World| {
            let (reply, _) = w.state.list_members(me, group(1), 0, false).expect("a tenant");
            (
                reply.generation,
                reply.members[..reply.count as usize].iter().map(|m| m.qpn).collect::<Vec<_>>(),
            )
        };
        let (h2, h3): (Arc<str>, Arc<str>) = ("h2".into(), "h3".into());
        let (before, none) = list(&mut w);
        assert!(none.is_empty());
        assert!(w.state.far_joins(&h2, &joining("blue", 1, [10, 0, 0, 2])));
        assert!(w.state.far_joins(&h2, &joining("red", 2, [10, 0, 0, 2])));
        assert!(list(&mut w).1.is_empty(), "another tenant's, and another group");
        assert!(w.state.far_joins(&h2, &joining("red", 1, [10, 0, 0, 2])));
        assert!(!w.state.far_joins(&h2, &joining("red", 1, [10, 0, 0, 2])), "again");
        assert!(w.state.far_joins(&h3, &joining("red", 1, [10, 0, 0, 3])));
        let (now, elsewhere) = list(&mut w);
        assert_eq!(elsewhere, [MULTICAST_QPN]);
        assert_ne!(before, now);
        w.state.far_forget("h2");
        assert_eq!(
            w.state.far_members(&"red".into(), group(1)),
            [(h3.clone(), Gid::of([10, 0, 0, 3].into()))]
        );
        assert!(!w.state.far_leaves(&h2, &joining("red", 1, [10, 0, 0, 2])), "forgotten");
        assert!(w.state.far_leaves(&h3, &joining("red", 1, [10, 0, 0, 3])));
        assert!(list(&mut w).1.is_empty());
    }
}
