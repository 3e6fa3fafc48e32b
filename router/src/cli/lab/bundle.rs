//! A container's OCI bundle: root file system, configuration, and the directory it sees at /run/freeflow.
//!
//! Owns how unprivileged the container is: every namespace of its own, a user that is nobody on the host, no
//! capability, no new privileges, a read-only root. It must never know which programs will run.

use std::ffi::OsString;
use std::fs;
use std::path::{Path, PathBuf};

use rustix::mount::{mount_bind, mount_bind_recursive};
use serde_json::{Value, json};

use super::spec::{ContainerSpec, Spec};
use super::{cgroups, network};
use crate::cli::container::{self, INSIDE};
use crate::cli::failure::{Context as _, Result};
use crate::cli::nic;
use crate::cli::paths::{self, Dist};
use crate::cli::userns::ContainerIds;
use crate::cli::vars;

const PATH: &str = "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";
const NAMESPACES: [&str; 7] = ["user", "mount", "pid", "ipc", "network", "uts", "cgroup"];
const MASKED: [&str; 9] = [
    "/proc/acpi",
    "/proc/kcore",
    "/proc/keys",
    "/proc/latency_stats",
    "/proc/timer_list",
    "/proc/timer_stats",
    "/proc/sched_debug",
    "/proc/scsi",
    "/sys/firmware",
];
const READ_ONLY: [&str; 5] = ["/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger"];
/// Variables of the caller that a container's programs get too.
const PASSED_ON: [&str; 2] = ["TERM", vars::LOG];

pub struct Bundle {
    dir: PathBuf,
}

impl Bundle {
    /// Lays the bundle of `container` out below the lab's directory.
    pub fn make(spec: &Spec, container: &ContainerSpec, ids: &ContainerIds) -> Result<Self> {
        let bundle = Self { dir: spec.dir.join(&container.name) };
        let doors = bundle.door_dir();
        for dir in [bundle.root(), doors.join("bin"), doors.join("lib/freeflow")] {
            paths::make_dir(&dir, 0o755)?;
        }
        bundle.bind_root(spec)?;
        bundle.write("hosts", &hosts_file(spec))?;
        bundle.write("config.json", &bundle.config(spec, container, ids)?.to_string())?;
        Ok(bundle)
    }

    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// The directory that the container sees at /run/freeflow; its socket goes here.
    pub fn door_dir(&self) -> PathBuf {
        self.dir.join("doors")
    }

    fn root(&self) -> PathBuf {
        self.dir.join("rootfs")
    }

    /// In a user namespace the kernel only allows a bind with everything mounted below.
    fn bind_root(&self, spec: &Spec) -> Result<()> {
        let source = spec.rootfs.as_deref().unwrap_or(Path::new("/"));
        let bound = if spec.rootless {
            mount_bind_recursive(source, self.root())
        } else {
            mount_bind(source, self.root())
        };
        bound.context(format_args!("cannot bind {} as a root file system", source.display()))
    }

    fn write(&self, name: &str, text: &str) -> Result<()> {
        let path = self.dir.join(name);
        fs::write(&path, text).context(format_args!("cannot write {}", path.display()))
    }

    fn config(&self, spec: &Spec, container: &ContainerSpec, ids: &ContainerIds) -> Result<Value> {
        Ok(json!({
            "ociVersion": "1.0.2",
            "hostname": container.name,
            "root": { "path": self.root(), "readonly": true },
            "process": {
                "terminal": false,
                "user": { "uid": ids.user, "gid": ids.user },
                // Its standard input is a pipe that the lab never writes to: it lasts as long as the lab does.
                "args": ["sh", "-c", "read -r end"],
                "env": environment(container)?,
                "cwd": "/tmp",
                "capabilities": {},
                "noNewPrivileges": true,
            },
            "mounts": self.mounts(spec),
            "linux": {
                "namespaces": NAMESPACES.map(|kind| json!({ "type": kind })),
                "uidMappings": ids.mappings,
                "gidMappings": ids.mappings,
                "cgroupsPath": cgroups_path(spec, container),
                "resources": { "devices": [{ "allow": false, "access": "rwm" }] },
                "maskedPaths": MASKED,
                "readonlyPaths": READ_ONLY,
            },
            "hooks": { "createContainer": [self.hook(spec, container)] },
        }))
    }

    fn hook(&self, spec: &Spec, container: &ContainerSpec) -> Value {
        nic::oci_hook(&spec.dir.join("dist/bin/freeflow"), container.ip, Some(network::INTERFACE))
    }

    fn mounts(&self, spec: &Spec) -> Vec<Value> {
        let inside = Path::new(INSIDE);
        let mut mounts = vec![
            mount("/proc", "proc", "proc", &["nosuid", "noexec", "nodev"]),
            mount("/dev", "tmpfs", "tmpfs", &["nosuid", "strictatime", "mode=755", "size=64m"]),
            mount("/dev/pts", "devpts", "devpts", &["nosuid", "noexec", "newinstance", "ptmxmode=0666"]),
            mount("/dev/shm", "tmpfs", "shm", &["nosuid", "noexec", "nodev", "mode=1777"]),
            mount("/dev/mqueue", "mqueue", "mqueue", &["nosuid", "noexec", "nodev"]),
            mount("/sys", "sysfs", "sysfs", &["nosuid", "noexec", "nodev", "ro"]),
            mount("/tmp", "tmpfs", "tmpfs", &["nosuid", "nodev", "mode=1777"]),
            mount("/run", "tmpfs", "tmpfs", &["nosuid", "nodev", "mode=755"]),
            bind(inside, &self.door_dir()),
            container::node_mount(),
            bind(&inside.join("bin"), &spec.dir.join("dist/bin")),
            bind(&inside.join("lib/freeflow"), &spec.dir.join("dist/lib/freeflow")),
        ];
        let root = spec.rootfs.as_deref().unwrap_or(Path::new("/"));
        if root.join("etc/hosts").is_file() {
            mounts.push(bind(Path::new("/etc/hosts"), &self.dir.join("hosts")));
        }
        mounts
    }
}

fn mount(destination: &str, kind: &str, source: &str, options: &[&str]) -> Value {
    json!({ "destination": destination, "type": kind, "source": source, "options": options })
}

fn bind(destination: &Path, source: &Path) -> Value {
    json!({
        "destination": destination, "type": "bind", "source": source,
        "options": ["bind", "ro", "nosuid", "nodev"],
    })
}

/// Without root there is none: runc then goes without a cgroup where it can make none, which it must not do when a
/// path is asked for.
fn cgroups_path(spec: &Spec, container: &ContainerSpec) -> String {
    if spec.rootless { String::new() } else { cgroups::path(&spec.dir, &container.name) }
}

fn environment(container: &ContainerSpec) -> Result<Vec<String>> {
    let mut variables = vec![PATH.to_owned(), "HOME=/tmp".to_owned()];
    for name in PASSED_ON {
        if let Ok(value) = std::env::var(name) {
            variables.push(format!("{name}={value}"));
        }
    }
    let nothing = |_: &str| -> Option<OsString> { None };
    let doors = container::inside_doors(&Dist::find()?, &container.name, nothing);
    variables.extend(container::environment(&doors));
    Ok(variables)
}

fn hosts_file(spec: &Spec) -> String {
    let containers = spec.containers().map(|c| format!("{} {}\n", c.ip, c.name));
    std::iter::once("127.0.0.1 localhost\n".to_owned()).chain(containers).collect()
}
