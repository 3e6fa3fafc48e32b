//! Child processes of a test: their lines as they come, a time limit, and an end for each whatever happens.

use std::io::{self, BufRead, BufReader, Read};
use std::os::unix::process::CommandExt;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread;
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process_group};

/// One line of output, and whose.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Line {
    pub side: usize,
    pub text: String,
}

/// How a group of processes ended.
#[derive(Debug)]
pub struct Ended {
    pub lines: Vec<Line>,
    /// In the order in which they were started; `None` had to be killed.
    pub statuses: Vec<Option<ExitStatus>>,
}

/// Processes started one after the other; those that still run are killed on drop.
#[derive(Debug)]
pub struct Group {
    children: Vec<Child>,
    sender: Sender<Line>,
    receiver: Receiver<Line>,
    lines: Vec<Line>,
    deadline: Instant,
}

impl Group {
    pub fn new(limit: Duration) -> Self {
        let (sender, receiver) = channel();
        Self { children: Vec::new(), sender, receiver, lines: Vec::new(), deadline: Instant::now() + limit }
    }

    /// Starts one process, in a process group of its own: what it starts ends with it.
    pub fn start(&mut self, command: &mut Command) -> io::Result<()> {
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()).process_group(0);
        let mut child =
            command.spawn().map_err(|e| io::Error::new(e.kind(), format!("cannot run {command:?}: {e}")))?;
        let side = self.children.len();
        if let Some(stdout) = child.stdout.take() {
            read_lines(side, stdout, self.sender.clone());
        }
        if let Some(stderr) = child.stderr.take() {
            read_lines(side, stderr, self.sender.clone());
        }
        self.children.push(child);
        Ok(())
    }

    /// Waits for a line of which `wanted` makes something; `None` if the time is over first or everybody has ended.
    pub fn wait_for<T>(&mut self, wanted: impl Fn(&Line) -> Option<T>) -> Option<T> {
        loop {
            let left = self.deadline.saturating_duration_since(Instant::now());
            let line = self.receiver.recv_timeout(left.min(Duration::from_millis(200)));
            if let Ok(line) = line {
                let found = wanted(&line);
                self.lines.push(line);
                if found.is_some() {
                    return found;
                }
            } else if left.is_zero() || self.all_ended() {
                return None;
            }
        }
    }

    fn all_ended(&mut self) -> bool {
        self.children.iter_mut().all(|child| matches!(child.try_wait(), Ok(Some(_))))
    }

    /// Waits for all of them, then for what they printed.
    pub fn finish(mut self) -> Ended {
        let never = |_: &Line| None::<()>;
        self.wait_for(never);
        let statuses = self.children.iter_mut().map(|child| child.try_wait().ok().flatten()).collect();
        self.kill();
        let (closed, _) = channel();
        self.sender = closed; // the readers' clones are then the last ones: recv ends with them
        let mut lines = std::mem::take(&mut self.lines);
        while let Ok(line) = self.receiver.recv_timeout(Duration::from_secs(5)) {
            lines.push(line);
        }
        Ended { lines, statuses }
    }

    fn kill(&mut self) {
        for child in &mut self.children {
            if !matches!(child.try_wait(), Ok(Some(_))) {
                // The group's leader is not reaped yet, so the id cannot be another's.
                if let Some(pid) = i32::try_from(child.id()).ok().and_then(Pid::from_raw) {
                    let _gone_already = kill_process_group(pid, Signal::KILL);
                }
                let _reaped = child.wait();
            }
        }
    }
}

impl Drop for Group {
    fn drop(&mut self) {
        self.kill();
    }
}

fn read_lines(side: usize, from: impl Read + Send + 'static, to: Sender<Line>) {
    thread::spawn(move || {
        let mut from = BufReader::new(from);
        let mut bytes = Vec::new();
        while matches!(from.read_until(b'\n', &mut bytes), Ok(n) if n > 0) {
            let text = String::from_utf8_lossy(&bytes).trim_end().to_owned();
            bytes.clear();
            if to.send(Line { side, text }).is_err() {
                return;
            }
        }
    });
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sh(script: &str) -> Command {
        let mut command = Command::new("sh");
        command.args(["-c", script]);
        command
    }

    #[test]
    fn lines_and_statuses_come_by_side() {
        let mut group = Group::new(Duration::from_secs(30));
        group.start(&mut sh("echo one; echo two >&2; exit 3")).expect("starts");
        assert!(group.wait_for(|line| (line.text == "one").then_some(())).is_some());
        group.start(&mut sh("printf three")).expect("starts");
        let ended = group.finish();
        assert_eq!(
            ended.statuses.iter().map(|s| s.and_then(|s| s.code())).collect::<Vec<_>>(),
            [Some(3), Some(0)]
        );
        assert!(ended.lines.contains(&Line { side: 0, text: "two".to_owned() }));
        assert!(ended.lines.contains(&Line { side: 1, text: "three".to_owned() }));
    }

    #[test]
    fn what_does_not_end_is_killed_with_its_children() {
        let start = Instant::now();
        let mut group = Group::new(Duration::from_millis(300));
        group.start(&mut sh("echo up; sleep 1000 & wait")).expect("starts");
        let ended = group.finish();
        assert_eq!(ended.statuses, [None]);
        assert_eq!(ended.lines, [Line { side: 0, text: "up".to_owned() }]);
        assert!(start.elapsed() < Duration::from_secs(20));
    }
}
