//! The lab's network: a bridge per host and a veth pair per container, made with `ip` in this network namespace.

use std::io::Write as _;
use std::net::IpAddr;
use std::process::{Command, Stdio};

use rustix::process::Pid;

use crate::cli::failure::{Context as _, Failure, Result};
use crate::cli::paths::find_program;
use crate::cli::sys::ChildSetup;

/// A host's bridge. In a network namespace of the lab's own, so its name can be short and fixed.
pub struct Bridge;

const BRIDGE: &str = "br0";
const PREFIX: u8 = 24;

pub fn loopback_up() -> Result<()> {
    ip(None, "link set lo up")
}

impl Bridge {
    pub fn make(address: IpAddr) -> Result<Self> {
        ip(
            None,
            &format!(
                "link add {BRIDGE} type bridge stp_state 0 forward_delay 0\n\
                 addr add {address}/{PREFIX} dev {BRIDGE}\n\
                 link set {BRIDGE} up"
            ),
        )?;
        Ok(Self)
    }

    /// Gives the container `name` its interface eth0 with `address` on this bridge.
    pub fn attach(&self, name: &str, init: Pid, address: IpAddr) -> Result<()> {
        let pid = init.as_raw_nonzero().get();
        ip(
            None,
            &format!(
                "link add {name} type veth peer name eth0 netns {pid}\n\
                 link set {name} master {BRIDGE} up"
            ),
        )?;
        ip(
            Some(pid),
            &format!("link set lo up\naddr add {address}/{PREFIX} dev eth0 nodad\nlink set eth0 up"),
        )
    }
}

/// Runs `ip` on a list of commands, in the network namespace of process `pid` if one is given.
fn ip(pid: Option<i32>, commands: &str) -> Result<()> {
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
    let mut child = ChildSetup::default().apply(&mut command).spawn().context("cannot start ip")?;
    let written = child.stdin.take().map(|mut pipe| writeln!(pipe, "{commands}"));
    let output = child.wait_with_output().context("cannot wait for ip")?;
    if output.status.success() {
        return written.transpose().map(|_| ()).context("cannot write to ip");
    }
    let said = String::from_utf8_lossy(&output.stderr);
    Err(Failure::new(format!("ip failed ({}): {}\nin: {commands}", output.status, said.trim_end())))
}
