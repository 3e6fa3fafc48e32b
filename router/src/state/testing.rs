//! A small world for the tables' tests: containers, clients and objects without any process behind them.

use std::os::fd::OwnedFd;
use std::sync::Arc;

use freeflow_core::ring::{MR_SLOTS, MrEntry};
use freeflow_core::shm::{Mapping, View, make_memfd};
use freeflow_core::verbs::QpType;
use rustix::event::EventfdFlags;

use super::*;

pub const SLAB: u64 = 1 << 16;

pub struct World {
    pub state: State,
}

pub fn eventfd() -> OwnedFd {
    rustix::event::eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK).expect("eventfd")
}

impl World {
    pub fn new() -> Self {
        World::with(Settings::default())
    }

    pub fn with(settings: Settings) -> Self {
        World { state: State::new(Arc::new(settings), Random::new().expect("random")) }
    }

    pub fn container(&mut self, name: &str, ip: [u8; 4], tenant: &str) -> u32 {
        let new = NewContainer {
            name: name.into(),
            tenant: tenant.into(),
            vip: Some(ip.into()),
            aliases: vec![],
            socket: "/nowhere".into(),
        };
        self.state.add_container(new).expect("container")
    }

    pub fn client(&mut self, container: u32) -> u32 {
        let (rpc, event) = Socket::pair().expect("socketpair");
        let rpc = Arc::new(rpc);
        self.state.admit(container, rpc.clone()).expect("room");
        let id = self.state.new_client_id().expect("id");
        self.state.clients.insert(
            id,
            Client {
                id,
                container,
                pid: 1,
                rpc,
                event: Arc::new(event),
                memory: Err(rustix::io::Errno::ACCESS),
                mr_table: Some(Arc::new(MrTable::new().expect("table").0)),
                mrs: Mrs::default(),
                cut_off: false,
                given: Default::default(),
                met: Default::default(),
                key_failures: Limiter::new(1, 1),
                key_failures_total: 0,
                resuming: Resuming::No,
            },
        );
        id
    }

    pub fn owner_of_new_client(&mut self, container: u32) -> Owner {
        let id = self.client(container);
        self.state.owner(id).expect("client")
    }

    /// A client's table of memory regions, as the client itself has it.
    pub fn own_table(&mut self, owner: Owner) -> View<MrEntry> {
        let (table, own) = MrTable::new().expect("table");
        let map = Mapping::new(&own, 0, table.map.len(), true).expect("mmap");
        self.state.clients.get_mut(&owner.client).expect("client").mr_table = Some(Arc::new(table));
        View::new(Arc::new(map), 0, MR_SLOTS).expect("whole")
    }

    pub fn pd(&mut self, owner: Owner) -> u32 {
        self.state.alloc_pd(owner, eventfd()).expect("pd")
    }

    pub fn slab(&mut self, owner: Owner) -> u32 {
        self.state.reserve_slab(owner, SLAB).expect("quota");
        let fd = make_memfd("test", SLAB).expect("memfd");
        let map = Mapping::new(&fd, 0, SLAB as usize, true).expect("mmap");
        self.state.insert_slab(owner, Slab { fd: Arc::new(fd), map: Arc::new(map) }).expect("a new id")
    }

    /// Arguments for a queue pair with everything it needs, in a slab of its own.
    pub fn new_qp(&mut self, owner: Owner, kind: QpType) -> NewQp {
        let pd = self.pd(owner);
        let slab = self.slab(owner);
        let channel = self.state.create_channel(owner, eventfd()).expect("channel");
        let recv_cq = self.state.create_cq(owner, channel, slab, 0).expect("cq");
        let send_cq = self.state.create_cq(owner, 0, slab, 1024).expect("cq");
        let (kind, qp_off, rq_off) = (kind as u32, 4096, 8192);
        let (rq_depth, rq_sge, cq_bit) = (4, 1, 1);
        NewQp {
            pd,
            send_cq,
            recv_cq,
            kind,
            slab,
            qp_off,
            rq_off,
            rq_depth,
            rq_sge,
            cq_bit,
            ..NewQp::default()
        }
    }

    pub fn qp(&mut self, owner: Owner, kind: QpType) -> u32 {
        let new = self.new_qp(owner, kind);
        self.state.create_qp(owner, new).expect("qp")
    }

    /// What clients were to be told since the last call.
    pub fn notices(&mut self) -> Vec<(u32, Notice)> {
        std::mem::take(&mut self.state.outbox.notices)
    }
}
