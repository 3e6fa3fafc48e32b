//! The environment through which an unmodified program finds our doors: libraries by search path and by preload.
//!
//! LD_LIBRARY_PATH is the main way; LD_PRELOAD in addition serves programs with an RPATH. LD_PRELOAD alone would be a
//! trap: a later dlopen("libibverbs.so") would load the distribution's copy beside ours.

use std::ffi::{OsStr, OsString};
use std::path::Path;

use super::vars;

/// Libraries to preload, where the tree has them. The last has UCX before 1.22 look for our transport.
const PRELOADED: [&str; 3] = ["libibverbs.so.1", "librdmacm.so.1", "ucx/libucx-ff-preload.so"];
/// Where UCX finds our transport: from 1.22 on in a list of directories, before in one beside its own.
const UCX_PLUGIN_PATH: &str = "UCX_PLUGIN_PATH";
const UCX_MODULE_DIR: &str = "UCX_MODULE_DIR";

/// NCCL's network plugin. Every version of NCCL finds it by this name and LD_LIBRARY_PATH; a path some do not take.
pub const NCCL_PLUGIN: (&str, &str) = ("NCCL_NET_PLUGIN", "freeflow");
pub const NCCL_LIBRARY: &str = "libnccl-net-freeflow.so";

/// What a program's environment must say.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Doors {
    pub variables: Vec<(&'static str, OsString)>,
}

impl Doors {
    /// Doors to the libraries seen at `present` here and at `libraries` by the program, and to the router at
    /// `socket`. `inherited` looks up the variables the program would have had: they stay, behind ours.
    pub fn new(
        present: &Path,
        libraries: &Path,
        socket: &Path,
        name: Option<&str>,
        inherited: impl Fn(&str) -> Option<OsString>,
    ) -> Self {
        let mut preload = OsString::new();
        for library in PRELOADED.iter().filter(|l| present.join(l).exists()) {
            push_path(&mut preload, libraries.join(library).as_os_str());
        }
        let mut variables = vec![
            ("LD_LIBRARY_PATH", joined(libraries.as_os_str(), inherited("LD_LIBRARY_PATH"))),
            ("LD_PRELOAD", joined(&preload, inherited("LD_PRELOAD"))),
            (vars::SOCKET, socket.as_os_str().to_owned()),
        ];
        let ucx = libraries.join("ucx");
        if present.join("ucx").is_dir() {
            variables.push((UCX_PLUGIN_PATH, joined(ucx.as_os_str(), inherited(UCX_PLUGIN_PATH))));
            // UCX looks beside its own libraries first; a directory that somebody chose holds more than ours.
            let chosen = inherited(UCX_MODULE_DIR).filter(|dir| !dir.is_empty());
            variables.push((UCX_MODULE_DIR, chosen.unwrap_or_else(|| ucx.into_os_string())));
        }
        if let Some(name) = name {
            variables.push((vars::NAME, name.into()));
        }
        // A user who named another plugin, or none, meant it.
        if present.join(NCCL_LIBRARY).exists() {
            let (variable, plugin) = NCCL_PLUGIN;
            variables.push((variable, inherited(variable).unwrap_or_else(|| plugin.into())));
        }
        Self { variables }
    }
}

/// Ours first, then what was there. An empty element would mean "the current directory" to ld.so: none is made.
fn joined(ours: &OsStr, theirs: Option<OsString>) -> OsString {
    let mut list = ours.to_owned();
    if let Some(theirs) = theirs.filter(|t| !t.is_empty() && t != ours) {
        push_path(&mut list, &theirs);
    }
    list
}

fn push_path(list: &mut OsString, element: &OsStr) {
    if !list.is_empty() {
        list.push(":");
    }
    list.push(element);
}

#[cfg(test)]
mod tests {
    use super::*;

    fn value<'a>(doors: &'a Doors, name: &str) -> &'a str {
        let (_, value) = doors.variables.iter().find(|(n, _)| *n == name).expect("variable is set");
        value.to_str().expect("utf-8")
    }

    #[test]
    fn ucx_finds_our_transport() {
        let dir = std::env::temp_dir().join(format!("ff-doors-ucx-{}", std::process::id()));
        std::fs::create_dir_all(dir.join("ucx")).unwrap();
        std::fs::write(dir.join("ucx/libucx-ff-preload.so"), "").unwrap();
        let fresh = Doors::new(&dir, Path::new("/l"), Path::new("/s"), None, |_| None);
        let chosen = |name: &str| name.starts_with("UCX_").then(|| "/theirs".into());
        let kept = Doors::new(&dir, Path::new("/l"), Path::new("/s"), None, chosen);
        std::fs::remove_dir_all(&dir).unwrap();
        assert_eq!(value(&fresh, "LD_PRELOAD"), "/l/ucx/libucx-ff-preload.so");
        assert_eq!((value(&fresh, UCX_PLUGIN_PATH), value(&fresh, UCX_MODULE_DIR)), ("/l/ucx", "/l/ucx"));
        assert_eq!(
            (value(&kept, UCX_PLUGIN_PATH), value(&kept, UCX_MODULE_DIR)),
            ("/l/ucx:/theirs", "/theirs")
        );
    }

    #[test]
    fn ours_come_first_and_the_rest_is_kept() {
        let dir = std::env::temp_dir().join(format!("ff-doors-{}", std::process::id()));
        std::fs::create_dir_all(&dir).unwrap();
        for library in ["libibverbs.so.1", NCCL_LIBRARY] {
            std::fs::write(dir.join(library), "").unwrap();
        }
        let inherited = |name: &str| (name == "LD_LIBRARY_PATH").then(|| "/opt/lib".into());
        let doors = Doors::new(&dir, Path::new("/l"), Path::new("/s"), Some("c1"), inherited);
        std::fs::remove_dir_all(&dir).unwrap();
        assert_eq!(value(&doors, "LD_LIBRARY_PATH"), "/l:/opt/lib");
        assert_eq!(value(&doors, "LD_PRELOAD"), "/l/libibverbs.so.1", "what is not there is not preloaded");
        assert_eq!(value(&doors, "FREEFLOW_SOCKET"), "/s");
        assert_eq!(value(&doors, "FREEFLOW_NAME"), "c1");
        assert_eq!(value(&doors, "NCCL_NET_PLUGIN"), "freeflow");
    }

    #[test]
    fn another_plugin_for_nccl_stays() {
        let dir = std::env::temp_dir().join(format!("ff-doors-nccl-{}", std::process::id()));
        std::fs::create_dir_all(&dir).unwrap();
        std::fs::write(dir.join(NCCL_LIBRARY), "").unwrap();
        let inherited = |name: &str| (name == "NCCL_NET_PLUGIN").then(|| "none".into());
        let doors = Doors::new(&dir, Path::new("/l"), Path::new("/s"), None, inherited);
        std::fs::remove_dir_all(&dir).unwrap();
        assert_eq!(value(&doors, "NCCL_NET_PLUGIN"), "none");
    }
}
