//! `freeflow router`: the daemon's command line. What the daemon does is in `freeflow_router::daemon`.

use std::io;
use std::os::fd::AsFd as _;
use std::path::PathBuf;
use std::process::ExitCode;

use clap::Parser;
use freeflow_router::daemon;
use tracing_subscriber::EnvFilter;

use super::failure::{Context as _, Result};
use super::{daemonise, paths, stop, vars};

/// Serve this host's containers. SIGTERM drains and cleans up.
#[derive(Debug, Parser)]
#[command(after_help = "\
Examples:
  freeflow router
  freeflow router --socket /run/freeflow/router.sock --config /etc/freeflow.toml
  freeflow router --detach      in the background; returns once it serves
  freeflow router --stop && freeflow router --detach      restart; containers come back with their addresses")]
pub struct Args {
    /// Configuration file, TOML (default: $FREEFLOW_CONFIG)
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
    /// Socket to serve on; its directory gets admin.sock too
    #[arg(long, visible_alias = "router", value_name = "PATH")]
    socket: Option<PathBuf>,
    /// Run in the background, in a session of its own, logging to router.log beside the socket
    #[arg(long)]
    detach: bool,
    /// Stop the router that answers there, and return once it has cleaned up
    #[arg(long, conflicts_with_all = ["detach", "config"])]
    stop: bool,
    /// Write one byte to standard output once all sockets listen
    #[arg(long, hide = true)]
    ready_on_stdout: bool,
}

pub fn main(args: Args) -> Result<ExitCode> {
    let socket = paths::absolute(&paths::router_socket(args.socket.as_deref())?)?;
    if args.stop {
        return stop::stop(&socket);
    }
    let file = args.config.or_else(|| std::env::var_os(vars::CONFIG).map(PathBuf::from));
    if args.detach {
        return daemonise::detach(&socket, file.as_deref());
    }
    log_to_stderr()?;
    let ready = args.ready_on_stdout.then(|| io::stdout().as_fd().try_clone_to_owned());
    let ready = ready.transpose().context("cannot use standard output")?;
    let config = daemon::Config { socket, file, ready };
    daemon::run(config).context("router")?;
    Ok(ExitCode::SUCCESS)
}

fn log_to_stderr() -> Result<()> {
    let wanted = std::env::var(vars::LOG).unwrap_or_else(|_| "info".to_owned());
    let filter = EnvFilter::try_new(&wanted).context(format_args!("{} is {wanted:?}", vars::LOG))?;
    tracing_subscriber::fmt().with_env_filter(filter).with_writer(io::stderr).with_ansi(false).init();
    Ok(())
}
