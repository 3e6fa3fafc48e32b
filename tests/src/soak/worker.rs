//! A program under `soak/` that takes orders as lines and answers with lines.

use std::collections::VecDeque;
use std::io::{BufRead, BufReader, Write};
use std::path::Path;
use std::process::{Child, ChildStdin, Command, ExitStatus, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::thread;
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};

use super::Result;
use crate::path::Host;

/// Who takes longer for anything hangs.
const WATCHDOG: Duration = Duration::from_secs(30);

/// A line, and when it came.
#[derive(Debug, Clone)]
pub struct Said {
    pub at: Instant,
    pub text: String,
}

/// Where a queue pair is, as one worker says it and the other is told.
pub type Address = String;

#[derive(Debug)]
pub struct Worker {
    pub name: String,
    child: Child,
    orders: ChildStdin,
    lines: Receiver<Said>,
    /// Lines that nobody has asked for yet.
    heard: VecDeque<Said>,
}

impl Worker {
    /// Starts `program` in the container `name` and waits until it is ready.
    pub fn start(host: &Host, name: &str, program: &Path, args: &[&str]) -> Result<Self> {
        Self::by(host.run_in(name, program), name, args)
    }

    /// The same with an address that is given.
    pub fn at(host: &Host, (name, ip): (&str, &str), program: &Path, args: &[&str]) -> Result<Self> {
        Self::by(host.run_at(name, ip, program), name, args)
    }

    fn by(mut command: Command, name: &str, args: &[&str]) -> Result<Self> {
        let started = command.args(args).stdin(Stdio::piped()).stdout(Stdio::piped()).spawn();
        let mut child = started.map_err(|e| format!("cannot start {name}: {e}"))?;
        let (Some(orders), Some(stdout)) = (child.stdin.take(), child.stdout.take()) else {
            return Err(format!("{name} has no pipes"));
        };
        let (sender, lines) = channel();
        thread::spawn(move || {
            for text in BufReader::new(stdout).lines().map_while(std::result::Result::ok) {
                if sender.send(Said { at: Instant::now(), text }).is_err() {
                    return;
                }
            }
        });
        let mut worker = Worker { name: name.to_owned(), child, orders, lines, heard: VecDeque::new() };
        worker.hear("ready")?;
        Ok(worker)
    }

    /// `freeflow run` becomes the program: its pid is the program's.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    pub fn order(&mut self, order: &str) -> Result<()> {
        writeln!(self.orders, "{order}").map_err(|e| {
            let end = self.end();
            format!("{}: {order}: {e}{end}", self.name)
        })
    }

    /// An order, and the rest of the line that answers it and begins with `answer`.
    pub fn ask(&mut self, order: &str, answer: &str) -> Result<String> {
        self.order(order)?;
        Ok(self.hear(answer)?.text[answer.len()..].trim().to_owned())
    }

    /// The first line, heard or to come, that begins with `start`.
    pub fn hear(&mut self, start: &str) -> Result<Said> {
        let deadline = Instant::now() + WATCHDOG;
        let whole = |text: &str| {
            text.strip_prefix(start).is_some_and(|rest| rest.is_empty() || rest.starts_with(' '))
        };
        if let Some(at) = self.heard.iter().position(|said| whole(&said.text))
            && let Some(said) = self.heard.remove(at)
        {
            return Ok(said);
        }
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            match self.lines.recv_timeout(left) {
                Ok(said) if whole(&said.text) => return Ok(said),
                Ok(said) if said.text.starts_with("wrong ") => {
                    return Err(format!("{}: {}", self.name, said.text));
                }
                Ok(said) => self.heard.push_back(said),
                Err(RecvTimeoutError::Timeout) => {
                    let words = self.last_words();
                    return Err(format!("{}: no {start:?} in {WATCHDOG:?}, but {words}", self.name));
                }
                Err(RecvTimeoutError::Disconnected) => {
                    let end = self.end();
                    return Err(format!("{} ended before {start:?}{end}", self.name));
                }
            }
        }
    }

    /// What it said that nobody asked for, and whether it still answers.
    fn last_words(&mut self) -> String {
        let asked = self.order("show");
        let answer = self.lines.recv_timeout(Duration::from_secs(5));
        let heard: Vec<&str> = self.heard.iter().map(|said| said.text.as_str()).collect();
        let answer = answer.map_or_else(|e| format!("no answer ({e})"), |said| said.text);
        let waits = super::process::waits(self.pid());
        format!("{heard:?}, {answer} {}; its threads:\n{waits}", asked.err().unwrap_or_default())
    }

    /// How it ended, in words, after its pipes closed.
    fn end(&mut self) -> String {
        let said = self.heard.iter().map(|said| format!("; {}", said.text)).collect::<String>();
        match self.child.wait() {
            Ok(status) => format!(": {status}{said}"),
            Err(error) => format!(": {error}{said}"),
        }
    }

    /// Lines that begin with `start` and came before the last answer; they are forgotten.
    pub fn heard(&mut self, start: &str) -> Vec<String> {
        while let Ok(said) = self.lines.try_recv() {
            self.heard.push_back(said);
        }
        let (found, rest) =
            self.heard.drain(..).partition::<VecDeque<_>, _>(|said| said.text.starts_with(start));
        self.heard = rest;
        found.into_iter().map(|said| said.text).collect()
    }

    /// Forgets what was said about queue pairs that are gone.
    pub fn forget(&mut self) {
        self.heard.clear();
    }

    pub fn make(&mut self, slot: usize, kind: &str) -> Result<Address> {
        self.ask(&format!("make {slot} {kind}"), &format!("made {slot}"))
    }

    pub fn join(&mut self, slot: usize, peer: &Address) -> Result<()> {
        self.ask(&format!("join {slot} {peer}"), &format!("joined {slot}")).map(drop)
    }

    pub fn go(&mut self, slot: usize) -> Result<()> {
        self.order(&format!("go {slot}"))
    }

    pub fn break_up(&mut self, slot: usize) -> Result<()> {
        self.ask(&format!("break {slot}"), &format!("broken {slot}")).map(drop)
    }

    /// Completed requests of each slot.
    pub fn counts(&mut self) -> Result<Vec<u64>> {
        let text = self.ask("count", "counts")?;
        text.split_whitespace()
            .map(|n| n.parse().map_err(|e| format!("{}: counts {text}: {e}", self.name)))
            .collect()
    }

    /// Waits until `slot` has completed something after now.
    pub fn moves_on(&mut self, slot: usize) -> Result<()> {
        let (before, deadline) = (self.counts()?[slot], Instant::now() + WATCHDOG);
        while self.counts()?[slot] == before {
            if Instant::now() > deadline {
                let said = self.heard("");
                return Err(format!("slot {slot} of {} stands still; it said {said:?}", self.name));
            }
            thread::yield_now();
        }
        Ok(())
    }

    pub fn signal(&self, signal: Signal) -> Result<()> {
        let pid = i32::try_from(self.pid()).ok().and_then(Pid::from_raw);
        let pid = pid.ok_or_else(|| format!("{} has no pid", self.name))?;
        kill_process(pid, signal).map_err(|e| format!("signal to {}: {e}", self.name))
    }

    /// Kills and reaps it.
    pub fn kill(mut self) -> Result<()> {
        self.signal(Signal::KILL)?;
        self.child.wait().map(drop).map_err(|e| format!("{}: {e}", self.name))
    }

    /// Has it give everything back and end.
    pub fn quit(mut self) -> Result<()> {
        self.order("quit")?;
        let status: ExitStatus = self.child.wait().map_err(|e| format!("{}: {e}", self.name))?;
        let wrong = self.heard("wrong");
        if status.success() { Ok(()) } else { Err(format!("{}: {status} {wrong:?}", self.name)) }
    }
}

impl Drop for Worker {
    fn drop(&mut self) {
        // Ended and reaped already, or of no use any more.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Two workers' queue pairs, joined and running.
pub fn link(a: (&mut Worker, usize, &str), b: (&mut Worker, usize, &str)) -> Result<()> {
    let (at_a, at_b) = (a.0.make(a.1, a.2)?, b.0.make(b.1, b.2)?);
    a.0.join(a.1, &at_b)?;
    b.0.join(b.1, &at_a)?;
    b.0.go(b.1)?;
    a.0.go(a.1)
}
