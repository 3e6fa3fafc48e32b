//! The Debian packages each task needs, and installing those that are missing.

use std::fs;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;

use crate::failure::{Context as _, Failure, Result};
use crate::process;

/// A package and why a task needs it.
pub type Package = (&'static str, &'static str);

/// What the distribution tree is built with, beside the toolchain.
pub const BUILD: &[Package] = &[
    ("protobuf-compiler", "protoc, which the etcd client's build calls for etcd's own .proto files"),
    ("libprotobuf-dev", "the standard .proto files that those include"),
];
/// What starts containers.
pub const LAB: &[Package] =
    &[("runc", "starts the lab's containers"), ("iproute2", "bridges and interfaces of the lab")];
/// The unmodified verbs programs.
pub const CLIENTS: &[Package] = &[
    ("ibverbs-utils", "ibv_devices, ibv_devinfo, the pingpongs"),
    ("rdmacm-utils", "rping, ucmatose, udaddy, mckey, cmtime, rdma_client, rstream and their like"),
    ("librdmacm1", "librspreload.so, which carries TCP programs over rsockets"),
    ("iperf3", "a TCP program under librspreload.so"),
    ("python3", "a web server under librspreload.so"),
    ("curl", "its client"),
    ("perftest", "ib_write_bw and its family"),
    ("qperf", "rc_*, ud_* and tcp_* measurements"),
    ("libfabric-bin", "fi_info and fi_pingpong"),
    ("fio", "its rdma engine"),
];
/// What the tests are built with and look at.
pub const TESTS: &[Package] = &[
    ("gcc", "compiles the small C programs of the tests"),
    ("libc6-dev", "headers for them"),
    ("libibverbs-dev", "verbs headers, for the layout and conformance tests"),
    ("librdmacm-dev", "rdma_cm headers, for the layout and conformance tests"),
    ("binutils", "objdump, for the exported symbols"),
    ("systemd", "systemd-analyze, which judges the router's unit"),
    ("etcd-server", "the directory of a cluster, started by its tests"),
];
/// What the benchmarks compare with, and are built with.
pub const BENCH: &[Package] = &[
    ("ucx-utils", "ucx_perftest, which the direct path and the link are compared with"),
    ("iperf3", "the kernel's TCP between hosts, one stream"),
    ("libfabric-bin", "fi_pingpong, which the link is compared with"),
    ("iproute2", "ip, which makes the two hosts"),
    ("gcc", "compiles the probes, and is the busy third program"),
    ("valgrind", "callgrind, which counts instructions"),
    ("libc6-dev", "headers for them"),
    ("libibverbs-dev", "verbs headers, for the probes that use the device"),
];
/// What the tree for old systems is built with beyond [`BUILD`], and where it is tried.
pub const PORTABLE: &[Package] = &[
    ("python3-venv", "fetches PyPI's zig and cargo-zigbuild, which link with an old libc"),
    ("binutils", "objdump, for the versions of glibc's symbols"),
    ("mmdebstrap", "makes the roots of other Debian releases"),
];
/// What builds the router's image.
pub const IMAGE: &[Package] = &[
    ("buildah", "builds from a Containerfile without an engine"),
    ("mmdebstrap", "makes the image that it begins with"),
];
/// UCX and the MPIs over it.
pub const UCX: &[Package] = &[
    ("ucx-utils", "ucx_info and ucx_perftest"),
    ("libucx-dev", "UCP's headers, for the example"),
    ("openmpi-bin", "mpirun of OpenMPI"),
    ("libopenmpi-dev", "mpicc of OpenMPI"),
    ("mpich", "mpirun of MPICH"),
    ("libmpich-dev", "mpicc of MPICH"),
    ("python3-venv", "fetches PyPI's wheels of UCX and MPI"),
    ("xz-utils", "unpacks UCX's source package"),
    ("valgrind", "headers that UCX's own include"),
];
/// What fetches NCCL's own library, which must load our plugin.
pub const NCCL: &[Package] =
    &[("python3-venv", "pip in a directory of its own, to fetch NCCL's library from PyPI")];
/// Allocators and runtimes whose programs register memory.
pub const RUNTIMES: &[Package] = &[
    ("libjemalloc2", "a malloc that is not glibc's"),
    ("python3", "runs the Python program of the tests"),
    ("golang-go", "builds the Go program of the tests"),
    ("openjdk-17-jdk-headless", "compiles and runs the Java program of the tests"),
];
/// rdma-core's own suite.
pub const VERBS_SUITE: &[Package] = &[
    ("rdma-core", "has rdma-core's tests among its documentation"),
    ("python3-pyverbs", "the Python bindings they use"),
];
/// What the soak in a new Debian root needs.
pub const FRESH: &[Package] =
    &[("mmdebstrap", "makes the new Debian root"), ("git", "clones the repository")];

/// apt-get may wait for another one's lock and download slowly.
const LIMIT: Duration = Duration::from_secs(900);

/// Installs what is missing of `groups`.
pub fn ensure(groups: &[&[Package]]) -> Result<()> {
    let wanted: Vec<Package> = groups.iter().flat_map(|g| g.iter().copied()).collect();
    let missing = missing(&wanted)?;
    if missing.is_empty() {
        return Ok(());
    }
    let names: Vec<&str> = missing.iter().map(|(name, _)| *name).collect();
    for (name, reason) in &missing {
        eprintln!("xtask: needs Debian's package {name}: {reason}");
    }
    let way = Way::find().ok_or_else(|| {
        Failure::new(format!(
            "not root, and sudo does not work without a password: apt-get install {}",
            names.join(" ")
        ))
    })?;
    eprintln!("xtask: installing {} {}", names.join(" "), way.words());
    install(way, &names).map_err(|failure| {
        Failure::new(format!("{failure}; install by hand, then try again: {}", names.join(" ")))
    })
}

/// How apt-get gets root's rights.
#[derive(Debug, Clone, Copy)]
enum Way {
    Root,
    Sudo,
}

impl Way {
    fn find() -> Option<Self> {
        if rustix::process::geteuid().is_root() {
            return Some(Self::Root);
        }
        let mut sudo = Command::new("sudo");
        sudo.args(["-n", "true"]).stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
        sudo.status().is_ok_and(|s| s.success()).then_some(Self::Sudo)
    }

    fn words(self) -> &'static str {
        match self {
            Self::Root => "as root",
            Self::Sudo => "through sudo",
        }
    }

    fn apt_get(self, args: &[&str]) -> Result<()> {
        let mut command = match self {
            Self::Root => Command::new("env"),
            Self::Sudo => Command::new("sudo"),
        };
        if matches!(self, Self::Sudo) {
            command.args(["-n", "env"]);
        }
        command.args(["DEBIAN_FRONTEND=noninteractive", "apt-get", "-q", "-o", "DPkg::Lock::Timeout=300"]);
        process::must(command.args(args), LIMIT).map(drop)
    }
}

fn install(way: Way, names: &[&str]) -> Result<()> {
    let mut args = vec!["install", "-y", "--no-install-recommends"];
    args.extend(names);
    if !has_lists() {
        way.apt_get(&["update"])?;
        return way.apt_get(&args);
    }
    // Lists that are there may be too old for the mirror.
    way.apt_get(&args).or_else(|_| way.apt_get(&["update"]).and_then(|()| way.apt_get(&args)))
}

fn has_lists() -> bool {
    let entries = fs::read_dir(Path::new("/var/lib/apt/lists")).into_iter().flatten().flatten();
    entries.filter_map(|e| e.file_name().into_string().ok()).any(|name| name.contains("_Packages"))
}

fn missing(wanted: &[Package]) -> Result<Vec<Package>> {
    let output = Command::new("dpkg-query")
        .args(["-W", "-f", "${Package} ${db:Status-Status}\\n"])
        .output()
        .context("cannot ask dpkg-query for installed packages (this needs Debian)")?;
    let text = String::from_utf8_lossy(&output.stdout);
    Ok(not_installed(&text, wanted))
}

fn not_installed(dpkg: &str, wanted: &[Package]) -> Vec<Package> {
    let installed = |name: &str| dpkg.lines().any(|l| l.strip_prefix(name) == Some(" installed"));
    wanted.iter().copied().filter(|(name, _)| !installed(name)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_removed_package_is_missing() {
        let dpkg = "runc installed\nfio config-files\nfio-examples installed\n";
        let wanted = [("runc", ""), ("fio", ""), ("qperf", "")];
        assert_eq!(not_installed(dpkg, &wanted), [("fio", ""), ("qperf", "")]);
    }
}
