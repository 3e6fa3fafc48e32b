//! Multicast groups: which UD queue pairs get what is sent to one. Each tenant has its own.
//!
//! Senders keep the list of members; a word in a page that they map changes whenever a list is out of date. Members on other
//! hosts are one entry of it, and what other routers have to say of them is in `far_mcast`.

use std::collections::{BTreeSet, HashMap};
use std::ops::Bound;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use freeflow_core::ctl::{MEMBERS, Member, MembersReply};
use freeflow_core::shm::{self, Mapping, PAGE};
use freeflow_core::sync::{AtomicU64, Ordering};
use freeflow_core::verbs::{Gid, MULTICAST_QPN, QpType};

use super::{Joining, Owner, State};
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
        self.tell_of(owner, mgid);
        Ok(())
    }

    /// Other hosts must know of the owner's container and a group.
    fn tell_of(&mut self, owner: Owner, mgid: Gid) {
        if let Ok((tenant, vip)) = self.home_of(owner) {
            self.outbox.groups.push(Joining { tenant, mgid, vip });
        }
    }

    pub fn detach_mcast(&mut self, owner: Owner, qpn: u32, mgid: Gid) -> Result<()> {
        self.qps.owned(qpn, owner)?;
        if !self.groups(owner)?.leave(mgid, qpn) {
            return Err(Refusal::Invalid("the queue pair is not attached to the multicast group"));
        }
        self.give_back(owner.container, &[(Resource::Mcasts, 1)]);
        self.tell_of(owner, mgid);
        Ok(())
    }

    /// The queue pair is gone.
    pub(super) fn leave_groups(&mut self, owner: Owner, qpn: u32) {
        let Some(home) = self.containers.get(&owner.container) else { return };
        let Some(groups) = self.groups.get_mut(&home.tenant) else { return };
        let mgids: Vec<Gid> = groups.members.keys().copied().collect();
        let left: Vec<Gid> = mgids.into_iter().filter(|mgid| groups.leave(*mgid, qpn)).collect();
        self.give_back(owner.container, &[(Resource::Mcasts, left.len() as u64)]);
        left.into_iter().for_each(|mgid| self.tell_of(owner, mgid));
    }

    /// Members of a group with numbers after `after`, the last being [`MULTICAST_QPN`] at the group's own address if other hosts have
    /// some; and the page, for who asks for it.
    pub fn list_members(
        &mut self,
        owner: Owner,
        mgid: Gid,
        after: u32,
        page: bool,
    ) -> Result<(MembersReply, Option<Arc<OwnedFd>>)> {
        let tenant = self.home_of(owner)?.0;
        let elsewhere = self.is_elsewhere(&tenant, mgid).then_some(MULTICAST_QPN);
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
        let rest = (Bound::Excluded(after), Bound::Unbounded);
        let members = groups.members.get(&mgid).into_iter().flat_map(|all| all.range(rest)).copied();
        let elsewhere = elsewhere.filter(|number| *number > after);
        let some: Vec<u32> = members.chain(elsewhere).take(MEMBERS + 1).collect();
        reply.more = (some.len() > MEMBERS).into();
        for qpn in some.into_iter().take(MEMBERS) {
            let gid = match self.qps.get(qpn) {
                Some((them, _)) => self.home_of(them)?.1.0,
                None if qpn == MULTICAST_QPN => mgid.0,
                None => continue,
            };
            reply.members[reply.count as usize] = Member { gid, qpn };
            reply.count += 1;
        }
        Ok((reply, fd))
    }
}

impl Groups {
    /// Each group's members.
    pub(super) fn all(&self) -> impl Iterator<Item = (Gid, u32)> {
        self.members.iter().flat_map(|(mgid, members)| members.iter().map(|qpn| (*mgid, *qpn)))
    }

    pub(super) fn of(&self, mgid: Gid) -> impl Iterator<Item = u32> {
        self.members.get(&mgid).into_iter().flatten().copied()
    }

    pub(super) fn changed(&self) {
        self.page.changed();
    }

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
