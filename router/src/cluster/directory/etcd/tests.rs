//! The suite over a real etcd, and what happens when that goes away.

use std::net::TcpListener;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use super::super::suite::{self, Cluster, addr, await_at, home};
use super::{Backend, Claim, Etcd, Home, Hosts, Place};

/// Debian's etcd-server, in a directory of its own.
struct Server {
    dir: PathBuf,
    ports: [u16; 2],
    child: Child,
}

impl Server {
    fn new() -> Self {
        static NUMBER: AtomicU32 = AtomicU32::new(0);
        let number = NUMBER.fetch_add(1, Ordering::Relaxed);
        let dir = std::env::temp_dir().join(format!("ff-etcd-{}-{number}", std::process::id()));
        // Held together, so that they differ.
        let free = [(); 2].map(|()| TcpListener::bind("127.0.0.1:0").expect("a port"));
        let ports = free.map(|listener| listener.local_addr().expect("address").port());
        let child = Self::spawn(&dir, ports);
        Server { dir, ports, child }
    }

    fn spawn(dir: &PathBuf, [client, peer]: [u16; 2]) -> Child {
        let (client, peer) = (format!("http://127.0.0.1:{client}"), format!("http://127.0.0.1:{peer}"));
        let mut command = Command::new("etcd");
        command.arg("--data-dir").arg(dir).args(["--log-level", "error", "--name", "one"]);
        command.args(["--listen-client-urls", &client, "--advertise-client-urls", &client]);
        command.args(["--listen-peer-urls", &peer, "--initial-advertise-peer-urls", &peer]);
        command.args(["--initial-cluster", &format!("one={peer}")]);
        command.stdout(Stdio::null()).stderr(Stdio::null()).spawn().expect("etcd (Debian's etcd-server)")
    }

    fn place(&self, ttl: Duration) -> Place {
        Place { urls: vec![format!("http://127.0.0.1:{}", self.ports[0])], tls: None, ttl }
    }

    fn kill(&mut self) {
        self.child.kill().expect("kill");
        self.child.wait().expect("reap");
    }

    fn start_again(&mut self) {
        self.child = Self::spawn(&self.dir, self.ports);
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.kill();
        // Of an etcd that never came up there is nothing.
        let _ = std::fs::remove_dir_all(&self.dir);
    }
}

const TTL: Duration = Duration::from_secs(2);

struct InEtcd {
    server: Server,
    members: Vec<(String, Etcd)>,
}

impl InEtcd {
    fn new() -> Self {
        InEtcd { server: Server::new(), members: vec![] }
    }

    fn member(&self, host: &str) -> &Etcd {
        &self.members.iter().find(|(name, _)| name == host).expect("joined").1
    }
}

impl Cluster for InEtcd {
    fn join(&mut self, name: &str) -> Arc<Hosts> {
        let hosts = Arc::new(Hosts::of(name));
        let member = Etcd::start(self.server.place(TTL), addr(name), hosts.clone()).expect("thread");
        self.members.push((name.into(), member));
        // By its own entry in etcd.
        let start = Instant::now();
        while hosts.by_name(name).is_none() {
            assert!(start.elapsed() < suite::WATCHDOG, "{name} does not join");
            std::thread::yield_now();
        }
        hosts
    }

    fn announce(&mut self, host: &str, home: &Home, claim: Claim) {
        self.member(host).publish(home, claim);
    }

    fn withdraw(&mut self, host: &str, home: &Home) {
        self.member(host).withdraw(home);
    }

    fn leave(&mut self, host: &str) {
        self.members.retain(|(name, _)| name != host);
    }
}

#[test]
fn in_etcd() {
    suite::run(&mut InEtcd::new());
}

#[test]
fn an_outage_changes_nothing_and_is_made_up_for() {
    let mut cluster = InEtcd::new();
    let (one, _) = (cluster.join("h1"), cluster.join("h2"));
    let [kept, gone, new] = [1, 2, 3].map(|last| home("red", last));
    cluster.announce("h2", &kept, Claim::Firm);
    cluster.announce("h2", &gone, Claim::Firm);
    await_at(&one, &kept, Some("h2"));
    await_at(&one, &gone, Some("h2"));
    cluster.server.kill();
    cluster.withdraw("h2", &gone);
    cluster.announce("h2", &new, Claim::Firm);
    let found = |home: &Home| one.find(&home.tenant, home.ip).map(|host| host.name.to_string());
    assert_eq!((found(&kept).as_deref(), found(&new)), (Some("h2"), None), "as before");
    cluster.server.start_again();
    await_at(&one, &new, Some("h2"));
    await_at(&one, &gone, None);
    assert_eq!(found(&kept).as_deref(), Some("h2"));
}

#[test]
fn an_etcd_that_lost_everything_is_told_again() {
    let mut cluster = InEtcd::new();
    let (one, _) = (cluster.join("h1"), cluster.join("h2"));
    let red = home("red", 1);
    cluster.announce("h2", &red, Claim::Firm);
    await_at(&one, &red, Some("h2"));
    cluster.server.kill();
    std::fs::remove_dir_all(&cluster.server.dir).expect("etcd's data");
    cluster.server.start_again();
    // A host that is new has it from the new etcd alone, and the old one never missed it.
    let three = cluster.join("h3");
    await_at(&three, &red, Some("h2"));
    assert_eq!(one.find(&red.tenant, red.ip).expect("known").name.as_ref(), "h2");
}

/// Waits until no host of that name is known.
fn await_unknown(hosts: &Hosts, name: &str) {
    let start = Instant::now();
    while hosts.by_name(name).is_some() {
        assert!(start.elapsed() < suite::WATCHDOG, "{name} is still known");
        std::thread::yield_now();
    }
}

#[test]
fn a_dead_hosts_entries_end_with_its_lease() {
    let mut cluster = InEtcd::new();
    let one = cluster.join("h1");
    cluster.join("h2");
    let red = home("red", 1);
    cluster.announce("h2", &red, Claim::Firm);
    await_at(&one, &red, Some("h2"));
    // What a router that is killed does: nothing more.
    let (_, dead) = cluster.members.pop().expect("h2");
    dead.fall_silent();
    await_at(&one, &red, None);
    // Its entries end at once, and are heard of one by one.
    await_unknown(&one, "h2");
}

#[test]
fn ten_thousand_containers_are_found_like_one() {
    let mut cluster = InEtcd::new();
    let one = cluster.join("h1");
    cluster.join("h2");
    let homes: Vec<Home> = (0..10_000u32)
        .map(|n| Home { tenant: "red".into(), ip: std::net::Ipv4Addr::from(0x0a00_0000 + n).into() })
        .collect();
    homes.iter().for_each(|home| cluster.announce("h2", home, Claim::Firm));
    for home in &homes {
        await_at(&one, home, Some("h2"));
    }
    // A host that comes later reads them by pages.
    let three = cluster.join("h3");
    assert_eq!(three.len().1, homes.len());
}
