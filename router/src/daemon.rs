//! The router daemon: brings sockets up, waits for the end, takes them down.
//!
//! Owns the order of start and stop. It must never know who started it.

use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::Duration;

use freeflow_core::verbs::Gid;
use rustix::fs::{FlockOperation, Mode, OFlags, flock};
use rustix::io::Errno;
use rustix::net::SocketType;

use crate::admin::{DEFAULT_TENANT, admin_socket};
use crate::admin_server::{Admin, make_dir};
use crate::cluster::{Claim, ClusterError, Membership};
use crate::config::{ConfigError, Settings};
use crate::link::Links;
use crate::listener::{ListenError, Listener, SocketFile, Stop, accept_loop, listen};
use crate::proof::Proofs;
use crate::shared::Shared;
use crate::state::NewContainer;
use crate::{cm_hook, host, metrics};

/// Name of the container of the user's own processes.
pub const DEFAULT_CONTAINER: &str = "default";
/// How long the end waits for sessions that are in the middle of a request.
const DRAIN: Duration = Duration::from_secs(5);

/// Everything the command line decides for the daemon.
#[derive(Debug)]
pub struct Config {
    /// Where the router's own socket goes; `admin.sock` goes beside it.
    pub socket: PathBuf,
    /// `--config` / `FREEFLOW_CONFIG`: a TOML file.
    pub file: Option<PathBuf>,
    /// One byte is written here once all sockets listen; closed unwritten means that the start failed.
    pub ready: Option<OwnedFd>,
}

#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error(transparent)]
    Config(#[from] ConfigError),
    #[error(transparent)]
    Listen(#[from] ListenError),
    #[error("{what}: {source}")]
    System { what: String, source: std::io::Error },
    #[error(transparent)]
    Cluster(#[from] ClusterError),
    #[error("{0}")]
    Container(String),
}

fn system<E: Into<std::io::Error>>(what: impl Into<String>) -> impl FnOnce(E) -> Error {
    move |source| Error::System { what: what.into(), source: source.into() }
}

/// Serves until SIGTERM or SIGINT.
pub fn run(config: Config) -> Result<(), Error> {
    init_log();
    // Before any thread: all of them inherit the mask.
    let signals = host::termination().map_err(system("signals"))?;
    let settings = config.file.as_deref().map(Settings::load).transpose()?.unwrap_or_default();
    let daemon = Daemon::start(&config.socket, settings)?;
    if let Some(ready) = config.ready {
        rustix::io::write(&ready, b"\n").map_err(system("tell readiness"))?;
    }
    host::notify("READY=1").map_err(system("tell the service manager"))?;
    host::wait_for_signal(&signals).map_err(system("wait for a signal"))?;
    tracing::info!("stopping");
    // The service manager may be gone; that does not keep us.
    let _ = host::notify("STOPPING=1");
    drop(daemon);
    Ok(())
}

fn init_log() {
    use tracing_subscriber::EnvFilter;
    let filter = EnvFilter::try_from_env("FREEFLOW_LOG").unwrap_or_else(|_| EnvFilter::new("info"));
    // A second daemon of one process (tests) uses the first one's.
    let _ = tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr).try_init();
}

/// A running router; it stops and cleans up when dropped.
#[derive(Debug)]
pub struct Daemon {
    shared: Arc<Shared>,
    admin: Arc<Admin>,
    admin_stop: Arc<Stop>,
    admin_thread: Option<JoinHandle<()>>,
    metrics: Option<JoinHandle<()>>,
    main: Option<Listener>,
    _admin_file: SocketFile,
    _dir: DirLock,
}

impl Daemon {
    /// Brings a router up at `socket`.
    pub fn start(socket: &Path, settings: Settings) -> Result<Self, Error> {
        let socket = std::path::absolute(socket).map_err(system("socket path"))?;
        let dir = socket
            .parent()
            .ok_or_else(|| Error::Container(format!("{} has no directory", socket.display())))?;
        make_dir(dir, 0o700).map_err(system(format!("cannot make {}", dir.display())))?;
        let lock = lock(dir, &socket)?;
        check_descriptors(host::raise_descriptor_limit(), settings.descriptors());
        let proofs = Proofs::beside(dir).map_err(system(format!("secret in {}", dir.display())))?;
        let shared = Arc::new(Shared::new(settings, proofs).map_err(system("/dev/urandom"))?);
        if let Some(membership) = Membership::start(&shared.settings)? {
            shared.cluster.get_or_init(|| membership);
        }
        if let Some(membership) = shared.cluster.get() {
            let links = start_links(&shared, membership)?;
            shared.links.get_or_init(|| links);
        }
        let cm = cm_hook::start(&shared).map_err(system("connection manager"))?;
        shared.cm.get_or_init(|| cm);
        let default = add_default(&shared, &socket)?;
        let admin = Arc::new(Admin::new(shared.clone(), dir, default));
        admin.restore();
        let (fd, admin_file) = listen(&admin_socket(&socket), SocketType::STREAM, 0o600)?;
        let main = Listener::start(&shared, default, &socket, 0o600)?;
        let admin_stop = Arc::new(Stop::new().map_err(system("eventfd"))?);
        let admin_thread = start_admin(fd, admin.clone(), admin_stop.clone())?;
        let metrics = start_metrics(&shared, &admin_stop);
        tracing::info!("router listens on {}", socket.display());
        Ok(Daemon {
            shared,
            admin,
            admin_stop,
            admin_thread: Some(admin_thread),
            metrics,
            main: Some(main),
            _admin_file: admin_file,
            _dir: lock,
        })
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        self.admin_stop.set();
        for thread in [self.admin_thread.take(), self.metrics.take()].into_iter().flatten() {
            // A panic in it was printed where it happened.
            let _ = thread.join();
        }
        self.main.take();
        self.admin.close();
        self.shared.with(|state| state.end_connections(|_| true));
        if !self.shared.wait_until(DRAIN, |state| state.connections.is_empty()) {
            tracing::warn!("some sessions did not end within {DRAIN:?}");
        }
    }
}

/// Warns when one container can use up what all containers share.
fn check_descriptors(limit: u64, one: u64) {
    if one > limit / 2 {
        tracing::warn!(
            "by its quotas one container may hold {one} of this router's {limit} descriptors: raise the limit of open \
             files (LimitNOFILE=, ulimit -Hn), or lower max_clients, max_channel, max_slab and max_pd"
        );
    }
}

/// One router per directory: `admin.sock` is one, and two that start at once must not both find the sockets stale.
#[derive(Debug)]
struct DirLock(OwnedFd);

impl Drop for DirLock {
    fn drop(&mut self) {
        // Closing is not enough while a child that was just forked has the descriptor too. It cannot fail.
        let _ = flock(&self.0, FlockOperation::Unlock);
    }
}

fn lock(dir: &Path, socket: &Path) -> Result<DirLock, Error> {
    let failed = || system::<Errno>(format!("cannot lock {}", dir.display()));
    let fd = rustix::fs::open(dir, OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty());
    let fd = fd.map_err(failed())?;
    match flock(&fd, FlockOperation::NonBlockingLockExclusive) {
        Ok(()) => Ok(DirLock(fd)),
        Err(Errno::WOULDBLOCK) => Err(ListenError::Taken(socket.to_owned()).into()),
        Err(errno) => Err(failed()(errno)),
    }
}

/// The user's own processes: they reach each other by every address of the host.
fn add_default(shared: &Shared, socket: &Path) -> Result<u32, Error> {
    let addresses = host::addresses().map_err(system("interface addresses"))?;
    let vip = host::vip(&addresses);
    let outward = addresses.iter().copied().filter(|ip| host::is_outward(*ip)).collect::<Vec<_>>();
    let new = NewContainer {
        name: DEFAULT_CONTAINER.into(),
        tenant: DEFAULT_TENANT.into(),
        vip: Some(vip),
        aliases: addresses,
        socket: socket.to_owned(),
    };
    let id = shared.with(|state| state.add_container(new)).map_err(Error::Container)?;
    // Bridges have the same address on many hosts: the first one keeps it.
    outward.into_iter().for_each(|ip| shared.publish(&DEFAULT_TENANT.into(), ip, Claim::Modest));
    Ok(id)
}

/// The way to other hosts: queue pairs to a container that moves between them fail, and those to one that was not known when
/// they were connected look for it again.
fn start_links(shared: &Arc<Shared>, membership: &Membership) -> Result<Links, Error> {
    let listen = shared.settings.cluster_listen;
    let links =
        membership.listen(listen).and_then(|listener| Links::start(shared, membership.hosts.own(), listener));
    let links = links.map_err(system(format!("cannot listen for other routers at {listen}")))?;
    let weak = Arc::downgrade(shared);
    membership.hosts.subscribe(Box::new(move |moved| {
        if let Some(links) = weak.upgrade().as_ref().and_then(|shared| shared.links.get()) {
            links.moved(&moved.home.tenant, Gid::of(moved.home.ip), &moved.to);
        }
    }));
    let weak = Arc::downgrade(shared);
    membership.hosts.watch(Box::new(move || {
        if let Some(shared) = weak.upgrade() {
            shared.look_again();
        }
    }));
    Ok(links)
}

/// A host may have several routers, and one address: those that come later do without.
fn start_metrics(shared: &Arc<Shared>, stop: &Arc<Stop>) -> Option<JoinHandle<()>> {
    let address = shared.settings.metrics;
    if address.port() == 0 {
        return None;
    }
    metrics::start(address, shared.clone(), stop.clone())
        .inspect_err(|error| {
            tracing::warn!(
                "no metrics at {address}: {error}; `metrics` in the configuration names another address"
            );
        })
        .ok()
}

fn start_admin(fd: OwnedFd, admin: Arc<Admin>, stop: Arc<Stop>) -> Result<JoinHandle<()>, Error> {
    let serve = move || {
        accept_loop(&fd, &stop, |connection| {
            let (admin, stop) = (admin.clone(), stop.clone());
            let thread = std::thread::Builder::new().name("admin-client".into());
            if let Err(error) = thread.spawn(move || admin.serve(connection, &stop)) {
                tracing::warn!("cannot start a thread for an admin connection: {error}");
            }
        });
    };
    std::thread::Builder::new().name("admin".into()).spawn(serve).map_err(system("thread"))
}
