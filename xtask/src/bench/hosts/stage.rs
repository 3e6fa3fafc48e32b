//! The two hosts: network namespaces joined by one veth pair, with a router each for every kind of link that is measured.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use super::super::nccl;
use crate::failure::{Context as _, Failure, Result};
use crate::process::{self, Echo, Running};

const LIMIT: Duration = Duration::from_secs(120);
const ADDRESSES: [&str; 2] = ["192.168.78.1", "192.168.78.2"];
const PORT: u16 = 4790;
/// The line with the processor time of both routers, in seconds.
pub const ROUTERS: &str = "routers' seconds ";
/// BBR carries a fourth of what others do over a veth pair, and routers do not use it: so that peers are held to the same, they
/// get what every namespace may choose.
const NOT_BBR: &str = "cd /proc/sys/net/ipv4; read -r own < tcp_congestion_control; test $own != bbr || echo reno > tcp_congestion_control";
/// Containers in a directory that has many.
const CROWD: usize = 10_000;

/// Which routers a pair of programs uses; none for those that use the kernel's TCP.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Over {
    Kernel,
    Plain,
    Tls,
    /// Plain TCP, and a directory of [`CROWD`] containers.
    Crowded,
}

impl Over {
    const ROUTERS: [Over; 3] = [Over::Plain, Over::Tls, Over::Crowded];

    fn port(self) -> u16 {
        PORT + self as u16
    }
}

/// The two hosts.
pub struct Stage {
    freeflow: PathBuf,
    probes: PathBuf,
    dir: PathBuf,
    names: [String; 2],
    routers: Vec<Running>,
}

impl Stage {
    pub fn new(tree: &Path, probes: PathBuf) -> Result<Self> {
        let pid = std::process::id();
        let dir = std::env::temp_dir().join(format!("ff-hosts-{pid}"));
        std::fs::create_dir_all(&dir).context(format_args!("cannot make {}", dir.display()))?;
        let names = [format!("ff{pid}a"), format!("ff{pid}b")];
        let mut stage = Self { freeflow: tree.join("bin/freeflow"), probes, dir, names, routers: Vec::new() };
        stage.join()?;
        stage.certify()?;
        for over in Over::ROUTERS {
            for host in 0..2 {
                let router = stage.router(over, host)?;
                stage.routers.push(router);
            }
        }
        Ok(stage)
    }

    /// Two namespaces and what joins them.
    fn join(&self) -> Result<()> {
        let [a, b] = &self.names;
        ip(&["netns", "add", a])?;
        ip(&["netns", "add", b])?;
        ip(&["-n", a, "link", "add", "wire", "type", "veth", "peer", "name", "wire", "netns", b])?;
        for (name, address) in self.names.iter().zip(ADDRESSES) {
            ip(&["-n", name, "addr", "add", &format!("{address}/24"), "dev", "wire"])?;
            ip(&["-n", name, "link", "set", "wire", "up"])?;
            ip(&["-n", name, "link", "set", "lo", "up"])?;
            ip(&["netns", "exec", name, "sh", "-c", NOT_BBR])?;
        }
        // The second end may find out a second later that it has a carrier; until then programs take no notice of it.
        until("the wire", || self.names.iter().all(|name| is_up(name)))
    }

    fn certify(&self) -> Result<()> {
        let mut certs = Command::new(&self.freeflow);
        certs.arg("certs").arg(self.dir.join("tls")).args(["--host", "h1", "--host", "h2"]);
        succeed(&mut certs).map(drop)
    }

    fn host_dir(&self, over: Over, host: usize) -> PathBuf {
        self.dir.join(format!("{over:?}{host}"))
    }

    fn router(&self, over: Over, host: usize) -> Result<Running> {
        let dir = self.host_dir(over, host);
        std::fs::create_dir_all(&dir).context(format_args!("cannot make {}", dir.display()))?;
        let port = over.port();
        let directory: String = (0..2).map(|i| entry(over, i)).collect();
        let tls = self.dir.join("tls").join(format!("h{}", host + 1));
        let security = match over {
            Over::Tls => format!(
                "tls_ca = \"{0}/ca.pem\"\ntls_cert = \"{0}/cert.pem\"\ntls_key = \"{0}/key.pem\"\n",
                tls.display()
            ),
            _ => "insecure_plain_tcp = true\n".to_owned(),
        };
        let config = format!(
            "host = \"h{}\"\ncluster_listen = \"{}:{port}\"\ndirectory = \"file:{}\"\nmetrics = \"127.0.0.1:0\"\n{security}",
            host + 1,
            ADDRESSES[host],
            dir.join("directory.toml").display()
        );
        for (name, text) in [("directory.toml", directory), ("router.toml", config)] {
            std::fs::write(dir.join(name), text).context(format_args!("cannot write {name}"))?;
        }
        let socket = dir.join("router.sock");
        let mut command = self.inside(host);
        command.arg(&self.freeflow).arg("router").arg("--socket").arg(&socket);
        command.arg("--config").arg(dir.join("router.toml")).env("FREEFLOW_LOG", "warn");
        let mut router = Running::start(&mut command, Echo::Quiet)?;
        until("a router's socket", || socket.exists() || router.has_ended())?;
        Ok(router)
    }

    fn inside(&self, host: usize) -> Command {
        let mut command = Command::new("ip");
        command.args(["netns", "exec", &self.names[host]]);
        command
    }

    /// A program on a host.
    fn program(&self, over: Over, host: usize, words: &[&str]) -> Command {
        let mut command = self.inside(host);
        if over != Over::Kernel {
            command.env("FREEFLOW_SOCKET", self.host_dir(over, host).join("router.sock"));
            command.arg(&self.freeflow).args(["run", "--"]);
        }
        command.args(words.iter().map(|word| match word.strip_prefix("probe:") {
            Some(probe) => self.probes.join(probe).into_os_string(),
            None if *word == nccl::PROGRAM => nccl::program().into_os_string(),
            None => word.replace('@', ADDRESSES[0]).into(),
        }));
        command
    }

    /// What the client printed, beside a server on the other host; and behind it [`ROUTERS`].
    pub fn run(&self, over: Over, server: &[&str], client: &[&str]) -> Result<String> {
        let mut client = client.to_vec();
        if !client.iter().any(|word| word.contains('@')) {
            client.push(ADDRESSES[0]);
        }
        let (before, spent) = (self.listeners(0)?, self.routers_time()?);
        let mut serving = Running::start(&mut self.program(over, 0, server), Echo::Quiet)?;
        let listens =
            || self.listeners(0).is_ok_and(|now| now > before) || serving.has_ended() || self.listens(over);
        until("a server's port", listens)?;
        let done = process::run(&mut self.program(over, 1, &client), LIMIT, Echo::Quiet)?;
        if server[0] == "qperf" || server[0] == "cmtime" {
            serving.terminate();
        }
        let served = serving.finish(LIMIT)?;
        if done.success() {
            return Ok(format!("{}\n{ROUTERS}{}\n", done.stdout, self.routers_time()? - spent));
        }
        Err(Failure::new(format!("{}: {}\n{}", done.how(), done.tail(), served.tail())))
    }

    /// Processor time of all routers so far, in seconds.
    fn routers_time(&self) -> Result<f64> {
        self.routers.iter().map(|router| spent(router.group())).sum()
    }

    /// Does a program on the first host listen at an rdma_cm port?
    fn listens(&self, over: Over) -> bool {
        if over == Over::Kernel {
            return false;
        }
        let mut ls = Command::new(&self.freeflow);
        ls.args(["container", "ls", "--json", "--router"]).arg(self.host_dir(over, 0).join("router.sock"));
        succeed(&mut ls).is_ok_and(|said| said.contains("\"cm_ports\"") && !said.contains("\"cm_ports\": []"))
    }

    /// How many TCP ports are listened on there.
    fn listeners(&self, host: usize) -> Result<usize> {
        let done = succeed(self.inside(host).args(["cat", "/proc/net/tcp", "/proc/net/tcp6"]))?;
        Ok(done.lines().filter(|line| line.split_whitespace().nth(3) == Some("0A")).count())
    }
}

/// A host in a directory's file.
fn entry(over: Over, host: usize) -> String {
    let (at, port) = (ADDRESSES[host], over.port());
    let mut containers = vec![format!("\"default/{at}\"")];
    if over == Over::Crowded {
        let net = 100 + host; // 10.100 and 10.101
        let rest = (0..CROWD / 2).map(|i| format!("\"default/10.{net}.{}.{}\"", i / 250, i % 250));
        containers.extend(rest);
    }
    let (number, containers) = (host + 1, containers.join(", "));
    format!("[hosts.h{number}]\naddress = \"{at}:{port}\"\ncontainers = [{containers}]\n")
}

impl Drop for Stage {
    fn drop(&mut self) {
        self.routers.clear();
        for name in &self.names {
            // Its interfaces go with it.
            ip(&["netns", "del", name]).ok();
        }
        std::fs::remove_dir_all(&self.dir).ok();
    }
}

/// Processor time of a process so far, in seconds: proc(5), stat, the 14th and 15th field.
fn spent(pid: i32) -> Result<f64> {
    let path = format!("/proc/{pid}/stat");
    let text = std::fs::read_to_string(&path).context(format_args!("cannot read {path}"))?;
    let fields = text.rsplit_once(") ").map_or("", |(_, fields)| fields).split(' ');
    let ticks: f64 = fields.skip(11).take(2).filter_map(|ticks| ticks.parse::<f64>().ok()).sum();
    Ok(ticks / rustix::param::clock_ticks_per_second() as f64)
}

fn ip(words: &[&str]) -> Result<()> {
    succeed(Command::new("ip").args(words)).map(drop)
}

fn is_up(namespace: &str) -> bool {
    let link = succeed(Command::new("ip").args(["-n", namespace, "link", "show", "wire"]));
    link.is_ok_and(|link| link.contains("state UP"))
}

fn succeed(command: &mut Command) -> Result<String> {
    let done = process::run(command, LIMIT, Echo::Quiet)?;
    if done.success() {
        Ok(done.stdout)
    } else {
        Err(Failure::new(format!("{command:?}: {}: {}", done.how(), done.tail())))
    }
}

/// Waits for something by looking.
fn until(what: &str, mut happened: impl FnMut() -> bool) -> Result<()> {
    let start = Instant::now();
    while !happened() {
        if start.elapsed() > LIMIT {
            return Err(Failure::new(format!("waited in vain for {what}")));
        }
        std::thread::sleep(Duration::from_millis(5));
    }
    Ok(())
}
