//! Where things are: the router's socket, the runtime directory and the distribution tree.
//!
//! Owns these rules and nothing else: it opens no connection except to see whether a socket is answered.

use std::ffi::OsString;
use std::os::unix::fs::DirBuilderExt as _;
use std::path::{Path, PathBuf};

use freeflow_core::ctl;
use freeflow_router::{admin, daemon};
use rustix::fs::Access;

use super::failure::{Context as _, Failure, Result};
use super::vars;

const SYSTEM_DIR: &str = "/run/freeflow";
const SOCKET_NAME: &str = "router.sock";

/// The router socket to use: the one given, else FREEFLOW_SOCKET, else the system's if this user may use it, else the
/// user's own.
pub fn router_socket(given: Option<&Path>) -> Result<PathBuf> {
    let system = Path::new(SYSTEM_DIR).join(SOCKET_NAME);
    let is_root = rustix::process::geteuid().is_root();
    resolve(
        given,
        std::env::var_os(vars::SOCKET),
        is_root || usable(&system),
        std::env::var_os("XDG_RUNTIME_DIR"),
    )
}

/// Whether this user may connect to `socket`. Root's router is there for root: others have one of their own.
fn usable(socket: &Path) -> bool {
    rustix::fs::access(socket, Access::WRITE_OK).is_ok()
}

fn resolve(
    given: Option<&Path>,
    variable: Option<OsString>,
    system: bool,
    xdg: Option<OsString>,
) -> Result<PathBuf> {
    if let Some(path) = given {
        return Ok(path.to_owned());
    }
    if let Some(path) = variable.filter(|v| !v.is_empty()) {
        return Ok(path.into());
    }
    if system {
        return Ok(Path::new(SYSTEM_DIR).join(SOCKET_NAME));
    }
    match xdg.filter(|v| !v.is_empty()) {
        Some(dir) => Ok(Path::new(&dir).join("freeflow").join(SOCKET_NAME)),
        None => Err(Failure::new(format!(
            "no router socket: there is no {SYSTEM_DIR}/{SOCKET_NAME} that this user may use, and neither \
             FREEFLOW_SOCKET nor XDG_RUNTIME_DIR is set; set one of them or give --router"
        ))),
    }
}

/// Directory for our run-time files: /run/freeflow for root, else under XDG_RUNTIME_DIR. Made if missing.
pub fn runtime_dir() -> Result<PathBuf> {
    let dir = if rustix::process::geteuid().is_root() {
        PathBuf::from(SYSTEM_DIR)
    } else {
        let xdg = std::env::var_os("XDG_RUNTIME_DIR").filter(|v| !v.is_empty());
        Path::new(&xdg.ok_or_else(|| Failure::new("XDG_RUNTIME_DIR is not set"))?).join("freeflow")
    };
    make_dir(&dir, 0o755)?;
    Ok(dir)
}

/// Makes a directory, and its parents, unless it is there.
pub fn make_dir(dir: &Path, mode: u32) -> Result<()> {
    std::fs::DirBuilder::new()
        .recursive(true)
        .mode(mode)
        .create(dir)
        .context(format_args!("cannot make directory {}", dir.display()))
}

/// `path` as it is seen from everywhere.
pub fn absolute(path: &Path) -> Result<PathBuf> {
    std::path::absolute(path).context(format_args!("cannot use {}", path.display()))
}

/// Whether `socket` is a container's own: somebody listens, but the router's admin socket is not beside it.
pub fn is_inside_a_container(socket: &Path) -> bool {
    !admin::admin_socket(socket).exists() && ctl::Socket::connect(socket).is_ok()
}

/// Whether a router answers at `socket`, an absolute path. It is an error if the one in that directory has another socket:
/// two would share admin.sock.
pub fn answers(socket: &Path) -> Result<bool> {
    let Ok(containers) = admin::Client::connect(socket).and_then(|mut client| client.ls()) else {
        return Ok(false);
    };
    let own = containers.iter().find(|container| container.name == daemon::DEFAULT_CONTAINER);
    match own.filter(|own| own.socket.file_name() != socket.file_name()) {
        None => Ok(true),
        Some(own) => Err(Failure::new(format!(
            "there is no router at {}: the one in that directory serves {}, and a directory has room for one. Name that \
             socket, or one in a directory of its own",
            socket.display(),
            own.socket.display()
        ))),
    }
}

/// The running binary and the libraries beside it, as `cargo xtask dist` or a package lays them out.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Dist {
    pub binary: PathBuf,
    /// The directory with libibverbs.so.1 and its companions.
    pub libraries: PathBuf,
}

impl Dist {
    pub fn find() -> Result<Self> {
        let binary = std::env::current_exe().context("cannot tell where this program is")?;
        Self::beside(&binary)
    }

    fn beside(binary: &Path) -> Result<Self> {
        let root = binary.parent().and_then(Path::parent).unwrap_or(Path::new("/"));
        let libraries = root.join("lib/freeflow");
        if !libraries.join("libibverbs.so.1").exists() {
            return Err(Failure::new(format!(
                "no libibverbs.so.1 in {}: run the freeflow of a dist tree (cargo xtask dist makes target/dist)",
                libraries.display()
            )));
        }
        Ok(Self { binary: binary.to_owned(), libraries })
    }
}

/// Looks a program up in PATH and in the directories of system programs, which a user's PATH may lack.
pub fn find_program(name: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let extra = ["/usr/sbin", "/sbin"].map(PathBuf::from);
    std::env::split_paths(&path).chain(extra).map(|dir| dir.join(name)).find(|p| p.is_file())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_socket_is_looked_up_in_the_documented_order() {
        let given = Path::new("/given.sock");
        let variable = || Some(OsString::from("/variable.sock"));
        let xdg = || Some(OsString::from("/xdg"));
        let socket = |g, v, s, x| resolve(g, v, s, x).map_err(|f| f.to_string());
        assert_eq!(socket(Some(given), variable(), true, xdg()), Ok("/given.sock".into()));
        assert_eq!(socket(None, variable(), true, xdg()), Ok("/variable.sock".into()));
        assert_eq!(socket(None, Some("".into()), true, xdg()), Ok("/run/freeflow/router.sock".into()));
        assert_eq!(socket(None, None, false, xdg()), Ok("/xdg/freeflow/router.sock".into()));
        assert!(socket(None, None, false, None).is_err());
    }

    #[test]
    fn a_socket_of_somebody_else_is_passed_over() {
        use std::os::unix::fs::PermissionsExt as _;
        let path = std::env::temp_dir().join(format!("ff-usable-{}", std::process::id()));
        let _listener = std::os::unix::net::UnixListener::bind(&path).unwrap();
        assert!(usable(&path));
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o400)).unwrap();
        assert_eq!(usable(&path), rustix::process::getuid().is_root(), "root may use any");
        std::fs::remove_file(&path).unwrap();
        assert!(!usable(&path));
    }

    #[test]
    fn a_binary_outside_a_dist_tree_says_so() {
        let error = Dist::beside(Path::new("/nonexistent/bin/freeflow")).expect_err("no tree there");
        assert!(error.to_string().contains("/nonexistent/lib/freeflow"), "{error}");
    }
}
