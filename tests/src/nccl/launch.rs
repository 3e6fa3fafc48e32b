//! Runs of `nccl-replay`: all ranks on one host with a router of its own, or each in a container, on one host or two.

use std::io;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use super::Outcome;
use crate::launch::{Ended, Group};
use crate::path::{Host, Staged, Tree};

/// The program, and how long it may take: a watchdog, its own speaks before.
#[derive(Debug, Clone, Copy)]
pub struct Replay<'a> {
    pub tree: &'a Tree,
    pub program: &'a Path,
    pub limit: Duration,
}

impl Replay<'_> {
    /// All ranks on one host.
    pub fn alone(&self, args: &[&str]) -> io::Result<Ended> {
        let host = Host::start(self.tree)?;
        self.on(&host, args)
    }

    /// The same with a router that is there.
    pub fn on(&self, host: &Host, args: &[&str]) -> io::Result<Ended> {
        let mut group = Group::new(self.limit);
        group.start(host.run(self.program).args(args))?;
        Ok(group.finish())
    }

    /// Two ranks, each in a container of its own.
    pub fn in_containers(&self, hosts: usize, scenario: &str) -> io::Result<Ended> {
        let staged = Staged::new(self.program)?;
        let (first, second) = if hosts == 1 { ("c1", "c2") } else { ("h1c1", "h2c1") };
        let rank = |rank: usize, at: &str| {
            format!("{} --ranks 2 --rank {rank} --at {at} {scenario}", staged.program.display())
        };
        let zero =
            format!("{first}=mkfifo /tmp/end; {}; s=$?; echo $s >/tmp/end; exit $s", rank(0, "0.0.0.0:7000"));
        // It may have killed itself; then rank 0 has the last word.
        let one = format!("{second}=trap '' TERM; {} || [ $? = 137 ]", rank(1, &format!("@{first}:7000")));
        // The lab ends with its last command, which here waits for rank 0; rank 1 then hears SIGTERM, and may still be writing.
        let last = format!("{first}=read -r s </tmp/end; exit $s");
        let mut lab = Command::new(self.tree.freeflow());
        lab.args(["lab", "--hosts", &hosts.to_string(), "--run", &zero, "--run", &one, "--run", &last]);
        let mut group = Group::new(self.limit);
        group.start(&mut lab)?;
        Ok(group.finish())
    }
}

/// All that was printed.
pub fn text(ended: &Ended) -> String {
    ended.lines.iter().map(|line| format!("{}: {}\n", line.side, line.text)).collect()
}

/// Did all that was started end well, and did it say each of `wanted`?
pub fn judge(ended: &Ended, wanted: &[&str]) -> Outcome {
    let said = text(ended);
    let well = ended.statuses.iter().all(|status| status.is_some_and(|status| status.success()));
    match wanted.iter().find(|wanted| !said.contains(**wanted)) {
        _ if !well => Err(format!("{:?}\n{said}", ended.statuses)),
        Some(missing) => Err(format!("nothing said of {missing:?}\n{said}")),
        None => Ok(()),
    }
}
