//! The operator's side: adding, listing and removing containers, starting and stopping.

mod support;

use std::io::Read;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::PermissionsExt;
use std::process::{Command, Stdio};

use freeflow_core::ctl::cm::*;
use freeflow_core::ctl::*;
use freeflow_core::shm::Mapping;
use freeflow_core::verbs::QpType;
use freeflow_router::admin::{self, Add};
use freeflow_router::config::Settings;
use freeflow_router::daemon::Daemon;
use rustix::event::{PollFd, PollFlags, Timespec};
use rustix::io::Errno;
use rustix::net::{
    AddressFamily, RecvFlags, SendFlags, Shutdown, SocketAddrUnix, SocketFlags, SocketType, bind, listen,
    socket_with,
};
use support::*;
use zerocopy::IntoBytes;

fn mode(path: &std::path::Path) -> u32 {
    std::fs::metadata(path).expect("metadata").permissions().mode() & 0o777
}

#[test]
fn containers_come_and_go() {
    let rig = Rig::new();
    let mut admin = rig.admin();
    let add = Add { name: "c1".into(), ip: Some([10, 0, 0, 1].into()), ..Add::default() };
    let c1 = admin.add(add.clone()).expect("add");
    assert_eq!((c1.tenant.as_str(), c1.vip), ("default", [10, 0, 0, 1].into()));
    assert_eq!((mode(&c1.socket), mode(c1.socket.parent().expect("directory"))), (0o666, 0o755));
    assert_eq!(mode(&rig.dir.join("containers")), 0o700, "no other user becomes a container");
    assert_eq!((mode(&rig.socket()), mode(&rig.dir.join("admin.sock"))), (0o600, 0o600));
    assert_eq!(admin.add(add.clone()).expect("the same again"), c1);
    admin.add(Add { ip: Some([10, 0, 0, 2].into()), ..add.clone() }).expect_err("another address");
    admin.add(Add { name: "c2".into(), ..add.clone() }).expect_err("address in use");
    admin.add(Add { name: "../c2".into(), ip: None, ..add.clone() }).expect_err("name");
    let dir = Some("relative".into());
    admin.add(Add { name: "c2".into(), ip: None, dir, ..add.clone() }).expect_err("directory");
    let c2 = admin.add(Add { name: "c2".into(), ..Add::default() }).expect("what failed left nothing behind");

    let client = Client::at(&c1.socket);
    let qp = client.qp(QpType::Rc);
    let names = |list: Vec<admin::Container>| list.into_iter().map(|c| c.name).collect::<Vec<_>>();
    let list = admin.ls().expect("ls");
    assert_eq!(list[1].pids, [std::process::id()]);
    assert_eq!(names(list), ["default", "c1", "c2"]);
    let ps = admin.ps().expect("ps");
    assert_eq!((ps.version, ps.containers[1].qps[0].qpn), (1, qp.qpn));

    admin.rm("c1").expect("rm");
    assert!(matches!(client.socket.recv(RecvFlags::empty()), Err(SocketError::Closed)));
    assert!(!c1.socket.exists() && !c1.socket.parent().expect("directory").exists());
    assert_eq!(names(admin.ls().expect("ls")), ["default", "c2"]);
    assert!(admin.rm("c1").expect_err("gone").to_string().contains("c1"));
    assert!(admin.rm("default").expect_err("stays").to_string().contains("default"));
    let again = admin.add(add).expect("name and address are free again");
    Client::at(&again.socket);
    Client::at(&c2.socket);
}

#[test]
fn a_container_can_live_in_a_directory_of_the_operators() {
    let rig = Rig::new();
    let dir = rig.dir.join("given");
    std::fs::create_dir(&dir).expect("directory");
    let add = Add { name: "c1".into(), dir: Some(dir.clone()), ..Add::default() };
    let c1 = rig.admin().add(add).expect("add");
    assert_eq!(c1.socket, dir.join("router.sock"));
    Client::at(&c1.socket);
    rig.admin().rm("c1").expect("rm");
    assert!(!c1.socket.exists());
    std::fs::remove_dir(&dir).expect("the directory stays, empty");
}

#[test]
fn a_restart_keeps_containers_in_directories_of_their_own() {
    let mut rig = Rig::new();
    let dir = rig.dir.join("given");
    std::fs::create_dir(&dir).expect("directory");
    let mut admin = rig.admin();
    let c1 = admin.add(Add { name: "c1".into(), dir: Some(dir.clone()), ..Add::default() }).expect("add");
    admin.add(Add { name: "c2".into(), ..Add::default() }).expect("add");
    rig.daemon.take();
    assert!(!c1.socket.exists());
    rig.daemon = Some(Daemon::start(&rig.socket(), Settings::default()).expect("restart"));
    let after = rig.admin().ls().expect("ls");
    assert_eq!(
        (after.len(), &after[1]),
        (2, &c1),
        "with its address; c2's directory went with the first router"
    );
    Client::at(&c1.socket);
    rig.daemon.take();
    std::fs::remove_dir(&dir).expect("empty");
    rig.daemon = Some(Daemon::start(&rig.socket(), Settings::default()).expect("restart"));
    assert_eq!(rig.admin().ls().expect("ls").len(), 1, "it has no place any more");
}

#[test]
fn ls_shows_ports_that_rdma_cm_listens_on() {
    let rig = Rig::new();
    let c1 = rig.container("c1", [10, 0, 0, 1], "red");
    let cm = connect(&c1.socket);
    cm.call(&hello(purpose::CM), &[]).expect("hello");
    let channel = cm.call(&CmOpenChannel {}, &[]).expect("channel").0.id;
    let id = cm.call(&CmCreate { channel, space: cm_space::TCP }, &[]).expect("id").0.id;
    let addr = CmAddr { port: 7471, family: cm_family::V4, ..CmAddr::default() };
    cm.call(&CmBind { id, flags: 0, addr }, &[]).expect("bind");
    cm.call(&CmListen { id, backlog: 1 }, &[]).expect("listen");
    let ports = |name: &str| {
        let list = rig.admin().ls().expect("ls");
        list.into_iter().find(|c| c.name == name).expect(name).cm_ports
    };
    assert_eq!((ports("c1"), ports("default")), (vec![7471], vec![]));
}

#[test]
fn one_router_per_directory_and_a_clean_restart() {
    let mut rig = Rig::new();
    let second = Daemon::start(&rig.socket(), Settings::default());
    assert!(second.expect_err("taken").to_string().contains("another router"));
    let client = rig.client();
    let boot = client.hello.boot;
    rig.daemon.take();
    assert!(matches!(client.socket.recv(RecvFlags::empty()), Err(SocketError::Closed)));
    assert!(!rig.socket().exists());
    // What a router that was killed leaves behind gives way.
    std::os::unix::net::UnixListener::bind(rig.dir.join("admin.sock")).expect("stale socket");
    rig.daemon = Some(Daemon::start(&rig.socket(), Settings::default()).expect("restart"));
    assert_ne!(rig.client().hello.boot, boot);
}

#[test]
fn sigterm_ends_the_daemon_and_its_files() {
    let dir = std::env::temp_dir().join(format!("ff-router-{}-sigterm", std::process::id()));
    let socket = dir.join("router.sock");
    let mut daemon = Command::new(env!("CARGO_BIN_EXE_freeflow"))
        .args(["router", "--ready-on-stdout", "--socket"])
        .arg(&socket)
        .stdout(Stdio::piped())
        .spawn()
        .expect("freeflow router");
    let mut ready = [0];
    daemon.stdout.take().expect("stdout").read_exact(&mut ready).expect("readiness");
    assert_eq!(mode(&dir), 0o700);
    let client = Client::at(&socket);
    let mut admin = admin::Client::connect(&socket).expect("admin");
    let c1 = admin.add(Add { name: "c1".into(), ..Add::default() }).expect("add");
    assert_eq!(admin.ping().expect("ping").pid, daemon.id());
    assert_eq!(admin.router_pid().expect("credentials"), rustix::process::Pid::from_child(&daemon));
    // What `--stop` sends is SIGTERM.
    let stop = || {
        let mut command = Command::new(env!("CARGO_BIN_EXE_freeflow"));
        command.args(["router", "--stop", "--socket"]).arg(&socket).stderr(Stdio::null()).status()
    };
    assert!(stop().expect("freeflow router --stop").success());
    assert!(!stop().expect("freeflow router --stop").success(), "nobody is there to be stopped");
    assert!(daemon.wait().expect("wait").success());
    assert!(matches!(client.socket.recv(RecvFlags::empty()), Err(SocketError::Closed)));
    assert!(!socket.exists() && !c1.socket.exists());
    std::fs::remove_file(dir.join("router.secret")).expect("it is for the next router");
    std::fs::remove_dir(&dir).expect("nothing else was left in it");
}

/// What a client of one router says to the next.
fn resume(
    client: &Client,
    socket: &std::path::Path,
    change: impl Fn(&mut Resume),
) -> Result<Client, SocketError> {
    let again = connect(socket);
    let table = freeflow_core::shm::make_owned_memfd("table", client.table.len() as u64).expect("memfd");
    let HelloReply { client: id, proof, .. } = client.hello;
    let mut resume = Resume { min_version: VERSION, max_version: VERSION, client: id, proof };
    change(&mut resume);
    let (hello, fds) = again.call(&resume, &[table.as_fd()])?;
    let events = Socket::new(fds.into_iter().next().expect("event socket"));
    watch(&events);
    let table = Mapping::new(&table, 0, client.table.len(), true).expect("mmap");
    Ok(Client { socket: again, events, hello, table })
}

#[test]
fn only_who_had_it_resumes() {
    let mut rig = Rig::new();
    let dir = rig.dir.join("given");
    std::fs::create_dir(&dir).expect("directory");
    let c1 =
        rig.admin().add(Add { name: "c1".into(), dir: Some(dir.clone()), ..Add::default() }).expect("add");
    let (ours, theirs) = (Client::at(&c1.socket), rig.client());
    let pd =
        ours.socket.call(&AllocPd {}, &[freeflow_core::shm::make_memfd("pd", 4096).expect("memfd").as_fd()]);
    let pd = pd.expect("AllocPd").0;
    assert_eq!(refusal(resume(&ours, &c1.socket, |_| ())), Errno::BUSY, "it is there");
    rig.daemon.take();
    rig.daemon = Some(Daemon::start(&rig.socket(), Settings::default()).expect("restart"));
    assert_eq!(
        refusal(resume(&ours, &rig.socket(), |_| ())),
        Errno::ACCESS,
        "through another container's socket"
    );
    assert_eq!(refusal(resume(&theirs, &c1.socket, |_| ())), Errno::ACCESS);
    assert_eq!(refusal(resume(&ours, &c1.socket, |r| r.client ^= 1)), Errno::ACCESS);
    assert_eq!(refusal(resume(&ours, &c1.socket, |r| r.proof ^= 1)), Errno::ACCESS);
    let again = resume(&ours, &c1.socket, |_| ()).expect("its own");
    let claim = |id, proof| again.socket.call(&Claim { what: claim::OBJECT, id, proof }, &[]);
    assert_eq!(refusal(claim(pd.id ^ 1, pd.proof)), Errno::ACCESS);
    claim(pd.id, pd.proof).expect("its own");
    let memory = freeflow_core::shm::make_memfd("pd", 4096).expect("memfd");
    assert_eq!(again.socket.call(&AllocPd {}, &[memory.as_fd()]).expect("AllocPd").0, pd);
    let huge = again.socket.call(&BringSlab { len: 8192 }, &[memory.as_fd()]);
    assert_eq!(refusal(huge), Errno::INVAL, "not of that length");
    again.ask(&Resumed {});
    assert_eq!(refusal(claim(pd.id, pd.proof)), Errno::INVAL, "too late");
    drop((again, ours, theirs));
    rig.admin().rm("c1").expect("rm");
    std::fs::remove_dir(&dir).expect("empty");
}

/// A client of an earlier router says all that it had: a queue pair, connected to `peer`.
fn come_back(before: &Client, socket: &std::path::Path, qp: TestQp, peer: (TestQp, RawGid)) -> Client {
    let again = resume(before, socket, |_| ()).expect("its own");
    again.ask(&Claim { what: claim::QP, id: qp.qpn, proof: qp.proof });
    let adopted = again.qp(QpType::Rc);
    assert_eq!(adopted.qpn, qp.qpn);
    again.connect(adopted, peer.0, peer.1);
    again.ask(&Resumed {});
    again
}

/// Somebody who listens at `path` and takes no calls: who calls him waits until this is dropped.
struct Busy {
    _listener: OwnedFd,
    _callers: Vec<OwnedFd>,
}

impl Busy {
    fn at(path: &std::path::Path) -> Self {
        let address = SocketAddrUnix::new(path).expect("address");
        let socket = || socket_with(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::NONBLOCK, None);
        let listener = socket().expect("socket");
        bind(&listener, &address).and_then(|()| listen(&listener, 0)).expect("listen");
        let mut callers = vec![];
        loop {
            let caller = socket().expect("socket");
            match rustix::net::connect(&caller, &address) {
                Ok(()) => callers.push(caller),
                Err(Errno::AGAIN) => return Busy { _listener: listener, _callers: callers },
                Err(errno) => panic!("connect: {errno}"),
            }
        }
    }
}

#[test]
fn a_peer_whose_container_is_served_later_is_not_missed() {
    let mut rig = Rig::new();
    let [first, held, last] = ["first", "held", "last"].map(|name| {
        let dir = rig.dir.join(name);
        std::fs::create_dir(&dir).expect("directory");
        rig.admin().add(Add { name: name.into(), dir: Some(dir), ..Add::default() }).expect("add").socket
    });
    let (a, b) = (Client::at(&first), Client::at(&last));
    let (qa, qb) = (a.qp(QpType::Rc), b.qp(QpType::Rc));
    a.connect(qa, qb, b.gid());
    b.connect(qb, qa, a.gid());
    rig.daemon.take();

    // The next router serves the first container, and is kept from going on with the others.
    let busy = Busy::at(&held);
    let socket = rig.socket();
    let router = std::thread::spawn(move || Daemon::start(&socket, Settings::default()).expect("restart"));
    while Socket::connect(&first).is_err() {
        std::thread::yield_now();
    }
    let a = come_back(&a, &first, qa, (qb, b.gid()));
    assert!(!last.exists(), "it is not served yet");
    drop(busy);
    rig.daemon = Some(router.join().expect("router"));
    let _b = come_back(&b, &last, qb, (qa, a.gid()));
    assert_eq!(a.event::<PeerReady>().qpn, qa.qpn, "the first it hears");
    for name in ["first", "held", "last"] {
        rig.admin().rm(name).expect("rm");
        std::fs::remove_dir(rig.dir.join(name)).expect("empty");
    }
}

#[test]
fn who_hangs_up_before_the_answer_leaves_nothing() {
    let rig = Rig::new();
    for purpose in [purpose::VERBS, purpose::CM] {
        let socket = rig.connect();
        // The router's answer cannot be sent.
        rustix::net::shutdown(&socket, Shutdown::Read).expect("shutdown");
        socket.send(Hello::KIND, 0, hello(purpose).as_bytes(), &[], SendFlags::empty()).expect("send");
        // It hangs up, too, when it has noticed and there is no such client any more.
        let mut end = [PollFd::new(&socket, PollFlags::empty())];
        let watchdog = Timespec { tv_sec: 20, tv_nsec: 0 };
        assert_eq!(rustix::event::poll(&mut end, Some(&watchdog)), Ok(1), "the connection ends");
        assert!(rig.admin().ls().expect("ls")[0].pids.is_empty());
    }
}
