//! Running labs seen from outside: finding one and entering it.

use std::os::fd::{AsFd as _, OwnedFd};
use std::path::{Path, PathBuf};
use std::process::Command;

use rustix::fs::{Mode, OFlags};
use rustix::net::sockopt::socket_peercred;
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType, connect, socket_with};
use rustix::process::Pid;
use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};

use super::runc;
use super::state::{self, State};
use crate::cli::failure::{Context as _, Failure, Result};
use crate::cli::paths;

fn running() -> Result<Vec<(PathBuf, State)>> {
    let alive = |state: &State| Path::new("/proc").join(state.inner.to_string()).join("ns").exists();
    let mut labs = state::all(&paths::runtime_dir()?);
    labs.retain(|(_, state)| alive(state));
    Ok(labs)
}

/// The router sockets of the only running lab, as this process can reach them.
pub fn running_routers() -> Result<Vec<PathBuf>> {
    match running()?.as_slice() {
        [] => Err(no_lab()),
        [(_, state)] => Ok(state.routers.iter().map(|path| state.seen_from_outside(path)).collect()),
        several => Err(Failure::new(format!("{} labs are running: give --router", several.len()))),
    }
}

fn no_lab() -> Failure {
    Failure::new(
        "no lab of this user is running: freeflow lab starts one. Containers of docker, podman and runc are \
         entered with their own exec",
    )
}

/// A running lab that has a certain container.
pub struct Running {
    runc_root: PathBuf,
    /// The socket of the container's router, from outside.
    router: PathBuf,
    inner: u32,
    rootless: bool,
}

/// Finds the running lab that has the container `name`.
pub fn find(name: &str) -> Result<Running> {
    let running = running()?;
    let having: Vec<_> = running.iter().filter(|(_, s)| s.containers.iter().any(|c| c == name)).collect();
    match having.as_slice() {
        [(dir, state)] => Ok(Running {
            runc_root: state::runc_root(dir),
            router: state.router_of(name).ok_or_else(no_lab)?,
            inner: state.inner,
            rootless: state.rootless,
        }),
        [] if running.is_empty() => Err(no_lab()),
        [] => Err(Failure::new(format!("no running lab has a container {name:?}"))),
        several => Err(Failure::new(format!("{} running labs have a container {name:?}", several.len()))),
    }
}

/// The process that listens on a router's socket.
fn owner_of(socket: &Path) -> rustix::io::Result<Pid> {
    let end = socket_with(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None)?;
    connect(&end, &SocketAddrUnix::new(socket)?)?;
    Ok(socket_peercred(&end)?.pid)
}

/// Namespaces to enter, in this order; all are open before the first is entered.
#[derive(Default)]
struct Spaces(Vec<(OwnedFd, LinkNameSpaceType)>);

impl Spaces {
    fn add(&mut self, path: &str, kind: LinkNameSpaceType) -> Result<()> {
        let opened = rustix::fs::open(path, OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty());
        self.0.push((opened.context(format_args!("cannot open {path}"))?, kind));
        Ok(())
    }

    fn enter(self) -> Result<()> {
        for (fd, kind) in &self.0 {
            move_into_link_name_space(fd.as_fd(), Some(*kind)).context("cannot enter the lab")?;
        }
        Ok(())
    }
}

impl Running {
    /// `runc exec` in a container of this lab, to be run once this process has entered it.
    pub fn exec_command(&self, container: &str) -> Result<Command> {
        runc::exec_command(&self.runc_root, container, runc::is_terminal())
    }

    /// Moves this process, which must have one thread, into the network of the container's host, where its router is.
    pub fn enter_host(&self) -> Result<()> {
        let socket = &self.router;
        let router = owner_of(socket).context(format_args!("cannot connect to {}", socket.display()))?;
        let mut spaces = self.user_space()?;
        let network = format!("/proc/{}/ns/net", router.as_raw_nonzero());
        spaces.add(&network, LinkNameSpaceType::Network)?;
        spaces.enter()
    }

    /// A rootless lab's user namespace. A process on one of its hosts is in it already, and cannot enter it again.
    fn user_space(&self) -> Result<Spaces> {
        let (ours, labs) = ("/proc/self/ns/user", format!("/proc/{}/ns/user", self.inner));
        let mut spaces = Spaces::default();
        if self.rootless && std::fs::read_link(ours).ok() != std::fs::read_link(&labs).ok() {
            spaces.add(&labs, LinkNameSpaceType::User)?;
        }
        Ok(spaces)
    }

    /// Moves this process, which must have one thread, into the lab's namespaces; its children, into its PID
    /// namespace.
    pub fn enter(&self) -> Result<()> {
        let mut spaces = self.user_space()?;
        // The inner process' own PID namespace is the one its children are in: it is that namespace's init.
        for (name, kind) in [
            ("pid", LinkNameSpaceType::ProcessID),
            ("net", LinkNameSpaceType::Network),
            ("mnt", LinkNameSpaceType::Mount),
        ] {
            spaces.add(&format!("/proc/{}/ns/{name}", self.inner), kind)?;
        }
        spaces.enter()
    }
}
