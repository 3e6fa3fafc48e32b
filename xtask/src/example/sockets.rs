//! TCP programs that know nothing of RDMA, between two containers of one host: each over the kernel's TCP, and over
//! rsockets by Debian's librspreload.so. The container's interface tells which way the bytes went.

use std::fmt::Write as _;
use std::fs;
use std::path::PathBuf;
use std::process::{Command, ExitCode};
use std::time::Duration;

use serde_json::Value;

use crate::failure::{Context as _, Failure, Result};
use crate::process::{self, Echo};
use crate::{dist, layout, packages};

const LIMIT: Duration = Duration::from_secs(120);
/// What each program moves.
const MIB: u64 = 1024;

/// Under librspreload.so, after what the lab preloads itself.
const PRELOAD: &str = "LD_PRELOAD=$LD_PRELOAD:$(echo /usr/lib/*/rsocket/librspreload.so) ";

/// Which way a program's bytes go.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Way {
    Tcp,
    Rsockets,
}

impl Way {
    fn name(self) -> &'static str {
        match self {
            Way::Tcp => "TCP",
            Way::Rsockets => "rsockets",
        }
    }

    /// The command of a program that goes this way.
    fn through(self, command: &str) -> String {
        if self == Way::Tcp { command.to_owned() } else { format!("{PRELOAD}{command}") }
    }
}

/// A program: what its server and its client do, and how fast the client says it was, in bytes per second.
struct Case {
    name: &'static str,
    server: fn(Way) -> String,
    client: fn(Way) -> String,
    speed: fn(&str) -> Option<f64>,
}

const CASES: [Case; 3] = [
    Case { name: "iperf3", server: iperf_server, client: |way| iperf(way, ""), speed: iperf_speed },
    Case {
        name: "iperf3, 4 streams back",
        server: iperf_server,
        client: |way| iperf(way, "-P 4 -R"),
        speed: iperf_speed,
    },
    Case {
        name: "HTTP (http.server, curl)",
        server: |way| {
            let serve = way.through("python3 -m http.server 8000");
            format!("cd /tmp && truncate -s {MIB}M file && {serve}")
        },
        client: |way| {
            way.through(
                "curl -sSf -o /dev/null -w '%{speed_download} %{size_download}\\n' http://@c1:8000/file",
            )
        },
        speed: |said| {
            let mut words = said.split_whitespace();
            let (speed, size) = (words.next()?.parse().ok()?, words.next()?.parse::<u64>().ok()?);
            (size == MIB << 20).then_some(speed)
        },
    },
];

fn iperf_server(way: Way) -> String {
    way.through("iperf3 -s -1 >/dev/null")
}

fn iperf(way: Way, options: &str) -> String {
    way.through(&format!("iperf3 -c @c1 -J -n {MIB}M {options}"))
}

fn iperf_speed(said: &str) -> Option<f64> {
    let report: Value = serde_json::from_str(said).ok()?;
    Some(report.pointer("/end/sum_received/bits_per_second")?.as_f64()? / 8.0)
}

/// What came out of one run.
struct Outcome {
    case: &'static str,
    way: Way,
    /// Bytes per second.
    speed: f64,
    /// Bytes that the client's network interface has seen.
    outside: u64,
}

pub fn run() -> Result<ExitCode> {
    packages::ensure(&[packages::LAB, packages::CLIENTS])?;
    dist::build()?;
    let mut outcomes = Vec::new();
    for case in &CASES {
        for way in [Way::Tcp, Way::Rsockets] {
            let outcome = measure(case, way)?;
            println!("{:<26} {:<9} {:>6.2} GB/s", outcome.case, way.name(), outcome.speed / 1e9);
            outcomes.push(outcome);
        }
    }
    let place = save(&outcomes)?;
    println!("{}", place.display());
    Ok(ExitCode::SUCCESS)
}

fn measure(case: &Case, way: Way) -> Result<Outcome> {
    let client = format!(
        "{}; s=$?; awk '/eth0/ {{ print \"outside\", $2 + $10 }}' /proc/net/dev; exit $s",
        (case.client)(way)
    );
    let mut lab = Command::new(layout::freeflow());
    lab.arg("lab")
        .arg("--run")
        .arg(format!("c1={}", (case.server)(way)))
        .arg("--run")
        .arg(format!("c2={client}"));
    let done = process::run(&mut lab, LIMIT, Echo::Quiet)?;
    let failed =
        |why: &str| Failure::new(format!("{} over {}: {why}\n{}", case.name, way.name(), done.tail()));
    if !done.success() {
        return Err(failed(&done.how()));
    }
    let lines: Vec<&str> = done.stdout.lines().filter_map(|line| line.strip_prefix("c2| ")).collect();
    let (seen, said): (Vec<&str>, Vec<&str>) = lines.iter().partition(|line| line.starts_with("outside "));
    let outside = seen.first().and_then(|line| line.strip_prefix("outside ")?.parse().ok());
    let outside: u64 = outside.ok_or_else(|| failed("the interface's counters are missing"))?;
    let speed =
        (case.speed)(&said.join("\n")).ok_or_else(|| failed("its client did not say how fast it was"))?;
    // A tenth: handshakes and the like.
    if (way == Way::Rsockets) != (outside < (MIB << 20) / 10) {
        return Err(failed(&format!("{outside} bytes went through the network interface")));
    }
    Ok(Outcome { case: case.name, way, speed, outside })
}

/// Writes results.csv and results.md; returns the latter's path.
fn save(outcomes: &[Outcome]) -> Result<PathBuf> {
    let dir = layout::target().join("examples/sockets");
    fs::create_dir_all(&dir).context(format_args!("cannot make {}", dir.display()))?;
    let mut csv = String::from("program,way,bytes_per_second,bytes_through_interface\n");
    for outcome in outcomes {
        let Outcome { case, way, speed, outside } = outcome;
        writeln!(csv, "\"{case}\",{},{speed:.0},{outside}", way.name()).context("a line")?;
    }
    let mut table = format!(
        "# TCP programs over rsockets\n\n{MIB} MiB between two containers of one host; one run each.\n\n\
         | program | TCP, GB/s | rsockets, GB/s | ratio |\n|---|---|---|---|\n"
    );
    for pair in outcomes.chunks(2) {
        let (tcp, ours) = (pair[0].speed / 1e9, pair[1].speed / 1e9);
        writeln!(table, "| {} | {tcp:.2} | {ours:.2} | {:.2} |", pair[0].case, ours / tcp)
            .context("a line")?;
    }
    for (name, text) in [("results.csv", &csv), ("results.md", &table)] {
        let path = dir.join(name);
        fs::write(&path, text).context(format_args!("cannot write {}", path.display()))?;
    }
    Ok(dir.join("results.md"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn speeds_are_read_from_what_the_clients_say() {
        let report = r#"{"end":{"sum_received":{"bits_per_second":8e9}}}"#;
        assert_eq!(iperf_speed(report), Some(1e9));
        assert_eq!(iperf_speed("iperf3: error"), None);
        let http = CASES[2].speed;
        assert_eq!(http(&format!("5.0 {}", MIB << 20)), Some(5.0));
        assert_eq!(http("5.0 17"), None, "not the whole file");
    }
}
