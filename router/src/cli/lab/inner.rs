//! The lab's inner process: init of the lab's PID namespace, in mount and network namespaces of its own.
//!
//! Builds the hosts, then hands over to `sequence` or to a shell. It removes nothing: when it ends, the kernel ends
//! every process, mount and interface it made.

use std::path::Path;
use std::process::ExitCode;
use std::sync::mpsc;

use rustix::mount::{MountFlags, MountPropagationFlags, mount, mount_change};

use super::cluster;
use super::events::{Event, Watched, watch};
use super::host::Host;
use super::network::{self, Namespace};
use super::sequence;
use super::spec::Spec;
use super::{output, runc};
use crate::cli::container::place_tree;
use crate::cli::failure::{Context as _, Failure, Result};
use crate::cli::paths::{self, Dist};
use crate::cli::sys::{ENDING, SignalSet};

pub fn run(spec: &str) -> Result<ExitCode> {
    let spec: Spec = serde_json::from_str(spec).context("the lab's description")?;
    if std::process::id() != 1 {
        return Err(Failure::new("this is lab's inner process; use freeflow lab"));
    }
    let signals = SignalSet::block(&ENDING).context("cannot block signals")?;
    let (events, inbox) = mpsc::channel();
    forward_signals(signals, events.clone());
    private_mounts(&spec.dir)?;
    place_tree(&Dist::find()?, &spec.dir.join("dist"))?;
    let output = output::Output::default();
    let hosts = start_hosts(&spec, &output, &events)?;
    let code = if spec.runs.is_empty() {
        shell(&spec, &hosts, &events, &inbox)?
    } else {
        sequence::run(&spec.runs, &hosts, &output, &events, &inbox)?
    };
    drop(hosts);
    output.finish();
    Ok(ExitCode::from(code))
}

/// All hosts, the network between them first: routers bind their addresses on it.
fn start_hosts(spec: &Spec, output: &output::Output, events: &mpsc::Sender<Event>) -> Result<Vec<Host>> {
    let namespaces: Vec<Namespace> = if spec.is_cluster() {
        let made = spec.hosts.iter().map(|_| Namespace::new()).collect::<Result<Vec<_>>>()?;
        network::join(&spec.hosts, &made)?;
        if !spec.plain {
            cluster::certify(spec)?;
        }
        made
    } else {
        vec![Namespace::own()?]
    };
    let hosts = spec.hosts.iter().zip(namespaces);
    hosts.map(|(host, namespace)| Host::start(spec, host, namespace, output, events)).collect()
}

fn forward_signals(signals: SignalSet, events: mpsc::Sender<Event>) {
    std::thread::spawn(move || {
        while let Ok(signal) = signals.wait() {
            if events.send(Event::Signal(signal)).is_err() {
                return;
            }
        }
    });
}

/// Takes the mount namespace off the host's, hides the lab's directory behind a tmpfs, and shows the new PIDs.
fn private_mounts(dir: &Path) -> Result<()> {
    mount_change("/", MountPropagationFlags::PRIVATE | MountPropagationFlags::REC)
        .context("cannot make mounts private")?;
    let flags = MountFlags::NOSUID | MountFlags::NODEV;
    mount("freeflow-lab", dir, "tmpfs", flags, c"mode=0755")
        .context(format_args!("cannot mount a tmpfs on {}", dir.display()))?;
    mount("proc", "/proc", "proc", flags | MountFlags::NOEXEC, None).context("cannot mount /proc")?;
    paths::make_dir(&super::state::runc_root(dir), 0o700)
}

/// An interactive shell in the first container.
fn shell(
    spec: &Spec,
    hosts: &[Host],
    events: &mpsc::Sender<Event>,
    inbox: &mpsc::Receiver<Event>,
) -> Result<u8> {
    let first = hosts
        .iter()
        .find_map(|h| h.containers.first())
        .ok_or_else(|| Failure::new("a lab without a container"))?;
    for c in spec.containers() {
        eprintln!("freeflow lab: {} is {}", c.name, c.ip);
    }
    eprintln!("freeflow lab: this is a shell in {}; its end ends the lab.", first.name);
    eprintln!("freeflow lab: from another terminal: freeflow exec NAME -- CMD, freeflow ps --lab");
    let script = "command -v bash >/dev/null && exec bash; exec sh";
    let child = runc::exec_in_terminal(&spec.dir, &first.name, &["sh", "-c", script])?;
    watch(child, Watched::Run(0), events.clone());
    sequence::wait_for_shell(inbox)
}
