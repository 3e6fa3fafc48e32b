//! Multicast groups: which UD queue pairs get what is sent to one. Each tenant has its own, on this host.
//!
//! Senders keep the list of members; a word in a page that they map changes whenever a list is out of date.

use std::collections::{BTreeSet, HashMap};
use std::ops::Bound;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use freeflow_core::ctl::{MEMBERS, Member, MembersReply};
use freeflow_core::shm::{self, Mapping, PAGE};
use freeflow_core::sync::{AtomicU64, Ordering};
use freeflow_core::verbs::{Gid, QpType};

use super::{Owner, State};
use crate::quota::Resource;
use crate::refusal::{Refusal, Result};

/// The groups of one tenant.
#[derive(Debug)]
pub struct Groups {
    page: Page,
    members: HashMap<Gid, BTreeSet<u32>>,
}

/// Where senders see that something changed.
#[derive(Debug)]
struct Page {
    read_only: Arc<OwnedFd>,
    map: Mapping,
}

impl Page {
    fn new() -> rustix::io::Result<Self> {
        let fd = shm::make_owned_memfd("freeflow-mcast", PAGE)?;
        let read_only = Arc::new(shm::reopen_read_only(&fd)?);
        Ok(Page { read_only, map: Mapping::new(&fd, 0, PAGE as usize, true)? })
    }

    fn word(&self) -> Option<&AtomicU64> {
        self.map.get(0)
    }

    fn generation(&self) -> u64 {
        self.word().map_or(0, |word| word.load(Ordering::Acquire))
    }

    /// Release: who sees the change and asks gets the new members.
    fn changed(&self) {
        self.word().inspect(|word| _ = word.fetch_add(1, Ordering::Release));
    }
}

impl State {
    /// The groups of the owner's tenant.
    fn groups(&mut self, owner: Owner) -> Result<&mut Groups> {
        let tenant = self.home_of(owner)?.0;
        if !self.groups.contains_key(&tenant) {
            let page = Page::new().map_err(Refusal::system("page of the multicast groups"))?;
            self.groups.insert(tenant.clone(), Groups { page, members: HashMap::new() });
        }
        self.groups.get_mut(&tenant).ok_or(Refusal::NoPeer)
    }

    pub fn attach_mcast(&mut self, owner: Owner, qpn: u32, mgid: Gid) -> Result<()> {
        if self.qps.owned(qpn, owner)?.kind != QpType::Ud {
            return Err(Refusal::Invalid("only UD queue pairs can be attached to a multicast group"));
        }
        if !mgid.is_multicast() {
            return Err(Refusal::Invalid("the GID is no multicast group's"));
        }
        let groups = self.groups(owner)?;
        if groups.members.get(&mgid).is_some_and(|members| members.contains(&qpn)) {
            return Err(Refusal::Exists("attachment of the queue pair to the multicast group"));
        }
        self.take(owner.container, &[(Resource::Mcasts, 1)])?;
        let groups = self.groups(owner)?;
        groups.members.entry(mgid).or_default().insert(qpn);
        groups.page.changed();
        Ok(())
    }

    pub fn detach_mcast(&mut self, owner: Owner, qpn: u32, mgid: Gid) -> Result<()> {
        self.qps.owned(qpn, owner)?;
        if !self.groups(owner)?.leave(mgid, qpn) {
            return Err(Refusal::Invalid("the queue pair is not attached to the multicast group"));
        }
        self.give_back(owner.container, &[(Resource::Mcasts, 1)]);
        Ok(())
    }

    /// The queue pair is gone.
    pub(super) fn leave_groups(&mut self, owner: Owner, qpn: u32) {
        let Some(home) = self.containers.get(&owner.container) else { return };
        let Some(groups) = self.groups.get_mut(&home.tenant) else { return };
        let mgids: Vec<Gid> = groups.members.keys().copied().collect();
        let left = mgids.into_iter().filter(|mgid| groups.leave(*mgid, qpn)).count();
        self.give_back(owner.container, &[(Resource::Mcasts, left as u64)]);
    }

    /// Members of a group with numbers after `after`; and the page, for who asks for it.
    pub fn list_members(
        &mut self,
        owner: Owner,
        mgid: Gid,
        after: u32,
        page: bool,
    ) -> Result<(MembersReply, Option<Arc<OwnedFd>>)> {
        let groups = self.groups(owner)?;
        let mut reply = MembersReply {
            generation: groups.page.generation(),
            page: page.into(),
            count: 0,
            more: 0,
            _pad: 0,
            members: [Member::default(); MEMBERS],
        };
        let fd = page.then(|| groups.page.read_only.clone());
        let after = (Bound::Excluded(after), Bound::Unbounded);
        let members = groups.members.get(&mgid).into_iter().flat_map(|all| all.range(after));
        let some: Vec<u32> = members.copied().take(MEMBERS + 1).collect();
        reply.more = (some.len() > MEMBERS).into();
        for qpn in some.into_iter().take(MEMBERS) {
            let Some((them, _)) = self.qps.get(qpn) else { continue };
            let gid = self.home_of(them)?.1.0;
            reply.members[reply.count as usize] = Member { gid, qpn };
            reply.count += 1;
        }
        Ok((reply, fd))
    }
}

impl Groups {
    /// False: it was no member.
    fn leave(&mut self, mgid: Gid, qpn: u32) -> bool {
        let Some(members) = self.members.get_mut(&mgid) else { return false };
        if !members.remove(&qpn) {
            return false;
        }
        if members.is_empty() {
            self.members.remove(&mgid);
        }
        self.page.changed();
        true
    }
}

#[cfg(test)]
mod tests {
    use super::super::testing::*;
    use super::*;
    use crate::config::Settings;

    fn members(w: &mut World, of: Owner, mgid: Gid) -> Vec<u32> {
        let (reply, page) = w.state.list_members(of, mgid, 0, false).expect("a tenant");
        assert!(page.is_none());
        reply.members[..reply.count as usize].iter().map(|member| member.qpn).collect()
    }

    fn group(last: u8) -> Gid {
        Gid::of([239, 1, 1, last].into())
    }

    #[test]
    fn tenants_have_groups_of_their_own() {
        let mut w = World::new();
        let (ca, cb, cc) = (
            w.container("a", [10, 0, 0, 1], "red"),
            w.container("b", [10, 0, 0, 2], "red"),
            w.container("c", [10, 0, 0, 1], "blue"),
        );
        let [a, b, c] = [ca, cb, cc].map(|container| w.owner_of_new_client(container));
        let [qa, qb, qc] = [a, b, c].map(|owner| w.qp(owner, QpType::Ud));
        let both = [qa.min(qb), qa.max(qb)];
        for (owner, qpn) in [(a, qa), (b, qb), (c, qc)] {
            w.state.attach_mcast(owner, qpn, group(1)).expect("attached");
        }
        assert_eq!(members(&mut w, a, group(1)), both);
        assert_eq!(members(&mut w, c, group(1)), [qc]);
        assert!(members(&mut w, a, group(2)).is_empty());
        let before = w.state.list_members(a, group(1), 0, true).expect("a tenant");
        assert!(before.1.is_some());
        w.state.destroy_qp(b, qb).expect("mine");
        assert_eq!(members(&mut w, a, group(1)), [qa]);
        let after = w.state.list_members(a, group(1), 0, true).expect("a tenant");
        assert_ne!(before.0.generation, after.0.generation);
    }

    #[test]
    fn what_cannot_be_attached() {
        let mut w = World::with(Settings { max_mcast: 2, ..Settings::default() });
        let c = w.container("a", [10, 0, 0, 1], "red");
        let (me, sibling) = (w.owner_of_new_client(c), w.owner_of_new_client(c));
        let (ud, rc) = (w.qp(me, QpType::Ud), w.qp(me, QpType::Rc));
        let attach = |w: &mut World, owner, qpn, gid| w.state.attach_mcast(owner, qpn, gid);
        assert!(matches!(attach(&mut w, me, rc, group(1)), Err(Refusal::Invalid(_))));
        assert!(matches!(attach(&mut w, me, ud, Gid::of([10, 0, 0, 1].into())), Err(Refusal::Invalid(_))));
        assert!(matches!(attach(&mut w, sibling, ud, group(1)), Err(Refusal::NotYours { .. })));
        attach(&mut w, me, ud, group(1)).expect("attached");
        assert!(matches!(attach(&mut w, me, ud, group(1)), Err(Refusal::Exists(_))));
        attach(&mut w, me, ud, Gid::of("ff12::1".parse::<std::net::IpAddr>().expect("address")))
            .expect("attached");
        assert!(matches!(attach(&mut w, me, ud, group(2)), Err(Refusal::Quota(_))));
        assert!(matches!(w.state.detach_mcast(me, ud, group(2)), Err(Refusal::Invalid(_))));
        w.state.detach_mcast(me, ud, group(1)).expect("attached");
        attach(&mut w, me, ud, group(2)).expect("room again");
        w.state.destroy_qp(me, ud).expect("mine");
        assert_eq!(w.state.containers[&c].quota.used(Resource::Mcasts), 0);
    }

    #[test]
    fn a_large_group_is_told_in_pieces() {
        let mut w = World::new();
        let c = w.container("a", [10, 0, 0, 1], "red");
        let me = w.owner_of_new_client(c);
        let mut all: Vec<u32> = (0..MEMBERS + 5).map(|_| w.qp(me, QpType::Ud)).collect();
        for qpn in &all {
            w.state.attach_mcast(me, *qpn, group(1)).expect("attached");
        }
        all.sort_unstable();
        let (first, _) = w.state.list_members(me, group(1), 0, false).expect("a tenant");
        assert_eq!((first.count as usize, first.more), (MEMBERS, 1));
        let last = first.members[MEMBERS - 1].qpn;
        let (rest, _) = w.state.list_members(me, group(1), last, false).expect("a tenant");
        assert_eq!((rest.count, rest.more), (5, 0));
        assert_eq!(rest.members[4].qpn, all[MEMBERS + 4]);
    }
}
