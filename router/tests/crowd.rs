//! What a container can make the router hold: descriptors, threads and memory stay within its quota, however many
//! connections it opens and whatever it says on them, and come back when it goes.

mod support;

use std::io::{IoSlice, Read};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use freeflow_core::ctl::*;
use freeflow_core::shm::make_memfd;
use freeflow_router::admin::{self, Add};
use rustix::io::Errno;
use rustix::net::{RecvFlags, SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};
use support::*;
use zerocopy::IntoBytes;

const MAX_CLIENTS: u32 = 64;
const CROWD: usize = 2000;
/// Socket, event socket, pidfd, memory, MR table, and one on its way to the client.
const FDS_EACH: usize = 6;
/// Stack, tables and the pages of the MR table that the router itself touches.
const KIB_EACH: usize = 256;
const WATCHDOG: Duration = Duration::from_secs(20);

/// A router in a process of its own, so that what it holds can be counted.
struct Router {
    child: Child,
    dir: PathBuf,
}

impl Router {
    fn start() -> Self {
        let dir = std::env::temp_dir().join(format!("ff-router-{}-crowd", std::process::id()));
        std::fs::create_dir(&dir).expect("scratch directory");
        std::fs::write(
            dir.join("config"),
            format!("max_clients = {MAX_CLIENTS}\nmetrics = \"127.0.0.1:0\"\n"),
        )
        .expect("configuration");
        let mut child = Command::new(env!("CARGO_BIN_EXE_freeflow"))
            .args(["router", "--ready-on-stdout", "--socket"])
            .arg(dir.join("router.sock"))
            .arg("--config")
            .arg(dir.join("config"))
            .env("FREEFLOW_LOG", "error")
            .stdout(Stdio::piped())
            .spawn()
            .expect("freeflow router");
        child.stdout.take().expect("stdout").read_exact(&mut [0]).expect("readiness");
        Router { child, dir }
    }

    fn admin(&self) -> admin::Client {
        admin::Client::connect(&self.dir.join("router.sock")).expect("admin socket")
    }

    fn holds(&self) -> Held {
        let count = |what: &str| {
            let entries = std::fs::read_dir(format!("/proc/{}/{what}", self.child.id()));
            entries.expect("the router lives").count()
        };
        let status = std::fs::read_to_string(format!("/proc/{}/status", self.child.id())).expect("status");
        let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).expect("VmRSS");
        let kib = line.trim().trim_end_matches(" kB").parse().expect("a number");
        Held { fds: count("fd"), threads: count("task"), kib }
    }
}

impl Drop for Router {
    fn drop(&mut self) {
        self.child.kill().expect("kill");
        self.child.wait().expect("wait");
        std::fs::remove_dir_all(&self.dir).expect("remove scratch");
    }
}

#[derive(Debug, Clone, Copy)]
struct Held {
    fds: usize,
    threads: usize,
    kib: usize,
}

impl Held {
    /// Whether this is at most `base` and what `clients` connections may add.
    fn within(self, base: Held, clients: usize) -> bool {
        self.fds <= base.fds + clients * FDS_EACH
            && self.threads <= base.threads + clients
            && self.kib <= base.kib + clients * KIB_EACH
    }
}

/// Bytes with as many descriptors as a message can carry; the connection ends.
fn throw(socket: &Socket, bytes: &[u8], bait: BorrowedFd<'_>) {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_FDS))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    let baits = [bait; MAX_FDS];
    control.push(SendAncillaryMessage::ScmRights(&baits));
    // The router may have hung up already, and does so now.
    let _ = sendmsg(socket, &[IoSlice::new(bytes)], &mut control, SendFlags::NOSIGNAL);
    assert!(matches!(
        socket.recv(RecvFlags::empty()),
        Err(SocketError::Closed | SocketError::System(_, Errno::CONNRESET))
    ));
}

/// Connections that say nothing, say hello and stay, talk nonsense, or send descriptors nobody asked for.
fn crowd(path: &Path, bait: &OwnedFd) -> Vec<Socket> {
    let greet = |socket: &Socket| socket.call(&hello(purpose::VERBS), &[]).is_ok();
    let come = |number: usize| {
        let socket = connect(path);
        match number % 4 {
            0 => {}
            1 => _ = greet(&socket),
            2 => throw(&socket, &[0xa5; 100], bait.as_fd()),
            _ if greet(&socket) => throw(&socket, MakeSlab { len: 1 }.as_bytes(), bait.as_fd()),
            _ => {}
        }
        socket
    };
    (0..CROWD).map(come).collect()
}

fn allow_descriptors() {
    use rustix::process::{Resource, getrlimit, setrlimit};
    let mut limit = getrlimit(Resource::Nofile);
    limit.current = limit.maximum;
    setrlimit(Resource::Nofile, limit).expect("limit of open files");
}

#[test]
fn a_crowd_takes_no_more_than_its_quota_and_gives_it_back() {
    allow_descriptors();
    let router = Router::start();
    let mut admin = router.admin();
    let mut add = |name: &str| admin.add(Add { name: name.into(), ..Add::default() }).expect("add");
    let (evil, good) = (add("evil"), add("good"));
    let neighbour = Client::at(&good.socket);
    let base = router.holds();

    let bait = make_memfd("bait", 4096).expect("memfd");
    let crowd = crowd(&evil.socket, &bait);
    // Connections are taken in order: once this one is turned away, each before it was let in or turned away.
    let last = connect(&evil.socket);
    assert!(matches!(last.recv(RecvFlags::empty()), Err(SocketError::Closed)));
    let full = router.holds();
    neighbour.pd();
    println!("before {base:?}, with the crowd {full:?}");
    assert!(full.within(base, MAX_CLIENTS as usize), "{base:?} became {full:?}");
    assert!(full.threads > base.threads + MAX_CLIENTS as usize / 2, "the crowd was let in: {full:?}");

    drop(crowd);
    admin.rm("evil").expect("all its sessions have ended");
    // A thread ends a moment after its session.
    let start = Instant::now();
    while !router.holds().within(Held { kib: usize::MAX / 2, ..base }, 0) {
        assert!(start.elapsed() < WATCHDOG, "{base:?} became {:?}", router.holds());
        std::thread::yield_now();
    }
}
