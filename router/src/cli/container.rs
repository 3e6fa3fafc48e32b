//! `freeflow container`: prepares the directory that a docker, podman or runc container mounts at /run/freeflow.
//!
//! Owns what is in that directory: the libraries, this binary, and the container's own socket, which is its identity.

use std::fs;
use std::io;
use std::net::IpAddr;
use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use clap::{Parser, Subcommand};
use freeflow_router::admin::{self, Add};
use serde_json::{Value, json};

use super::doors::Doors;
use super::failure::{Context as _, Failure, Result};
use super::nic;
use super::paths::{self, Dist};

/// Where a container sees its directory.
pub const INSIDE: &str = "/run/freeflow";

/// Prepare containers of docker, podman or runc.
#[derive(Debug, Subcommand)]
pub enum Args {
    Add(AddArgs),
    Rm(RmArgs),
    Ls(LsArgs),
}

/// Prepare a directory to mount at /run/freeflow, and print the flags to use.
#[derive(Debug, Parser)]
#[command(after_help = "\
Adding a container again changes nothing and prints the same flags.

Examples:
  freeflow container add web --ip 10.9.0.1
  docker run $(freeflow container add web --flags) IMAGE CMD
  podman run $(freeflow container add web --flags) IMAGE CMD
  ff=$(freeflow container add web --oci) && jq --argjson ff \"$ff\" \\
    '.mounts += $ff.mounts | .process.env += $ff.process.env
     | .hooks.createContainer += $ff.hooks.createContainer' config.json >new.json")]
pub struct AddArgs {
    name: String,
    /// The container's virtual address (default: one from the router's pool)
    #[arg(long, value_name = "A")]
    ip: Option<IpAddr>,
    /// The container's tenant
    #[arg(long, value_name = "T")]
    tenant: Option<String>,
    /// Directory to prepare (default: containers/NAME beside the router's socket)
    #[arg(long, value_name = "DIR")]
    dir: Option<PathBuf>,
    /// Socket of the router to use
    #[arg(long, visible_alias = "socket", value_name = "SOCK")]
    router: Option<PathBuf>,
    /// Print nothing but the flags for docker run and podman run, on one line
    #[arg(long)]
    flags: bool,
    /// Print nothing but what an OCI bundle's config.json needs (runc, crun), as JSON of the same shape
    #[arg(long, conflicts_with = "flags")]
    oci: bool,
}

/// Remove a container: what its processes hold is destroyed as if they had died. A directory given as --dir stays.
#[derive(Debug, Parser)]
#[command(after_help = "Example:\n  freeflow container rm web")]
pub struct RmArgs {
    name: String,
    /// Socket of the router to use
    #[arg(long, visible_alias = "socket", value_name = "SOCK")]
    router: Option<PathBuf>,
}

/// List containers.
#[derive(Debug, Parser)]
#[command(after_help = "Example:\n  freeflow container ls --json")]
pub struct LsArgs {
    #[arg(long)]
    json: bool,
    /// Socket of the router to use
    #[arg(long, visible_alias = "socket", value_name = "SOCK")]
    router: Option<PathBuf>,
}

pub fn main(args: Args) -> Result<ExitCode> {
    match args {
        Args::Add(args) => add(args),
        Args::Rm(args) => rm(&args),
        Args::Ls(args) => ls(&args),
    }
}

fn connect(router: Option<&Path>) -> Result<(PathBuf, admin::Client)> {
    let socket = paths::router_socket(router)?;
    let client = admin::Client::connect(&socket)?;
    Ok((socket, client))
}

fn add(args: AddArgs) -> Result<ExitCode> {
    let dist = Dist::find()?;
    let (router, mut client) = connect(args.router.as_deref())?;
    check_name(&args.name)?;
    let dir = args.dir.unwrap_or_else(|| default_dir(&router, &args.name));
    let dir = paths::absolute(&dir)?;
    check_dir(&dir)?;
    let made = make(&dir)?;
    let add = Add { name: args.name, ip: args.ip, tenant: args.tenant, dir: Some(dir.clone()) };
    let container = client.add(add).inspect_err(|_| {
        if made {
            // Empty, as it was made a moment ago; else it is somebody else's now.
            fs::remove_dir(&dir).ok();
        }
    })?;
    place_tree(&dist, &dir)?;
    let doors = inside_doors(&dist, &container.name, |_| None);
    if args.flags {
        println!("{}", flags(&dir, &doors).join(" "));
    } else if args.oci {
        println!("{}", oci(&dir, &doors, hook(&dist, &dir, container.vip)));
    } else {
        println!("{}: {} (tenant {}), {}", container.name, container.vip, container.tenant, dir.display());
        println!("Flags for docker run and podman run (--flags prints nothing else):");
        for flag in flags(&dir, &doors) {
            println!("  {flag}");
        }
        println!(
            "For runc and other OCI bundles, --oci prints the mounts, the variables and a hook for config.json."
        );
    }
    Ok(ExitCode::SUCCESS)
}

/// A name becomes a directory and part of messages: letters, digits, `-`, `_`, `.`, not first a dot.
pub fn check_name(name: &str) -> Result<()> {
    let legal = |c: char| c.is_ascii_alphanumeric() || "-_.".contains(c);
    if name.is_empty() || name.len() > 63 || name.starts_with('.') || !name.chars().all(legal) {
        return Err(Failure::new(format!(
            "{name:?} is no container name: 1 to 63 letters, digits, '-', '_', '.', the first no '.'"
        )));
    }
    Ok(())
}

fn default_dir(router: &Path, name: &str) -> PathBuf {
    router.with_file_name("containers").join(name)
}

/// What `$(...)` splits into words, and what takes part in `--mount`'s commas, cannot be in the directory's name.
fn check_dir(dir: &Path) -> Result<()> {
    let plain = |c: char| !c.is_whitespace() && !c.is_control() && !",*?[]\\'\"".contains(c);
    if dir.to_str().is_some_and(|text| text.chars().all(plain)) {
        return Ok(());
    }
    Err(Failure::new(format!(
        "{} cannot be put into flags: give a --dir without blanks, commas, quotes and wildcards",
        dir.display()
    )))
}

fn flags(dir: &Path, doors: &Doors) -> Vec<String> {
    let mut flags = vec![format!("--mount type=bind,src={},dst={INSIDE},readonly", dir.display())];
    flags.push(format!("--device {}:{}", nic::NODE_SOURCE, nic::node()));
    flags.extend(environment(doors).into_iter().map(|variable| format!("-e {variable}")));
    flags
}

/// The same for config.json of an OCI bundle, with the hook that shows what docker run has no flag for.
fn oci(dir: &Path, doors: &Doors, hook: Option<Value>) -> Value {
    let options = ["bind", "ro", "nosuid", "nodev"];
    let mount = json!({ "destination": INSIDE, "type": "bind", "source": dir, "options": options });
    let hooks: Vec<Value> = hook.into_iter().collect();
    json!({
        "mounts": [mount, node_mount()],
        "process": { "env": environment(doors) },
        "hooks": { "createContainer": hooks },
    })
}

/// The device's node, as a mount: a runtime in a user namespace can make no nodes.
pub fn node_mount() -> Value {
    let options = ["bind", "nosuid", "noexec"];
    json!({ "destination": nic::node(), "type": "bind", "source": nic::NODE_SOURCE, "options": options })
}

/// The hook that shows a container the device under /sys/class. It runs as the container's root, which may be any user
/// of the host: none where such a user reaches neither the container's own binary nor this one.
pub fn hook(dist: &Dist, dir: &Path, vip: IpAddr) -> Option<Value> {
    let own = dir.join("bin/freeflow");
    let this = is_seen_by_runtimes().then(|| dist.binary.clone());
    let binary = [Some(own), this].into_iter().flatten().find(|binary| is_for_all(binary))?;
    Some(nic::oci_hook(&binary, vip, None))
}

fn is_for_all(path: &Path) -> bool {
    path.ancestors().all(|at| fs::metadata(at).is_ok_and(|m| m.permissions().mode() & 0o001 != 0))
}

/// Whether this binary has the same name for the host's runtimes: a router in a container of its own is elsewhere.
fn is_seen_by_runtimes() -> bool {
    let id = |path: &str| fs::metadata(path).map(|m| (m.dev(), m.ino()));
    // Whoever may not look at the first process's root is no router in a container.
    id("/proc/1/root/").map_or(true, |first| id("/").is_ok_and(|here| here == first))
}

/// `NAME=value` of each variable.
pub fn environment(doors: &Doors) -> Vec<String> {
    doors.variables.iter().map(|(name, value)| format!("{name}={}", value.display())).collect()
}

/// The doors of a program inside a container that has its directory at [`INSIDE`].
pub fn inside_doors(
    dist: &Dist,
    name: &str,
    inherited: impl Fn(&str) -> Option<std::ffi::OsString>,
) -> Doors {
    let inside = Path::new(INSIDE);
    let socket = inside.join(admin::CONTAINER_SOCKET_NAME);
    Doors::new(&dist.libraries, &inside.join("lib/freeflow"), &socket, Some(name), inherited)
}

/// Makes a container's directory unless it is there; true if it was made. The directory above is for its owner alone:
/// who reaches a container's socket is that container.
fn make(dir: &Path) -> Result<bool> {
    if let Some(parent) = dir.parent() {
        paths::make_dir(parent, 0o700)?;
    }
    let made = !dir.exists();
    paths::make_dir(dir, 0o755)?;
    Ok(made)
}

/// Puts the distribution tree (bin/ and lib/freeflow/) into `dir`.
pub fn place_tree(dist: &Dist, dir: &Path) -> Result<()> {
    paths::make_dir(&dir.join("bin"), 0o755)?;
    place(&dist.binary, &dir.join("bin/freeflow"))?;
    place_all(&dist.libraries, &dir.join("lib/freeflow"))
}

fn place_all(from: &Path, to: &Path) -> Result<()> {
    paths::make_dir(to, 0o755)?;
    let entries = fs::read_dir(from).context(format_args!("cannot read {}", from.display()))?;
    for entry in entries {
        let entry = entry.context(format_args!("cannot read {}", from.display()))?;
        let target = to.join(entry.file_name());
        if entry.path().is_symlink() {
            link(&entry.path(), &target)?;
        } else if entry.path().is_dir() {
            place_all(&entry.path(), &target)?;
        } else {
            place(&entry.path(), &target)?;
        }
    }
    Ok(())
}

/// Makes the same symbolic link: were libibverbs.so a copy of libibverbs.so.1, a process could load both.
fn link(from: &Path, to: &Path) -> Result<()> {
    let aside = to.with_extension("new");
    let make = || -> io::Result<()> {
        match fs::remove_file(&aside) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
        std::os::unix::fs::symlink(fs::read_link(from)?, &aside)?;
        fs::rename(&aside, to)
    };
    make().context(format_args!("cannot make the link {}", to.display()))
}

/// Copies a file aside and renames it, so that programs which have the old one mapped keep it. A hard link would let
/// a container that mounts the directory writable change the host's own libraries.
fn place(from: &Path, to: &Path) -> Result<()> {
    let aside = to.with_extension("new");
    let copy = || -> io::Result<()> {
        fs::copy(from, &aside)?;
        fs::set_permissions(&aside, fs::Permissions::from_mode(0o755))?;
        fs::rename(&aside, to)
    };
    copy().context(format_args!("cannot copy {} to {}", from.display(), to.display()))
}

fn rm(args: &RmArgs) -> Result<ExitCode> {
    let (router, mut client) = connect(args.router.as_deref())?;
    check_name(&args.name)?;
    client.rm(&args.name)?;
    let dir = default_dir(&router, &args.name);
    match fs::remove_dir_all(&dir) {
        Ok(()) => Ok(ExitCode::SUCCESS),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(ExitCode::SUCCESS),
        Err(error) => Err(error).context(format_args!("cannot remove {}", dir.display())),
    }
}

fn ls(args: &LsArgs) -> Result<ExitCode> {
    let (_, mut client) = connect(args.router.as_deref())?;
    let containers = client.ls()?;
    if args.json {
        println!("{}", serde_json::to_string_pretty(&containers).context("cannot print")?);
        return Ok(ExitCode::SUCCESS);
    }
    println!("{:<20} {:<16} {:<24} {:>5}  SOCKET", "NAME", "TENANT", "VIP", "PROCS");
    for c in containers {
        let (vip, procs) = (c.vip.to_string(), c.pids.len());
        println!("{:<20} {:<16} {vip:<24} {procs:>5}  {}", c.name, c.tenant, c.socket.display());
    }
    Ok(ExitCode::SUCCESS)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_that_would_leave_the_directory_are_refused() {
        for good in ["c1", "h1c2", "web-1.x"] {
            assert!(check_name(good).is_ok(), "{good}");
        }
        let long = "x".repeat(64);
        for bad in ["", ".", "..", "a/b", "a b", long.as_str()] {
            assert!(check_name(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn each_runtime_gets_the_mount_and_the_variables() {
        let doors = Doors { variables: vec![("FREEFLOW_NAME", "c1".into()), ("LD_PRELOAD", "/a:/b".into())] };
        let dir = Path::new("/run/freeflow/containers/c1");
        let mount = "--mount type=bind,src=/run/freeflow/containers/c1,dst=/run/freeflow,readonly";
        let device = "--device /dev/full:/dev/infiniband/uverbs0";
        assert_eq!(flags(dir, &doors), [mount, device, "-e FREEFLOW_NAME=c1", "-e LD_PRELOAD=/a:/b"]);
        let oci = oci(dir, &doors, None);
        assert_eq!(oci["mounts"][0]["source"], "/run/freeflow/containers/c1");
        assert_eq!(oci["mounts"][0]["destination"], "/run/freeflow");
        assert_eq!(oci["mounts"][1]["destination"], "/dev/infiniband/uverbs0");
        assert_eq!(oci["process"]["env"], json!(["FREEFLOW_NAME=c1", "LD_PRELOAD=/a:/b"]));
    }

    #[test]
    fn a_directory_that_would_break_the_flags_is_refused() {
        assert!(check_dir(Path::new("/srv/ff/c-1_x.y")).is_ok());
        for bad in ["/srv/f f", "/srv/a,b", "/srv/a*", "/srv/'a", "/srv/a\nb"] {
            assert!(check_dir(Path::new(bad)).is_err(), "{bad:?}");
        }
    }

    #[test]
    fn a_tree_is_copied_with_its_folders() {
        let base = std::env::temp_dir().join(format!("ff-place-{}", std::process::id()));
        let dist = Dist { binary: base.join("dist/bin/freeflow"), libraries: base.join("dist/lib/freeflow") };
        fs::create_dir_all(base.join("dist/bin")).unwrap();
        fs::create_dir_all(dist.libraries.join("ucx")).unwrap();
        fs::write(&dist.binary, "b").unwrap();
        fs::write(dist.libraries.join("libibverbs.so.1"), "v").unwrap();
        fs::write(dist.libraries.join("ucx/libuct_ff.so.0"), "u").unwrap();
        std::os::unix::fs::symlink("libibverbs.so.1", dist.libraries.join("libibverbs.so")).unwrap();
        let dir = base.join("containers/c1");
        assert!(make(&dir).unwrap());
        assert!(!make(&dir).unwrap(), "it was there");
        place_tree(&dist, &dir).unwrap();
        place_tree(&dist, &dir).unwrap();
        assert_eq!(fs::read(dir.join("lib/freeflow/ucx/libuct_ff.so.0")).unwrap(), b"u");
        let link = fs::read_link(dir.join("lib/freeflow/libibverbs.so")).unwrap();
        assert_eq!(link, Path::new("libibverbs.so.1"));
        assert_eq!(fs::read(dir.join("bin/freeflow")).unwrap(), b"b");
        let mode = fs::metadata(base.join("containers")).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o700);
        fs::remove_dir_all(&base).unwrap();
    }
}
