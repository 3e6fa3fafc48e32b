//! What a process holds, as /proc shows it.

use std::fs;
use std::time::{Duration, Instant};

use super::Result;

/// Where each thread of a process waits: its name, and the kernel's functions if we may see them.
pub fn waits(pid: u32) -> String {
    let tasks = fs::read_dir(format!("/proc/{pid}/task")).into_iter().flatten().flatten();
    let lines = tasks.map(|task| {
        let read = |name: &str| fs::read_to_string(task.path().join(name)).unwrap_or_default();
        let stack = read("stack");
        let frames: Vec<&str> =
            stack.lines().filter_map(|line| line.split_whitespace().nth(1)).take(6).collect();
        format!("  {} {}: {}\n", read("comm").trim(), read("wchan"), frames.join(" "))
    });
    lines.collect()
}

/// Things that must not become more.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Held {
    pub fds: usize,
    pub maps: usize,
    pub threads: usize,
    /// Resident memory.
    pub kib: usize,
}

impl Held {
    pub fn of(pid: u32) -> Result<Self> {
        let proc = format!("/proc/{pid}");
        let read = |name: &str| {
            fs::read_to_string(format!("{proc}/{name}")).map_err(|e| format!("{proc}/{name}: {e}"))
        };
        let fds = fs::read_dir(format!("{proc}/fd")).map_err(|e| format!("{proc}/fd: {e}"))?.count();
        let status = read("status")?;
        let number = |key: &str| {
            let line = status.lines().find_map(|line| line.strip_prefix(key))?;
            line.split_whitespace().next()?.parse().ok()
        };
        let missing = |key: &str| format!("no {key} in {proc}/status");
        Ok(Held {
            fds,
            maps: read("maps")?.lines().count(),
            threads: number("Threads:").ok_or_else(|| missing("Threads"))?,
            kib: number("VmRSS:").ok_or_else(|| missing("VmRSS"))?,
        })
    }

    /// Waits until `pid`, called `name`, holds no more than this; it may still hear of its peers' deaths.
    pub fn again(&self, name: &str, pid: u32) -> Result<()> {
        let deadline = Instant::now() + Duration::from_secs(30);
        loop {
            let now = Held::of(pid)?;
            if now.is_within(self) {
                return Ok(());
            }
            if Instant::now() > deadline {
                return Err(format!("{name} leaks: {self:?} became {now:?}"));
            }
            std::thread::yield_now();
        }
    }

    /// Holds no more than `before`, but for a few mappings and some memory that allocators keep.
    pub fn is_within(&self, before: &Held) -> bool {
        self.fds <= before.fds
            && self.threads <= before.threads
            && self.maps <= before.maps + 8
            && self.kib <= before.kib + 4096
    }
}
