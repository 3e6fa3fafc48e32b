//! All the router knows about containers, clients and their objects, as plain tables behind one lock.
//!
//! Owns who has what and which requests are legal: every operation checks all of its arguments before any effect. It
//! does no I/O that can block; what must be told to clients leaves through the outbox. It must never know packets.

mod client;
mod container;
mod copies;
mod death;
mod far;
mod far_mcast;
mod mcast;
mod mr;
mod objects;
mod peers;
mod qp;
mod resume;
mod srq;
mod table;
#[cfg(any(test, fuzzing))]
pub(crate) mod testing;

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::net::IpAddr;
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::sync::Arc;

use freeflow_core::ctl::Socket;
use freeflow_core::verbs::Gid;

pub use client::{Client, Given, MrTable};
pub use container::{Container, Counters, sorted};
pub use copies::CopyPlan;
pub use far::{FarDomain, FarQp, FarRing, FarSrq};
pub use far_mcast::{FarMember, Joining};
use mcast::Groups;
pub use mr::{Mr, Mrs};
pub use objects::{Channel, Cq, Pd, Slab};
pub use qp::{Link, NewQp, Qp};
pub use resume::Resuming;
pub use srq::Srq;
pub use table::{Owner, Table};

use crate::config::Settings;
use crate::directory::{Directory, Tenant};
use crate::limiter::Limiter;
use crate::quota::{Quota, Resource};
use crate::random::Random;
use crate::refusal::{Refusal, Result};

/// Client ids have 24 bits.
const CLIENT_IDS: u32 = 1 << 24;
/// Ids of other objects have 30: a PD is told from the domain of a memory window (`ring::mr`).
const OBJECT_IDS: u32 = 1 << 30;

/// Something a client must be told.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Notice {
    PeerReady { qpn: u32 },
    PeerProgress { qpn: u32 },
    PeerFault { qpn: u32 },
    PeerGone { qpn: u32 },
    PeerLeft { qpn: u32 },
    ClientGone { client: u32 },
    SrqLimit { srq: u32 },
}

/// What leaves the state when its lock is given back.
#[derive(Debug, Default)]
pub struct Outbox {
    /// For whom, and what; sent under the lock (in order), without waiting.
    pub notices: Vec<(u32, Notice)>,
    /// Queue pairs that are connected no more, and whether that is because their process died: a link may use them.
    pub unlinked: Vec<(u32, bool)>,
    /// Containers that joined or left a multicast group: other hosts must know.
    pub groups: Vec<Joining>,
    /// Bells to ring after the lock is gone.
    pub bells: Vec<Arc<OwnedFd>>,
    /// Lines for the operator; writing them may block, so that is done without the lock, too.
    pub lines: Vec<String>,
}

/// Attributes of a container to be.
#[derive(Debug, Clone)]
pub struct NewContainer {
    pub name: String,
    pub tenant: String,
    /// `None`: one from the pool.
    pub vip: Option<IpAddr>,
    /// Further addresses that mean this container.
    pub aliases: Vec<IpAddr>,
    pub socket: PathBuf,
}

#[derive(Debug)]
pub struct State {
    pub settings: Arc<Settings>,
    pub containers: BTreeMap<u32, Container>,
    pub directory: Directory,
    pub clients: HashMap<u32, Client>,
    /// Every connection from accept to its end: its container, and the socket to hang up.
    pub connections: HashMap<u64, (u32, Arc<Socket>)>,
    pub slabs: Table<Slab>,
    pub pds: Table<Pd>,
    pub channels: Table<Channel>,
    pub cqs: Table<Cq>,
    pub qps: Table<Qp>,
    pub srqs: Table<Srq>,
    pub outbox: Outbox,
    /// Multicast groups, per tenant.
    groups: HashMap<Tenant, Groups>,
    /// And who is in them on other hosts.
    far_groups: HashMap<(Tenant, Gid), BTreeSet<FarMember>>,
    /// Queue pairs that were connected under an earlier router, and whose peers have not come back.
    awaiting: HashSet<u32>,
    random: Random,
    next_connection: u64,
    next_container: u32,
    next_client: u32,
    next_object: u32,
}

impl State {
    pub fn new(settings: Arc<Settings>, mut random: Random) -> Self {
        // Somewhere else than an earlier router, whose clients may come back with theirs.
        let mut start = || random.next_u32().unwrap_or(0);
        let (next_client, next_object) = (start() % (CLIENT_IDS - 1) + 1, start() % (OBJECT_IDS - 1) + 1);
        State {
            settings,
            containers: BTreeMap::new(),
            directory: Directory::default(),
            clients: HashMap::new(),
            connections: HashMap::new(),
            slabs: Table::new("slab"),
            pds: Table::new("protection domain"),
            channels: Table::new("completion channel"),
            cqs: Table::new("completion queue"),
            qps: Table::new("queue pair"),
            srqs: Table::new("shared receive queue"),
            outbox: Outbox::default(),
            groups: HashMap::new(),
            far_groups: HashMap::new(),
            awaiting: HashSet::new(),
            random,
            next_connection: 1,
            next_container: 1,
            next_client,
            next_object,
        }
    }

    /// Adds a container. Its name is unique on the host, its addresses in its tenant.
    pub fn add_container(&mut self, new: NewContainer) -> std::result::Result<u32, String> {
        if !Container::valid_name(&new.name) || !Container::valid_name(&new.tenant) {
            return Err(format!(
                "names of containers and tenants are letters, digits, '.', '_' and '-', 64 at most: {:?}, {:?}",
                new.name, new.tenant
            ));
        }
        if let Some(there) = self.container_named(&new.name) {
            return Err(format!(
                "container {} exists already, with address {}, tenant {} and socket {}: leave out what differs, or \
                 remove it first",
                there.name,
                there.vip,
                there.tenant,
                there.socket.display()
            ));
        }
        let tenant: Tenant = new.tenant.as_str().into();
        let vip = match new.vip {
            Some(vip) => vip.to_canonical(),
            None => self.free_vip(&tenant)?,
        };
        if let Some(holder) = self.directory.find(&tenant, vip) {
            let name = self.containers.get(&holder).map_or("?", |c| c.name.as_str());
            return Err(format!(
                "container {name} of tenant {tenant} has address {vip} already: take another, or remove that one"
            ));
        }
        let id = self.next_container;
        self.next_container += 1;
        for ip in std::iter::once(vip).chain(new.aliases) {
            // The vIP is free; an alias that another container has stays with it.
            let _ = self.directory.claim(&tenant, ip, id);
        }
        self.containers.insert(
            id,
            Container {
                id,
                name: new.name,
                tenant,
                vip,
                socket: new.socket,
                quota: Quota::new(&self.settings),
                ended: Counters::default(),
                leaving: false,
                refused: Default::default(),
                log: Limiter::new(50, 1),
            },
        );
        Ok(id)
    }

    fn free_vip(&self, tenant: &Tenant) -> std::result::Result<IpAddr, String> {
        let mut pool = self.settings.vip_pool.hosts().map(IpAddr::from);
        pool.find(|ip| self.directory.find(tenant, *ip).is_none()).ok_or_else(|| {
            format!("the pool {:?} has no address left for tenant {tenant}", self.settings.vip_pool)
        })
    }

    pub fn container_named(&self, name: &str) -> Option<&Container> {
        self.containers.values().find(|c| c.name == name)
    }

    /// Begins to remove a container: its addresses are gone, its connections end.
    pub fn leave(&mut self, id: u32) {
        self.directory.forget(id);
        if let Some(container) = self.containers.get_mut(&id) {
            container.leaving = true;
        }
        self.end_connections(|container| container == id);
    }

    /// Ends the connections of some containers: each finishes the request it is at.
    pub fn end_connections(&self, of: impl Fn(u32) -> bool) {
        for (_, socket) in self.connections.values().filter(|(container, _)| of(*container)) {
            // An error means that it is gone already.
            let _ = rustix::net::shutdown(&**socket, rustix::net::Shutdown::Read);
        }
    }

    /// Takes a connection on, before it said anything. It must end in [`State::dismiss`].
    pub fn admit(&mut self, container: u32, socket: Arc<Socket>) -> Result<u64> {
        let gone = Refusal::NoSuch { what: "container", id: container };
        let home = self.containers.get_mut(&container).filter(|c| !c.leaving).ok_or(gone)?;
        home.quota.take(&[(Resource::Clients, 1)])?;
        let id = self.next_connection;
        self.next_connection += 1;
        self.connections.insert(id, (container, socket));
        Ok(id)
    }

    /// A connection ended.
    pub fn dismiss(&mut self, connection: u64) {
        if let Some((container, _)) = self.connections.remove(&connection) {
            self.give_back(container, &[(Resource::Clients, 1)]);
        }
    }

    /// Forgets a container whose last connection has ended; true once it is gone.
    pub fn forget_container(&mut self, id: u32) -> bool {
        let idle = !self.connections.values().any(|(container, _)| *container == id);
        if idle {
            self.containers.remove(&id);
        }
        idle
    }

    /// A fresh client id: reused only after 2^24 connections, long after every peer was told that the old one is gone.
    pub fn new_client_id(&mut self) -> Result<u32> {
        for _ in 1..CLIENT_IDS {
            let id = self.next_client;
            self.next_client = if id + 1 == CLIENT_IDS { 1 } else { id + 1 };
            if !self.clients.contains_key(&id) {
                return Ok(id);
            }
        }
        Err(Refusal::Exhausted("client ids"))
    }

    /// An id no slab, PD, channel or CQ has. Peers know objects by id, so it is unique on the host.
    fn new_object_id(&mut self, owner: Owner) -> Result<u32> {
        if let Some(id) = self.claimed(owner.client, resume::OBJECT) {
            let taken = Refusal::Busy { what: "object id", id, by: "new object" };
            return if self.is_object(id) { Err(taken) } else { Ok(id) };
        }
        loop {
            let id = self.next_object;
            self.next_object = id % (OBJECT_IDS - 1) + 1;
            if !self.is_object(id) {
                return Ok(id);
            }
        }
    }

    fn is_object(&self, id: u32) -> bool {
        self.slabs.contains(id)
            || self.pds.contains(id)
            || self.channels.contains(id)
            || self.cqs.contains(id)
    }

    fn random(&mut self) -> Result<u32> {
        draw(&mut self.random)
    }

    pub fn client(&self, id: u32) -> Result<&Client> {
        self.clients.get(&id).ok_or(Refusal::NoSuch { what: "client", id })
    }

    pub fn client_mut(&mut self, id: u32) -> Result<&mut Client> {
        self.clients.get_mut(&id).ok_or(Refusal::NoSuch { what: "client", id })
    }

    pub fn owner(&self, client: u32) -> Result<Owner> {
        self.client(client).map(Client::owner)
    }

    /// The container that `gid` means to a process of `container`. Loopback is always the asker's own.
    pub fn container_at(&self, container: u32, gid: Gid) -> Option<u32> {
        let tenant = &self.containers.get(&container)?.tenant;
        let ip = gid.ip();
        if ip.is_loopback() { Some(container) } else { self.directory.find(tenant, ip) }
    }

    fn take(&mut self, container: u32, wants: &[(Resource, u64)]) -> Result<()> {
        let gone = Refusal::NoSuch { what: "container", id: container };
        Ok(self.containers.get_mut(&container).ok_or(gone)?.quota.take(wants)?)
    }

    pub fn give_back(&mut self, container: u32, what: &[(Resource, u64)]) {
        if let Some(container) = self.containers.get_mut(&container) {
            container.quota.give_back(what);
        }
    }

    fn tell(&mut self, client: u32, notice: Notice) {
        self.outbox.notices.push((client, notice));
    }
}

fn draw(random: &mut Random) -> Result<u32> {
    random.next_u32().map_err(|_| Refusal::Exhausted("randomness"))
}

#[cfg(test)]
mod tests {
    use super::testing::*;
    use super::*;

    #[test]
    fn containers_have_unique_names_and_addresses() {
        let mut w = World::new();
        let new = |name: &str, ip: Option<[u8; 4]>, tenant: &str| NewContainer {
            name: name.into(),
            tenant: tenant.into(),
            vip: ip.map(Into::into),
            aliases: vec![],
            socket: "/x".into(),
        };
        w.state.add_container(new("c1", Some([10, 0, 0, 1]), "red")).expect("new");
        let same_name = w.state.add_container(new("c1", Some([10, 0, 0, 9]), "blue"));
        assert!(same_name.expect_err("name").contains("c1"));
        let same_ip = w.state.add_container(new("c2", Some([10, 0, 0, 1]), "red"));
        assert!(same_ip.expect_err("address").contains("10.0.0.1"));
        w.state.add_container(new("c2", Some([10, 0, 0, 1]), "blue")).expect("another tenant");
        for bad in ["", "../x", "-x", ".", "a b", "a/b", &"x".repeat(65)] {
            w.state.add_container(new(bad, None, "red")).expect_err(bad);
        }
        let c3 = w.state.add_container(new("c3", None, "red")).expect("pool");
        let c4 = w.state.add_container(new("c4", None, "red")).expect("pool");
        assert_ne!(w.state.containers[&c3].vip, w.state.containers[&c4].vip);
    }

    #[test]
    fn client_ids_wrap_around_the_living() {
        let mut w = World::new();
        let c = w.container("c1", [10, 0, 0, 1], "red");
        let first = w.client(c);
        w.state.next_client = CLIENT_IDS - 1;
        assert_eq!(w.state.new_client_id(), Ok(CLIENT_IDS - 1));
        assert_ne!(w.state.new_client_id(), Ok(first), "1 is alive");
    }
}
