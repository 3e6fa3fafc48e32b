//! Routers of other hosts: which there are, who they are, and the streams to them.
//!
//! Owns identity between hosts and the directory of containers. It must never know what travels between routers.

pub mod certs;
mod congestion;
pub mod directory;
pub mod hosts;
pub mod security;
pub mod stream;
#[cfg(test)]
mod tests;

use std::io;
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::sync::Arc;
use std::time::Duration;

use congestion::Congestion;
pub use directory::{Backend, Claim, Source};
pub use hosts::{Home, Host, HostName, Hosts, Moved};
pub use security::{Files, Security, SecurityError};
pub use stream::Stream;

use crate::config::Settings;

/// This host's part in a cluster.
#[derive(Debug)]
pub struct Membership {
    pub security: Security,
    congestion: Congestion,
    pub hosts: Arc<Hosts>,
    directory: Box<dyn Backend>,
}

#[derive(Debug, thiserror::Error)]
pub enum ClusterError {
    #[error(transparent)]
    Security(#[from] SecurityError),
    #[error(transparent)]
    File(#[from] directory::file::FileError),
    #[error(
        "this freeflow was built without etcd (cargo feature `etcd`): take a `directory` file, or another build"
    )]
    NoEtcd,
    #[error("`directory` names other hosts, but without `cluster_listen` this router has no links to them")]
    NoListen,
    #[error("`cluster_listen` without a `directory`: no other host would be found")]
    NoDirectory,
    #[error("cluster_address {0:?} is no address and port")]
    BadAddress(String),
    #[error(
        "congestion_control {name:?}: {why} (/proc/sys/net/ipv4/tcp_available_congestion_control has those of this kernel, \
         tcp_allowed_congestion_control those that need no CAP_NET_ADMIN)"
    )]
    Congestion { name: String, why: io::Error },
    #[error("directory: {0}")]
    System(io::Error),
    #[error("the kernel has no host name: set `host`")]
    NoName,
}

impl Membership {
    /// None where the configuration says that this host is alone.
    pub fn start(settings: &Settings) -> Result<Option<Self>, ClusterError> {
        match (settings.cluster_listen.port(), &settings.directory) {
            (0, Source::Alone) => return Ok(None),
            (0, _) => return Err(ClusterError::NoListen),
            (_, Source::Alone) => return Err(ClusterError::NoDirectory),
            _ => {}
        }
        let name = host_name(settings)?;
        let security = security(settings, &name)?;
        let congestion = congestion(settings)?;
        let hosts = Arc::new(Hosts::of(&name));
        let directory: Box<dyn Backend> = match &settings.directory {
            Source::Alone => return Ok(None),
            Source::File(path) => Box::new(directory::file::File::start(path, hosts.clone())?),
            Source::Etcd(urls) => etcd(settings, urls, hosts.clone())?,
        };
        Ok(Some(Membership { security, congestion, hosts, directory }))
    }

    /// Where other routers connect to.
    pub fn listen(&self, at: SocketAddr) -> io::Result<TcpListener> {
        let listener = TcpListener::bind(at)?;
        self.congestion.apply(&listener);
        Ok(listener)
    }

    /// A connection to where another router listens.
    pub fn dial(&self, to: SocketAddr, within: Duration) -> io::Result<TcpStream> {
        let socket = socket2::Socket::new(socket2::Domain::for_address(to), socket2::Type::STREAM, None)?;
        self.congestion.apply(&socket);
        socket.connect_timeout(&to.into(), within)?;
        Ok(socket.into())
    }

    /// This host has `home` now; never waits.
    pub fn publish(&self, home: &Home, claim: Claim) {
        self.directory.publish(home, claim);
    }

    /// And now not any more.
    pub fn withdraw(&self, home: &Home) {
        self.directory.withdraw(home);
    }
}

#[cfg(not(feature = "etcd"))]
fn etcd(_: &Settings, _: &[String], _: Arc<Hosts>) -> Result<Box<dyn Backend>, ClusterError> {
    Err(ClusterError::NoEtcd)
}

#[cfg(feature = "etcd")]
fn etcd(settings: &Settings, urls: &[String], hosts: Arc<Hosts>) -> Result<Box<dyn Backend>, ClusterError> {
    let secure = urls.iter().any(|url| url.starts_with("https:"));
    let files = || [&settings.tls_ca, &settings.tls_cert, &settings.tls_key].map(Clone::clone);
    let tls = secure.then(files);
    let place = directory::etcd::Place { urls: urls.to_vec(), tls, ttl: ETCD_TTL };
    let joined = directory::etcd::Etcd::start(place, advertised(settings)?, hosts);
    Ok(Box::new(joined.map_err(ClusterError::System)?))
}

/// How long a host that is gone is still in the directory.
#[cfg(feature = "etcd")]
const ETCD_TTL: Duration = Duration::from_secs(10);

/// Where other hosts find this one.
#[cfg(feature = "etcd")]
fn advertised(settings: &Settings) -> Result<SocketAddr, ClusterError> {
    if !settings.cluster_address.is_empty() {
        let address = &settings.cluster_address;
        return address.parse().map_err(|_| ClusterError::BadAddress(address.clone()));
    }
    let mut address = settings.cluster_listen;
    if address.ip().is_unspecified() {
        address.set_ip(crate::host::vip(&crate::host::addresses().map_err(ClusterError::System)?));
    }
    Ok(address)
}

/// This host's name in the cluster.
fn host_name(settings: &Settings) -> Result<String, ClusterError> {
    if !settings.host.is_empty() {
        return Ok(settings.host.clone());
    }
    let system = rustix::system::uname();
    let name = system.nodename().to_string_lossy().into_owned();
    if name.is_empty() { Err(ClusterError::NoName) } else { Ok(name) }
}

fn congestion(settings: &Settings) -> Result<Congestion, ClusterError> {
    let name = &settings.congestion_control;
    Congestion::configured(name)
        .map_err(|errno| ClusterError::Congestion { name: name.clone(), why: errno.into() })
}

fn security(settings: &Settings, host: &str) -> Result<Security, SecurityError> {
    if settings.insecure_plain_tcp {
        tracing::warn!(
            "insecure_plain_tcp: anybody on the network can read and change what containers of different hosts send, \
             and pretend to be any host"
        );
        return Ok(Security::plain(host));
    }
    let (ca, cert, key) = (&settings.tls_ca, &settings.tls_cert, &settings.tls_key);
    Security::tls(&Files { ca: ca.clone(), cert: cert.clone(), key: key.clone() }, host)
}
