//! The protocol against a whole router: hello, objects, ownership, quotas, connecting, copying, death.

mod support;

use std::os::fd::AsFd;

use freeflow_core::ctl::*;
use freeflow_core::shm::{Mapping, make_memfd};
use freeflow_core::verbs::{Access, QpType};
use freeflow_router::config::Settings;
use rustix::io::Errno;
use rustix::net::{RecvFlags, SendFlags};
use support::*;
use zerocopy::IntoBytes;

/// The connection must end without another word.
fn assert_closed(socket: &Socket) {
    let got = socket.recv(RecvFlags::empty());
    assert!(matches!(got, Err(SocketError::Closed)), "{got:?}");
}

#[test]
fn hello_decides_version_and_identity() {
    let rig = Rig::new();
    let c1 = rig.container("c1", [10, 0, 0, 1], "red");
    let (a, b) = (Client::at(&c1.socket), Client::at(&c1.socket));
    assert_eq!(a.hello.vip, gid([10, 0, 0, 1]));
    assert_eq!((a.hello.version, a.hello.boot), (VERSION, b.hello.boot));
    assert_ne!(a.hello.client, b.hello.client);
    assert_ne!(a.hello.boot, 0);
    assert_eq!(a.hello.limits.max_qp, Settings::default().max_qp);

    let cm = rig.connect();
    let (_, fds) = cm.call(&hello(purpose::CM), &[]).expect("hello");
    assert_eq!(fds.len(), 1, "an event socket alone");
    assert_eq!(refusal(cm.call(&MakeSlab { len: 4096 }, &[])), Errno::OPNOTSUPP);

    for (hello, errno) in [
        (Hello { min_version: VERSION + 1, max_version: 99, ..hello(0) }, Errno::PROTONOSUPPORT),
        (Hello { min_version: 0, max_version: 0, ..hello(0) }, Errno::PROTONOSUPPORT),
        (hello(77), Errno::INVAL),
    ] {
        let socket = rig.connect();
        assert_eq!(refusal(socket.call(&hello, &[])), errno, "{hello:?}");
        assert_closed(&socket);
    }
    let newer = rig.connect();
    let (reply, _) = newer.call(&Hello { max_version: 99, ..hello(0) }, &[]).expect("a common version");
    assert_eq!(reply.version, VERSION);
}

#[test]
fn malformed_messages_end_their_connection_only() {
    let rig = Rig::new();
    let other = rig.client();
    let before_hello = rig.connect();
    before_hello
        .send(MakeSlab::KIND, 0, MakeSlab { len: 4096 }.as_bytes(), &[], SendFlags::empty())
        .expect("send");
    assert_closed(&before_hello);

    let short = rig.client();
    short.socket.send(DeallocPd::KIND, 0, &[1, 2], &[], SendFlags::empty()).expect("send");
    assert_closed(&short.socket);

    let file = make_memfd("x", 4096).expect("memfd");
    let surplus = rig.client();
    let body = DeallocPd { pd: 1 };
    surplus
        .socket
        .send(DeallocPd::KIND, 0, body.as_bytes(), &[file.as_fd()], SendFlags::empty())
        .expect("send");
    assert_closed(&surplus.socket);

    let missing = rig.client();
    missing.socket.send(AllocPd::KIND, 0, &[], &[], SendFlags::empty()).expect("send");
    assert_closed(&missing.socket);

    let unknown = rig.client();
    unknown.socket.send(999, 0, &[], &[], SendFlags::empty()).expect("send");
    let reply = unknown.socket.recv(RecvFlags::empty()).expect("a refusal");
    assert_eq!((reply.header.kind, reply.header.status), (999, Errno::OPNOTSUPP.raw_os_error()));
    unknown.pd();
    other.pd();
}

#[test]
fn descriptors_are_what_they_must_be() {
    let rig = Rig::new();
    let client = rig.client();
    let unsealed = rustix::fs::memfd_create("x", rustix::fs::MemfdFlags::ALLOW_SEALING).expect("memfd");
    let null = std::fs::File::open("/dev/null").expect("null");
    let event = rustix::event::eventfd(0, rustix::event::EventfdFlags::NONBLOCK).expect("eventfd");
    for bad in [unsealed.as_fd(), null.as_fd(), event.as_fd()] {
        assert_eq!(refusal(client.socket.call(&AllocPd {}, &[bad])), Errno::INVAL);
        assert_eq!(refusal(client.socket.call(&CreateChannel {}, &[bad])), Errno::INVAL);
    }
    let (_, slab) = client.slab();
    assert!(freeflow_core::shm::is_sealed_memfd(&slab));
    assert_eq!(rustix::fs::fstat(&slab).expect("fstat").st_size as u64, SLAB);
    assert_eq!(rustix::fs::fstat(&slab).expect("fstat").st_blocks as u64 * 512, SLAB, "wholly allocated");
    rustix::fs::ftruncate(&slab, 0).expect_err("sealed");
}

#[test]
fn objects_of_others_cannot_be_named() {
    let rig = Rig::new();
    let c1 = rig.container("c1", [10, 0, 0, 1], "red");
    let (me, sibling) = (Client::at(&c1.socket), Client::at(&c1.socket));
    let stranger = rig.client();
    let qp = me.qp(QpType::Rc);
    let (mut bytes, gid) = ([0u8; 64], me.gid());
    let key = me.register(qp.pd, &bytes, Access::REMOTE_WRITE, 0);
    for (client, errno) in [(&sibling, Errno::PERM), (&stranger, Errno::NOENT)] {
        assert_eq!(client.refused(&DeallocPd { pd: qp.pd }), errno);
        assert_eq!(client.refused(&DestroyChannel { channel: qp.channel }), errno);
        assert_eq!(client.refused(&DestroyCq { cq: qp.cq }), errno);
        assert_eq!(client.refused(&DestroyQp { qpn: qp.qpn }), errno);
        assert_eq!(client.refused(&Connect { qpn: qp.qpn, dest_qpn: 5, dgid: gid, traffic_class: 0 }), errno);
        assert_eq!(client.refused(&Disconnect { qpn: qp.qpn, error: 0 }), errno);
        assert_eq!(
            client.refused(&Resolve { qpn: qp.qpn, dest_qpn: 5, dgid: gid, ..Resolve::default() }),
            errno
        );
        assert_eq!(client.refused(&RegMr { pd: qp.pd, access: 0, addr: 0, len: 1 }), errno);
        assert_eq!(client.refused(&DeregMr { key, _pad: 0 }), Errno::NOENT);
        let (channel, off, _pad) = (0, 0, 0);
        assert_eq!(client.refused(&CreateCq { channel, slab: qp.slab, off, _pad }), errno);
    }
    assert_eq!(me.refused(&DeallocPd { pd: qp.pd }), Errno::BUSY);
    assert_eq!(me.refused(&DestroyCq { cq: qp.cq }), Errno::BUSY);
    assert_eq!(me.refused(&DestroyChannel { channel: qp.channel }), Errno::BUSY);
    me.ask(&DestroyQp { qpn: qp.qpn });
    me.ask(&DestroyCq { cq: qp.cq });
    me.ask(&DestroyChannel { channel: qp.channel });
    me.ask(&DeregMr { key, _pad: 0 });
    me.ask(&DeallocPd { pd: qp.pd });
    bytes.fill(1);
}

#[test]
fn quotas_hold_per_container_and_come_back() {
    let settings =
        Settings { max_qp: 2, max_cq: 3, max_mr: 2, max_mr_bytes: 1000, max_pd: 4, ..Settings::default() };
    let rig = Rig::with(settings);
    let (a, b) = (rig.client(), rig.client());
    let qa = a.qp(QpType::Rc);
    let qb = b.qp(QpType::Rc);
    let third = CreateQp {
        pd: qa.pd,
        send_cq: qa.cq,
        recv_cq: qa.cq,
        kind: QpType::Rc as u32,
        slab: qa.slab,
        qp_off: QP_OFF,
        rq_off: RQ_OFF,
        ..CreateQp::default()
    };
    assert_eq!(a.refused(&third), Errno::NOMEM);
    let mr = RegMr { pd: qa.pd, access: 0, addr: 0, len: 600 };
    a.ask(&mr);
    assert_eq!(a.refused(&mr), Errno::NOMEM);
    a.ask(&RegMr { len: 1, ..mr });
    assert_eq!(b.refused(&RegMr { pd: qb.pd, len: 1, ..mr }), Errno::NOMEM);
    let cq = CreateCq { channel: 0, slab: qa.slab, off: CQ_OFF, _pad: 0 };
    a.ask(&cq);
    assert_eq!(a.refused(&cq), Errno::NOMEM);

    let apart = rig.container("c1", [10, 0, 0, 1], "default");
    Client::at(&apart.socket).qp(QpType::Rc);
    drop(a);
    // b has nothing of a, so nobody tells it when a is buried: ps is asked until it shows it.
    let mut admin = rig.admin();
    let watch = std::time::Instant::now();
    while admin.ps().expect("ps").containers[0].mr_bytes != 0 {
        assert!(watch.elapsed().as_secs() < 20, "quotas of the dead do not come back");
    }
    b.ask(&RegMr { pd: qb.pd, len: 1000, ..mr });
}

#[test]
fn two_clients_find_each_other_in_either_order() {
    let rig = Rig::new();
    for first in [0, 1] {
        let clients = [rig.client(), rig.client()];
        let qps = clients.each_ref().map(|c| c.qp(QpType::Rc));
        let (x, y) = (first, 1 - first);
        let (cx, cy) = (&clients[x], &clients[y]);
        cx.connect(qps[x], qps[y], cy.gid());
        let (info, fds) = cx.resolve(qps[x], qps[y], cy.gid());
        assert_eq!((info.state, fds.len()), (peer_state::ABSENT, 0));
        cx.no_event();
        cy.connect(qps[y], qps[x], cx.gid());
        assert_eq!(cx.event::<PeerReady>().qpn, qps[x].qpn);
        cy.no_event();

        let (info, fds) = cx.resolve(qps[x], qps[y], cy.gid());
        assert_eq!(info.state, peer_state::READY);
        assert_eq!(info.fds, peer_fds::SLAB | peer_fds::MR_TABLE | peer_fds::PD | peer_fds::BELL);
        assert_eq!((info.client, info.pd, info.slab), (cy.hello.client, qps[y].pd, qps[y].slab));
        assert_eq!((info.qp_off, info.rq_off, info.rq_depth), (QP_OFF, RQ_OFF, 16));
        assert_eq!((info.cq_slab, info.cq_off, info.channel), (qps[y].slab, CQ_OFF, qps[y].channel));
        assert_eq!(fds.len(), 4);
        let refused = Mapping::new(&fds[1], 0, 4096, true);
        assert_eq!(refused.expect_err("the MR table is read-only"), Errno::ACCESS);
        let (again, fds) = cx.resolve(qps[x], qps[y], cy.gid());
        assert_eq!((again.fds, fds.len()), (0, 0));
        assert_eq!(again, PeerInfo { fds: 0, ..info });
    }
}

#[test]
fn a_given_slab_is_the_peers_memory() {
    let rig = Rig::new();
    let ((a, qa), (b, qb)) = connected(&rig, QpType::Rc);
    let (_, fds) = a.resolve(qa, qb, b.gid());
    let map = Mapping::new(&fds[0], 0, SLAB as usize, true).expect("mmap");
    let header = map.get::<freeflow_core::ring::QpShared>(QP_OFF.into()).expect("header");
    header.tx_bytes.store(123, std::sync::atomic::Ordering::Relaxed);
    header.state.store(3, std::sync::atomic::Ordering::Relaxed);
    let ps = rig.admin().ps().expect("ps");
    let qp = ps.containers[0].qps.iter().find(|qp| qp.qpn == qb.qpn).expect("in ps");
    assert_eq!((qp.tx_bytes, qp.state.as_str(), qp.transport.as_str()), (123, "RTS", "RC"));
    assert_eq!(qp.path.as_deref(), Some("direct"));
    assert_eq!(qp.peer.as_ref().expect("peer").qpn, qa.qpn);
    b.ask(&DestroyQp { qpn: qb.qpn });
    let ps = rig.admin().ps().expect("ps");
    assert_eq!(ps.containers[0].tx_bytes, 123, "ended queue pairs count");
}

#[test]
fn the_default_container_answers_to_the_hosts_addresses() {
    let rig = Rig::new();
    for name in [gid([127, 0, 0, 1]), std::net::Ipv6Addr::LOCALHOST.octets()] {
        let (a, b) = (rig.client(), rig.client());
        let (qa, qb) = (a.qp(QpType::Rc), b.qp(QpType::Rc));
        a.connect(qa, qb, name);
        b.connect(qb, qa, b.gid());
        assert_eq!(a.event::<PeerReady>().qpn, qa.qpn);
        assert_eq!(a.resolve(qa, qb, name).0.state, peer_state::READY);
    }
}

#[test]
fn tenants_are_apart() {
    let rig = Rig::new();
    let (red, blue) = (rig.container("r", [10, 0, 0, 1], "red"), rig.container("b", [10, 0, 0, 2], "blue"));
    let twin = rig.container("t", [10, 0, 0, 1], "blue");
    assert_eq!(twin.vip, red.vip);
    for kind in [QpType::Rc, QpType::Ud] {
        let (a, b) = (Client::at(&red.socket), Client::at(&blue.socket));
        let (qa, qb) = (a.qp(kind), b.qp(kind));
        a.connect(qa, qb, b.gid());
        b.connect(qb, qa, a.gid());
        assert_eq!(a.resolve(qa, qb, b.gid()).0.state, peer_state::ABSENT);
        assert_eq!(b.resolve(qb, qa, a.gid()).0.state, peer_state::ABSENT);
        a.no_event();
        b.no_event();
    }
}

#[test]
fn peers_hear_of_leaving_and_of_death() {
    let rig = Rig::new();
    let ((a, qa), (b, qb)) = connected(&rig, QpType::Rc);
    a.resolve(qa, qb, b.gid());
    b.ask(&Disconnect { qpn: qb.qpn, error: 1 });
    assert_eq!(a.event::<PeerLeft>().qpn, qa.qpn);
    assert_eq!(a.resolve(qa, qb, b.gid()).0.state, peer_state::ABSENT);
    b.connect(qb, qa, a.gid());
    assert_eq!(a.event::<PeerReady>().qpn, qa.qpn);
    let dead = b.hello.client;
    drop(b);
    assert_eq!(a.event::<PeerGone>().qpn, qa.qpn);
    assert_eq!(a.event::<ClientGone>().client, dead);
    assert_eq!(a.resolve(qa, qb, a.gid()).0.state, peer_state::ABSENT);
}

/// A connection that a child process made and gave to us. The socket outlives the process that is its identity.
struct Elsewhere {
    connection: Option<Socket>,
    /// Closing it ends the child.
    leash: Option<Socket>,
    pid: i32,
}

impl Elsewhere {
    fn new(path: &std::path::Path) -> Self {
        let (ours, theirs) = Socket::pair().expect("socketpair");
        // SAFETY: the child makes system calls only (nothing it calls allocates), and leaves by _exit.
        let pid = unsafe { libc::fork() };
        if pid == 0 {
            drop(ours); // its copy would keep the child waiting for itself
            let sent = Socket::connect(path)
                .is_ok_and(|socket| theirs.send(0, 0, &[], &[socket.as_fd()], SendFlags::empty()).is_ok());
            let _ = rustix::io::read(theirs.as_fd(), &mut [0u8; 1]);
            // SAFETY: ends the child without running the parent's destructors.
            unsafe { libc::_exit(i32::from(!sent)) };
        }
        assert!(pid > 0, "fork");
        let message = ours.recv(RecvFlags::empty()).expect("the child's connection");
        let connection = message.fds.into_iter().next().map(Socket::new);
        connection.iter().for_each(watch);
        Elsewhere { connection, leash: Some(ours), pid }
    }

    fn end(&mut self) {
        if let Some(leash) = self.leash.take() {
            // Shut down, not only closed: a sibling forked meanwhile may hold it, too.
            rustix::net::shutdown(&leash, rustix::net::Shutdown::Both).expect("shutdown");
        }
        let mut status = 0;
        // SAFETY: waits for our own child; the status goes to a live local.
        let waited = unsafe { libc::waitpid(self.pid, &raw mut status, 0) };
        assert_eq!((waited, status), (self.pid, 0));
    }
}

#[test]
fn a_process_that_died_is_gone_though_its_socket_lives() {
    let rig = Rig::new();
    let mut silent = Elsewhere::new(&rig.socket());
    silent.end();
    assert_closed(&silent.connection.take().expect("connection"));

    let a = rig.client();
    let mut child = Elsewhere::new(&rig.socket());
    let b = Client::over(child.connection.take().expect("connection"));
    let (qa, qb) = (a.qp(QpType::Rc), b.qp(QpType::Rc));
    a.connect(qa, qb, b.gid());
    b.connect(qb, qa, a.gid());
    a.event::<PeerReady>();
    a.resolve(qa, qb, b.gid());
    child.end();
    assert_eq!(a.event::<PeerGone>().qpn, qa.qpn);
    assert_eq!(a.event::<ClientGone>().client, b.hello.client);
    assert_closed(&b.socket);
}

#[test]
fn copies_reach_the_other_process_and_not_ours() {
    let (mine, theirs, back) = ([7u8; 64], [1u8; 64], [0u8; 64]);
    let rig = Rig::new();
    let a = rig.client();
    // The child is a fork: at the address of `theirs` it has a copy of its own.
    let mut child = Elsewhere::new(&rig.socket());
    let b = Client::over(child.connection.take().expect("connection"));
    let (qa, qb) = (a.qp(QpType::Rc), b.qp(QpType::Rc));
    a.connect(qa, qb, b.gid());
    b.connect(qb, qa, a.gid());
    let key = b.register(qb.pd, &theirs, Access::REMOTE_WRITE | Access::REMOTE_READ, 0);
    let request = CopyMem {
        qpn: qa.qpn,
        dest_qpn: qb.qpn,
        dgid: b.gid(),
        kind: copy_kind::WRITE,
        key,
        local: mine.as_ptr() as u64,
        remote: 0,
        len: 64,
    };
    a.ask(&request);
    assert_eq!(std::hint::black_box(&theirs), &[1; 64], "this process's bytes are not the child's");
    a.ask(&CopyMem { kind: copy_kind::READ, local: back.as_ptr() as u64, ..request });
    assert_eq!(std::hint::black_box(&back), &mine);
    child.end();
}

struct Copying {
    rig: Rig,
    a: Client,
    qa: TestQp,
    b: Client,
    qb: TestQp,
}

impl Copying {
    fn new() -> Self {
        let rig = Rig::new();
        let ((a, qa), (b, qb)) = connected(&rig, QpType::Rc);
        Copying { rig, a, qa, b, qb }
    }

    fn request(&self, kind: u32, key: u32, local: &[u8], remote: u64) -> CopyMem {
        CopyMem {
            qpn: self.qa.qpn,
            dest_qpn: self.qb.qpn,
            dgid: self.b.gid(),
            kind,
            key,
            local: local.as_ptr() as u64,
            remote,
            len: local.len() as u64,
        }
    }
}

#[test]
fn the_router_copies_between_processes() {
    let c = Copying::new();
    let len = 600_000;
    let mine: Vec<u8> = (0..len).map(|i| (i % 251) as u8).collect();
    let theirs = vec![0u8; len + 16];
    let back = vec![0u8; len];
    let all = Access::REMOTE_WRITE | Access::REMOTE_READ | Access::LOCAL_WRITE;
    let iova = 0x7000;
    let key = c.b.register(c.qb.pd, &theirs, all, iova);
    c.a.ask(&c.request(copy_kind::WRITE, key, &mine, iova + 16));
    assert!(std::hint::black_box(&theirs)[16..] == mine[..] && theirs[..16] == [0; 16]);
    c.a.ask(&c.request(copy_kind::READ, key, &back, iova + 16));
    assert!(std::hint::black_box(&back) == &mine);
    c.a.ask(&c.request(copy_kind::RECV, key, &mine[..16], iova));
    assert_eq!(std::hint::black_box(&theirs)[..16], mine[..16]);
    drop(c.rig);
}

#[test]
fn copies_are_checked() {
    let c = Copying::new();
    let mine = [7u8; 64];
    let theirs = [0u8; 64];
    let iova = 0x7000;
    let key = c.b.register(c.qb.pd, &theirs, Access::REMOTE_WRITE, iova);
    let good = c.request(copy_kind::WRITE, key, &mine, iova);
    let other_pd = c.b.pd();
    let in_other_pd = c.b.register(other_pd, &theirs, Access::REMOTE_WRITE, iova);
    for (bad, errno) in [
        (CopyMem { key: key ^ 0x1_0000, ..good }, Errno::ACCESS),
        (CopyMem { key: key ^ 1, ..good }, Errno::ACCESS),
        (CopyMem { key: 0, ..good }, Errno::ACCESS),
        (CopyMem { key: in_other_pd, ..good }, Errno::ACCESS),
        (CopyMem { kind: copy_kind::READ, ..good }, Errno::ACCESS),
        (CopyMem { kind: copy_kind::RECV, ..good }, Errno::ACCESS),
        (CopyMem { kind: 3, ..good }, Errno::INVAL),
        (CopyMem { remote: iova - 1, ..good }, Errno::ACCESS),
        (CopyMem { remote: iova + 1, ..good }, Errno::ACCESS),
        (CopyMem { remote: u64::MAX, ..good }, Errno::ACCESS),
        (CopyMem { len: u64::MAX, ..good }, Errno::INVAL),
        (CopyMem { local: 8, ..good }, Errno::FAULT),
        (CopyMem { local: u64::MAX - 8, ..good }, Errno::FAULT),
        (CopyMem { dest_qpn: 9, ..good }, Errno::INVAL),
        (CopyMem { qpn: c.qb.qpn, ..good }, Errno::PERM),
    ] {
        assert_eq!(c.a.refused(&bad), errno, "{bad:?}");
    }
    assert_eq!(std::hint::black_box(theirs), [0; 64]);
    c.a.ask(&good);
    assert_eq!(std::hint::black_box(theirs), mine);

    // An owner that lies in its table about what it registered harms nobody but itself.
    let view = c.b.entry(key).read(key).expect("published");
    c.b.entry(key).publish(&freeflow_core::ring::MrView { addr: 8, ..view });
    assert_eq!(c.a.refused(&good), Errno::REMOTEIO);
    c.b.entry(key).kill();
    assert_eq!(c.a.refused(&good), Errno::ACCESS);
    c.b.entry(key).publish(&view);
    c.a.ask(&good);
    c.b.ask(&DeregMr { key, _pad: 0 });
    assert_eq!(c.a.refused(&good), Errno::ACCESS);
    c.b.ask(&DestroyQp { qpn: c.qb.qpn });
    assert_eq!(c.a.refused(&good), Errno::NOTCONN);
}

#[test]
fn after_deregistration_nothing_lands() {
    let c = Copying::new();
    // One piece: a copy in flight still has its end to write.
    let mine = vec![7u8; 256 << 10];
    let theirs = vec![0u8; 256 << 10];
    let memory = std::fs::File::options().write(true).open("/proc/self/mem").expect("own memory");
    let tail = theirs.len() - 8;
    for _ in 0..200 {
        let key = c.b.register(c.qb.pd, &theirs, Access::REMOTE_WRITE, 0);
        let request = c.request(copy_kind::WRITE, key, &mine, 0);
        c.a.ask(&request);
        std::thread::scope(|scope| {
            let copying = scope.spawn(|| while c.a.socket.call(&request, &[]).is_ok() {});
            c.b.ask(&DeregMr { key, _pad: 0 });
            // Through the kernel, as the router writes, so that the compiler has no say.
            let at = theirs.as_ptr() as u64 + tail as u64;
            std::os::unix::fs::FileExt::write_all_at(&memory, &[0; 8], at).expect("write");
            copying.join().expect("refused in the end");
        });
        assert_eq!(std::hint::black_box(&theirs)[tail..], [0; 8], "a late copy landed");
    }
}

#[test]
fn guessing_keys_is_limited_to_few_per_second() {
    let c = Copying::new();
    let (mine, theirs) = ([7u8; 8], [0u8; 8]);
    let key = c.b.register(c.qb.pd, &theirs, Access::REMOTE_WRITE, 0);
    let good = c.request(copy_kind::WRITE, key, &mine, 0);
    c.a.ask(&good);
    for guess in 1..2000 {
        assert_eq!(c.a.refused(&CopyMem { key: key ^ guess << 16, ..good }), Errno::ACCESS);
    }
    assert_eq!(c.a.refused(&good), Errno::ACCESS, "not even with the right key, for a while");
    let back = CopyMem { qpn: c.qb.qpn, dest_qpn: c.qa.qpn, dgid: c.a.gid(), ..good };
    assert_eq!(c.b.refused(&CopyMem { key: 1 << 16, ..back }), Errno::ACCESS);
    let key = c.a.register(c.qa.pd, &theirs, Access::REMOTE_WRITE, 0);
    c.b.ask(&CopyMem { key, ..back });
}

#[test]
fn rings_reach_the_connected_peer() {
    let rig = Rig::new();
    let ((a, qa), (b, qb)) = connected(&rig, QpType::Rc);
    let ring = |what| Ring { qpn: qa.qpn, dest_qpn: qb.qpn, dgid: b.gid(), what };
    a.ask(&ring(ring::PROGRESS));
    assert_eq!(b.event::<PeerProgress>().qpn, qb.qpn);
    a.ask(&ring(ring::FAULT));
    assert_eq!(b.event::<PeerFault>().qpn, qb.qpn);
    assert_eq!(a.refused(&ring(99)), Errno::INVAL);
    assert_eq!(a.refused(&ring(ring::LIMIT)), Errno::INVAL, "its receives are its own");
    let (info, fds) = a.resolve(qa, qb, b.gid());
    assert_eq!(info.fds.leading_zeros(), peer_fds::BELL.leading_zeros(), "the bell comes last");
    let given = fds.last().expect("bell");
    let bell = freeflow_core::shm::Bell::open(given).expect("peers may open it");
    a.ask(&ring(ring::BELL));
    assert_eq!(rustix::io::read(&bell, &mut [0; 8]), Ok(1), "rung once");
    // A full bell, made blocking by a hostile holder, holds nobody up.
    while rustix::io::write(given, &[0; 4096]).is_ok() {}
    let blocking = rustix::fs::fcntl_getfl(given).expect("flags") & !rustix::fs::OFlags::NONBLOCK;
    rustix::fs::fcntl_setfl(given, blocking).expect("flags");
    a.ask(&ring(ring::BELL));
}

#[test]
fn a_client_that_takes_no_events_is_disconnected() {
    let rig = Rig::new();
    let ((a, qa), (b, qb)) = connected(&rig, QpType::Rc);
    let progress = Ring { qpn: qa.qpn, dest_qpn: qb.qpn, dgid: b.gid(), what: ring::PROGRESS };
    let refused = (0..100_000).map(|_| a.socket.call(&progress, &[])).find_map(Result::err);
    assert!(matches!(refused, Some(SocketError::Refused(Errno::NOTCONN))), "{refused:?}");
    assert_closed(&b.socket);
    a.pd();
}

#[test]
fn a_client_that_takes_no_replies_is_disconnected() {
    let rig = Rig::new();
    let other = rig.client();
    let client = rig.client();
    let flood = (0..100_000).find(|_| {
        client
            .socket
            .send(DestroyQp::KIND, 0, DestroyQp { qpn: 1 }.as_bytes(), &[], SendFlags::empty())
            .is_err()
    });
    assert!(flood.is_some(), "the router went on for ever");
    other.pd();
}
