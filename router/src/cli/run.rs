//! `freeflow run`: a program of this host as a container, without a container runtime.

use std::io;
use std::net::IpAddr;
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode, Stdio};

use clap::Parser;
use freeflow_router::admin;

use super::doors::Doors;
use super::failure::{CANNOT_EXECUTE, Context as _, Failure, NOT_FOUND, OWN_FAILURE, Result};
use super::nic;
use super::paths::{self, Dist};
use super::vars;

/// Run a program with FreeFlow's RDMA device; exit status and signals are the program's own.
#[derive(Debug, Parser)]
#[command(after_help = "\
Starts a per-user router if none answers. Without --name the program belongs to the user's default container, whose
programs reach each other, also by 127.0.0.1 and the host's addresses. In a container that freeflow container add
prepared, the program belongs to that container.

The program has a mount namespace of its own, in which the device is under /dev/infiniband and /sys/class/infiniband as
well. For that, who is not root gets a user namespace too, where other users' files look like nobody's and setuid
programs (sudo) do not work: --no-mounts does without.

Examples:
  freeflow run -- ibv_devinfo
  freeflow run -- ib_write_bw -d ff0 & sleep 1; freeflow run -- ib_write_bw -d ff0 127.0.0.1
  freeflow run --name a --ip 10.9.0.1 -- rping -s -a 10.9.0.1

Exit status 125: FreeFlow itself failed; 126, 127: the program cannot be executed, is not found.")]
pub struct Args {
    /// Container to run in; created if missing
    #[arg(long, value_name = "N")]
    name: Option<String>,
    /// The container's virtual address (default: one from the router's pool)
    #[arg(long, value_name = "A", requires = "name")]
    ip: Option<IpAddr>,
    /// The container's tenant
    #[arg(long, value_name = "T", requires = "name")]
    tenant: Option<String>,
    /// Socket of the router to use
    #[arg(long, visible_alias = "socket", value_name = "SOCK")]
    router: Option<PathBuf>,
    /// Leave /dev and /sys as they are: no /dev/infiniband and /sys/class/infiniband, and no namespace for them
    #[arg(long)]
    no_mounts: bool,
    /// Program and its arguments
    #[arg(required = true, trailing_var_arg = true, allow_hyphen_values = true, value_name = "CMD")]
    command: Vec<std::ffi::OsString>,
}

pub fn main(args: Args) -> Result<ExitCode> {
    let doors = prepare(&args).map_err(|failure| failure.with_status(OWN_FAILURE))?;
    let (program, rest) = args
        .command
        .split_first()
        .ok_or_else(|| Failure::new("no program given").with_status(OWN_FAILURE))?;
    let error = Command::new(program).args(rest).envs(doors.variables).exec();
    let status = if error.kind() == io::ErrorKind::NotFound { NOT_FOUND } else { CANNOT_EXECUTE };
    Err(Failure::new(format!("cannot run {}: {error}", program.display())).with_status(status))
}

fn prepare(args: &Args) -> Result<Doors> {
    let dist = Dist::find()?;
    let router = paths::absolute(&paths::router_socket(args.router.as_deref())?)?;
    let inside = paths::is_inside_a_container(&router);
    if !inside && !paths::answers(&router)? {
        start(&router)?;
    }
    let socket = match &args.name {
        None => router,
        Some(_) if inside => {
            return Err(Failure::new("a container has one identity: leave out --name in it"));
        }
        Some(name) => container_socket(&router, name, args)?,
    };
    if !args.no_mounts
        && let Err(failure) = nic::enter(&socket)
    {
        eprintln!("freeflow: no {} for the program: {failure} (--no-mounts: do not try)", nic::node());
    }
    let inherited = |name: &str| std::env::var_os(name);
    Ok(Doors::new(&dist.libraries, &dist.libraries, &socket, args.name.as_deref(), inherited))
}

/// A process between us and the router: were it our own child, the program we become would inherit it.
fn start(socket: &Path) -> Result<()> {
    let binary = std::env::current_exe().context("cannot tell where this program is")?;
    let status = vars::forget_unknown(&mut Command::new(binary))
        .args(["router", "--detach", "--socket"])
        .arg(socket)
        .stdin(Stdio::null())
        .status()
        .context("cannot start a router")?;
    if status.success() {
        return Ok(());
    }
    Err(Failure::new(format!("no router answers at {}, and none could be started", socket.display())))
}

fn container_socket(router: &Path, name: &str, args: &Args) -> Result<PathBuf> {
    let add = admin::Add { name: name.to_owned(), ip: args.ip, tenant: args.tenant.clone(), dir: None };
    Ok(admin::Client::connect(router)?.add(add)?.socket)
}
