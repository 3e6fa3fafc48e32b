//! The directory as a TOML file that the operator writes: read at the start and whenever it changes.
//!
//! A file that cannot be read or makes no sense changes nothing: the last good one holds, and the log says why. The
//! file's own directory is watched, because files are replaced by renaming (or, in Kubernetes, by swapping a symlink).

use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr, ToSocketAddrs};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::thread::JoinHandle;

use rustix::fs::inotify;
use rustix::io::Errno;

use super::{Backend, Claim, Home, Hosts};
use crate::cluster::hosts::{Listing, Net};
use crate::listener::Stop;

#[derive(Debug, thiserror::Error)]
pub enum FileError {
    #[error("cannot read the directory {}: {source}", path.display())]
    Read { path: PathBuf, source: std::io::Error },
    #[error("directory {}: {why}", path.display())]
    Content { path: PathBuf, why: String },
    #[error("cannot watch {}: {errno}", path.display())]
    Watch { path: PathBuf, errno: Errno },
    #[error("cannot start a thread: {0}")]
    Thread(std::io::Error),
}

#[derive(Debug, serde::Deserialize)]
#[serde(deny_unknown_fields)]
struct Content {
    #[serde(default)]
    hosts: BTreeMap<String, Entry>,
}

#[derive(Debug, serde::Deserialize)]
#[serde(deny_unknown_fields)]
struct Entry {
    /// Where the host's router listens: IP or name, and port.
    address: String,
    /// `tenant/ip`, or `tenant/network` and `*/network`.
    #[serde(default)]
    containers: Vec<String>,
}

/// What the text of a directory says.
fn parse(text: &str) -> Result<Listing, String> {
    let content: Content = toml::from_str(text).map_err(|e| e.to_string())?;
    let mut listing = Listing::default();
    for (name, entry) in content.hosts {
        let addr = resolve(&entry.address).map_err(|why| format!("host {name}: {why}"))?;
        let name: super::HostName = name.into();
        for what in &entry.containers {
            let place = place(what).ok_or_else(|| {
                format!("host {name}: {what:?} is not TENANT/ADDRESS, TENANT/NETWORK or */NETWORK")
            })?;
            match place {
                Place::Home(home) => {
                    if let Some(other) = listing.homes.insert(home, name.clone()) {
                        return Err(format!("{what} is on two hosts: {other} and {name}"));
                    }
                }
                Place::Net(net) => listing.nets.push(Net { host: name.clone(), ..net }),
            }
        }
        listing.hosts.insert(name, addr);
    }
    Ok(listing)
}

fn resolve(address: &str) -> Result<SocketAddr, String> {
    let mut found = address.to_socket_addrs().map_err(|e| format!("address {address:?}: {e}"))?;
    found.next().ok_or_else(|| format!("address {address:?}: no such host"))
}

enum Place {
    Home(Home),
    /// Its host is not filled in yet.
    Net(Net),
}

fn place(text: &str) -> Option<Place> {
    let (tenant, rest) = text.split_once('/')?;
    let Some((base, bits)) = rest.split_once('/') else {
        let ip: IpAddr = rest.parse().ok()?;
        let named = !tenant.is_empty() && tenant != "*";
        return named.then(|| Place::Home(Home { tenant: tenant.into(), ip: ip.to_canonical() }));
    };
    let base: IpAddr = base.parse().ok()?;
    let bits: u8 = bits.parse().ok()?;
    let tenant = (tenant != "*").then(|| tenant.into());
    let most = if base.is_ipv4() { 32 } else { 128 };
    (bits <= most).then(|| Place::Net(Net { tenant, base, bits, host: "".into() }))
}

/// A file that is watched.
#[derive(Debug)]
pub struct File {
    stop: Arc<Stop>,
    thread: Option<JoinHandle<()>>,
}

impl File {
    /// Reads `path` into `hosts`, and again whenever it changes. The first time it must make sense.
    pub fn start(path: &Path, hosts: Arc<Hosts>) -> Result<Self, FileError> {
        let failed = |errno| FileError::Watch { path: path.to_owned(), errno };
        let watch = inotify::init(inotify::CreateFlags::CLOEXEC | inotify::CreateFlags::NONBLOCK);
        let watch = watch.map_err(failed)?;
        let dir = path.parent().unwrap_or(Path::new("/"));
        let changes = inotify::WatchFlags::CLOSE_WRITE
            | inotify::WatchFlags::MOVED_TO
            | inotify::WatchFlags::MOVED_FROM
            | inotify::WatchFlags::CREATE
            | inotify::WatchFlags::DELETE;
        inotify::add_watch(&watch, dir, changes).map_err(failed)?;
        // After the watch is there: no change falls between the two.
        let mut text = read(path)?;
        let content = |why| FileError::Content { path: path.to_owned(), why };
        hosts.replace(&parse(&text).map_err(content)?);
        let stop = Arc::new(Stop::new().map_err(failed)?);
        let (path, until) = (path.to_owned(), stop.clone());
        let follow = move || {
            while until.wait(&watch, None) == Ok(true) {
                forget_events(&watch);
                let now = read(&path).unwrap_or_else(|_| String::new());
                if now != text {
                    take(&path, &now, &hosts);
                    text = now;
                }
            }
        };
        let thread = std::thread::Builder::new().name("directory".into()).spawn(follow);
        Ok(File { stop, thread: Some(thread.map_err(FileError::Thread)?) })
    }
}

fn read(path: &Path) -> Result<String, FileError> {
    std::fs::read_to_string(path).map_err(|source| FileError::Read { path: path.to_owned(), source })
}

fn take(path: &Path, text: &str, hosts: &Hosts) {
    let path = path.display();
    if text.is_empty() {
        // Gone, or about to be written: both happen while a file is replaced.
        return tracing::warn!("the directory {path} is empty or gone: the last one holds");
    }
    match parse(text) {
        Ok(listing) => {
            hosts.replace(&listing);
            let (hosts, containers) = hosts.len();
            tracing::info!("directory {path}: {hosts} hosts, {containers} containers by address");
        }
        Err(why) => tracing::warn!("directory {path}: {why}; the last good one holds"),
    }
}

fn forget_events(watch: &impl std::os::fd::AsFd) {
    let mut events = [0u8; 4096];
    while rustix::io::read(watch, &mut events).is_ok_and(|n| n > 0) {}
}

impl Backend for File {
    /// The file is the operator's: what this host has must be in it.
    fn publish(&self, home: &Home, claim: Claim) {
        tracing::debug!("{home:?} ({claim:?}) is here; the directory is a file and says what others see");
    }

    fn withdraw(&self, _: &Home) {}
}

impl Drop for File {
    fn drop(&mut self) {
        self.stop.set();
        // A panic in it was printed where it happened.
        self.thread.take().map(JoinHandle::join);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_directory_is_read_whole_or_not_at_all() {
        let good = "[hosts.h2]\naddress = \"192.168.77.2:4790\"\ncontainers = [\"red/10.2.0.1\", \"*/10.3.0.0/16\"]\n";
        let listing = parse(good).expect("good");
        assert_eq!((listing.hosts.len(), listing.homes.len(), listing.nets.len()), (1, 1, 1));
        let bad = [
            ("[hosts.h2]\naddress = \"nowhere\"", "nowhere"),
            ("[hosts.h2]\nadress = \"192.168.77.2:1\"", "adress"),
            ("[hosts.h2]\naddress = \"192.168.77.2:1\"\ncontainers = [\"10.0.0.1\"]", "TENANT/ADDRESS"),
            ("[hosts.h2]\naddress = \"192.168.77.2:1\"\ncontainers = [\"*/10.0.0.1\"]", "TENANT/ADDRESS"),
            ("[hosts.h2]\naddress = \"192.168.77.2:1\"\ncontainers = [\"a/10.0.0.0/33\"]", "NETWORK"),
            (
                "[hosts.h2]\naddress = \"192.168.77.2:1\"\ncontainers = [\"a/10.0.0.1\"]\n\
                 [hosts.h3]\naddress = \"192.168.77.3:1\"\ncontainers = [\"a/10.0.0.1\"]",
                "two hosts",
            ),
        ];
        for (text, why) in bad {
            let error = parse(text).expect_err(text);
            assert!(error.contains(why), "{text}: {error}");
        }
    }
}
