//! Two spinning programs and a compile on the same two processors: slower, but no collapse.

use std::fmt::Write as _;
use std::process::Command;

use super::cases::{Bar, Bound, Figure};
use super::figures::{Results, Round};
use super::side::{How, Provider, Read, Stage, background};
use crate::failure::{Context as _, Result};
use crate::layout;

const IDLE_RATE: Figure =
    Figure { case: "busy", side: "freeflow, idle machine", size: 8, metric: "mean latency", unit: "us" };
const BUSY_RATE: Figure = Figure { side: "freeflow, beside a compile", ..IDLE_RATE };
const IDLE_BW: Figure = Figure { metric: "bandwidth", unit: "GB/s", size: 64 << 10, ..IDLE_RATE };
const BUSY_BW: Figure = Figure { metric: "bandwidth", unit: "GB/s", size: 64 << 10, ..BUSY_RATE };
const FIGURES: [Figure; 4] = [IDLE_RATE, BUSY_RATE, IDLE_BW, BUSY_BW];

/// Several time slices of the scheduler long.
const LATENCY: How = How::Perftest {
    program: "ib_send_lat",
    provider: Provider::Ours,
    size: 8,
    count: 1_000_000,
    read: Read::Mean,
    more: &[],
};
const BANDWIDTH: How = How::Perftest {
    program: "ib_write_bw",
    provider: Provider::Ours,
    size: 64 << 10,
    count: 200_000,
    read: Read::Average,
    more: &[],
};

pub fn run(stage: &Stage, only: &str, rounds: usize, results: &mut Results) -> Result<()> {
    if !"busy".contains(only) {
        return Ok(());
    }
    let source = source()?;
    let mut kept = Vec::new();
    for turn in 1..=rounds {
        eprintln!("bench: busy {turn} of {rounds}");
        let (latency, bandwidth) = (stage.figure(LATENCY)?, stage.figure(BANDWIDTH)?);
        let compile = format!("while gcc -O2 -c -o /dev/null {}; do :; done", source.display());
        let compiling = background(Command::new("taskset").args(["-c", "0,1", "sh", "-c", &compile]))?;
        let (slow_latency, slow_bandwidth) = (stage.figure(LATENCY)?, stage.figure(BANDWIDTH)?);
        drop(compiling);
        kept.push(Round::from([
            (IDLE_RATE, latency),
            (BUSY_RATE, slow_latency),
            (IDLE_BW, bandwidth),
            (BUSY_BW, slow_bandwidth),
        ]));
    }
    results.add(&FIGURES, &bars(), &kept);
    Ok(())
}

fn bars() -> [Bar; 2] {
    [
        Bar {
            case: "busy",
            what: "mean ib_send_lat beside a compile / on an idle machine",
            bound: Bound::None,
            ratio: |f| {
                let mean = |side| f.get("busy", side, 8);
                Some(mean("freeflow, beside a compile")? / mean("freeflow, idle machine")?)
            },
        },
        Bar {
            case: "busy",
            what: "64 KiB ib_write_bw beside a compile / on an idle machine",
            bound: Bound::None,
            ratio: |f| {
                let bw = |side| f.get("busy", side, 64 << 10);
                Some(bw("freeflow, beside a compile")? / bw("freeflow, idle machine")?)
            },
        },
    ]
}

/// Something for gcc to do for a second or so.
fn source() -> Result<std::path::PathBuf> {
    let mut text = String::new();
    for i in 0..2000 {
        let _ = writeln!(
            text,
            "int f{i}(int *a, int n) {{ int s = {i}; while (n--) s += a[n] * a[s & 7]; return s; }}"
        );
    }
    let path = layout::target().join("bench/busy.c");
    std::fs::write(&path, text).context(format_args!("cannot write {}", path.display()))?;
    Ok(path)
}
