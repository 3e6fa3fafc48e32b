//! Running clients in labs, and checks of the lab itself.

use std::path::Path;
use std::process::Command;
use std::time::Duration;

use super::Outcome;
use super::clients::{Check, Client};
use crate::process::{self, Done, Echo};
use crate::{layout, perftest};

/// For a client that hangs; one takes a second or two on an idle machine.
const LIMIT: Duration = Duration::from_secs(120);

/// The same for one that hangs by a flaw of its own, before its last run.
const SHORT_LIMIT: Duration = Duration::from_secs(30);
/// So often a program with such a flaw may run.
const RUNS: usize = 4;

/// A flaw of a program that a busy machine brings out. If it is seen, the program runs again.
struct Flaw {
    /// Part of its command line.
    whose: &'static str,
    /// What shows it, in either side's output. None: that it hangs.
    says: Option<&'static str>,
    hangs: bool,
}

const FLAWS: &[Flaw] = &[
    // perftest 4.5 -R: its server tells the client by TCP to connect, and listens only then. A client that is faster means to try
    // again; its second try crashes (rdma_cm_client_connection after rdma_cm_destroy_cma), and the server waits for ever.
    Flaw { whose: " -R -n", says: Some("Event: RDMA_CM_EVENT_REJECTED; error: 8."), hangs: true },
    // perftest measures the processor's clock against gettimeofday(2); if that goes wrong, its figures are zero.
    Flaw { whose: "ib_", says: Some("Correlation coefficient r^2"), hangs: false },
    // udpong -T e: what is not answered within a millisecond is sent again, and the answer to that counts as one to the next
    // message, which is then sent again: where answers take longer, ever more of them are under way, and if one is lost, the
    // number that is waited for is written over and never comes.
    Flaw { whose: "udpong", says: None, hangs: true },
];

impl Flaw {
    fn is_seen(&self, done: &Done) -> bool {
        let said = |text: &str| done.stdout.contains(text) || done.stderr.contains(text);
        self.says.map_or(done.timed_out, said)
    }
}

/// Where a client and its server are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Place {
    OneHost,
    /// The server on the first host, the client on the second.
    TwoHosts,
}

impl Place {
    fn server(self) -> &'static str {
        if self == Place::OneHost { "c1" } else { "h1c1" }
    }

    fn client(self) -> &'static str {
        if self == Place::OneHost { "c2" } else { "h2c1" }
    }

    /// The check's name for a client here.
    pub fn name(self, client: &Client) -> String {
        let between = if self == Place::OneHost { "" } else { "between hosts: " };
        format!("{between}{}", client.name())
    }
}

/// Runs a client in a lab of its own.
pub fn run_client(client: &Client, place: Place) -> Outcome {
    let flaws: Vec<&Flaw> = FLAWS.iter().filter(|flaw| client.command.contains(flaw.whose)).collect();
    let hangs = flaws.iter().any(|flaw| flaw.hangs);
    let run = |limit| lab(&layout::freeflow(), &arguments(client, place), limit);
    for _ in 1..RUNS {
        let done = run(if hangs { SHORT_LIMIT } else { LIMIT })?;
        if !flaws.iter().any(|flaw| flaw.is_seen(&done)) {
            return judged(client, place, &done);
        }
    }
    judged(client, place, &run(LIMIT)?)
}

fn judged(client: &Client, place: Place, done: &Done) -> Outcome {
    judge(client, place, done).map_err(|why| format!("{why}\n{}", done.tail()))
}

/// The same with another tree's binary, in containers of another root file system.
pub fn run_client_in(client: &Client, binary: &Path, root: &str) -> Outcome {
    let mut all = vec!["--rootfs".to_owned(), root.to_owned()];
    all.extend(arguments(client, Place::OneHost));
    let done = lab(binary, &all, LIMIT)?;
    let judged = judge(client, Place::OneHost, &done);
    judged.map_err(|why| format!("{} in {root}: {why}\n{}", client.name(), done.tail()))
}

/// The lab's arguments. A server that ends by itself is waited for: it reports through a pipe in its container's /tmp
/// to a third command, whose end ends the lab. The client, which may be a moment later, ignores the SIGTERM that this
/// brings: it would lose the output it has not written yet.
fn arguments(client: &Client, place: Place) -> Vec<String> {
    let (first, second) = (place.server(), place.client());
    let at = format!("@{first}");
    let run = |container: &str, command: &str| {
        vec!["--run".to_owned(), format!("{container}={}", command.replace("@c1", &at))]
    };
    let hosts = if place == Place::OneHost { vec![] } else { vec!["--hosts".to_owned(), "2".to_owned()] };
    let runs = match &client.server {
        None => run(second, &client.command),
        Some(server) if server.ends => {
            let report = format!("mkfifo /tmp/end; {}; s=$?; echo $s >/tmp/end; exit $s", server.command);
            let unhurried = format!("trap '' TERM; {}", client.command);
            [run(first, &report), run(second, &unhurried), run(first, "read -r s </tmp/end; exit $s")]
                .concat()
        }
        Some(server) => [run(first, &server.command), run(second, &client.command)].concat(),
    };
    [hosts, runs].concat()
}

fn lab(binary: &Path, arguments: &[String], limit: Duration) -> std::result::Result<Done, String> {
    let mut command = Command::new(binary);
    command.arg("lab").args(arguments);
    process::run(&mut command, limit, Echo::Quiet).map_err(|failure| failure.to_string())
}

fn judge(client: &Client, place: Place, done: &Done) -> Outcome {
    if !done.success() {
        return Err(done.how());
    }
    let said = perftest::lines_of(place.client(), &done.stdout);
    let all = format!("{}{}", done.stdout, done.stderr);
    client.checks.iter().try_for_each(|check| passes(check, &said, &all))
}

fn passes(check: &Check, client: &str, all: &str) -> Outcome {
    match check {
        Check::Says(text) if !client.contains(text) => Err(format!("the client did not say {text:?}")),
        Check::Anywhere(text) if !all.contains(text) => Err(format!("nobody said {text:?}")),
        Check::NeverSays(text) if all.contains(text) => Err(format!("it said {text:?}")),
        Check::Sizes(first, last) => sizes(client, *first, *last),
        _ => Ok(()),
    }
}

fn sizes(text: &str, first: u64, last: u64) -> Outcome {
    let rows = perftest::rows(text);
    let sizes = std::iter::successors(Some(first), |size| Some(size * 2)).take_while(|size| *size <= last);
    for size in sizes {
        let row = perftest::row(&rows, size).ok_or_else(|| format!("no row for size {size}"))?;
        // Column 3 is the average bandwidth or the longest time.
        if row[3] <= 0.0 {
            return Err(format!("a zero in the row for size {size}"));
        }
    }
    Ok(())
}

/// A check of the lab itself.
pub struct LabCheck {
    what: &'static str,
    arguments: &'static [&'static str],
    status: i32,
    /// Lines that standard output must have.
    lines: &'static [&'static str],
}

/// The lab must hold without our libraries: qperf over TCP, as a program that listens, does without them.
pub const OWN: &[LabCheck] = &[
    LabCheck {
        what: "the first command that failed decides",
        arguments: &["--run", "c1=exit 3", "--run", "c2=exit 4"],
        status: 3,
        lines: &[],
    },
    LabCheck {
        what: "a signal counts as 128 and its number",
        arguments: &["--run", "c1=kill -9 $$"],
        status: 137,
        lines: &[],
    },
    LabCheck {
        what: "a command that still runs gets SIGTERM and does not count",
        arguments: &[
            "--run",
            // Its listening port lets the second command start.
            "c1=trap 'echo term; exit 9' TERM; env -u LD_PRELOAD -u LD_LIBRARY_PATH qperf & wait",
            "--run",
            "c2=echo last",
        ],
        status: 0,
        lines: &["c2| last", "c1| term"],
    },
    LabCheck {
        what: "containers are unprivileged and reach each other",
        arguments: &[
            "--run",
            "c1=grep -E 'CapBnd|NoNewPrivs' /proc/self/status; \
             touch /etc/x || echo read-only; exec env -u LD_PRELOAD -u LD_LIBRARY_PATH qperf",
            "--run",
            "c2=env -u LD_PRELOAD -u LD_LIBRARY_PATH qperf @c1 -t 1 tcp_lat && echo reached",
        ],
        status: 0,
        lines: &["c1| CapBnd:\t0000000000000000", "c1| NoNewPrivs:\t1", "c1| read-only", "c2| reached"],
    },
    LabCheck {
        what: "a container has the device's files and its own interfaces",
        arguments: &[
            "--containers",
            "1",
            "--run",
            "c1=cd /sys/class/infiniband/ff0; cat ports/1/gids/0 ports/1/gid_attrs/ndevs/0; \
             cat device/net/eth0/operstate ../../net/lo/mtu; \
             test -w /dev/infiniband/uverbs0 && echo a node; touch x || echo read-only",
        ],
        status: 0,
        lines: &[
            "c1| 0000:0000:0000:0000:0000:ffff:0a4d:0101",
            "c1| eth0",
            "c1| up",
            "c1| 65536",
            "c1| a node",
            "c1| read-only",
        ],
    },
    LabCheck {
        what: "a bad command line is refused",
        arguments: &["--run", "c9=true"],
        status: 125,
        lines: &[],
    },
];

impl LabCheck {
    pub fn name(&self) -> String {
        format!("lab: {}", self.what)
    }

    pub fn run(&self) -> Outcome {
        let arguments: Vec<String> = self.arguments.iter().map(|&a| a.to_owned()).collect();
        let done = lab(&layout::freeflow(), &arguments, LIMIT)?;
        if done.timed_out || done.status.code() != Some(self.status) {
            return Err(format!("{}, expected {}\n{}", done.how(), self.status, done.tail()));
        }
        let missing = self.lines.iter().find(|line| !done.stdout.lines().any(|l| l == **line));
        missing.map_or(Ok(()), |line| Err(format!("no line {line:?}\n{}", done.tail())))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_missing_size_and_a_zero_fail() {
        let text = "2 200 1.0 1.0 0.1\n4 200 1.0 0.00 0.1\n";
        assert_eq!(sizes(text, 2, 2), Ok(()));
        assert!(sizes(text, 2, 4).is_err(), "zero bandwidth");
        assert!(sizes(text, 2, 8).is_err(), "no row");
    }

    #[test]
    fn each_kind_of_check_can_fail() {
        assert!(passes(&Check::Says("x"), "y", "y").is_err());
        assert!(passes(&Check::Anywhere("x"), "y", "y").is_err());
        assert!(passes(&Check::NeverSays("x"), "", "x").is_err());
        assert_eq!(passes(&Check::Says("x"), "xy", "xy"), Ok(()));
    }

    #[test]
    fn a_server_that_ends_is_waited_for() {
        let clients = super::super::clients::all();
        let rping = clients.iter().find(|c| c.name().contains("rping")).expect("in the list");
        let here = arguments(rping, Place::OneHost);
        assert_eq!(here.len(), 6);
        assert!(here[5].starts_with("c1=read"), "{here:?}");
        let between = arguments(rping, Place::TwoHosts);
        assert_eq!(between[..2], ["--hosts", "2"]);
        assert!(between[5].starts_with("h2c1=") && between[5].contains("@h1c1"), "{between:?}");
    }
}
