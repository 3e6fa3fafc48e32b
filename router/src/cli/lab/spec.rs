//! What a lab shall be: its containers, their addresses, and what runs in them, checked before anything is made.

use std::net::{IpAddr, Ipv4Addr};
use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use crate::cli::failure::{Failure, Result};

/// Most containers per host: their addresses share one /24.
pub const MAX_CONTAINERS: u8 = 250;

/// Passed from the outer to the inner process.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Spec {
    /// The lab's directory; only the inner process and its children see what is in it.
    pub dir: PathBuf,
    pub hosts: Vec<HostSpec>,
    pub runs: Vec<RunSpec>,
    pub rootfs: Option<PathBuf>,
    /// Links between hosts are plain TCP.
    pub plain: bool,
    /// Whether the lab runs in a user namespace of its own.
    pub rootless: bool,
}

#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct HostSpec {
    /// h1..; what the routers of a cluster call it.
    pub name: String,
    pub containers: Vec<ContainerSpec>,
    /// The network of its containers, a /24.
    pub network: IpAddr,
    /// The bridge's own address.
    pub gateway: IpAddr,
    /// Its address between hosts.
    pub wire: IpAddr,
}

#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct ContainerSpec {
    pub name: String,
    pub ip: IpAddr,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RunSpec {
    pub container: String,
    /// For `sh -c`, with `@NAME` replaced.
    pub command: String,
}

impl Spec {
    /// Whether there is something between hosts.
    pub fn is_cluster(&self) -> bool {
        self.hosts.len() > 1
    }

    pub fn containers(&self) -> impl Iterator<Item = &ContainerSpec> {
        self.hosts.iter().flat_map(|host| &host.containers)
    }
}

/// Hosts with their containers: c1.. on one host, hNcM on several.
pub fn hosts(hosts: u8, containers: u8) -> Vec<HostSpec> {
    let name = |h: u8, c: u8| if hosts == 1 { format!("c{c}") } else { format!("h{h}c{c}") };
    let address = |h: u8, c: u8| IpAddr::V4(Ipv4Addr::new(10, 77, h, c));
    let container = |h: u8, c: u8| ContainerSpec { name: name(h, c), ip: address(h, c) };
    let host = |h: u8| HostSpec {
        name: format!("h{h}"),
        containers: (1..=containers).map(|c| container(h, c)).collect(),
        network: address(h, 0),
        gateway: address(h, 254),
        wire: Ipv4Addr::new(192, 168, 77, h).into(),
    };
    (1..=hosts).map(host).collect()
}

/// Reads `NAME=CMD` and puts addresses in place of `@NAME`.
pub fn run(text: &str, hosts: &[HostSpec]) -> Result<RunSpec> {
    let containers: Vec<&ContainerSpec> = hosts.iter().flat_map(|h| &h.containers).collect();
    let names = || containers.iter().map(|c| c.name.as_str()).collect::<Vec<_>>().join(", ");
    let (name, command) =
        text.split_once('=').ok_or_else(|| Failure::new(format!("--run {text:?} is not NAME=CMD")))?;
    if !containers.iter().any(|c| c.name == name) {
        return Err(Failure::new(format!("--run {text:?}: no container {name:?}, there are {}", names())));
    }
    let address = |name: &str| containers.iter().find(|c| c.name == name).map(|c| c.ip);
    Ok(RunSpec { container: name.to_owned(), command: substitute(command, address) })
}

/// Replaces each `@WORD` that names a container; others, as in `user@example`, stay.
fn substitute(command: &str, address: impl Fn(&str) -> Option<IpAddr>) -> String {
    let mut out = String::new();
    let mut rest = command;
    while let Some(at) = rest.find('@') {
        out.push_str(&rest[..at]);
        rest = &rest[at + 1..];
        let end = rest.find(|c: char| !c.is_ascii_alphanumeric()).unwrap_or(rest.len());
        let (word, tail) = rest.split_at(end);
        match address(word) {
            Some(ip) => out.push_str(&ip.to_string()),
            None => {
                out.push('@');
                out.push_str(word);
            }
        }
        rest = tail;
    }
    out + rest
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_and_addresses_follow_the_interface() {
        let one = hosts(1, 2);
        assert_eq!(one[0].containers[1].name, "c2");
        assert_eq!(one[0].containers[1].ip.to_string(), "10.77.1.2");
        let two = hosts(2, 1);
        assert_eq!(two[1].containers[0].name, "h2c1");
        assert_eq!(two[1].containers[0].ip.to_string(), "10.77.2.1");
    }

    #[test]
    fn addresses_replace_whole_names_only() {
        let hosts = hosts(1, 11);
        let command = |text| run(text, &hosts).expect("a good --run").command;
        assert_eq!(command("c1=ping @c2"), "ping 10.77.1.2");
        assert_eq!(command("c1=x @c11:5 @c1"), "x 10.77.1.11:5 10.77.1.1");
        assert_eq!(command("c1=mail me@home @ a@"), "mail me@home @ a@");
        assert_eq!(command("c1=A=b"), "A=b");
    }

    #[test]
    fn a_bad_run_names_what_there_is() {
        let hosts = hosts(1, 2);
        let error = |text| run(text, &hosts).expect_err("must be refused").to_string();
        assert!(error("c3=true").contains("c1, c2"), "{}", error("c3=true"));
        assert!(error("true").contains("NAME=CMD"));
    }
}
