//! The lab's network, made with `ip`: a namespace per host where there are several, joined by veth; in each host a bridge,
//! and a veth pair per container.
//!
//! Hosts route between their bridges, so that containers reach each other by TCP across hosts, as programs expect that
//! exchange addresses before they use verbs.

use std::fs;
use std::io::Write as _;
use std::net::IpAddr;
use std::os::fd::{AsRawFd as _, OwnedFd};
use std::process::{Command, Stdio};

use rustix::fs::{Mode, OFlags};
use rustix::process::Pid;
use rustix::thread::UnshareFlags;

use super::spec::HostSpec;
use crate::cli::failure::{Context as _, Failure, Result};
use crate::cli::paths::find_program;
use crate::cli::sys::{self, ChildSetup};

const BRIDGE: &str = "br0";
/// What joins the hosts: in each the end of a veth pair, in the lab's own namespace a bridge if there are more than two.
const WIRE: &str = "wire";
const PREFIX: u8 = 24;
/// A container's interface.
pub const INTERFACE: &str = "eth0";

/// A host's network namespace. In it interface names can be short and fixed.
pub struct Namespace(Option<OwnedFd>);

impl Namespace {
    /// The lab's own.
    pub fn own() -> Result<Self> {
        let own = Self(None);
        own.ip("link set lo up")?;
        Ok(own)
    }

    /// A new one, that lasts as long as this value or a process in it.
    pub fn new() -> Result<Self> {
        // A namespace is a thread's before it is a process's.
        let made = std::thread::spawn(|| {
            sys::unshare(UnshareFlags::NEWNET).context("cannot make a network namespace")?;
            // Forwards between its interfaces, as a router does; /proc/sys/net is the reader's own namespace.
            let forward = "/proc/sys/net/ipv4/ip_forward";
            fs::write(forward, "1").context(format_args!("cannot write {forward}"))?;
            let path = "/proc/thread-self/ns/net";
            rustix::fs::open(path, OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty())
                .context(format_args!("cannot open {path}"))
        });
        let fd = made.join().map_err(|_| Failure::new("making a network namespace failed"))??;
        let new = Self(Some(fd));
        new.ip("link set lo up")?;
        Ok(new)
    }

    /// What puts a child into it.
    pub fn setup(&self) -> ChildSetup {
        ChildSetup { network: self.0.as_ref().map(|fd| fd.as_raw_fd()), ..ChildSetup::default() }
    }

    /// Its name for `ip`, which is a process beside this one.
    fn path(&self) -> Result<String> {
        let fd = self.0.as_ref().ok_or_else(|| Failure::new("a host of several without a namespace"))?;
        Ok(format!("/proc/{}/fd/{}", std::process::id(), fd.as_raw_fd()))
    }

    fn ip(&self, commands: &str) -> Result<()> {
        ip(self.setup(), None, commands)
    }
}

/// Joins the namespaces of several hosts, each with routes to the containers of all others.
pub fn join(hosts: &[HostSpec], namespaces: &[Namespace]) -> Result<()> {
    if let [a, b] = namespaces {
        a.ip(&format!("link add {WIRE} type veth peer name {WIRE} netns {}", b.path()?))?;
    } else {
        let lab = Namespace(None);
        lab.ip(&format!("link add {WIRE} type bridge stp_state 0 forward_delay 0\nlink set {WIRE} up"))?;
        for (host, namespace) in hosts.iter().zip(namespaces) {
            let (end, path) = (&host.name, namespace.path()?);
            lab.ip(&format!(
                "link add {end} type veth peer name {WIRE} netns {path}\nlink set {end} master {WIRE} up"
            ))?;
        }
    }
    for (host, namespace) in hosts.iter().zip(namespaces) {
        namespace.ip(&format!("addr add {}/{PREFIX} dev {WIRE}\nlink set {WIRE} up", host.wire))?;
    }
    for (host, namespace) in hosts.iter().zip(namespaces) {
        let others = hosts.iter().filter(|other| other.name != host.name);
        let routes = others.map(|other| format!("route add {}/{PREFIX} via {}\n", other.network, other.wire));
        namespace.ip(&routes.collect::<String>())?;
    }
    Ok(())
}

/// A host's bridge.
pub struct Bridge<'n> {
    namespace: &'n Namespace,
    gateway: IpAddr,
}

impl<'n> Bridge<'n> {
    pub fn make(namespace: &'n Namespace, gateway: IpAddr) -> Result<Self> {
        namespace.ip(&format!(
            "link add {BRIDGE} type bridge stp_state 0 forward_delay 0\n\
             addr add {gateway}/{PREFIX} dev {BRIDGE}\n\
             link set {BRIDGE} up"
        ))?;
        Ok(Self { namespace, gateway })
    }

    /// Gives the container `name` its [`INTERFACE`] with `address` on this bridge.
    pub fn attach(&self, name: &str, init: Pid, address: IpAddr) -> Result<()> {
        let pid = init.as_raw_nonzero().get();
        self.namespace.ip(&format!(
            "link add {name} type veth peer name {INTERFACE} netns {pid}\n\
             link set {name} master {BRIDGE} up"
        ))?;
        let mut inside = format!(
            "link set lo up\naddr add {address}/{PREFIX} dev {INTERFACE} nodad\nlink set {INTERFACE} up"
        );
        if self.namespace.0.is_some() {
            inside += &format!("\nroute add default via {}", self.gateway);
        }
        ip(ChildSetup::default(), Some(pid), &inside)
    }
}

/// Runs `ip` on a list of commands, in the network namespace of process `pid` if one is given, else in that of `setup`.
fn ip(setup: ChildSetup, pid: Option<i32>, commands: &str) -> Result<()> {
    let ip = find_program("ip").ok_or_else(|| Failure::new("ip is not there: install iproute2"))?;
    let mut command = match pid {
        None => Command::new(ip),
        Some(pid) => {
            let mut command = Command::new("nsenter");
            command.arg(format!("--net=/proc/{pid}/ns/net")).arg(ip);
            command
        }
    };
    command.args(["-batch", "-"]).stdin(Stdio::piped()).stdout(Stdio::null()).stderr(Stdio::piped());
    let mut child = setup.apply(&mut command).spawn().context("cannot start ip")?;
    let written = child.stdin.take().map(|mut pipe| writeln!(pipe, "{commands}"));
    let output = child.wait_with_output().context("cannot wait for ip")?;
    if output.status.success() {
        return written.transpose().map(|_| ()).context("cannot write to ip");
    }
    let said = String::from_utf8_lossy(&output.stderr);
    Err(Failure::new(format!("ip failed ({}): {}\nin: {commands}", output.status, said.trim_end())))
}
