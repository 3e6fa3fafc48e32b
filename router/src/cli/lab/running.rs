//! Running labs seen from outside: finding one and entering it.

use std::os::fd::{AsFd as _, OwnedFd};
use std::path::{Path, PathBuf};
use std::process::Command;

use rustix::fs::{Mode, OFlags};
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
        [(_, state)] => {
            let root = Path::new("/proc").join(state.inner.to_string()).join("root");
            Ok(state.routers.iter().map(|path| root.join(path.strip_prefix("/").unwrap_or(path))).collect())
        }
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
    inner: u32,
    rootless: bool,
}

/// Finds the running lab that has the container `name`.
pub fn find(name: &str) -> Result<Running> {
    let running = running()?;
    let having: Vec<_> = running.iter().filter(|(_, s)| s.containers.iter().any(|c| c == name)).collect();
    match having.as_slice() {
        [(dir, state)] => {
            Ok(Running { runc_root: state::runc_root(dir), inner: state.inner, rootless: state.rootless })
        }
        [] if running.is_empty() => Err(no_lab()),
        [] => Err(Failure::new(format!("no running lab has a container {name:?}"))),
        several => Err(Failure::new(format!("{} running labs have a container {name:?}", several.len()))),
    }
}

impl Running {
    /// `runc exec` in a container of this lab, to be run once this process has entered it.
    pub fn exec_command(&self, container: &str) -> Result<Command> {
        runc::exec_command(&self.runc_root, container, runc::is_terminal())
    }

    /// Moves this process, which must have one thread, into the lab's namespaces; its children, into its PID
    /// namespace.
    pub fn enter(&self) -> Result<()> {
        let open = |name: &str| -> Result<OwnedFd> {
            let path = format!("/proc/{}/ns/{name}", self.inner);
            rustix::fs::open(&path, OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty())
                .context(format_args!("cannot open {path}"))
        };
        let mut spaces = Vec::new();
        if self.rootless {
            spaces.push((open("user")?, LinkNameSpaceType::User));
        }
        // The inner process' own PID namespace is the one its children are in: it is that namespace's init.
        spaces.push((open("pid")?, LinkNameSpaceType::ProcessID));
        spaces.push((open("net")?, LinkNameSpaceType::Network));
        spaces.push((open("mnt")?, LinkNameSpaceType::Mount));
        for (fd, kind) in &spaces {
            move_into_link_name_space(fd.as_fd(), Some(*kind)).context("cannot enter the lab")?;
        }
        Ok(())
    }
}
