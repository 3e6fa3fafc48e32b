//! What `bench nccl` measures: nccl-replay's figures, beside memcpy of the same buffers and beside our own perftest.

use std::path::PathBuf;
use std::time::Duration;

use super::cases::{Bar, Bound, Figure, Group};
use super::hosts::{self, Measure, Over, ROUTERS};
use super::side::{How, Provider, Read};
use crate::failure::Result;
use crate::{layout, process};

const KIB: u64 = 1 << 10;
const MIB: u64 = 1 << 20;
const PLUGIN: &str = "nccl plugin";
const FOUR: &str = "nccl plugin, 4 ranks";
const MEMCPY: &str = "memcpy";
const VERBS: &str = "freeflow verbs";

/// A cold release build on a small, busy machine.
const LIMIT: Duration = Duration::from_secs(1800);

/// Builds nccl-replay.
pub fn build() -> Result<()> {
    let mut cargo = layout::cargo();
    cargo.args(["build", "--quiet", "--release", "--package", "freeflow-tests", "--bin", "nccl-replay"]);
    process::must(&mut cargo, LIMIT).map(drop)
}

/// What the measures between hosts call it.
pub const PROGRAM: &str = "nccl-replay";

pub fn program() -> PathBuf {
    layout::target().join("release").join(PROGRAM)
}

pub fn groups() -> Vec<Group> {
    vec![latency(), bandwidth(), ranks()]
}

fn replay(ranks: u32, scenario: &'static str, size: u64, amount: u64, line: &'static str) -> How {
    How::Replay { ranks, scenario, size, amount, line }
}

fn figure(
    case: &'static str,
    side: &'static str,
    size: u64,
    metric: &'static str,
    unit: &'static str,
) -> Figure {
    Figure { case, side, size, metric, unit }
}

fn latency() -> Group {
    let write_lat = How::Perftest {
        program: "ib_write_lat",
        provider: Provider::Ours,
        size: 8,
        count: 100_000,
        read: Read::Typical,
        more: &[],
    };
    let measures = vec![
        (figure("ping_pong", PLUGIN, 8, "latency", "us"), replay(2, "latency", 8, 100_000, "latency ")),
        (figure("write_lat", VERBS, 8, "latency", "us"), write_lat),
    ];
    let bars = vec![Bar {
        case: "ping_pong",
        what: "8 B ping-pong / ib_write_lat",
        bound: Bound::AtMost(2.0),
        ratio: |f| Some(f.get("ping_pong", PLUGIN, 8)? / f.get("write_lat", VERBS, 8)?),
    }];
    Group { name: "latency", measures, bars }
}

/// Bytes of one figure.
const TOTAL: u64 = 4 << 30;

fn bandwidth() -> Group {
    let mut measures = Vec::new();
    for size in [128 * KIB, MIB] {
        measures.extend([
            (
                figure("stream", MEMCPY, size, "bandwidth", "GB/s"),
                replay(1, "memcpy", size, TOTAL, "memcpy "),
            ),
            (
                figure("stream", PLUGIN, size, "bandwidth", "GB/s"),
                replay(2, "bandwidth", size, TOTAL, "bandwidth "),
            ),
            (
                figure("processors", PLUGIN, size, "both ranks", "s/GB"),
                replay(2, "bandwidth", size, TOTAL, "cpu "),
            ),
        ]);
    }
    let bars = vec![
        Bar {
            case: "stream",
            what: "128 KiB, 8 in flight / memcpy of the same buffers",
            bound: Bound::AtLeast(0.8),
            ratio: |f| Some(f.get("stream", PLUGIN, 128 * KIB)? / f.get("stream", MEMCPY, 128 * KIB)?),
        },
        Bar {
            case: "stream",
            what: "1 MiB, 8 in flight / memcpy of the same buffers",
            bound: Bound::AtLeast(0.8),
            ratio: |f| Some(f.get("stream", PLUGIN, MIB)? / f.get("stream", MEMCPY, MIB)?),
        },
    ];
    Group { name: "bandwidth", measures, bars }
}

fn ranks() -> Group {
    let stream = |ranks| replay(ranks, "bandwidth", MIB, TOTAL, "bandwidth ");
    let measures = vec![
        (figure("aggregate", PLUGIN, MIB, "bandwidth", "GB/s"), stream(2)),
        (figure("aggregate", FOUR, MIB, "bandwidth", "GB/s"), stream(4)),
    ];
    let bars = vec![Bar {
        case: "aggregate",
        what: "four ranks together / two ranks, 1 MiB",
        bound: Bound::AtLeast(0.8),
        ratio: |f| Some(f.get("aggregate", FOUR, MIB)? / f.get("aggregate", PLUGIN, MIB)?),
    }];
    Group { name: "ranks", measures, bars }
}

/// The case between two hosts.
pub const BETWEEN_HOSTS: &str = "between hosts";

/// Two ranks on two hosts, nobody pinned: they and two routers share the processors, as iperf3 and the kernel do.
pub fn between_hosts() -> Vec<Measure> {
    // Two GiB.
    const FIRST: &str = "nccl-replay --ranks 2 --rank 0 --at @:7000 bandwidth 1048576 2147483648";
    const SECOND: &str = "nccl-replay --ranks 2 --rank 1 --at @:7000 bandwidth 1048576 2147483648";
    let measure = |figure, parse| Measure { figure, over: Over::Plain, server: FIRST, client: SECOND, parse };
    vec![
        hosts::stream_of_iperf(),
        measure(figure(BETWEEN_HOSTS, PLUGIN, MIB, "bandwidth", "GB/s"), |text, _| {
            number(text, "bandwidth ")
        }),
        measure(figure("processors", "ranks and routers", MIB, "between hosts", "s/GB"), |text, _| {
            // The routers' time is for the eighth more that warms up, too.
            let moved = 2.0 * f64::from(1 << 30) * 1.125 / 1e9;
            Some(number(text, "cpu ")? + number(text, ROUTERS)? / moved)
        }),
    ]
}

fn number(text: &str, line: &str) -> Option<f64> {
    text.lines().find_map(|l| l.strip_prefix(line)?.trim().parse().ok())
}

pub fn hosts_bars() -> Vec<Bar> {
    vec![Bar {
        case: BETWEEN_HOSTS,
        what: "between hosts, 1 MiB, 8 in flight / iperf3",
        bound: Bound::AtLeast(0.7),
        ratio: |f| Some(f.get(BETWEEN_HOSTS, PLUGIN, MIB)? / f.get("stream", "iperf3", MIB)?),
    }]
}
