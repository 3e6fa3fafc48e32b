//! The daemon's parameters: one declared table, from which the TOML reader, the defaults and docs/config.md come.
//!
//! Owns names, types, defaults and help. It must never know what a parameter is used for.

use std::net::{Ipv4Addr, SocketAddr, SocketAddrV4};
use std::path::{Path, PathBuf};

use crate::cluster::Source;

/// One parameter, as the reference shows it.
#[derive(Debug, Clone)]
pub struct Parameter {
    pub name: &'static str,
    pub kind: &'static str,
    pub default: String,
    pub help: &'static str,
}

macro_rules! parameters {
    ($($(#[doc = $help:literal])+ $name:ident: $kind:ty = $default:expr;)*) => {
        /// What the configuration file can set; every key has a default.
        #[derive(Debug, Clone, PartialEq, Eq, serde::Deserialize)]
        #[serde(deny_unknown_fields, default)]
        pub struct Settings {
            $($(#[doc = $help])+ pub $name: $kind,)*
        }

        impl Default for Settings {
            fn default() -> Self {
                Settings { $($name: $default,)* }
            }
        }

        /// The table of parameters, in the order of declaration.
        pub fn parameters() -> Vec<Parameter> {
            let defaults = Settings::default();
            vec![$(Parameter {
                name: stringify!($name),
                kind: stringify!($kind),
                default: format!("{:?}", defaults.$name),
                help: concat!($($help),+),
            },)*]
        }
    };
}

parameters! {
    /// Connections (processes, and their connection managers) a container may have at one time.
    max_clients: u32 = 1024;
    /// Queue pairs per container.
    max_qp: u32 = 4096;
    /// Completion queues per container.
    max_cq: u32 = 4096;
    /// Shared receive queues per container.
    max_srq: u32 = 4096;
    /// Attachments of queue pairs to multicast groups per container.
    max_mcast: u32 = 1024;
    /// Completion channels per container.
    max_channel: u32 = 1024;
    /// Memory regions per container (a single process has at most 65536).
    max_mr: u32 = 65536;
    /// Protection domains per container; each holds one descriptor in the router.
    max_pd: u32 = 512;
    /// Registered bytes per container.
    max_mr_bytes: u64 = 1 << 40;
    /// Segments of queue memory per container; each holds one descriptor in the router.
    max_slab: u32 = 1024;
    /// Bytes of queue memory per container.
    max_slab_bytes: u64 = 1 << 30;
    /// Work requests per queue.
    max_qp_wr: u32 = 16384;
    /// Entries per completion queue.
    max_cqe: u32 = 1 << 20;
    /// Addresses for containers that name none: an IPv4 network in CIDR form.
    vip_pool: Network = Network::DEFAULT_POOL;
    /// Address of the Prometheus endpoint, /metrics; with port 0 there is none.
    metrics: SocketAddr = SocketAddr::V4(SocketAddrV4::new(Ipv4Addr::LOCALHOST, 9464));
    /// This host's name in the cluster, as its certificate and the directory have it; empty: the kernel's host name.
    host: String = String::new();
    /// Address where routers of other hosts connect; with port 0 this host is alone.
    cluster_listen: SocketAddr = SocketAddr::V4(SocketAddrV4::new(Ipv4Addr::UNSPECIFIED, 0));
    /// What other hosts connect to where that is not `cluster_listen`, as IP:PORT; only etcd needs it, a file has it.
    cluster_address: String = String::new();
    /// Who knows which host has which container: `none`, `file:/PATH` (TOML, read again when it changes) or
    /// `etcd:http://HOST:2379,...`.
    directory: Source = Source::Alone;
    /// The cluster's CA, PEM: a router is trusted if this signed its certificate.
    tls_ca: PathBuf = "/etc/freeflow/tls/ca.pem".into();
    /// This host's certificate, PEM; `freeflow certs` makes it.
    tls_cert: PathBuf = "/etc/freeflow/tls/cert.pem".into();
    /// And its private key, PEM.
    tls_key: PathBuf = "/etc/freeflow/tls/key.pem".into();
    /// Instead of TLS: anybody on the network can then read and change what containers of different hosts send, and
    /// pretend to be any host.
    insecure_plain_tcp: bool = false;
    /// TCP's congestion control between routers, for instance `dctcp`; empty: the host's own (sysctl net.ipv4.tcp_congestion_control), but
    /// cubic where that is bbr, which is made for long paths and slow between hosts of a cluster.
    congestion_control: String = String::new();
}

/// An IPv4 network.
#[derive(Clone, Copy, PartialEq, Eq, serde::Deserialize)]
#[serde(try_from = "String")]
pub struct Network {
    base: u32,
    bits: u8,
}

impl Network {
    const DEFAULT_POOL: Network = Network { base: 0x64_7f_00_00, bits: 16 };

    /// The addresses a host can have, lowest first.
    pub fn hosts(self) -> impl Iterator<Item = std::net::Ipv4Addr> {
        let last = self.base | (u32::MAX.checked_shr(self.bits.into()).unwrap_or(0));
        (self.base + 1..last).map(std::net::Ipv4Addr::from)
    }
}

impl std::fmt::Debug for Network {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "\"{}/{}\"", std::net::Ipv4Addr::from(self.base), self.bits)
    }
}

impl TryFrom<String> for Network {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        let wrong = || format!("{text:?} is not an IPv4 network of the form a.b.c.d/8 to /30");
        let (base, bits) = text.split_once('/').ok_or_else(wrong)?;
        let base = u32::from(base.parse::<std::net::Ipv4Addr>().map_err(|_| wrong())?);
        let bits: u8 = bits.parse().map_err(|_| wrong())?;
        let inside = (8..=30).contains(&bits) && base & (u32::MAX >> bits) == 0;
        if inside { Ok(Network { base, bits }) } else { Err(wrong()) }
    }
}

#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    #[error("cannot read the configuration {}: {source}", path.display())]
    Read { path: PathBuf, source: std::io::Error },
    #[error("{}: {source}", path.display())]
    Parse { path: PathBuf, source: toml::de::Error },
}

/// Descriptors in the router per connection: socket, event socket, pidfd, memory, MR table, and one in passing.
const PER_CLIENT: u64 = 6;

impl Settings {
    /// Descriptors one container can make the router hold.
    pub fn descriptors(&self) -> u64 {
        let single = [self.max_channel, self.max_pd, self.max_slab].map(u64::from);
        u64::from(self.max_clients) * PER_CLIENT + single.iter().sum::<u64>()
    }

    /// Reads a TOML file.
    pub fn load(path: &Path) -> Result<Self, ConfigError> {
        let text = std::fs::read_to_string(path)
            .map_err(|source| ConfigError::Read { path: path.to_owned(), source })?;
        toml::from_str(&text).map_err(|source| ConfigError::Parse { path: path.to_owned(), source })
    }
}

/// docs/config.md.
pub fn reference() -> String {
    let mut page = String::from(
        "# Configuration of the router\n\n\
         Generated from the table in router/src/config.rs; a test keeps it current (`UPDATE_DOCS=1 cargo test -p \
         freeflow-router config` rewrites it).\n\n\
         `freeflow router --config FILE`, or the variable FREEFLOW_CONFIG, names a TOML file with these keys. \
         Each has a default; an unknown key is an error. FREEFLOW_LOG filters the log (`info` unless set; the syntax is \
         tracing's, for instance `freeflow_router=debug`).\n\n\
         Quotas hold per container: what exceeds one fails in the program with ENOMEM and leaves a line in the router's \
         log.\n\n| key | type | default | meaning |\n|---|---|---|---|\n",
    );
    for p in parameters() {
        let string = ["Network", "SocketAddr", "String", "Source", "PathBuf"].contains(&p.kind);
        let kind = if string { "string" } else { p.kind };
        let default = p.default.trim_matches('"');
        let default = if kind == "string" { format!("\"{default}\"") } else { default.to_owned() };
        page += &format!("| `{}` | {kind} | `{default}` | {} |\n", p.name, p.help.trim());
    }
    page
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_reference_is_current() {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs/config.md");
        if std::env::var_os("UPDATE_DOCS").is_some() {
            std::fs::write(&path, reference()).expect("write docs/config.md");
        }
        let written = std::fs::read_to_string(&path).expect("docs/config.md");
        assert_eq!(written, reference(), "run UPDATE_DOCS=1 cargo test -p freeflow-router config");
    }

    #[test]
    fn a_file_overrides_defaults_and_unknown_keys_are_refused() {
        let settings: Settings = toml::from_str("max_qp = 7\nvip_pool = \"10.9.0.0/24\"").expect("valid");
        assert_eq!((settings.max_qp, settings.max_cq), (7, Settings::default().max_cq));
        assert_eq!(settings.vip_pool.hosts().next(), Some([10, 9, 0, 1].into()));
        assert_eq!(settings.vip_pool.hosts().count(), 254);
        let error = toml::from_str::<Settings>("max_pq = 7").expect_err("unknown key");
        assert!(error.to_string().contains("max_pq"), "{error}");
    }

    #[test]
    fn a_pool_is_a_network() {
        for bad in ["10.0.0.0", "10.0.0.1/24", "10.0.0.0/31", "0.0.0.0/0", "x/8", "10.0.0.0/x"] {
            Network::try_from(bad.to_owned()).expect_err(bad);
        }
        let default = format!("{:?}", Network::DEFAULT_POOL);
        let parsed = Network::try_from(default.trim_matches('"').to_owned());
        assert_eq!(parsed, Ok(Network::DEFAULT_POOL));
    }
}
