//! Three hosts that find each other by etcd and trust each other by TLS, and what happens when parts of that go away.
//!
//! The hosts are routers of this machine, each with a port of loopback. A container moves with its address, etcd is killed and
//! comes back empty, a router is killed: what is connected and what can be connected is as promised each time.

use std::fs;
use std::net::{Ipv4Addr, TcpListener};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use super::Result;
use super::worker::{Worker, link};
use crate::path::{Host, Tree};

/// What the issue promises: new connections find a container that moved, and a router that returned, within this time.
const PROMISE: Duration = Duration::from_secs(1);
/// IBV_EVENT_QP_FATAL.
const QP_FATAL: &str = "1";
const HOSTS: [&str; 3] = ["h1", "h2", "h3"];

#[derive(Debug, Clone)]
pub struct Options {
    /// Times are reported, not judged.
    pub lenient: bool,
}

/// Debian's etcd-server; killed when dropped.
struct Etcd {
    dir: PathBuf,
    ports: [u16; 2],
    child: Child,
}

impl Etcd {
    fn start(dir: PathBuf, ports: [u16; 2]) -> Result<Self> {
        let [client, peer] = ports.map(|port| format!("http://127.0.0.1:{port}"));
        let mut command = Command::new("etcd");
        command.arg("--data-dir").arg(&dir).args(["--log-level", "error", "--name", "one"]);
        command.args(["--listen-client-urls", &client, "--advertise-client-urls", &client]);
        command.args(["--listen-peer-urls", &peer, "--initial-advertise-peer-urls", &peer]);
        command
            .args(["--initial-cluster", &format!("one={peer}")])
            .stdout(Stdio::null())
            .stderr(Stdio::null());
        let child = command.spawn().map_err(|e| format!("etcd (Debian's etcd-server): {e}"))?;
        Ok(Etcd { dir, ports, child })
    }

    fn kill(&mut self) {
        // It is there until it is reaped here.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Drop for Etcd {
    fn drop(&mut self) {
        self.kill();
    }
}

/// Ports that nobody has at this moment.
pub(super) fn free_ports<const N: usize>() -> Result<[u16; N]> {
    let held = [(); N].map(|()| TcpListener::bind((Ipv4Addr::LOCALHOST, 0)));
    let mut ports = [0; N];
    for (port, held) in ports.iter_mut().zip(&held) {
        let address = held.as_ref().map_err(|e| e.to_string())?.local_addr();
        *port = address.map_err(|e| e.to_string())?.port();
    }
    Ok(ports)
}

struct Stage {
    dir: PathBuf,
    etcd: Etcd,
    hosts: Vec<Host>,
    program: PathBuf,
}

impl Drop for Stage {
    fn drop(&mut self) {
        self.hosts.clear();
        self.etcd.kill();
        // What cannot be removed is in the directory for temporary files.
        let _ = fs::remove_dir_all(&self.dir);
    }
}

pub fn run(tree: &Tree, target: &Path, options: &Options) -> Result<()> {
    println!("soak cluster");
    let mut stage = Stage::set(tree, target)?;
    let slowest = stage.story();
    let slowest = slowest.inspect_err(|_| stage.hosts.iter().for_each(Host::show_log))?;
    if !options.lenient && slowest > PROMISE {
        return Err(format!("it took {slowest:?}"));
    }
    Ok(())
}

impl Stage {
    fn set(tree: &Tree, target: &Path) -> Result<Self> {
        let dir = std::env::temp_dir().join(format!("freeflow-cluster-{}", std::process::id()));
        fs::create_dir_all(&dir).map_err(|e| e.to_string())?;
        let mut certs = Command::new(tree.freeflow());
        certs.arg("certs").arg(dir.join("ca")).arg("--host").args(HOSTS).stdout(Stdio::null());
        if !certs.status().is_ok_and(|status| status.success()) {
            return Err("freeflow certs failed".into());
        }
        let [client, peer, ports @ ..] = free_ports::<5>()?;
        let etcd = Etcd::start(dir.join("etcd"), [client, peer])?;
        let program = super::compile(target, "worker").map_err(|e| e.to_string())?;
        let mut stage = Stage { dir, etcd, hosts: vec![], program };
        for (number, (name, port)) in HOSTS.iter().zip(ports).enumerate() {
            let tls = stage.dir.join("ca").join(name);
            let tls = tls.display();
            let config = format!(
                "host = \"{name}\"\ncluster_listen = \"127.0.0.1:{port}\"\ndirectory = \"etcd:http://127.0.0.1:{client}\"\n\
                 tls_ca = \"{tls}/ca.pem\"\ntls_cert = \"{tls}/cert.pem\"\ntls_key = \"{tls}/key.pem\"\n\
                 vip_pool = \"100.127.{number}.0/24\"\nmetrics = \"127.0.0.1:0\"\n"
            );
            stage.hosts.push(Host::configured(tree, &config).map_err(|e| e.to_string())?);
        }
        Ok(stage)
    }

    fn worker(&self, host: usize, name: &str, ip: &str) -> Result<Worker> {
        Worker::at(&self.hosts[host], (name, ip), &self.program, &["1", "sleep"])
    }

    /// The longest time that something took for which the issue has a limit.
    fn story(&mut self) -> Result<Duration> {
        let (mut a, mut b) = (self.worker(0, "a", "10.77.0.1")?, self.worker(1, "b", "10.77.0.2")?);
        let took = meet((&mut a, 0), (&mut b, 0))?;
        println!("  two hosts meet by etcd and TLS: {took:?}");

        self.etcd.kill();
        both_move_on((&mut a, 0), (&mut b, 0))?;
        let took = meet((&mut a, 1), (&mut b, 1))?;
        println!("  without etcd: the connection goes on, a new one works ({took:?})");

        fs::remove_dir_all(&self.etcd.dir).map_err(|e| e.to_string())?;
        self.etcd = Etcd::start(self.etcd.dir.clone(), self.etcd.ports)?;
        let mut c = self.worker(2, "c", "10.77.0.3")?;
        let took = meet((&mut c, 0), (&mut b, 2))?;
        both_move_on((&mut a, 0), (&mut b, 0))?;
        println!(
            "  etcd came back empty: a container that is new meets one that etcd was told of again ({took:?})"
        );

        let start = Instant::now();
        let mut moved = self.worker(2, "moved", "10.77.0.2")?;
        for slot in [0, 1] {
            a.hear(&format!("event {slot} {QP_FATAL}"))?;
            a.hear(&format!("flushed {slot}"))?;
        }
        let failed = start.elapsed();
        let took = meet((&mut a, 2), (&mut moved, 0))?;
        println!(
            "  b moved: what led to the old one failed after {failed:?}, a new connection took {took:?}"
        );
        let mut slowest = took.max(failed);

        self.hosts[2].kill_router().map_err(|e| e.to_string())?;
        self.hosts[2].start_router_again().map_err(|e| e.to_string())?;
        let ready = Instant::now();
        moved.hear(&format!("event 0 {QP_FATAL}"))?;
        a.hear("flushed 2")?;
        meet((&mut a, 3), (&mut moved, 3))?;
        let took = ready.elapsed();
        println!(
            "  a router was killed: its links failed at both ends, and a new connection worked after {took:?}"
        );
        slowest = slowest.max(took);
        Ok(slowest)
    }
}

/// Connects the two and waits for bytes to flow; how long that took.
pub(super) fn meet(a: (&mut Worker, usize), b: (&mut Worker, usize)) -> Result<Duration> {
    let start = Instant::now();
    link((a.0, a.1, "load"), (b.0, b.1, "load"))?;
    both_move_on(a, b)?;
    Ok(start.elapsed())
}

pub(super) fn both_move_on(a: (&mut Worker, usize), b: (&mut Worker, usize)) -> Result<()> {
    a.0.moves_on(a.1)?;
    b.0.moves_on(b.1)
}
