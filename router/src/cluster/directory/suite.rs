//! What every directory does, whatever is behind it.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, mpsc};
use std::time::{Duration, Instant};

use super::memory::{Member, Memory};
use super::{Backend, Claim, Home, HostName, Hosts, file};

/// A directory, and hosts that are in it. `announce` is what happens when a container comes to a host.
pub trait Cluster {
    /// A host joins; its table.
    fn join(&mut self, name: &str) -> Arc<Hosts>;
    fn announce(&mut self, host: &str, home: &Home, claim: Claim);
    fn withdraw(&mut self, host: &str, home: &Home);
    /// It stops, in an orderly way.
    fn leave(&mut self, host: &str);
}

/// What the issue promises for a container that moved.
const PROMISE: Duration = Duration::from_secs(1);
/// Who waits longer has failed.
pub const WATCHDOG: Duration = Duration::from_secs(20);

pub fn home(tenant: &str, last: u8) -> Home {
    Home { tenant: tenant.into(), ip: [10, 0, 0, last].into() }
}

pub fn addr(name: &str) -> SocketAddr {
    let last = name.trim_start_matches('h').parse().expect("hN");
    ([192, 168, 0, last], 4790).into()
}

fn at(hosts: &Hosts, home: &Home) -> Option<HostName> {
    hosts.find(&home.tenant, home.ip).map(|host| host.name.clone())
}

/// Waits until `hosts` say that `home` is at `host`; how long that took.
pub fn await_at(hosts: &Hosts, home: &Home, host: Option<&str>) -> Duration {
    let start = Instant::now();
    while at(hosts, home).as_deref() != host {
        assert!(start.elapsed() < WATCHDOG, "{home:?} is at {:?}, not {host:?}", at(hosts, home));
        std::thread::yield_now();
    }
    start.elapsed()
}

/// The rules, in one story: containers come, are seen by other hosts, keep to their tenants, move and go.
pub fn run(cluster: &mut dyn Cluster) {
    let (one, two) = (cluster.join("h1"), cluster.join("h2"));
    let (red, blue) = (home("red", 1), home("blue", 1));
    cluster.announce("h2", &red, Claim::Firm);
    await_at(&one, &red, Some("h2"));
    assert_eq!(one.find(&red.tenant, red.ip).expect("there").addr, addr("h2"));
    assert_eq!(one.by_name("h2").expect("there").addr, addr("h2"));
    assert_eq!(at(&two, &red), None, "its own container is no other host's");
    assert_eq!(at(&one, &blue), None, "another tenant's");

    cluster.announce("h1", &blue, Claim::Firm);
    await_at(&two, &blue, Some("h1"));
    assert_eq!(at(&one, &red).as_deref(), Some("h2"));

    let three = cluster.join("h3");
    await_at(&three, &red, Some("h2"));
    let (tell, told) = mpsc::channel();
    let tell = Mutex::new(tell);
    one.subscribe(Box::new(move |moved| tell.lock().expect("test").send(moved.clone()).expect("test")));
    cluster.announce("h3", &red, Claim::Firm);
    let took = await_at(&one, &red, Some("h3"));
    assert!(took < PROMISE, "a move took {took:?}");
    let moved = told.recv_timeout(WATCHDOG).expect("a move is told");
    assert_eq!((moved.home, &*moved.to), (red.clone(), "h3"));
    await_at(&two, &red, Some("h3"));

    cluster.announce("h2", &red, Claim::Modest);
    cluster.withdraw("h2", &red);
    let marker = home("red", 9);
    cluster.announce("h2", &marker, Claim::Modest);
    await_at(&one, &marker, Some("h2"));
    assert_eq!(at(&one, &red).as_deref(), Some("h3"), "who had it before takes nothing away");

    cluster.withdraw("h3", &red);
    await_at(&one, &red, None);
    cluster.leave("h2");
    await_at(&one, &marker, None);
    await_at(&three, &blue, Some("h1"));
}

struct InMemory(Memory, Vec<(String, Member)>);

impl InMemory {
    fn member(&self, host: &str) -> &Member {
        &self.1.iter().find(|(name, _)| name == host).expect("joined").1
    }
}

impl Cluster for InMemory {
    fn join(&mut self, name: &str) -> Arc<Hosts> {
        let hosts = Arc::new(Hosts::of(name));
        self.1.push((name.into(), self.0.join(name, addr(name), hosts.clone())));
        hosts
    }

    fn announce(&mut self, host: &str, home: &Home, claim: Claim) {
        self.member(host).publish(home, claim);
    }

    fn withdraw(&mut self, host: &str, home: &Home) {
        self.member(host).withdraw(home);
    }

    fn leave(&mut self, host: &str) {
        self.1.retain(|(name, _)| name != host);
    }
}

#[test]
fn in_memory() {
    run(&mut InMemory(Memory::default(), vec![]));
}

/// The operator's side of a file: each step writes it anew, as an editor does.
struct InFile {
    dir: PathBuf,
    hosts: Vec<String>,
    homes: Vec<(Home, String)>,
    followers: Vec<file::File>,
}

impl InFile {
    fn path(&self) -> PathBuf {
        self.dir.join("directory.toml")
    }

    fn write(&self) {
        let mut text = String::new();
        for host in &self.hosts {
            let own = self.homes.iter().filter(|(_, at)| at == host);
            let own: Vec<_> = own.map(|(home, _)| format!("\"{}/{}\"", home.tenant, home.ip)).collect();
            text +=
                &format!("[hosts.{host}]\naddress = \"{}\"\ncontainers = [{}]\n", addr(host), own.join(", "));
        }
        let aside = self.dir.join("directory.new");
        std::fs::write(&aside, text).expect("write");
        std::fs::rename(&aside, self.path()).expect("rename");
    }
}

impl Cluster for InFile {
    fn join(&mut self, name: &str) -> Arc<Hosts> {
        self.hosts.push(name.into());
        self.write();
        let hosts = Arc::new(Hosts::of(name));
        self.followers.push(file::File::start(&self.path(), hosts.clone()).expect("follow"));
        hosts
    }

    fn announce(&mut self, host: &str, home: &Home, claim: Claim) {
        if claim == Claim::Modest && self.homes.iter().any(|(there, _)| there == home) {
            return;
        }
        self.homes.retain(|(there, _)| there != home);
        self.homes.push((home.clone(), host.into()));
        self.write();
    }

    fn withdraw(&mut self, host: &str, home: &Home) {
        self.homes.retain(|(there, at)| there != home || at != host);
        self.write();
    }

    fn leave(&mut self, host: &str) {
        self.hosts.retain(|there| there != host);
        self.homes.retain(|(_, at)| at != host);
        self.write();
    }
}

fn in_scratch_file(what: &str) -> InFile {
    let dir = std::env::temp_dir().join(format!("ff-directory-{}-{what}", std::process::id()));
    std::fs::create_dir_all(&dir).expect("scratch directory");
    InFile { dir, hosts: vec![], homes: vec![], followers: vec![] }
}

#[test]
fn in_a_file() {
    let mut cluster = in_scratch_file("suite");
    run(&mut cluster);
    std::fs::remove_dir_all(&cluster.dir).expect("scratch directory");
}

#[test]
fn a_bad_file_changes_nothing() {
    let mut cluster = in_scratch_file("bad");
    let one = cluster.join("h1");
    cluster.join("h2");
    let (red, other) = (home("red", 1), home("red", 2));
    cluster.announce("h2", &red, Claim::Firm);
    await_at(&one, &red, Some("h2"));
    for bad in ["[hosts", "[hosts.h2]\naddress = 7\n", ""] {
        std::fs::write(cluster.path(), bad).expect("write");
    }
    std::fs::remove_file(cluster.path()).expect("remove");
    assert_eq!(at(&one, &red).as_deref(), Some("h2"));
    cluster.announce("h2", &other, Claim::Firm);
    await_at(&one, &other, Some("h2"));
    assert_eq!(at(&one, &red).as_deref(), Some("h2"));
    drop(cluster.followers.drain(..));
    std::fs::remove_dir_all(&cluster.dir).expect("scratch directory");
    file::File::start(&cluster.path(), one).expect_err("a router does not start without its directory");
}
