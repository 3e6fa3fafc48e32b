//! `freeflow lab`: a throw-away cluster of real containers around a router of its own.
//!
//! Two processes. The outer one (`outer`) makes a PID namespace (and, rootless, a user namespace), starts the inner
//! one as its init, passes signals on, and removes what outlives processes. The inner one (`inner`) has its own mount
//! and network namespaces, keeps everything on a tmpfs only it sees, and builds hosts and containers. So whatever way
//! the inner process ends, the kernel ends every process, mount and interface of the lab with it; and it ends when the
//! outer process does.

mod bundle;
mod cgroups;
mod cluster;
mod events;
mod host;
mod inner;
mod network;
mod outer;
mod output;
mod ports;
mod runc;
mod running;
mod sequence;
mod spec;
mod state;

use std::path::PathBuf;
use std::process::ExitCode;

use clap::Parser;

use super::failure::{OWN_FAILURE, Result};

pub use outer::INNER_COMMAND;
pub use running::{find as find_container, running_routers};

/// Start a throw-away cluster of unprivileged containers and run programs in it.
#[derive(Debug, Parser)]
#[command(after_help = "\
Containers are named c1, c2, .., with several hosts h1c1, h1c2, .., h2c1; @c1 in a command is c1's address. Commands are started in order: each once the previous
one has a listening TCP or rdma_cm port, has ended, or 10 s passed. The lab ends when the last --run ends; the others
then get SIGTERM and do not count. Exit status: that of the first --run that failed by itself, else the last one's
(128+n for signal n); 125 when the lab itself failed. Without --run: a shell in c1.

Needs runc and ip (packages runc, iproute2). Runs as root, or without where the kernel allows user namespaces.

Examples:
  freeflow lab --run c1='ib_write_bw -d ff0' --run c2='ib_write_bw -d ff0 @c1'
  freeflow lab --containers 3
  freeflow lab --hosts 2 --containers 1 --run h1c1='ib_write_bw' --run h2c1='ib_write_bw @h1c1'
  freeflow lab --rootfs /srv/bookworm --run c1='ibv_devinfo'")]
pub struct Args {
    /// Hosts, each with a router of its own
    #[arg(long, default_value_t = 1, value_name = "N", value_parser = clap::value_parser!(u8).range(1..=200))]
    hosts: u8,
    /// Containers per host
    #[arg(long, default_value_t = 2, value_name = "N", value_parser = clap::value_parser!(u8).range(1..=i64::from(spec::MAX_CONTAINERS)))]
    containers: u8,
    /// Links between hosts are plain TCP instead of TLS: faster, and as `insecure_plain_tcp` of a router's configuration
    #[arg(long)]
    insecure_plain_tcp: bool,
    /// Root file system of the containers, read-only (default: this host's /)
    #[arg(long, value_name = "DIR")]
    rootfs: Option<PathBuf>,
    /// Command for a container's `sh -c`; may be given several times, also for one container
    #[arg(long, value_name = "NAME=CMD")]
    run: Vec<String>,
}

/// The inner process; started by `lab` only.
#[derive(Debug, Parser)]
pub struct InnerArgs {
    spec: String,
}

pub fn main(args: Args) -> Result<ExitCode> {
    outer::run(args).map_err(|failure| failure.with_status(OWN_FAILURE))
}

pub fn inner_main(args: InnerArgs) -> Result<ExitCode> {
    inner::run(&args.spec).map_err(|failure| failure.with_status(OWN_FAILURE))
}
