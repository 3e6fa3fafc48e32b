//! `bench hosts`: two hosts, which are network namespaces joined by one veth pair, each with its router; beside what the kernel's TCP
//! carries over the same pair.
//!
//! Programs are not pinned: two of them and two routers share the processors, and who runs when is part of what is measured.

mod stage;

use std::path::Path;

use super::cases::{Bar, Bound, Figure};
use super::figures::{Lookup, Results, Round};
use super::probes;
use crate::failure::{Failure, Result};
use crate::perftest;
use stage::Stage;
pub use stage::{Over, ROUTERS};

const MIB: u64 = 1 << 20;
const KIB: u64 = 1 << 10;

const OURS: &str = "freeflow";
const EVENTS: &str = "freeflow, events";
const TLS: &str = "freeflow, TLS";
const CROWDED: &str = "among 10,000";
const IPERF: &str = "iperf3";
const QPERF: &str = "qperf tcp";
const UCX: &str = "ucx tcp";
const OFI: &str = "libfabric tcp";
const FLOOR: &str = "bare helpers";

/// How a figure is read from what the client printed, behind which [`ROUTERS`] stands.
type Parse = fn(&str, u64) -> Option<f64>;

/// One figure: server and client; `@` is the server's address, which is appended to the client's words where there is none,
/// and a word that begins with `probe:` a program of benches/probes.
pub struct Measure {
    pub figure: Figure,
    pub over: Over,
    pub server: &'static str,
    pub client: &'static str,
    pub parse: Parse,
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

/// A probe's only figure, or first one.
fn first(text: &str, _: u64) -> Option<f64> {
    text.split_whitespace().next()?.parse().ok()
}

/// Jain's fairness, behind the rate.
fn fairness(text: &str, _: u64) -> Option<f64> {
    text.split_whitespace().nth(1)?.parse().ok()
}

/// Connections per second, of a cmtime that made `count`: its first column of numbers is the milliseconds of each step, of which
/// there are seven where no address was bound.
fn connections(text: &str, count: u64) -> Option<f64> {
    let step = |line: &str| line.split_once(':')?.1.split_whitespace().next()?.parse::<f64>().ok();
    let steps: Vec<f64> = text.lines().filter_map(step).collect();
    (steps.len() >= 7).then(|| count as f64 * 1e3 / steps.iter().sum::<f64>())
}

/// ucx_perftest's row: iterations; median, mean and overall time; mean and overall MB/s; mean and overall rate.
fn ucx_column(text: &str, index: usize) -> Option<f64> {
    perftest::rows(text).last().filter(|row| row.len() == 8).map(|row| row[index])
}

pub fn ucx_typical(text: &str, _: u64) -> Option<f64> {
    ucx_column(text, 1)
}

pub fn ucx_average(text: &str, _: u64) -> Option<f64> {
    ucx_column(text, 5).map(|rate| rate * f64::from(1 << 20) / 1e9)
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
    let many = |figure, (server, client), parse| Measure { figure, over: Over::Plain, server, client, parse };
    const ONE: (&str, &str) = ("probe:fair 7000 1 65536", "probe:fair 7000 1 65536 2");
    const MANY: (&str, &str) = ("probe:fair 7000 1024 65536", "probe:fair 7000 1024 65536 2");
    const WRITE_BW: &str = "ib_write_bw -F --report_gbits -s 1048576 -n 4000";
    const READ_BW: &str = "ib_read_bw -F --report_gbits -s 1048576 -n 4000";
    const WRITE_LAT: &str = "ib_write_lat -F -s 8 -n 20000";
    vec![
        stream_of_iperf(),
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
        kernel(
            latency("floor", FLOOR, 8),
            "probe:helper server @ 20000 4",
            "probe:helper client @ 20000 4",
            first,
        ),
        kernel(latency("tcp_lat", QPERF, 8), "qperf", "qperf -t 2 -m 8 @ tcp_lat", qperf),
        events(latency("send_lat", EVENTS, 8), "qperf -t 2 -m 8 @ rc_lat"),
        ours(latency("directory", OURS, 8), Over::Plain, WRITE_LAT, perftest_typical),
        ours(latency("directory", CROWDED, 8), Over::Crowded, WRITE_LAT, perftest_typical),
        many(bandwidth("many_qps", "1 qp", 64 * KIB), ONE, first),
        many(bandwidth("many_qps", "1024 qps", 64 * KIB), MANY, first),
        many(
            Figure { metric: "Jain's fairness", unit: "", ..bandwidth("fairness", "1024 qps", 64 * KIB) },
            MANY,
            fairness,
        ),
        Measure {
            figure: Figure { case: "connect", side: TLS, size: 1000, metric: "rate", unit: "1/s" },
            over: Over::Tls,
            server: "cmtime -c 1000",
            client: "cmtime -c 1000 -s",
            parse: connections,
        },
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
        bar("write_lat", "ib_write_lat 8 B / bare helpers between program and wire", Bound::None, |f| {
            Some(f.get("write_lat", OURS, 8)? / f.get("floor", FLOOR, 8)?)
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
        bar("fairness", "Jain's fairness of 1,024 QPs", least(0.97), |f| {
            f.get("fairness", "1024 qps", 65536)
        }),
        bar("connect", "rdma_cm connections per second, TLS", least(1000.0), |f| f.get("connect", TLS, 1000)),
        bar("directory", "ib_write_lat 8 B, 10,000 containers / two", Bound::AtMost(1.1), |f| {
            Some(f.get("directory", CROWDED, 8)? / f.get("directory", OURS, 8)?)
        }),
    ]
}

/// What the kernel's TCP carries in one stream.
pub fn stream_of_iperf() -> Measure {
    let figure = bandwidth("stream", IPERF, MIB);
    let (server, client) = ("iperf3 -s -1", "iperf3 -t 2 -f g -l 1M -c");
    Measure { figure, over: Over::Kernel, server, client, parse: iperf }
}

/// The cases that `only` selects.
pub fn run(tree: &Path, only: &str, rounds: usize) -> Result<Results> {
    let measures: Vec<Measure> = measures().into_iter().filter(|m| m.figure.case.contains(only)).collect();
    measure(tree, &measures, bars(), rounds)
}

/// Measures each of `measures` `rounds` times, interleaved, and those of `bars` that have their figures.
pub fn measure(tree: &Path, measures: &[Measure], bars: Vec<Bar>, rounds: usize) -> Result<Results> {
    let stage = Stage::new(tree, probes::build()?)?;
    let mut kept: Vec<Round> = Vec::new();
    for turn in 1..=rounds {
        let mut round = Round::new();
        for measure in measures {
            let value = figure(&stage, measure).map_err(|failure| {
                Failure::new(format!("{} of {}: {failure}", measure.figure.case, measure.figure.side))
            })?;
            let Figure { case, side, size, unit, .. } = measure.figure;
            eprintln!("bench: {turn} of {rounds}  {case:<12} {side:<18} {size:>9} B {value:>10.3} {unit}");
            round.insert(measure.figure, value);
        }
        kept.push(round);
    }
    let complete = |bar: &Bar| kept.iter().all(|round| (bar.ratio)(&Lookup(round)).is_some());
    let bars: Vec<Bar> = bars.into_iter().filter(complete).collect();
    let figures: Vec<Figure> = measures.iter().map(|measure| measure.figure).collect();
    let mut results = Results::default();
    results.add(&figures, &bars, &kept);
    results.notes.push(format!("{rounds} rounds, interleaved; programs are not pinned"));
    Ok(results)
}

fn figure(stage: &Stage, measure: &Measure) -> Result<f64> {
    let words = |text: &'static str| -> Vec<&str> { text.split(' ').collect() };
    let printed = stage.run(measure.over, &words(measure.server), &words(measure.client))?;
    let value = (measure.parse)(&printed, measure.figure.size);
    value.ok_or_else(|| Failure::new(format!("no figure in what {} printed:\n{printed}", measure.client)))
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
        let text = "step              total ms     max ms     min us  us / conn\n\
                    create id    :       1.00       1.00       1.00       1.00\nresolve addr : 2.0\n\
                    resolve route: 1.0\ncreate qp    : 1.0\nconnect      : 395\ndisconnect   : 50\ndestroy      : 50\n";
        assert_eq!(connections(text, 1000), Some(2000.0));
        assert_eq!((first("1.5 0.99 3 4\n", 0), fairness("1.5 0.99 3 4\n", 0)), (Some(1.5), Some(0.99)));
        assert_eq!(qperf("tcp_lat:\n    latency  =  9.5 us\n", 0), Some(9.5));
    }
}
