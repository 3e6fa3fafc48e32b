//! The lab's outer process: checks, the lab's directory, the inner process, signals, and what outlives processes.
//!
//! It must never know what is inside the lab beyond the names of its containers.

use std::fs;
use std::os::unix::fs::DirBuilderExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitCode};

use rustix::process::{Pid, Signal, kill_process};
use rustix::thread::UnshareFlags;

use super::spec::{self, Spec};
use super::{Args, cgroups, state};
use crate::cli::failure::{Context as _, Failure, Result};
use crate::cli::paths::{self, Dist, find_program};
use crate::cli::sys::{self, ChildSetup, ENDING, SignalSet};
use crate::cli::userns;
use crate::cli::vars;

/// Name of the hidden subcommand that the inner process is.
pub const INNER_COMMAND: &str = "lab-inner";

const SIGNALS: [Signal; 5] = [ENDING[0], ENDING[1], ENDING[2], ENDING[3], Signal::CHILD];

pub fn run(args: Args) -> Result<ExitCode> {
    let hosts = spec::hosts(args.hosts, args.containers);
    let runs = args.run.iter().map(|text| spec::run(text, &hosts)).collect::<Result<Vec<_>>>()?;
    let rootfs = args.rootfs.as_deref().map(checked_rootfs).transpose()?;
    Dist::find()?;
    for (program, package) in [("runc", "runc"), ("ip", "iproute2"), ("nsenter", "util-linux")] {
        need(program, package)?;
    }
    let signals = SignalSet::block(&SIGNALS).context("cannot block signals")?;
    let runtime = paths::runtime_dir()?;
    state::sweep(&runtime);
    let dir = LabDir::make(&runtime)?;
    let rootless = !rustix::process::geteuid().is_root();
    if rootless {
        userns::enter()?;
    }
    sys::unshare(UnshareFlags::NEWPID).context("cannot make a PID namespace")?;
    let spec = Spec { dir: dir.path.clone(), hosts, runs, rootfs, plain: args.insecure_plain_tcp, rootless };
    let inner = start(&spec)?;
    state::write(&dir.path, inner.child.id(), &spec)?;
    supervise(inner, &signals)
}

fn checked_rootfs(dir: &Path) -> Result<PathBuf> {
    let path = dir.canonicalize().context(format_args!("--rootfs {}", dir.display()))?;
    if !path.is_dir() {
        return Err(Failure::new(format!("--rootfs {}: not a directory", dir.display())));
    }
    Ok(path)
}

fn need(program: &str, package: &str) -> Result<()> {
    if find_program(program).is_some() {
        return Ok(());
    }
    Err(Failure::new(format!("a lab needs {program}: install Debian's package {package}")))
}

/// The lab's directory and cgroups, removed however this process unwinds; `state::sweep` does it after a SIGKILL.
struct LabDir {
    path: PathBuf,
}

impl LabDir {
    fn make(runtime: &Path) -> Result<Self> {
        let path = state::dir_of(runtime, std::process::id());
        fs::DirBuilder::new()
            .mode(0o755)
            .create(&path)
            .context(format_args!("cannot make {}", path.display()))?;
        Ok(Self { path })
    }
}

impl Drop for LabDir {
    fn drop(&mut self) {
        cgroups::remove(std::process::id());
        if let Err(error) = fs::remove_dir_all(&self.path) {
            eprintln!("freeflow lab: cannot remove {}: {error}", self.path.display());
        }
    }
}

/// Kills the inner process, and by that the lab, unless it was seen to end.
struct Inner {
    child: Child,
}

impl Drop for Inner {
    fn drop(&mut self) {
        if !matches!(self.child.try_wait(), Ok(Some(_))) {
            self.child.kill().ok();
            self.child.wait().ok();
        }
    }
}

fn start(spec: &Spec) -> Result<Inner> {
    let binary = std::env::current_exe().context("cannot tell where this program is")?;
    let json = serde_json::to_string(spec).context("cannot write the lab's description")?;
    let mut command = Command::new(binary);
    vars::forget_unknown(&mut command).arg(INNER_COMMAND).arg(json);
    let setup = ChildSetup { unshare: UnshareFlags::NEWNS | UnshareFlags::NEWNET, ..ChildSetup::default() };
    let child = setup.apply(&mut command).spawn().map_err(|error| {
        Failure::new(format!("cannot start a process in new mount and network namespaces: {error}"))
    })?;
    Ok(Inner { child })
}

/// Waits for the inner process. The first ending signal asks it to end, the second kills it.
fn supervise(mut inner: Inner, signals: &SignalSet) -> Result<ExitCode> {
    let pid = Pid::from_child(&inner.child);
    let mut asked = false;
    loop {
        let signal = signals.wait().context("cannot wait for signals")?;
        if let Some(status) = inner.child.try_wait().context("cannot wait for the lab")? {
            return Ok(ExitCode::from(sys::exit_code(status)));
        }
        if signal != Signal::CHILD {
            let send = if asked { Signal::KILL } else { Signal::TERM };
            kill_process(pid, send).context("cannot end the lab")?;
            asked = true;
        }
    }
}
