//! Running a lab's commands in order, and deciding when the lab ends and with which exit status.

use std::collections::BTreeSet;
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender};
use std::time::{Duration, Instant};

use rustix::process::Signal;

use super::events::{Event, Watched, watch};
use super::host::{Container, Host};
use super::output::Output;
use super::ports;
use super::spec::RunSpec;
use crate::cli::failure::{Failure, Result};
use crate::cli::sys::exit_code;

/// How long a command may take to listen before the next one starts all the same.
const TURN: Duration = Duration::from_secs(10);
/// Listening sockets make no event; see `ports`.
const POLL: Duration = Duration::from_millis(10);
/// How long programs have to end after SIGTERM, before their container is killed.
const GRACE: Duration = Duration::from_secs(2);

/// Runs the commands; returns the lab's exit status.
pub fn run(
    runs: &[RunSpec],
    hosts: &[Host],
    output: &Output,
    events: &Sender<Event>,
    inbox: &Receiver<Event>,
) -> Result<u8> {
    let mut verdict = Verdict::new(runs.len());
    let code = start_all(runs, hosts, output, events, inbox, &mut verdict)?;
    end_the_others(hosts, inbox, &mut verdict);
    Ok(code)
}

fn start_all(
    runs: &[RunSpec],
    hosts: &[Host],
    output: &Output,
    events: &Sender<Event>,
    inbox: &Receiver<Event>,
    verdict: &mut Verdict,
) -> Result<u8> {
    for (index, run) in runs.iter().enumerate() {
        let (host, container) = find(hosts, &run.container)?;
        let before = Listening::now(host, container)?;
        let child = host.run(&run.container, &run.command, output)?;
        verdict.started += 1;
        watch(child, Watched::Run(index), events.clone());
        if index + 1 < runs.len() {
            let turn = await_turn(index, inbox, verdict, || {
                Ok(Listening::now(host, container)?.has_more_than(&before))
            })?;
            if let Some(code) = turn {
                return Ok(code);
            }
        }
    }
    loop {
        let event = inbox.recv().map_err(|_| Failure::new("the lab lost its events"))?;
        if let Some(code) = verdict.take(event)? {
            return Ok(code);
        }
    }
}

/// Waits until the next command may start, or the lab shall end with the status returned.
fn await_turn(
    index: usize,
    inbox: &Receiver<Event>,
    verdict: &mut Verdict,
    listens: impl Fn() -> Result<bool>,
) -> Result<Option<u8>> {
    let deadline = Instant::now() + TURN;
    while verdict.codes[index].is_none() && Instant::now() < deadline && !listens()? {
        match inbox.recv_timeout(POLL) {
            Ok(event) => {
                if let Some(code) = verdict.take(event)? {
                    return Ok(Some(code));
                }
            }
            Err(RecvTimeoutError::Timeout) => {}
            Err(RecvTimeoutError::Disconnected) => return Err(Failure::new("the lab lost its events")),
        }
    }
    Ok(None)
}

fn find<'a>(hosts: &'a [Host], name: &str) -> Result<(&'a Host, &'a Container)> {
    let mut all = hosts.iter().flat_map(|h| h.containers.iter().map(move |c| (h, c)));
    all.find(|(_, c)| c.name == name).ok_or_else(|| Failure::new(format!("no container {name:?}")))
}

/// What a container listens on: TCP sockets and rdma_cm ports.
struct Listening {
    sockets: BTreeSet<u64>,
    cm_ports: BTreeSet<u16>,
}

impl Listening {
    fn now(host: &Host, container: &Container) -> Result<Self> {
        let cm_ports = host.cm_ports(&container.name)?.into_iter().collect();
        Ok(Self { sockets: ports::listening(container.init), cm_ports })
    }

    fn has_more_than(&self, before: &Self) -> bool {
        !self.sockets.is_subset(&before.sockets) || !self.cm_ports.is_subset(&before.cm_ports)
    }
}

/// The commands' ends so far, and what follows from them.
struct Verdict {
    /// Exit status of each command that ended.
    codes: Vec<Option<u8>>,
    started: usize,
    first_failure: Option<u8>,
}

impl Verdict {
    fn new(runs: usize) -> Self {
        Self { codes: vec![None; runs], started: 0, first_failure: None }
    }

    /// Notes an event; returns the lab's exit status when it ends the lab.
    fn take(&mut self, event: Event) -> Result<Option<u8>> {
        match event {
            Event::Signal(signal) => Ok(Some(128 + u8::try_from(signal.as_raw()).unwrap_or(0))),
            Event::Ended(Watched::Router, status) => {
                Err(Failure::new(format!("the lab's router ended ({status})")))
            }
            Event::Ended(Watched::Run(index), status) => Ok(self.ended(index, exit_code(status))),
        }
    }

    fn ended(&mut self, index: usize, code: u8) -> Option<u8> {
        self.codes[index] = Some(code);
        if code != 0 {
            self.first_failure.get_or_insert(code);
        }
        (index + 1 == self.codes.len()).then(|| self.first_failure.unwrap_or(code))
    }

    fn running(&self) -> usize {
        self.started - self.codes.iter().flatten().count()
    }
}

/// Asks the programs that still run to end; their containers are killed afterwards in any case.
fn end_the_others(hosts: &[Host], inbox: &Receiver<Event>, verdict: &mut Verdict) {
    for container in hosts.iter().flat_map(|h| &h.containers) {
        container.signal_all(Signal::TERM);
    }
    let deadline = Instant::now() + GRACE;
    while verdict.running() > 0 {
        let left = deadline.saturating_duration_since(Instant::now());
        match inbox.recv_timeout(left) {
            Ok(Event::Ended(Watched::Run(index), status)) => {
                verdict.ended(index, exit_code(status));
            }
            Ok(Event::Ended(Watched::Router, _)) => {}
            Ok(Event::Signal(_)) | Err(_) => return,
        }
    }
}

/// Waits for the shell of a lab without commands.
pub fn wait_for_shell(inbox: &Receiver<Event>) -> Result<u8> {
    let mut verdict = Verdict::new(1);
    loop {
        let event = inbox.recv().map_err(|_| Failure::new("the lab lost its events"))?;
        if let Some(code) = verdict.take(event)? {
            return Ok(code);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_end_ends_the_lab() {
        let mut verdict = Verdict::new(3);
        assert_eq!(verdict.ended(0, 0), None);
        assert_eq!(verdict.ended(2, 0), Some(0), "the middle one still runs and does not count");
    }

    #[test]
    fn the_first_failure_counts_before_the_last_status() {
        let mut verdict = Verdict::new(3);
        assert_eq!(verdict.ended(1, 3), None);
        assert_eq!(verdict.ended(0, 4), None);
        assert_eq!(verdict.ended(2, 0), Some(3));
        let mut verdict = Verdict::new(2);
        assert_eq!(verdict.ended(1, 143), Some(143));
    }

    #[test]
    fn a_signal_ends_the_lab_with_its_number() {
        assert_eq!(Verdict::new(1).take(Event::Signal(Signal::INT)).expect("a status"), Some(130));
    }
}
