//! `bench hosts`: two hosts, which are network namespaces joined by one veth pair, each with its router; beside what the kernel's TCP
//! carries over the same pair.
//!
//! Programs are not pinned: two of them and two routers share the processors, and who runs when is part of what is measured.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use super::cases::{Bar, Bound, Figure};
use super::figures::{Lookup, Results, Round};
use crate::failure::{Context as _, Failure, Result};
use crate::perftest;
use crate::process::{self, Echo, Running};

const LIMIT: Duration = Duration::from_secs(120);
const MIB: u64 = 1 << 20;
const ADDRESSES: [&str; 2] = ["192.168.78.1", "192.168.78.2"];
const PORT: u16 = 4790;

const OURS: &str = "freeflow";
const EVENTS: &str = "freeflow, events";
const TLS: &str = "freeflow, TLS";
const IPERF: &str = "iperf3";
const QPERF: &str = "qperf tcp";
const UCX: &str = "ucx tcp";
const OFI: &str = "libfabric tcp";

/// Which routers a pair of programs uses; none for those that use the kernel's TCP.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Over {
    Kernel,
    Plain,
    Tls,
}

/// How a figure is read from what the client printed.
type Parse = fn(&str, u64) -> Option<f64>;

/// One figure: server and client, the address is appended to the client's words.
struct Measure {
    figure: Figure,
    over: Over,
    server: &'static str,
    client: &'static str,
    parse: Parse,
}

fn bandwidth(case: &'static str, side: &'static str, size: u64) -> Figure {
    Figure { case, side, size, metric: "bandwidth", unit: "GB/s" }
}

fn latency(case: &'static str, side: &'static str, size: u64) -> Figure {
    Figure { case, side, size, metric: "latency", unit: "us" }
}

fn perftest_average(text: &str, size: u64) -> Option<f64> {
    perftest::row(&perftest::rows(text), size).map(|row| row[3] / 8.0)
}

fn perftest_typical(text: &str, size: u64) -> Option<f64> {
    perftest::row(&perftest::rows(text), size).map(|row| row[4])
}

fn ucx_typical(text: &str, _: u64) -> Option<f64> {
    perftest::rows(text).last().filter(|row| row.len() == 8).map(|row| row[1])
}

fn qperf(text: &str, _: u64) -> Option<f64> {
    text.lines().find_map(|line| match *line.split_whitespace().collect::<Vec<_>>() {
        ["bw", "=", value, unit] => perftest::scaled(value, unit, 1e9),
        ["latency", "=", value, unit] => perftest::scaled(value, unit, 1e-6),
        _ => None,
    })
}

fn iperf(text: &str, _: u64) -> Option<f64> {
    let line = text.lines().find(|line| line.trim_end().ends_with("receiver"))?;
    let words: Vec<&str> = line.split_whitespace().collect();
    let at = words.iter().position(|word| *word == "Gbits/sec")?;
    words.get(at.checked_sub(1)?)?.parse::<f64>().ok().map(|gbits| gbits / 8.0)
}

/// fi_pingpong's last row; its second to last column is the time of one way.
fn fabric(text: &str, _: u64) -> Option<f64> {
    let row = text.lines().rfind(|line| line.trim_start().starts_with(|c: char| c.is_ascii_digit()))?;
    let words: Vec<&str> = row.split_whitespace().collect();
    words.get(words.len().checked_sub(2)?)?.parse().ok()
}

fn measures() -> Vec<Measure> {
    let ours = |figure, over, command: &'static str, parse| Measure {
        figure,
        over,
        server: command,
        client: command,
        parse,
    };
    let kernel =
        |figure, server, client, parse| Measure { figure, over: Over::Kernel, server, client, parse };
    let events =
        |figure, client| Measure { figure, over: Over::Plain, server: "qperf", client, parse: qperf };
    const WRITE_BW: &str = "ib_write_bw -F --report_gbits -s 1048576 -n 4000";
    const READ_BW: &str = "ib_read_bw -F --report_gbits -s 1048576 -n 4000";
    const WRITE_LAT: &str = "ib_write_lat -F -s 8 -n 20000";
    const MANY: &str = "ib_write_bw -F --report_gbits -s 65536 -n 40 -t 8 -q 1024";
    const ONE: &str = "ib_write_bw -F --report_gbits -s 65536 -n 40000";
    vec![
        kernel(bandwidth("stream", IPERF, MIB), "iperf3 -s -1", "iperf3 -t 2 -f g -l 1M -c", iperf),
        ours(bandwidth("write_bw", OURS, MIB), Over::Plain, WRITE_BW, perftest_average),
        ours(bandwidth("read_bw", OURS, MIB), Over::Plain, READ_BW, perftest_average),
        events(bandwidth("write_bw", EVENTS, MIB), "qperf -t 2 -m 1M -vc @ rc_rdma_write_bw"),
        events(bandwidth("read_bw", EVENTS, MIB), "qperf -t 2 -m 1M -vc @ rc_rdma_read_bw"),
        ours(bandwidth("write_bw", TLS, MIB), Over::Tls, WRITE_BW, perftest_average),
        ours(latency("write_lat", OURS, 8), Over::Plain, WRITE_LAT, perftest_typical),
        ours(latency("write_lat", TLS, 8), Over::Tls, WRITE_LAT, perftest_typical),
        kernel(
            latency("ucp_put_lat", UCX, 8),
            "env UCX_TLS=self,tcp ucx_perftest -f",
            "env UCX_TLS=self,tcp ucx_perftest -f -t ucp_put_lat -s 8 -n 20000",
            ucx_typical,
        ),
        kernel(
            latency("pingpong", OFI, 8),
            "fi_pingpong -p tcp -e rdm -S 8 -I 20000",
            "fi_pingpong -p tcp -e rdm -S 8 -I 20000",
            fabric,
        ),
        kernel(latency("tcp_lat", QPERF, 8), "qperf", "qperf -t 2 -m 8 @ tcp_lat", qperf),
        events(latency("send_lat", EVENTS, 8), "qperf -t 2 -m 8 @ rc_lat"),
        ours(bandwidth("many_qps", "1 qp", 65536), Over::Plain, ONE, perftest_average),
        ours(bandwidth("many_qps", "1024 qps", 65536), Over::Plain, MANY, perftest_average),
    ]
}

fn bars() -> Vec<Bar> {
    let bar = |case, what, bound, ratio| Bar { case, what, bound, ratio };
    let least = Bound::AtLeast;
    vec![
        bar("write_bw", "ib_write_bw 1 MiB, polling / iperf3", least(0.75), |f| {
            Some(f.get("write_bw", OURS, MIB)? / f.get("stream", IPERF, MIB)?)
        }),
        bar("read_bw", "ib_read_bw 1 MiB, polling / iperf3", least(0.75), |f| {
            Some(f.get("read_bw", OURS, MIB)? / f.get("stream", IPERF, MIB)?)
        }),
        bar("write_bw", "WRITE 1 MiB, events / iperf3", least(0.9), |f| {
            Some(f.get("write_bw", EVENTS, MIB)? / f.get("stream", IPERF, MIB)?)
        }),
        bar("read_bw", "READ 1 MiB, events / iperf3", least(0.9), |f| {
            Some(f.get("read_bw", EVENTS, MIB)? / f.get("stream", IPERF, MIB)?)
        }),
        bar("write_bw", "with TLS / without, 1 MiB", Bound::None, |f| {
            Some(f.get("write_bw", TLS, MIB)? / f.get("write_bw", OURS, MIB)?)
        }),
        bar("write_lat", "ib_write_lat 8 B / UCX tcp ucp_put_lat", Bound::AtMost(1.0), |f| {
            Some(f.get("write_lat", OURS, 8)? / f.get("ucp_put_lat", UCX, 8)?)
        }),
        bar("write_lat", "ib_write_lat 8 B / fi_pingpong over libfabric tcp", Bound::None, |f| {
            Some(f.get("write_lat", OURS, 8)? / f.get("pingpong", OFI, 8)?)
        }),
        bar("send_lat", "sleeping SEND 8 B / qperf tcp_lat", Bound::AtMost(2.0), |f| {
            Some(f.get("send_lat", EVENTS, 8)? / f.get("tcp_lat", QPERF, 8)?)
        }),
        bar("write_lat", "with TLS / without, 8 B", Bound::None, |f| {
            Some(f.get("write_lat", TLS, 8)? / f.get("write_lat", OURS, 8)?)
        }),
        bar("many_qps", "1,024 QPs / one, 64 KiB", least(0.9), |f| {
            Some(f.get("many_qps", "1024 qps", 65536)? / f.get("many_qps", "1 qp", 65536)?)
        }),
    ]
}

/// Measures the cases that `only` selects, `rounds` times each, interleaved.
pub fn run(tree: &Path, only: &str, rounds: usize) -> Result<Results> {
    let measures: Vec<Measure> = measures().into_iter().filter(|m| m.figure.case.contains(only)).collect();
    let stage = Stage::new(tree)?;
    let mut kept: Vec<Round> = Vec::new();
    for turn in 1..=rounds {
        let mut round = Round::new();
        for measure in &measures {
            let value = stage.figure(measure).map_err(|failure| {
                Failure::new(format!("{} of {}: {failure}", measure.figure.case, measure.figure.side))
            })?;
            let Figure { case, side, size, unit, .. } = measure.figure;
            eprintln!("bench: {turn} of {rounds}  {case:<12} {side:<18} {size:>9} B {value:>10.3} {unit}");
            round.insert(measure.figure, value);
        }
        kept.push(round);
    }
    let complete = |bar: &Bar| kept.iter().all(|round| (bar.ratio)(&Lookup(round)).is_some());
    let bars: Vec<Bar> = bars().into_iter().filter(complete).collect();
    let figures: Vec<Figure> = measures.iter().map(|measure| measure.figure).collect();
    let mut results = Results::default();
    results.add(&figures, &bars, &kept);
    results.notes.push(format!("{rounds} rounds, interleaved; programs are not pinned"));
    Ok(results)
}

/// The two hosts.
struct Stage {
    freeflow: PathBuf,
    dir: PathBuf,
    names: [String; 2],
    _routers: Vec<Running>,
}

impl Stage {
    fn new(tree: &Path) -> Result<Self> {
        let pid = std::process::id();
        let dir = std::env::temp_dir().join(format!("ff-hosts-{pid}"));
        std::fs::create_dir_all(&dir).context(format_args!("cannot make {}", dir.display()))?;
        let names = [format!("ff{pid}a"), format!("ff{pid}b")];
        let mut stage = Self { freeflow: tree.join("bin/freeflow"), dir, names, _routers: Vec::new() };
        stage.join()?;
        stage.certify()?;
        for over in [Over::Plain, Over::Tls] {
            for host in 0..2 {
                let router = stage.router(over, host)?;
                stage._routers.push(router);
            }
        }
        Ok(stage)
    }

    /// Two namespaces and what joins them.
    fn join(&self) -> Result<()> {
        let [a, b] = &self.names;
        ip(&["netns", "add", a])?;
        ip(&["netns", "add", b])?;
        ip(&["-n", a, "link", "add", "wire", "type", "veth", "peer", "name", "wire", "netns", b])?;
        for (name, address) in self.names.iter().zip(ADDRESSES) {
            ip(&["-n", name, "addr", "add", &format!("{address}/24"), "dev", "wire"])?;
            ip(&["-n", name, "link", "set", "wire", "up"])?;
            ip(&["-n", name, "link", "set", "lo", "up"])?;
        }
        Ok(())
    }

    fn certify(&self) -> Result<()> {
        let mut certs = Command::new(&self.freeflow);
        certs.arg("certs").arg(self.dir.join("tls")).args(["--host", "h1", "--host", "h2"]);
        succeed(&mut certs).map(drop)
    }

    fn host_dir(&self, over: Over, host: usize) -> PathBuf {
        self.dir.join(format!("{over:?}{host}"))
    }

    fn router(&self, over: Over, host: usize) -> Result<Running> {
        let dir = self.host_dir(over, host);
        std::fs::create_dir_all(&dir).context(format_args!("cannot make {}", dir.display()))?;
        let port = PORT + u16::from(over == Over::Tls);
        let directory: String = (0..2)
            .map(|i| {
                let (number, at) = (i + 1, ADDRESSES[i]);
                format!("[hosts.h{number}]\naddress = \"{at}:{port}\"\ncontainers = [\"default/{at}\"]\n")
            })
            .collect();
        let tls = self.dir.join("tls").join(format!("h{}", host + 1));
        let security = match over {
            Over::Tls => format!(
                "tls_ca = \"{0}/ca.pem\"\ntls_cert = \"{0}/cert.pem\"\ntls_key = \"{0}/key.pem\"\n",
                tls.display()
            ),
            _ => "insecure_plain_tcp = true\n".to_owned(),
        };
        let config = format!(
            "host = \"h{}\"\ncluster_listen = \"{}:{port}\"\ndirectory = \"file:{}\"\nmetrics = \"127.0.0.1:0\"\n{security}",
            host + 1,
            ADDRESSES[host],
            dir.join("directory.toml").display()
        );
        for (name, text) in [("directory.toml", directory), ("router.toml", config)] {
            std::fs::write(dir.join(name), text).context(format_args!("cannot write {name}"))?;
        }
        let socket = dir.join("router.sock");
        let mut command = self.inside(host);
        command.arg(&self.freeflow).arg("router").arg("--socket").arg(&socket);
        command.arg("--config").arg(dir.join("router.toml")).env("FREEFLOW_LOG", "warn");
        let mut router = Running::start(&mut command, Echo::Quiet)?;
        until("a router's socket", || socket.exists() || router.has_ended())?;
        Ok(router)
    }

    fn inside(&self, host: usize) -> Command {
        let mut command = Command::new("ip");
        command.args(["netns", "exec", &self.names[host]]);
        command
    }

    /// A program on a host.
    fn program(&self, over: Over, host: usize, words: &[&str]) -> Command {
        let mut command = self.inside(host);
        if over != Over::Kernel {
            command.env("FREEFLOW_SOCKET", self.host_dir(over, host).join("router.sock"));
            command.arg(&self.freeflow).args(["run", "--"]);
        }
        command.args(words);
        command
    }

    fn figure(&self, measure: &Measure) -> Result<f64> {
        let server: Vec<&str> = measure.server.split(' ').collect();
        let mut client: Vec<&str> = measure.client.split(' ').collect();
        match client.iter_mut().find(|word| **word == "@") {
            Some(word) => *word = ADDRESSES[0],
            None => client.push(ADDRESSES[0]),
        }
        let before = self.listeners(0)?;
        let mut serving = Running::start(&mut self.program(measure.over, 0, &server), Echo::Quiet)?;
        until("a server's port", || self.listeners(0).is_ok_and(|now| now > before) || serving.has_ended())?;
        let done = process::run(&mut self.program(measure.over, 1, &client), LIMIT, Echo::Quiet)?;
        if server[0] == "qperf" {
            serving.terminate();
        }
        let served = serving.finish(LIMIT)?;
        if !done.success() {
            return Err(Failure::new(format!("{}: {}\n{}", done.how(), done.tail(), served.tail())));
        }
        (measure.parse)(&done.stdout, measure.figure.size)
            .ok_or_else(|| Failure::new(format!("no figure in what {} printed:\n{}", client[0], done.stdout)))
    }

    /// How many TCP ports are listened on there.
    fn listeners(&self, host: usize) -> Result<usize> {
        let done = succeed(self.inside(host).args(["cat", "/proc/net/tcp", "/proc/net/tcp6"]))?;
        Ok(done.lines().filter(|line| line.split_whitespace().nth(3) == Some("0A")).count())
    }
}

impl Drop for Stage {
    fn drop(&mut self) {
        self._routers.clear();
        for name in &self.names {
            // Its interfaces go with it.
            ip(&["netns", "del", name]).ok();
        }
        std::fs::remove_dir_all(&self.dir).ok();
    }
}

fn ip(words: &[&str]) -> Result<()> {
    succeed(Command::new("ip").args(words)).map(drop)
}

fn succeed(command: &mut Command) -> Result<String> {
    let done = process::run(command, LIMIT, Echo::Quiet)?;
    if done.success() {
        Ok(done.stdout)
    } else {
        Err(Failure::new(format!("{command:?}: {}: {}", done.how(), done.tail())))
    }
}

/// Waits for something the kernel has no event for.
fn until(what: &str, mut happened: impl FnMut() -> bool) -> Result<()> {
    let start = Instant::now();
    while !happened() {
        if start.elapsed() > LIMIT {
            return Err(Failure::new(format!("waited in vain for {what}")));
        }
        std::thread::sleep(Duration::from_millis(5));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_peers_tables_are_read() {
        let text = "[  5]   0.00-2.00   sec  11.2 GBytes  48.0 Gbits/sec    0             sender\n\
                    [  5]   0.00-2.00   sec  11.2 GBytes  40.0 Gbits/sec                  receiver\n";
        assert_eq!(iperf(text, 0), Some(5.0));
        let text = "bytes   #sent   #ack     total       time     MB/sec    usec/xfer   Mxfers/sec\n\
                    8       20k     =20k     312k        0.40s      0.80      10.10       0.10\n";
        assert_eq!(fabric(text, 0), Some(10.1));
        assert_eq!(qperf("tcp_lat:\n    latency  =  9.5 us\n", 0), Some(9.5));
    }
}
