//! Starting a router process and waiting, by an event, until it serves.
//!
//! Owns the readiness pipe (the daemon's standard output: one byte once all sockets listen) and the per-user router's
//! log file. It must never know what the router is wanted for.

use std::fs::{File, OpenOptions};
use std::io::{Read as _, Seek as _, SeekFrom};
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::Path;
use std::process::{Child, Command, ExitCode, Stdio};

use rustix::fs::FlockOperation;

use super::failure::{Context as _, Failure, Result};
use super::sys::ChildSetup;
use super::{paths, vars};

/// How much of the log a failed start quotes.
const QUOTED_LOG: u64 = 2000;

/// A router to start.
pub struct Start<'a> {
    pub socket: &'a Path,
    pub config: Option<&'a Path>,
    /// Becomes its standard error.
    pub log: Stdio,
    /// What it logs unless FREEFLOW_LOG says otherwise.
    pub level: &'static str,
    pub setup: ChildSetup,
}

/// Starts `freeflow router` and waits until it serves.
pub fn spawn(start: Start) -> Result<Child> {
    let binary = std::env::current_exe().context("cannot tell where this program is")?;
    let mut command = Command::new(binary);
    vars::forget_unknown(&mut command);
    command.args(["router", "--ready-on-stdout", "--socket"]).arg(start.socket);
    if let Some(config) = start.config {
        command.arg("--config").arg(config);
    }
    if std::env::var_os(vars::LOG).is_none() {
        command.env(vars::LOG, start.level);
    }
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(start.log);
    let mut child = start.setup.apply(&mut command).spawn().context("cannot start the router")?;
    match await_ready(&mut child) {
        Ok(()) => Ok(child),
        Err(failure) => {
            // The child may be gone already: then there is nothing left to end.
            child.kill().ok();
            child.wait().ok();
            Err(failure)
        }
    }
}

fn await_ready(child: &mut Child) -> Result<()> {
    let mut pipe =
        child.stdout.take().ok_or_else(|| Failure::new("the router's readiness pipe is missing"))?;
    let mut byte = [0];
    match pipe.read(&mut byte) {
        Ok(1) => Ok(()),
        Ok(_) => Err(Failure::new("the router ended before it was ready")),
        Err(error) => Err(Failure::new(format!("cannot read the router's readiness pipe: {error}"))),
    }
}

/// Starts the router of `socket`, an absolute path, in its own session, logging beside it, and returns once it serves.
/// When two callers come at once, one starts it and the other finds it.
pub fn detach(socket: &Path, config: Option<&Path>) -> Result<ExitCode> {
    let dir =
        socket.parent().ok_or_else(|| Failure::new(format!("{} has no directory", socket.display())))?;
    paths::make_dir(dir, 0o755)?;
    let lock = open(&dir.join("router.lock"))?;
    rustix::fs::flock(&lock, FlockOperation::LockExclusive).context("cannot lock router.lock")?;
    if paths::answers(socket)? {
        if let Some(config) = config {
            let (socket, config) = (socket.display(), config.display());
            eprintln!("freeflow: warning: a router answers at {socket} already; it does not read {config}");
        }
        return Ok(ExitCode::SUCCESS);
    }
    let log_path = dir.join("router.log");
    let mut log = open(&log_path)?;
    let before = log.seek(SeekFrom::End(0)).context("cannot use the router's log")?;
    let stderr = log.try_clone().context("cannot use the router's log")?;
    let setup = ChildSetup { on_parent_death: None, new_session: true, ..ChildSetup::default() };
    spawn(Start { socket, config, log: stderr.into(), level: "info", setup }).map_err(|failure| {
        let said = said_since(&mut log, before);
        Failure::new(format!("{failure} (log: {}){said}", log_path.display()))
    })?;
    Ok(ExitCode::SUCCESS)
}

fn open(path: &Path) -> Result<File> {
    OpenOptions::new()
        .create(true)
        .append(true)
        .read(true)
        .mode(0o600)
        .open(path)
        .context(format_args!("cannot open {}", path.display()))
}

/// What the log got since `before`, cut to its end.
fn said_since(log: &mut File, before: u64) -> String {
    let end = log.seek(SeekFrom::End(0)).unwrap_or(before);
    let mut bytes = Vec::new();
    let from = before.max(end.saturating_sub(QUOTED_LOG));
    let read = log.seek(SeekFrom::Start(from)).and_then(|_| log.read_to_end(&mut bytes));
    match read {
        Ok(n) if n > 0 => format!("\n{}", String::from_utf8_lossy(&bytes).trim_end()),
        _ => String::new(),
    }
}
