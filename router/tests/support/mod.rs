//! A router on a temporary socket, and clients that speak the protocol to it.

#![allow(dead_code)] // each test program uses a part of it

use std::os::fd::{AsFd, OwnedFd};
use std::path::PathBuf;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use freeflow_core::ctl::*;
use freeflow_core::ring::mr::slot_of;
use freeflow_core::ring::{MR_SLOTS, MrEntry, MrView};
use freeflow_core::shm::{Mapping, make_bell, make_memfd};
use freeflow_core::verbs::{Gid, QpType};
use freeflow_router::admin;
use freeflow_router::config::Settings;
use freeflow_router::daemon::Daemon;
use rustix::io::Errno;
use rustix::net::RecvFlags;
use rustix::net::sockopt::{Timeout, set_socket_timeout};

/// A test that waits longer than this for anything has failed.
const WATCHDOG: Duration = Duration::from_secs(20);

pub struct Rig {
    pub daemon: Option<Daemon>,
    pub dir: PathBuf,
}

impl Rig {
    pub fn new() -> Self {
        Rig::with(Settings::default())
    }

    pub fn with(settings: Settings) -> Self {
        // Tests of this machine run at the same time, and this address is one for all.
        let settings = Settings { metrics: "127.0.0.1:0".parse().expect("address"), ..settings };
        static NUMBER: AtomicU32 = AtomicU32::new(0);
        let number = NUMBER.fetch_add(1, Ordering::Relaxed);
        let dir = std::env::temp_dir().join(format!("ff-router-{}-{number}", std::process::id()));
        std::fs::create_dir(&dir).expect("scratch directory");
        let daemon = Daemon::start(&dir.join("router.sock"), settings).expect("router");
        Rig { daemon: Some(daemon), dir }
    }

    pub fn socket(&self) -> PathBuf {
        self.dir.join("router.sock")
    }

    pub fn admin(&self) -> admin::Client {
        admin::Client::connect(&self.socket()).expect("admin socket")
    }

    pub fn container(&self, name: &str, ip: [u8; 4], tenant: &str) -> admin::Container {
        let add = admin::Add {
            name: name.into(),
            ip: Some(ip.into()),
            tenant: Some(tenant.into()),
            ..admin::Add::default()
        };
        self.admin().add(add).expect("container")
    }

    pub fn connect(&self) -> Socket {
        connect(&self.socket())
    }

    pub fn client(&self) -> Client {
        Client::at(&self.socket())
    }
}

impl Drop for Rig {
    fn drop(&mut self) {
        self.daemon.take();
        // It is for the next router.
        std::fs::remove_file(self.dir.join("router.secret")).expect("the secret");
        let left: Vec<_> =
            std::fs::read_dir(&self.dir).expect("scratch").flatten().map(|e| e.path()).collect();
        std::fs::remove_dir_all(&self.dir).expect("remove scratch");
        if !std::thread::panicking() {
            assert!(left.is_empty(), "the router left {left:?} behind");
        }
    }
}

pub fn connect(path: &std::path::Path) -> Socket {
    let socket = Socket::connect(path).expect("connect");
    watch(&socket);
    socket
}

/// Lets waits on `socket` fail in the end.
pub fn watch(socket: &Socket) {
    set_socket_timeout(socket, Timeout::Recv, Some(WATCHDOG)).expect("timeout");
}

pub fn hello(purpose: u32) -> Hello {
    Hello { min_version: 1, max_version: VERSION, purpose }
}

/// A verbs client after its hello.
pub struct Client {
    pub socket: Socket,
    pub events: Socket,
    pub hello: HelloReply,
    pub table: Mapping,
}

/// A queue pair and what belongs to it.
#[derive(Debug, Clone, Copy)]
pub struct TestQp {
    pub qpn: u32,
    pub proof: u64,
    pub pd: u32,
    pub slab: u32,
    pub cq: u32,
    pub channel: u32,
}

pub const SLAB: u64 = 64 << 10;
pub const CQ_OFF: u32 = 0;
pub const QP_OFF: u32 = 4096;
pub const RQ_OFF: u32 = 8192;

impl Client {
    pub fn at(path: &std::path::Path) -> Self {
        Client::over(connect(path))
    }

    /// Says hello on a connection.
    pub fn over(socket: Socket) -> Self {
        watch(&socket);
        let (hello, fds) = socket.call(&hello(purpose::VERBS), &[]).expect("hello");
        let mut fds = fds.into_iter();
        let events = Socket::new(fds.next().expect("event socket"));
        watch(&events);
        let table = fds.next().expect("MR table");
        assert!(fds.next().is_none());
        let table = Mapping::new(table, 0, MR_SLOTS * size_of::<MrEntry>(), true).expect("mmap");
        Client { socket, events, hello, table }
    }

    pub fn gid(&self) -> RawGid {
        self.hello.vip
    }

    pub fn ask<T: Request>(&self, request: &T) -> T::Reply {
        self.socket.call(request, &[]).unwrap_or_else(|e| panic!("{}: {e}", T::NAME)).0
    }

    pub fn refused<T: Request>(&self, request: &T) -> Errno {
        refusal(self.socket.call(request, &[]))
    }

    pub fn pd(&self) -> u32 {
        let memory = make_memfd("test-pd", 1 << 20).expect("memfd");
        self.socket.call(&AllocPd {}, &[memory.as_fd()]).expect("AllocPd").0.id
    }

    /// A channel, and the end of its bell that hears.
    pub fn channel(&self) -> (u32, OwnedFd) {
        let (heard, bell) = make_bell().expect("bell");
        (self.socket.call(&CreateChannel {}, &[bell.as_fd()]).expect("CreateChannel").0.id, heard)
    }

    pub fn slab(&self) -> (u32, OwnedFd) {
        let (reply, fds) = self.socket.call(&MakeSlab { len: SLAB }, &[]).expect("MakeSlab");
        (reply.id, fds.into_iter().next().expect("slab"))
    }

    pub fn qp(&self, kind: QpType) -> TestQp {
        let (slab, _) = self.slab();
        let (pd, (channel, _bell)) = (self.pd(), self.channel());
        let cq = self.ask(&CreateCq { channel, slab, off: CQ_OFF, _pad: 0 }).id;
        let create = CreateQp {
            pd,
            send_cq: cq,
            recv_cq: cq,
            kind: kind as u32,
            slab,
            qp_off: QP_OFF,
            rq_off: RQ_OFF,
            rq_depth: 16,
            rq_sge: 1,
            cq_bit: 0,
            srq: 0,
            xrcd: 0,
        };
        let Id { id: qpn, proof, .. } = self.ask(&create);
        TestQp { qpn, proof, pd, slab, cq, channel }
    }

    pub fn connect(&self, qp: TestQp, peer: TestQp, peer_gid: RawGid) {
        self.ask(&Connect { qpn: qp.qpn, dest_qpn: peer.qpn, dgid: peer_gid, traffic_class: 0 });
    }

    pub fn resolve(&self, qp: TestQp, peer: TestQp, peer_gid: RawGid) -> (PeerInfo, Vec<OwnedFd>) {
        let request = Resolve { qpn: qp.qpn, dest_qpn: peer.qpn, dgid: peer_gid, ..Resolve::default() };
        self.socket.call(&request, &[]).expect("Resolve")
    }

    /// The next event, which must be a `T`.
    pub fn event<T: Event>(&self) -> T {
        let event = self.events.recv(RecvFlags::empty()).expect("an event");
        event.event().unwrap_or_else(|| panic!("event of kind {:#x}", event.header.kind))
    }

    pub fn no_event(&self) {
        // Events of earlier requests went out before those requests' replies.
        let got = self.events.recv(RecvFlags::DONTWAIT);
        assert!(matches!(got, Err(SocketError::System(_, Errno::AGAIN))), "{got:?}");
    }

    /// Registers memory and publishes its entry as a client does.
    pub fn register(&self, pd: u32, bytes: &[u8], access: freeflow_core::verbs::Access, iova: u64) -> u32 {
        let (addr, len) = (bytes.as_ptr() as u64, bytes.len() as u64);
        let key = self.ask(&RegMr { pd, access: access.bits(), addr, len }).key;
        let view = MrView { key, access, pd, iova, addr, len, ..MrView::default() };
        self.entry(key).publish(&view);
        key
    }

    pub fn entry(&self, key: u32) -> &MrEntry {
        let slots = self.table.slice::<MrEntry>(0, MR_SLOTS).expect("table");
        &slots[slot_of(key)]
    }
}

pub fn refusal<T>(result: Result<T, SocketError>) -> Errno {
    match result {
        Err(SocketError::Refused(errno)) => errno,
        Err(error) => panic!("not refused: {error}"),
        Ok(_) => panic!("not refused"),
    }
}

/// Two clients, each with one queue pair, connected to each other.
pub fn connected(rig: &Rig, kind: QpType) -> ((Client, TestQp), (Client, TestQp)) {
    let (a, b) = (rig.client(), rig.client());
    let (qa, qb) = (a.qp(kind), b.qp(kind));
    a.connect(qa, qb, b.gid());
    b.connect(qb, qa, a.gid());
    if kind != QpType::Ud {
        assert_eq!(a.event::<PeerReady>().qpn, qa.qpn);
    }
    ((a, qa), (b, qb))
}

pub fn gid(ip: [u8; 4]) -> RawGid {
    Gid::of(ip.into()).0
}
