//! `cargo xtask demo`: `freeflow lab` with fixed arguments. Debian's perftest between two unprivileged containers, next
//! to the same containers' TCP over their veth, as one table.

use std::process::{Command, ExitCode};
use std::time::Duration;

use crate::failure::Result;
use crate::process::{self, Done, Echo};
use crate::{dist, layout, packages, perftest};

/// All of it takes well under a minute on an idle machine.
const LIMIT: Duration = Duration::from_secs(300);
/// Message sizes that TCP is measured at.
const SIZES: [u64; 5] = [64, 4 << 10, 64 << 10, 1 << 20, 8 << 20];
const BW: &str = "ib_write_bw -F -a -n 500 --report_gbits";
const LAT: &str = "ib_write_lat -F -a -n 300 -p 18516";

pub fn run() -> Result<ExitCode> {
    packages::ensure(&[packages::LAB, packages::CLIENTS])?;
    dist::build()?;
    println!(
        "Two containers started with runc on this host: own user, mount, pid, ipc, network, uts and cgroup"
    );
    println!(
        "namespaces, no capability, no RDMA device. Programs as Debian ships them: {BW}; ib_write_lat; qperf."
    );
    let mut lab = Command::new(layout::freeflow());
    lab.arg("lab");
    for run in runs() {
        lab.arg("--run").arg(run);
    }
    let done = process::run(&mut lab, LIMIT, Echo::Quiet)?;
    let table = Table::read(&perftest::lines_of("c2", &done.stdout));
    print!("{}", table.show());
    if done.success() && table.is_complete() {
        return Ok(ExitCode::SUCCESS);
    }
    explain(&done, &table);
    Ok(ExitCode::FAILURE)
}

/// Three servers that wait, then one script with the clients in turn: what is measured has the machine to itself.
fn runs() -> [String; 4] {
    let sizes = SIZES.map(|s| s.to_string()).join(" ");
    let clients = format!(
        "r=0; {BW} @c1 || r=$?; {LAT} @c1 || r=$?; \
         for s in {sizes}; do echo size $s; qperf @c1 -t 1 -m $s tcp_bw tcp_lat || r=$?; done; exit $r"
    );
    [format!("c1={BW}"), format!("c1={LAT}"), "c1=qperf".to_owned(), format!("c2={clients}")]
}

/// What could not be shown, and what the programs said about it.
fn explain(done: &Done, table: &Table) {
    eprintln!("demo: the lab ended with {}", done.how());
    for (what, rows) in [("ib_write_bw", &table.bw), ("ib_write_lat", &table.lat)] {
        if rows.is_empty() {
            eprintln!("demo: no result from {what}: the RDMA data path does not work in this build");
        }
    }
    eprintln!("{}", done.tail());
}

/// TCP at one message size.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
struct Tcp {
    size: u64,
    gigabytes: Option<f64>,
    microseconds: Option<f64>,
}

struct Table {
    bw: Vec<Vec<f64>>,
    lat: Vec<Vec<f64>>,
    tcp: Vec<Tcp>,
}

impl Table {
    /// Reads what the client container printed.
    fn read(text: &str) -> Self {
        let part = |title: &str| {
            let after = text.split_once(title).map_or("", |(_, after)| after);
            perftest::rows(after.split_once(" Test\n").map_or(after, |(part, _)| part))
        };
        Self { bw: part("RDMA_Write BW Test"), lat: part("RDMA_Write Latency Test"), tcp: tcp(text) }
    }

    fn gigabytes(&self, size: u64) -> Option<f64> {
        perftest::row(&self.bw, size).map(|row| row[3] / 8.0)
    }

    /// The typical (median) latency.
    fn microseconds(&self, size: u64) -> Option<f64> {
        perftest::row(&self.lat, size).and_then(|row| row.get(4).copied())
    }

    fn tcp(&self, size: u64) -> Tcp {
        self.tcp.iter().copied().find(|tcp| tcp.size == size).unwrap_or_default()
    }

    fn is_complete(&self) -> bool {
        SIZES.iter().all(|&size| {
            let tcp = self.tcp(size);
            let values = [self.gigabytes(size), self.microseconds(size), tcp.gigabytes, tcp.microseconds];
            values.iter().all(|v| v.is_some_and(|v| v > 0.0))
        })
    }

    fn show(&self) -> String {
        let mut out = format!(
            "\n{:>8} | {:^33} | {:^33}\n{:>8} | {:>12} {:>10} {:>9} | {:>12} {:>10} {:>9}\n",
            "", "bandwidth, GB/s", "latency, us", "size", "ib_write_bw", "TCP", "", "ib_write_lat", "TCP", ""
        );
        for size in SIZES {
            let (bw, lat, tcp) = (self.gigabytes(size), self.microseconds(size), self.tcp(size));
            out += &format!(
                "{:>8} | {:>12} {:>10} {:>9} | {:>12} {:>10} {:>9}\n",
                name(size),
                cell(bw),
                cell(tcp.gigabytes),
                times(bw, tcp.gigabytes),
                cell(lat),
                cell(tcp.microseconds),
                times(tcp.microseconds, lat),
            );
        }
        out + "\nTCP: qperf's tcp_bw and tcp_lat over the containers' veth interfaces.\n"
    }
}

fn cell(value: Option<f64>) -> String {
    value.map_or("-".to_owned(), |v| if v < 10.0 { format!("{v:.2}") } else { format!("{v:.1}") })
}

/// How many times better.
fn times(better: Option<f64>, worse: Option<f64>) -> String {
    match (better, worse) {
        (Some(b), Some(w)) if w > 0.0 => format!("{:.1}x", b / w),
        _ => String::new(),
    }
}

fn name(size: u64) -> String {
    match size {
        s if s >= 1 << 20 => format!("{} MiB", s >> 20),
        s if s >= 1 << 10 => format!("{} KiB", s >> 10),
        s => format!("{s} B"),
    }
}

/// qperf's figures, after the `size` lines of our loop.
fn tcp(text: &str) -> Vec<Tcp> {
    let mut all: Vec<Tcp> = Vec::new();
    for line in text.lines() {
        let words: Vec<&str> = line.split_whitespace().collect();
        match words.as_slice() {
            ["size", size] => all.push(Tcp { size: size.parse().unwrap_or(0), ..Tcp::default() }),
            ["bw", "=", value, unit] => set(&mut all, |t| t.gigabytes = perftest::scaled(value, unit, 1e9)),
            ["latency", "=", value, unit] => {
                set(&mut all, |t| t.microseconds = perftest::scaled(value, unit, 1e-6))
            }
            _ => {}
        }
    }
    all
}

fn set(all: &mut [Tcp], change: impl FnOnce(&mut Tcp)) {
    if let Some(last) = all.last_mut() {
        change(last);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn output() -> String {
        let mut text = String::from("                    RDMA_Write BW Test\n");
        for size in SIZES {
            text += &format!(" {size}     500     90.0     80.0     0.1\n");
        }
        text += "                    RDMA_Write Latency Test\n";
        for size in SIZES {
            text += &format!(" {size}  1000  1.0  9.0  1.5  1.6  0.1  2.0  3.0\n");
        }
        for size in SIZES {
            text +=
                &format!("size {size}\ntcp_bw:\n    bw  =  500 MB/sec\ntcp_lat:\n    latency  =  0.03 ms\n");
        }
        text
    }

    #[test]
    fn a_whole_run_fills_the_table() {
        let table = Table::read(&output());
        assert!(table.is_complete());
        assert_eq!(table.gigabytes(64), Some(10.0));
        assert_eq!(table.microseconds(64), Some(1.5));
        assert_eq!(table.tcp(64).microseconds.map(f64::round), Some(30.0));
        assert!(table.show().contains("20.0x"), "{}", table.show());
    }

    #[test]
    fn a_missing_figure_is_noticed() {
        let without = |what: &str| Table::read(&output().replace(what, "x")).is_complete();
        assert!(!without("80.0"));
        assert!(!without("1.5"));
        assert!(!without("ms"));
    }
}
