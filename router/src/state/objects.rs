//! Slabs, protection domains, channels, completion queues and memory regions: creation and destruction.

use std::os::fd::OwnedFd;
use std::sync::Arc;

use freeflow_core::ctl::LEASED_KEYS;
use freeflow_core::ring::CqShared;
use freeflow_core::shm::Mapping;

use super::{Given, Mr, Owner, State, draw};
use crate::quota::Resource;
use crate::refusal::{Refusal, Result};

/// Router-made queue memory. Lives as long as its client.
#[derive(Debug)]
pub struct Slab {
    pub fd: Arc<OwnedFd>,
    pub map: Arc<Mapping>,
}

/// A protection domain; its memory is the client's and never mapped here.
#[derive(Debug)]
pub struct Pd {
    pub fd: Arc<OwnedFd>,
    /// MRs and QPs in it.
    pub users: u32,
}

#[derive(Debug)]
pub struct Channel {
    pub bell: Arc<OwnedFd>,
    /// CQs on it.
    pub users: u32,
}

#[derive(Debug)]
pub struct Cq {
    /// 0: none.
    pub channel: u32,
    pub slab: u32,
    pub off: u32,
    /// Work queues that complete here.
    pub users: u32,
}

fn idle(users: u32, what: &'static str, id: u32, by: &'static str) -> Result<()> {
    if users == 0 { Ok(()) } else { Err(Refusal::Busy { what, id, by }) }
}

impl State {
    /// Sets quota aside for a slab that is then made without the lock.
    pub fn reserve_slab(&mut self, owner: Owner, len: u64) -> Result<()> {
        let limit = 1 << 31;
        if len == 0 || !len.is_multiple_of(freeflow_core::shm::PAGE) || len > limit {
            return Err(Refusal::Range { what: "length of a slab", got: len, limit });
        }
        self.take(owner.container, &[(Resource::Slabs, 1), (Resource::SlabBytes, len)])
    }

    /// Gives back what was set aside for a slab that could not be made.
    pub fn unreserve_slab(&mut self, owner: Owner, len: u64) {
        self.give_back(owner.container, &[(Resource::Slabs, 1), (Resource::SlabBytes, len)]);
    }

    pub fn insert_slab(&mut self, owner: Owner, slab: Slab) -> Result<u32> {
        let id = self.new_object_id(owner)?;
        self.slabs.insert(id, owner, slab);
        Ok(id)
    }

    pub fn alloc_pd(&mut self, owner: Owner, fd: OwnedFd) -> Result<u32> {
        let id = self.new_object_id(owner)?;
        self.take(owner.container, &[(Resource::Pds, 1)])?;
        self.pds.insert(id, owner, Pd { fd: Arc::new(fd), users: 0 });
        Ok(id)
    }

    pub fn dealloc_pd(&mut self, owner: Owner, id: u32) -> Result<()> {
        idle(self.pds.owned(id, owner)?.users, "protection domain", id, "memory region or queue pair")?;
        self.pds.remove(id);
        self.ungive(Given::Pd(id));
        self.give_back(owner.container, &[(Resource::Pds, 1)]);
        Ok(())
    }

    pub fn create_channel(&mut self, owner: Owner, bell: OwnedFd) -> Result<u32> {
        let id = self.new_object_id(owner)?;
        self.take(owner.container, &[(Resource::Channels, 1)])?;
        self.channels.insert(id, owner, Channel { bell: Arc::new(bell), users: 0 });
        Ok(id)
    }

    pub fn destroy_channel(&mut self, owner: Owner, id: u32) -> Result<()> {
        idle(self.channels.owned(id, owner)?.users, "completion channel", id, "completion queue")?;
        self.channels.remove(id);
        self.ungive(Given::Channel(id));
        self.give_back(owner.container, &[(Resource::Channels, 1)]);
        Ok(())
    }

    /// An id that is used anew goes with a new descriptor.
    fn ungive(&mut self, what: Given) {
        for client in self.clients.values_mut() {
            client.given.remove(&what);
        }
    }

    pub fn create_cq(&mut self, owner: Owner, channel: u32, slab: u32, off: u32) -> Result<u32> {
        if channel != 0 {
            self.channels.owned(channel, owner)?;
        }
        let room = self.slabs.owned(slab, owner)?.map.get::<CqShared>(off.into());
        room.ok_or(Refusal::Invalid("a CQ's header must be aligned and inside its slab"))?;
        let id = self.new_object_id(owner)?;
        self.take(owner.container, &[(Resource::Cqs, 1)])?;
        if let Some(channel) = self.channels.get_mut(channel) {
            channel.users += 1;
        }
        self.cqs.insert(id, owner, Cq { channel, slab, off, users: 0 });
        Ok(id)
    }

    pub fn destroy_cq(&mut self, owner: Owner, id: u32) -> Result<()> {
        let cq = self.cqs.owned(id, owner)?;
        idle(cq.users, "completion queue", id, "queue pair")?;
        if let Some(channel) = self.channels.get_mut(cq.channel) {
            channel.users -= 1;
        }
        self.cqs.remove(id);
        self.give_back(owner.container, &[(Resource::Cqs, 1)]);
        Ok(())
    }

    pub fn reg_mr(&mut self, owner: Owner, pd: u32, addr: u64, len: u64) -> Result<u32> {
        self.pds.owned(pd, owner)?;
        addr.checked_add(len).ok_or(Refusal::Invalid("a memory region wraps around"))?;
        let cost = [(Resource::Mrs, 1), (Resource::MrBytes, len)];
        self.take(owner.container, &cost)?;
        let mr = Mr { key: 0, pd, len, copies: 0, revoked: false };
        let claimed = self.claimed(owner.client, super::resume::KEY);
        let random = &mut self.random;
        let allocated = match (self.clients.get_mut(&owner.client), claimed) {
            (Some(client), Some(key)) => client.mrs.adopt(key, mr),
            (Some(client), None) => client.mrs.allocate(mr, || draw(random)),
            (None, _) => Err(Refusal::NoSuch { what: "client", id: owner.client }),
        };
        match allocated {
            Ok(_) => self.pds.get_mut(pd).into_iter().for_each(|pd| pd.users += 1),
            Err(_) => self.give_back(owner.container, &cost),
        }
        allocated
    }

    /// Registers regions of `len` bytes that the client will fill in when it needs them: one, and more while the
    /// container's quota has room for many times as much.
    pub fn lease_mrs(&mut self, owner: Owner, pd: u32, len: u64) -> Result<Vec<u32>> {
        let mut keys = vec![self.reg_mr(owner, pd, 0, len)?];
        while keys.len() < LEASED_KEYS && self.has_plenty(owner.container, len) {
            match self.reg_mr(owner, pd, 0, len) {
                Ok(key) => keys.push(key),
                Err(_) => break,
            }
        }
        Ok(keys)
    }

    /// What one process sets aside must not be what another lacks.
    fn has_plenty(&self, container: u32, len: u64) -> bool {
        let many = 8 * LEASED_KEYS as u64;
        let quota = self.containers.get(&container).map(|c| &c.quota);
        quota.is_some_and(|q| q.left(Resource::Mrs) >= many && q.left(Resource::MrBytes) / many >= len)
    }

    /// First half of deregistration: no copy starts any more. True when none is running either.
    pub fn revoke_mr(&mut self, owner: Owner, key: u32) -> Result<bool> {
        let mr = self.client_mut(owner.client)?.mrs.get_mut(key);
        let mr = mr.ok_or(Refusal::NoSuch { what: "memory region with key", id: key })?;
        mr.revoked = true;
        Ok(mr.copies == 0)
    }

    /// Second half, once no copy is running.
    pub fn forget_mr(&mut self, owner: Owner, key: u32) -> Result<()> {
        let mr = self.client_mut(owner.client)?.mrs.remove(key);
        let mr = mr.ok_or(Refusal::NoSuch { what: "memory region with key", id: key })?;
        if let Some(pd) = self.pds.get_mut(mr.pd) {
            pd.users -= 1;
        }
        self.give_back(owner.container, &[(Resource::Mrs, 1), (Resource::MrBytes, mr.len)]);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::super::testing::*;
    use super::*;
    use crate::config::Settings;

    #[test]
    fn objects_in_use_are_busy() {
        let mut w = World::new();
        let c = w.container("c1", [10, 0, 0, 1], "red");
        let me = w.owner_of_new_client(c);
        let pd = w.pd(me);
        let channel = w.state.create_channel(me, eventfd()).expect("channel");
        let slab = w.slab(me);
        let cq = w.state.create_cq(me, channel, slab, 0).expect("cq");
        let key = w.state.reg_mr(me, pd, 4096, 10).expect("mr");
        assert!(matches!(w.state.dealloc_pd(me, pd), Err(Refusal::Busy { .. })));
        assert!(matches!(w.state.destroy_channel(me, channel), Err(Refusal::Busy { .. })));
        assert_eq!(w.state.revoke_mr(me, key), Ok(true));
        w.state.forget_mr(me, key).expect("mr");
        w.state.dealloc_pd(me, pd).expect("free");
        w.state.destroy_cq(me, cq).expect("free");
        w.state.destroy_channel(me, channel).expect("free");
        assert!(matches!(w.state.destroy_cq(me, cq), Err(Refusal::NoSuch { .. })));
        assert!(matches!(w.state.revoke_mr(me, key), Err(Refusal::NoSuch { .. })));
    }

    #[test]
    fn another_process_has_no_rights() {
        let mut w = World::new();
        let c = w.container("c1", [10, 0, 0, 1], "red");
        let me = w.owner_of_new_client(c);
        let sibling = w.owner_of_new_client(c);
        let pd = w.pd(me);
        let slab = w.slab(me);
        let not_yours = |r: Result<u32>| matches!(r, Err(Refusal::NotYours { .. }));
        assert!(not_yours(w.state.reg_mr(sibling, pd, 0, 1)));
        assert!(not_yours(w.state.create_cq(sibling, 0, slab, 0)));
        assert!(matches!(w.state.dealloc_pd(sibling, pd), Err(Refusal::NotYours { .. })));
    }

    #[test]
    fn offsets_are_checked() {
        let mut w = World::new();
        let c = w.container("c1", [10, 0, 0, 1], "red");
        let me = w.owner_of_new_client(c);
        let slab = w.slab(me);
        let last = SLAB as u32 - size_of::<CqShared>() as u32;
        w.state.create_cq(me, 0, slab, last).expect("the last place");
        for bad in [4, 63, last + 64, SLAB as u32, u32::MAX, u32::MAX - 63] {
            assert!(matches!(w.state.create_cq(me, 0, slab, bad), Err(Refusal::Invalid(_))), "{bad}");
        }
        assert!(matches!(w.state.reg_mr(me, 77, 0, 1), Err(Refusal::NoSuch { .. })));
        let pd = w.pd(me);
        assert!(matches!(w.state.reg_mr(me, pd, u64::MAX, 2), Err(Refusal::Invalid(_))));
        for bad in [0, 1, 4097, 1 << 32, u64::MAX] {
            assert!(matches!(w.state.reserve_slab(me, bad), Err(Refusal::Range { .. })), "{bad}");
        }
    }

    #[test]
    fn quotas_are_the_containers_not_the_processes() {
        let mut w = World::with(Settings { max_mr_bytes: 100, max_pd: 2, ..Settings::default() });
        let c = w.container("c1", [10, 0, 0, 1], "red");
        let (a, b) = (w.owner_of_new_client(c), w.owner_of_new_client(c));
        let (pa, pb) = (w.pd(a), w.pd(b));
        assert!(matches!(w.state.alloc_pd(b, eventfd()), Err(Refusal::Quota(_))));
        let key = w.state.reg_mr(a, pa, 0, 60).expect("fits");
        assert!(matches!(w.state.reg_mr(b, pb, 0, 41), Err(Refusal::Quota(_))));
        w.state.forget_mr(a, key).expect("mr");
        w.state.reg_mr(b, pb, 0, 100).expect("fits again");
    }

    #[test]
    fn leased_keys_are_regions_like_others() {
        let mut w = World::with(Settings { max_mr: 1000, max_mr_bytes: 10_000, ..Settings::default() });
        let c = w.container("c1", [10, 0, 0, 1], "red");
        let me = w.owner_of_new_client(c);
        let pd = w.pd(me);
        let keys = w.state.lease_mrs(me, pd, 10).expect("room");
        assert_eq!(keys.len(), LEASED_KEYS);
        assert!(matches!(w.state.dealloc_pd(me, pd), Err(Refusal::Busy { .. })));
        for key in keys {
            w.state.forget_mr(me, key).expect("each is registered");
        }
        let few = w.state.lease_mrs(me, pd, 76).expect("room");
        assert!(few.len() > 1 && few.len() < LEASED_KEYS, "less than plenty is left after {}", few.len());
        let left = w.state.containers[&c].quota.left(Resource::MrBytes);
        assert_eq!(left, 10_000 - 76 * few.len() as u64);
        assert_eq!(w.state.lease_mrs(me, pd, left).expect("all that is left").len(), 1);
        assert!(matches!(w.state.lease_mrs(me, pd, 1), Err(Refusal::Quota(_))));
    }
}
