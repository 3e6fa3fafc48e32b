//! Finding running labs from outside: one small file per lab in the runtime directory.
//!
//! Owns that file and the directory's name. Everything else of a lab lies on a tmpfs that only its own mount
//! namespace has, under the same path.

use std::fs;
use std::os::fd::{AsFd as _, OwnedFd};
use std::path::{Path, PathBuf};
use std::process::Command;

use rustix::fs::{Mode, OFlags};
use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};
use serde::{Deserialize, Serialize};

use super::spec::Spec;
use super::{cgroups, runc};
use crate::cli::failure::{Context as _, Failure, Result};
use crate::cli::paths;

const FILE: &str = "lab.json";
const PREFIX: &str = "lab-";

#[derive(Debug, Clone, Serialize, Deserialize)]
struct State {
    /// Pid of the inner process.
    inner: u32,
    rootless: bool,
    containers: Vec<String>,
}

pub fn dir_of(runtime: &Path, pid: u32) -> PathBuf {
    runtime.join(format!("{PREFIX}{pid}"))
}

/// Where the router of the lab in `dir` listens, as the lab's own processes name it.
pub fn router_socket(dir: &Path) -> PathBuf {
    dir.join("router.sock")
}

/// runc's state directory in the lab in `dir`.
pub fn runc_root(dir: &Path) -> PathBuf {
    dir.join("runc")
}

pub fn write(dir: &Path, inner: u32, spec: &Spec) -> Result<()> {
    let containers = spec.containers().map(|c| c.name.clone()).collect();
    let state = State { inner, rootless: spec.rootless, containers };
    let json = serde_json::to_vec(&state).context("cannot write the lab's state")?;
    fs::write(dir.join(FILE), json).context(format_args!("cannot write {}", dir.join(FILE).display()))
}

/// Removes what labs left whose outer process was killed.
pub fn sweep(runtime: &Path) {
    for (pid, dir) in labs(runtime) {
        if !Path::new("/proc").join(pid.to_string()).exists() {
            cgroups::remove(pid);
            if let Err(error) = fs::remove_dir_all(&dir) {
                eprintln!("freeflow lab: cannot remove {}: {error}", dir.display());
            }
        }
    }
}

/// Outer pids and directories of the labs in `runtime`, dead ones included.
fn labs(runtime: &Path) -> Vec<(u32, PathBuf)> {
    let entries = fs::read_dir(runtime).into_iter().flatten().flatten();
    let pid_of = |name: &str| name.strip_prefix(PREFIX)?.parse().ok();
    entries.filter_map(|e| Some((pid_of(e.file_name().to_str()?)?, e.path()))).collect()
}

fn running() -> Result<Vec<(PathBuf, State)>> {
    let state = |dir: &Path| serde_json::from_slice::<State>(&fs::read(dir.join(FILE)).ok()?).ok();
    let alive = |state: &State| Path::new("/proc").join(state.inner.to_string()).join("ns").exists();
    let labs = labs(&paths::runtime_dir()?);
    Ok(labs.into_iter().filter_map(|(_, dir)| state(&dir).filter(alive).map(|s| (dir, s))).collect())
}

/// The router socket of the only running lab, as this process can reach it.
pub fn running_router() -> Result<PathBuf> {
    match running()?.as_slice() {
        [] => Err(no_lab()),
        [(dir, state)] => {
            let root = Path::new("/proc").join(state.inner.to_string()).join("root");
            Ok(root.join(router_socket(dir).strip_prefix("/").unwrap_or(dir)))
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
            Ok(Running { runc_root: runc_root(dir), inner: state.inner, rootless: state.rootless })
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
