//! What a lab leaves for others to find it by: one small file in the runtime directory.
//!
//! Owns that file and the directory's names. Everything else of a lab lies on a tmpfs that only its own mount
//! namespace has, under the same path.

use std::fs;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::cgroups;
use super::spec::{HostSpec, Spec};
use crate::cli::failure::{Context as _, Result};

const FILE: &str = "lab.json";
const PREFIX: &str = "lab-";

#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct State {
    /// Pid of the inner process.
    pub inner: u32,
    pub rootless: bool,
    pub containers: Vec<String>,
    /// Where its routers listen, as the lab's own processes name it.
    pub routers: Vec<PathBuf>,
}

impl State {
    /// A path of the lab's own processes, for others.
    pub fn seen_from_outside(&self, path: &Path) -> PathBuf {
        let root = Path::new("/proc").join(self.inner.to_string()).join("root");
        root.join(path.strip_prefix("/").unwrap_or(path))
    }

    /// The router of a container: each host has as many, in its order.
    pub fn router_of(&self, container: &str) -> Option<PathBuf> {
        let number = self.containers.iter().position(|name| name == container)?;
        let router = self.routers.get(number * self.routers.len() / self.containers.len())?;
        Some(self.seen_from_outside(router))
    }
}

pub fn dir_of(runtime: &Path, pid: u32) -> PathBuf {
    runtime.join(format!("{PREFIX}{pid}"))
}

/// Where a router of the lab in `dir` listens; `host` names one of several.
pub fn router_socket(dir: &Path, host: Option<&str>) -> PathBuf {
    host.map_or_else(|| dir.to_owned(), |host| dir.join(host)).join("router.sock")
}

/// runc's state directory in the lab in `dir`.
pub fn runc_root(dir: &Path) -> PathBuf {
    dir.join("runc")
}

pub fn write(dir: &Path, inner: u32, spec: &Spec) -> Result<()> {
    let containers = spec.containers().map(|c| c.name.clone()).collect();
    let host_name = |host: &HostSpec| spec.is_cluster().then(|| host.name.clone());
    let routers = spec.hosts.iter().map(|host| router_socket(dir, host_name(host).as_deref())).collect();
    let state = State { inner, rootless: spec.rootless, containers, routers };
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

/// The labs in `runtime`, by directory; their processes may have ended.
pub fn all(runtime: &Path) -> Vec<(PathBuf, State)> {
    let state = |dir: &Path| serde_json::from_slice(&fs::read(dir.join(FILE)).ok()?).ok();
    labs(runtime).into_iter().filter_map(|(_, dir)| state(&dir).map(|state| (dir, state))).collect()
}

/// Outer pids and directories of the labs in `runtime`, dead ones included.
fn labs(runtime: &Path) -> Vec<(u32, PathBuf)> {
    let entries = fs::read_dir(runtime).into_iter().flatten().flatten();
    let pid_of = |name: &str| name.strip_prefix(PREFIX)?.parse().ok();
    entries.filter_map(|e| Some((pid_of(e.file_name().to_str()?)?, e.path()))).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn containers_have_their_hosts_router() {
        let names = |names: &[&str]| names.iter().map(|name| (*name).to_owned()).collect();
        let state = State {
            inner: 7,
            rootless: false,
            containers: names(&["h1c1", "h1c2", "h2c1", "h2c2"]),
            routers: ["/run/1.sock", "/run/2.sock"].map(PathBuf::from).to_vec(),
        };
        let router = |name: &str| state.router_of(name).map(|path| path.display().to_string());
        assert_eq!(router("h1c2").as_deref(), Some("/proc/7/root/run/1.sock"));
        assert_eq!(router("h2c1").as_deref(), Some("/proc/7/root/run/2.sock"));
        assert_eq!(router("h3c1"), None);
    }
}
