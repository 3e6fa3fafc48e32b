//! Running a program to its end, under a watchdog, with its output shown or kept.
//!
//! A program runs in a process group of its own; the watchdog ends the whole group, so nothing is left behind.

use std::io::{self, BufRead, BufReader, Read};
use std::os::unix::process::{CommandExt as _, ExitStatusExt as _};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::mpsc::{self, RecvTimeoutError};
use std::thread::JoinHandle;
use std::time::Duration;

use rustix::process::{Pid, Signal, kill_process_group};

use crate::failure::{Context as _, Failure, Result};

/// Time a group has to clean up after SIGTERM, before SIGKILL.
const GRACE: Duration = Duration::from_secs(10);

/// How many lines of each output a failure quotes.
const QUOTED: usize = 30;

/// What a program did.
#[derive(Debug)]
pub struct Done {
    pub status: ExitStatus,
    /// Whether the watchdog ended it.
    pub timed_out: bool,
    pub stdout: String,
    pub stderr: String,
}

impl Done {
    pub fn success(&self) -> bool {
        self.status.success() && !self.timed_out
    }

    /// The last lines of both outputs.
    pub fn tail(&self) -> String {
        let quote = |text: &str| {
            let lines: Vec<&str> = text.lines().collect();
            lines[lines.len().saturating_sub(QUOTED)..].join("\n")
        };
        format!("{}\n{}", quote(&self.stdout), quote(&self.stderr))
    }

    /// The end in words.
    pub fn how(&self) -> String {
        match (self.timed_out, self.status.code(), self.status.signal()) {
            (true, ..) => "did not end in time".to_owned(),
            (_, Some(code), _) => format!("exit status {code}"),
            (_, _, signal) => format!("signal {}", signal.unwrap_or(0)),
        }
    }
}

/// Whether a program's output lines are also shown while it runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Echo {
    Quiet,
    /// On our standard error: standard output is for results.
    Shown,
}

/// Runs `command` for at most `limit`.
pub fn run(command: &mut Command, limit: Duration, echo: Echo) -> Result<Done> {
    Running::start(command, echo)?.finish(limit)
}

/// A program that was started; dropped, it is ended.
#[derive(Debug)]
pub struct Running {
    child: Option<Child>,
    group: Group,
    stdout: Option<JoinHandle<io::Result<String>>>,
    stderr: Option<JoinHandle<io::Result<String>>>,
}

impl Running {
    pub fn start(command: &mut Command, echo: Echo) -> Result<Self> {
        let name = command.get_program().to_string_lossy().into_owned();
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()).process_group(0);
        let mut child = command.spawn().context(format_args!("cannot start {name}"))?;
        let group = Group(Pid::from_child(&child));
        let stdout = child.stdout.take().map(|pipe| collect(pipe, echo));
        let stderr = child.stderr.take().map(|pipe| collect(pipe, echo));
        Ok(Self { child: Some(child), group, stdout, stderr })
    }

    /// The process group, which has the program's own number.
    pub fn group(&self) -> i32 {
        self.group.0.as_raw_nonzero().get()
    }

    /// Has it ended?
    pub fn has_ended(&mut self) -> bool {
        self.child.as_mut().is_none_or(|child| !matches!(child.try_wait(), Ok(None)))
    }

    /// Asks it to end; the caller still has to `finish`.
    pub fn terminate(&self) {
        self.group.signal(Signal::TERM);
    }

    /// Waits for its end for at most `limit`.
    pub fn finish(mut self, limit: Duration) -> Result<Done> {
        let child = self.child.take().ok_or_else(|| Failure::new("a program is waited for twice"))?;
        let (status, timed_out) = wait(child, &self.group, limit)?;
        Ok(Done { status, timed_out, stdout: text(self.stdout.take())?, stderr: text(self.stderr.take())? })
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        if let Some(mut child) = self.child.take() {
            self.group.signal(Signal::KILL);
            // Killed: there is nothing to learn from it.
            child.wait().ok();
        }
    }
}

/// Runs `command`, showing its output, and turns a failure into a message.
pub fn must(command: &mut Command, limit: Duration) -> Result<Done> {
    let words: Vec<_> = std::iter::once(command.get_program()).chain(command.get_args()).collect();
    let line = words.iter().map(|w| w.to_string_lossy()).collect::<Vec<_>>().join(" ");
    let done = run(command, limit, Echo::Shown)?;
    if done.success() { Ok(done) } else { Err(Failure::new(format!("{line}: {}", done.how()))) }
}

#[derive(Debug)]
struct Group(Pid);

impl Group {
    fn signal(&self, signal: Signal) {
        // It may have ended in this moment.
        kill_process_group(self.0, signal).ok();
    }
}

fn wait(mut child: Child, group: &Group, limit: Duration) -> Result<(ExitStatus, bool)> {
    let (sender, ended) = mpsc::channel();
    // Nobody listens any more only when this function has failed.
    let waiter = std::thread::spawn(move || sender.send(child.wait()).ok());
    let mut timed_out = false;
    let mut next = (limit, Signal::TERM);
    let status = loop {
        match ended.recv_timeout(next.0) {
            Ok(status) => break status,
            Err(RecvTimeoutError::Disconnected) => break Err(io::Error::other("the waiting thread is gone")),
            Err(RecvTimeoutError::Timeout) => {
                timed_out = true;
                group.signal(next.1);
                next = (GRACE, Signal::KILL);
            }
        }
    };
    if timed_out {
        group.signal(Signal::KILL);
    }
    waiter.join().map_err(|_| Failure::new("the waiting thread panicked"))?;
    Ok((status.context("cannot wait for a program")?, timed_out))
}

fn collect(pipe: impl Read + Send + 'static, echo: Echo) -> JoinHandle<io::Result<String>> {
    std::thread::spawn(move || {
        let mut all = String::new();
        let mut pipe = BufReader::new(pipe);
        let mut line = Vec::new();
        while pipe.read_until(b'\n', &mut line)? > 0 {
            let piece = String::from_utf8_lossy(&line);
            if echo == Echo::Shown {
                eprint!("{piece}");
            }
            all.push_str(&piece);
            line.clear();
        }
        Ok(all)
    })
}

fn text(reader: Option<JoinHandle<io::Result<String>>>) -> Result<String> {
    let Some(reader) = reader else { return Ok(String::new()) };
    let read = reader.join().map_err(|_| Failure::new("a reading thread panicked"))?;
    read.context("cannot read a program's output")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sh(script: &str, limit: Duration) -> Done {
        run(Command::new("sh").args(["-c", script]), limit, Echo::Quiet).expect("sh runs")
    }

    #[test]
    fn output_and_status_are_kept() {
        let done = sh("echo out; echo err >&2; exit 3", Duration::from_secs(60));
        assert_eq!((done.stdout.as_str(), done.stderr.as_str()), ("out\n", "err\n"));
        assert!(!done.success());
        assert_eq!(done.how(), "exit status 3");
    }

    #[test]
    fn the_watchdog_ends_the_whole_group() {
        let done = sh("cat /dev/zero >/dev/null & cat /dev/zero >/dev/null", Duration::from_millis(50));
        assert!(done.timed_out && !done.success());
    }
}
