//! The server side of the admin socket: adding, removing and listing containers.
//!
//! Owns the listeners of containers. It serves root and the router's own user, by peer credentials.

use std::collections::BTreeMap;
use std::io::BufReader;
use std::net::IpAddr;
use std::os::fd::OwnedFd;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use crate::admin::{
    Add, Answer, CONTAINER_SOCKET_NAME, DEFAULT_TENANT, Pong, Request, read_line, write_line,
};
use crate::cluster::Claim;
use crate::directory::Tenant;
use crate::identity::credentials;
use crate::listener::{Listener, Stop};
use crate::remembered::Remembered;
use crate::shared::Shared;
use crate::state::{Container, NewContainer};
use crate::{admin, cm_hook};

/// How long a removal waits for the container's sessions to end.
const REMOVE_WAIT: Duration = Duration::from_secs(5);

/// What the admin socket works on.
#[derive(Debug)]
pub struct Admin {
    shared: Arc<Shared>,
    /// Containers without a directory of their own get one in here.
    containers_dir: PathBuf,
    remembered: Remembered,
    /// The container that cannot be removed.
    default: u32,
    /// One change at a time; none once the router stops.
    listeners: Mutex<Option<BTreeMap<u32, Place>>>,
}

/// Where an added container is reached.
#[derive(Debug)]
struct Place {
    /// Dropped first: it removes the socket file.
    listener: Listener,
    /// A directory the router made.
    made: Option<PathBuf>,
}

/// A container in the tables.
enum Entered {
    /// It was there, and is served.
    Before(u32),
    Now(u32),
}

impl Admin {
    pub fn new(shared: Arc<Shared>, socket_dir: &Path, default: u32) -> Self {
        let containers_dir = socket_dir.join("containers");
        let remembered = Remembered::beside(socket_dir);
        Admin { shared, containers_dir, remembered, default, listeners: Mutex::new(Some(BTreeMap::new())) }
    }

    /// Serves the containers again that the last router had: after a clean end those in directories of the operator's,
    /// after a crash all of them. To be called once, at the start.
    pub fn restore(&self) {
        let adds = self.remembered.load().unwrap_or_else(|error| {
            let path = self.remembered.path().display();
            tracing::warn!("cannot read {path}, add the containers again: {error}");
            vec![]
        });
        let mut guard = self.listeners.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(listeners) = guard.as_mut() else { return };
        // All are known before the first is served: who comes back at once must not be told that its peers are on no host.
        let entered: Vec<_> = adds.iter().map(|add| self.enter(add)).collect();
        for (add, entered) in adds.iter().zip(entered) {
            // It may have moved to another host while no router was here.
            let opened = entered.and_then(|entered| self.open(listeners, add, entered, Claim::Modest));
            if let Err(why) = opened {
                tracing::warn!("container {} does not come back: {why}", add.name);
            }
        }
        if !adds.is_empty() {
            self.remember(listeners);
        }
    }

    /// Saves which containers there are.
    fn remember(&self, listeners: &BTreeMap<u32, Place>) {
        let adds = self.shared.with(|state| {
            let add = |(id, place): (&u32, &Place)| {
                let c = state.containers.get(id)?;
                let given = place.made.is_none().then(|| c.socket.parent().map(Path::to_owned));
                let (name, tenant) = (c.name.clone(), Some(c.tenant.to_string()));
                Some(Add { name, ip: Some(c.vip), tenant, dir: given.flatten() })
            };
            listeners.iter().filter_map(add).collect::<Vec<_>>()
        });
        if let Err(error) = self.remembered.save(&adds) {
            let path = self.remembered.path().display();
            tracing::warn!("cannot write {path}, a restart will lose containers: {error}");
        }
    }

    /// Serves one connection until either side ends it.
    pub fn serve(&self, connection: OwnedFd, stop: &Stop) {
        if let Err(why) = authorize(&connection) {
            return tracing::warn!("admin connection refused: {why}");
        }
        let mut stream = BufReader::new(UnixStream::from(connection));
        while matches!(stop.wait(stream.get_ref(), None), Ok(true)) {
            let line = match read_line(&mut stream) {
                Ok(Some(line)) => line,
                Ok(None) => return,
                Err(error) => return tracing::warn!("admin connection: {error}"),
            };
            let answer = match serde_json::from_str::<Request>(&line) {
                Ok(request) => self.answer(request),
                Err(error) => Answer::Error { message: format!("not a request of this router: {error}") },
            };
            if let Err(error) = write_line(stream.get_mut(), &answer) {
                return tracing::warn!("admin connection: {error}");
            }
        }
    }

    fn answer(&self, request: Request) -> Answer {
        let result = match request {
            Request::Add(add) => self.add(add).map(Answer::Added),
            Request::Rm { name } => self.remove(&name).map(|()| Answer::Removed {}),
            Request::Ls {} => Ok(Answer::Containers(self.list())),
            Request::Ps {} => Ok(Answer::Ps(self.shared.with(|state| state.ps()))),
            Request::Ping {} => Ok(Answer::Pong(Pong {
                protocol: freeflow_core::ctl::VERSION.into(),
                version: env!("CARGO_PKG_VERSION").into(),
                pid: std::process::id(),
            })),
        };
        result.unwrap_or_else(|message| Answer::Error { message })
    }

    fn list(&self) -> Vec<admin::Container> {
        let ids: Vec<u32> = self.shared.with(|state| state.containers.keys().copied().collect());
        ids.into_iter().filter_map(|id| self.describe(id)).collect()
    }

    fn describe(&self, id: u32) -> Option<admin::Container> {
        let cm_ports = cm_hook::ports(&self.shared, id);
        self.shared.with(|state| {
            let c = state.containers.get(&id)?;
            Some(admin::Container {
                name: c.name.clone(),
                tenant: c.tenant.to_string(),
                vip: c.vip,
                socket: c.socket.clone(),
                pids: state.pids(id),
                cm_ports,
            })
        })
    }

    fn add(&self, add: Add) -> Result<admin::Container, String> {
        let mut guard = self.listeners.lock().unwrap_or_else(PoisonError::into_inner);
        let listeners = guard.as_mut().ok_or("the router is stopping")?;
        let before = listeners.len();
        let id = self.establish(listeners, &add, Claim::Firm)?;
        if listeners.len() != before {
            self.remember(listeners);
        }
        self.describe(id).ok_or_else(|| "the container is gone again".into())
    }

    /// The container that `add` means, made if it is not there.
    fn establish(
        &self,
        listeners: &mut BTreeMap<u32, Place>,
        add: &Add,
        claim: Claim,
    ) -> Result<u32, String> {
        let entered = self.enter(add)?;
        self.open(listeners, add, entered, claim)
    }

    fn dir_of(&self, add: &Add) -> PathBuf {
        add.dir.clone().unwrap_or_else(|| self.containers_dir.join(&add.name))
    }

    fn socket_of(&self, add: &Add) -> PathBuf {
        self.dir_of(add).join(CONTAINER_SOCKET_NAME)
    }

    /// Makes the container known, if it is not; nobody reaches it yet.
    fn enter(&self, add: &Add) -> Result<Entered, String> {
        let tenant = add.tenant.clone().unwrap_or_else(|| DEFAULT_TENANT.into());
        self.shared.with(|state| {
            if let Some(id) = state.container_named(&add.name).and_then(|c| same(c, add, &tenant)) {
                return Ok(Entered::Before(id));
            }
            let (name, socket) = (add.name.clone(), self.socket_of(add));
            let new = NewContainer { name, tenant, vip: add.ip, aliases: vec![], socket };
            state.add_container(new).map(Entered::Now)
        })
    }

    /// Serves a container that was just entered.
    fn open(
        &self,
        listeners: &mut BTreeMap<u32, Place>,
        add: &Add,
        entered: Entered,
        claim: Claim,
    ) -> Result<u32, String> {
        let id = match entered {
            Entered::Before(id) => return Ok(id),
            Entered::Now(id) => id,
        };
        let place = self.listen(id, add);
        listeners.insert(id, place.inspect_err(|_| self.abandon(id))?);
        if let Some((tenant, vip)) = self.home(id) {
            self.shared.publish(&tenant, vip, claim);
        }
        tracing::info!("added container {} at {}", add.name, self.socket_of(add).display());
        Ok(id)
    }

    fn home(&self, id: u32) -> Option<(Tenant, IpAddr)> {
        self.shared.with(|state| state.containers.get(&id).map(|c| (c.tenant.clone(), c.vip)))
    }

    /// Takes a container that was never reachable out again.
    fn abandon(&self, id: u32) {
        self.shared.with(|state| {
            state.leave(id);
            state.forget_container(id)
        });
    }

    fn listen(&self, id: u32, add: &Add) -> Result<Place, String> {
        let dir = self.dir_of(add);
        let made = match &add.dir {
            Some(dir) if !dir.is_absolute() || !dir.is_dir() => {
                return Err(format!("{} is not an existing absolute directory", dir.display()));
            }
            Some(_) => None,
            None => {
                // Who reaches a container's socket is that container: the directory above is for the router's user alone.
                make_dir(&self.containers_dir, 0o700)
                    .and_then(|()| make_dir(&dir, 0o755))
                    .map_err(|e| format!("cannot make {}: {e}", dir.display()))?;
                Some(dir.clone())
            }
        };
        // Whoever gets the directory bind-mounted is the container, under whatever uid it is mapped to.
        let listener = Listener::start(&self.shared, id, &self.socket_of(add), 0o666);
        let listener = listener.map_err(|e| e.to_string())?;
        Ok(Place { listener, made })
    }

    fn remove(&self, name: &str) -> Result<(), String> {
        let mut guard = self.listeners.lock().unwrap_or_else(PoisonError::into_inner);
        let listeners = guard.as_mut().ok_or("the router is stopping")?;
        let id = self.shared.with(|state| state.container_named(name).map(|c| c.id));
        let id = id.ok_or_else(|| format!("no such container: {name}"))?;
        if id == self.default {
            return Err(format!("container {name} is the router's own and lives as long as it"));
        }
        if let Some(Place { listener, made }) = listeners.remove(&id) {
            drop(listener);
            if let Some(dir) = made {
                // What others put there is theirs to remove.
                let _ = std::fs::remove_dir(dir);
            }
            self.remember(listeners);
        }
        if let Some((tenant, vip)) = self.home(id) {
            self.shared.withdraw(&tenant, vip);
        }
        self.shared.with(|state| state.leave(id));
        if !self.shared.wait_until(REMOVE_WAIT, |state| state.forget_container(id)) {
            return Err(format!(
                "container {name} is cut off, but some of its sessions do not end; try again"
            ));
        }
        tracing::info!("removed container {name}");
        Ok(())
    }

    /// Stops all containers' listeners and removes the directories made for them.
    pub fn close(&self) {
        let mut places = self.listeners.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(places) = places.take() else { return };
        let (going, staying): (BTreeMap<_, _>, BTreeMap<_, _>) =
            places.into_iter().partition(|(_, place)| place.made.is_some());
        self.remember(&staying);
        for Place { listener, made } in going.into_values().chain(staying.into_values()) {
            drop(listener);
            made.into_iter().for_each(|dir| _ = std::fs::remove_dir(dir));
        }
        // Gone only if it is empty, as it should be.
        let _ = std::fs::remove_dir(&self.containers_dir);
    }
}

/// The id of `c` if a repeated `add` means it.
fn same(c: &Container, add: &Add, tenant: &str) -> Option<u32> {
    let same = *c.tenant == *tenant
        && !c.leaving
        && add.ip.is_none_or(|ip| ip.to_canonical() == c.vip)
        && add.dir.as_ref().is_none_or(|dir| c.socket == dir.join(CONTAINER_SOCKET_NAME));
    same.then_some(c.id)
}

/// Only root and the user that runs the router.
fn authorize(connection: &OwnedFd) -> Result<(), String> {
    let uid = credentials(connection).map_err(|e| e.to_string())?.uid;
    let own = rustix::process::geteuid().as_raw();
    if uid == 0 || uid == own {
        return Ok(());
    }
    Err(format!("user {uid} is neither root nor the router's user {own}"))
}

/// Makes a directory and those above it that are missing; the last gets `mode`.
pub fn make_dir(dir: &Path, mode: u32) -> std::io::Result<()> {
    if dir.is_dir() {
        return Ok(());
    }
    std::fs::create_dir_all(dir)?;
    std::fs::set_permissions(dir, std::fs::Permissions::from_mode(mode))
}
