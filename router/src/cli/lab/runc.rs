//! Calls of runc, with the lab's own state directory and log.

use std::fs;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use rustix::process::Pid;

use super::state;
use crate::cli::failure::{Context as _, Failure, Result};
use crate::cli::paths::find_program;
use crate::cli::sys::ChildSetup;

/// Starts the container whose bundle is in `bundle`; `stdin` becomes its init's. Returns the init's pid.
pub fn start(lab: &Path, bundle: &Path, name: &str, stdin: OwnedFd) -> Result<Pid> {
    let pid_file = bundle.join("pid");
    let mut command = runc(lab)?;
    command.args(["run", "--detach", "--pid-file"]).arg(&pid_file).arg("--bundle").arg(bundle).arg(name);
    command.stdin(stdin).stdout(Stdio::null()).stderr(Stdio::null());
    let status = ChildSetup::default().apply(&mut command).status().context("cannot start runc")?;
    if !status.success() {
        return Err(Failure::new(format!("runc cannot start container {name} ({status}): {}", said(lab))));
    }
    let text = fs::read_to_string(&pid_file).context(format_args!("cannot read {}", pid_file.display()))?;
    let pid = text.trim().parse().ok().and_then(Pid::from_raw);
    pid.ok_or_else(|| Failure::new(format!("runc wrote {text:?} as the pid of container {name}")))
}

/// Starts `argv` in a running container, with pipes for its output.
pub fn exec(lab: &Path, name: &str, argv: &[&str]) -> Result<Child> {
    let mut command = exec_command(&state::runc_root(lab), name, false)?;
    command.args(argv).stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    ChildSetup::default().apply(&mut command).spawn().context("cannot start runc exec")
}

/// Starts `argv` in a running container with this process' standard streams.
pub fn exec_in_terminal(lab: &Path, name: &str, argv: &[&str]) -> Result<Child> {
    let mut command = exec_command(&state::runc_root(lab), name, is_terminal())?;
    command.args(argv);
    ChildSetup::default().apply(&mut command).spawn().context("cannot start runc exec")
}

/// Whether both ends of an interactive program are a terminal.
pub fn is_terminal() -> bool {
    rustix::termios::isatty(rustix::stdio::stdin()) && rustix::termios::isatty(rustix::stdio::stdout())
}

/// `runc exec` of a container's user, up to and without the program's own words.
pub fn exec_command(root: &Path, name: &str, terminal: bool) -> Result<Command> {
    let mut command = Command::new(program()?);
    command.arg("--root").arg(root).arg("exec");
    if terminal {
        command.arg("--tty");
    }
    command.arg(name);
    Ok(command)
}

fn runc(lab: &Path) -> Result<Command> {
    let mut command = Command::new(program()?);
    command.arg("--root").arg(state::runc_root(lab)).arg("--log").arg(log_file(lab));
    Ok(command)
}

fn program() -> Result<PathBuf> {
    find_program("runc").ok_or_else(|| Failure::new("runc is not there: install Debian's package runc"))
}

fn log_file(lab: &Path) -> PathBuf {
    lab.join("runc.log")
}

/// The last message in runc's log.
fn said(lab: &Path) -> String {
    let log = fs::read_to_string(log_file(lab)).unwrap_or_default();
    log.lines().next_back().unwrap_or("it said nothing").to_owned()
}
