//! A host with one queue pair to another one, without any process or thread behind it, for tests that are its network.

use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Weak};

use freeflow_core::ring::{Extent, MrView, Submissions, Wqe, link::slot_words, mr::slot_of};
use freeflow_core::shm::{View, make_memfd};
use freeflow_core::sync::Ordering;
use freeflow_core::verbs::{Access, Gid, QpState, QpType, Sge};
use rustix::event::{Timespec, epoll};

use super::engine::{Engine, Own, Token};
use crate::cluster::Stream;
use crate::state::testing::World;
use crate::state::{FarRing, Owner};

/// The key of the one region that others may write to: all of the file but its first page.
pub const KEY: u32 = 5 << 16 | 3;
pub const PAGE: u64 = 1 << 12;
pub const FILE: u64 = 32 * PAGE;
/// Places for requests.
pub const DEPTH: u32 = 16;

pub struct Host {
    pub engine: Engine,
    pub file: OwnedFd,
    pub qpn: u32,
    world: World,
    owner: Owner,
    slab: u32,
    /// The process's view of what it submits.
    requests: FarRing,
    posted: u32,
}

impl Host {
    /// One that is called `name` and has a container at `ip`.
    pub fn new(name: &str, ip: [u8; 4], kind: QpType) -> Self {
        let mut world = World::new();
        let container = world.container("a", ip, "t");
        let owner = world.owner_of_new_client(container);
        let file = make_memfd("link", FILE).expect("memfd");
        let pd = world.state.alloc_pd(owner, file.try_clone().expect("dup")).expect("pd");
        let new = crate::state::NewQp { pd, ..world.new_qp(owner, kind) };
        let qpn = world.state.create_qp(owner, new).expect("qp");
        publish_region(&mut world, owner, pd);
        let epoll = Arc::new(epoll::create(epoll::CreateFlags::CLOEXEC).expect("epoll"));
        let own = Own { name: name.into(), boot: 1 };
        let mut engine = Engine::new(Weak::new(), epoll, own).expect("a timer");
        let slab = world.slab(owner);
        open_doorbell(&mut engine, &world, owner, slab, ip);
        let requests = requests(&world, owner, slab);
        Host { engine, file, qpn, world, owner, slab, requests, posted: 0 }
    }

    /// Connects the queue pair to one of the host `name`.
    pub fn connect(&mut self, name: &str, ip: [u8; 4], dest: u32) {
        self.world.state.connect(self.owner, self.qpn, dest, Gid::of(ip.into())).expect("connect");
        let qp = self.world.state.far_qp(self.qpn).expect("all of it");
        let shared = &qp.shared[0];
        shared.qpn.store(self.qpn, Ordering::Relaxed);
        shared.peer_qpn.store(dest, Ordering::Relaxed);
        shared.access.store(Access::all().bits(), Ordering::Relaxed);
        shared.state.store(QpState::Rts as u32, Ordering::Relaxed);
        self.engine.connect(qp, name.into());
        let theirs = requests(&self.world, self.owner, self.slab);
        assert!(self.engine.attach(self.owner.client, self.qpn, theirs, 0, 0));
    }

    /// Has the process submit a request, whose list is of one entry.
    pub fn post(&mut self, wqe: &Wqe, at: u64) {
        let list = [Sge { addr: at, length: wqe.total, lkey: KEY }];
        let FarRing { header, words, stride } = &self.requests;
        let ring = Submissions::new(&header[0], words, *stride).expect("whole");
        ring.write(self.posted, &Wqe { sges: 1, ..*wqe }, &list);
        self.posted += 1;
        ring.publish(self.posted);
        self.engine.take(self.qpn, self.engine.now());
    }

    /// How many requests ended, and did all end well?
    #[cfg(test)]
    pub fn done(&self) -> (u32, bool) {
        let none = freeflow_core::ring::LinkDone { count: 0, status: 0 };
        let done = self.requests.header[0].poll(none).unwrap_or(none);
        (done.count, done.status == 0)
    }

    /// Takes note of what came. False: nothing did.
    pub fn note(&mut self) -> bool {
        let mut events = Vec::with_capacity(16);
        let (now, room) = (Timespec::default(), rustix::buffer::spare_capacity(&mut events));
        epoll::wait(&*self.engine.epoll, room, Some(&now)).expect("epoll_wait");
        events.iter().for_each(|event| self.engine.note(Token::of(event.data), event.flags));
        !events.is_empty()
    }

    /// Does what there is to do, as the link's thread does, until there is no more.
    pub fn work(&mut self) {
        loop {
            while self.engine.turn() {}
            if !self.note() {
                return;
            }
        }
    }

    pub fn memory(&self, at: u64, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        assert_eq!(rustix::io::pread(&self.file, &mut bytes, at).expect("pread"), len);
        bytes
    }
}

/// A connection's two ends: the engine's, from the host `peer`, and the one in the network's hands.
pub fn wire(peer: &str) -> (Stream, UnixStream) {
    let (theirs, ours) = UnixStream::pair().expect("socketpair");
    // As little as the kernel allows: some kilobytes.
    rustix::net::sockopt::set_socket_send_buffer_size(&ours, 1).expect("SO_SNDBUF");
    ours.set_nonblocking(true).expect("nonblocking");
    theirs.set_nonblocking(true).expect("nonblocking");
    (Stream::plain(OwnedFd::from(ours).into(), peer.into()), theirs)
}

fn publish_region(world: &mut World, owner: Owner, pd: u32) {
    let mut extents = [Extent::default(); 3];
    extents[0] = Extent { va: PAGE, len: FILE - PAGE, offset: PAGE };
    world.own_table(owner)[slot_of(KEY)].publish(&MrView {
        key: KEY,
        access: Access::all(),
        pd,
        iova: PAGE,
        addr: PAGE,
        len: FILE - PAGE,
        extents,
        extent_count: 1,
        ..MrView::default()
    });
}

/// The slab of rings: requests at its beginning, the doorbell at the end.
fn open_doorbell(engine: &mut Engine, world: &World, owner: Owner, slab: u32, ip: [u8; 4]) {
    let doorbell: View<_> = world.state.far_doorbell(owner, slab, 61440).expect("in its slab");
    let (heard, _) = freeflow_core::shm::make_bell().expect("bell");
    engine.open_doorbell(owner.client, ("t".into(), Gid::of(ip.into())), doorbell, heard).expect("epoll");
}

fn requests(world: &World, owner: Owner, slab: u32) -> FarRing {
    world.state.far_ring(owner, slab, 0, DEPTH, slot_words(1, 64) as u32).expect("in its slab")
}
