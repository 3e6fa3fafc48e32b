//! What `bench ucx` measures: our transport beside UCX's own of one host, MPI over it, and between two hosts beside UCX's TCP.

use super::cases::{Bar, Bound, Figure, Group};
use super::figures::Lookup;
use super::hosts::{Measure, Over, ucx_average, ucx_typical};
use super::side::{How, MpiSide, OUR_TLS, Read};

const KIB: u64 = 1 << 10;
const MIB: u64 = 1 << 20;

const OURS: &str = "freeflow";
const CMA: &str = "ucx posix+cma";
const NATIVE: &str = "openmpi vader";
/// UCX's own transports, as ucx_perftest is told them.
const PEERS: [(&str, &str); 4] =
    [("ucx posix", "posix"), (CMA, "posix,cma"), ("ucx sysv+cma", "sysv,cma"), ("ucx tcp", "tcp")];
/// Sizes of a collective's message.
const SIZES: [u64; 8] = [8, 64, 512, 4 * KIB, 16 * KIB, 64 * KIB, MIB, 4 * MIB];

pub fn groups() -> Vec<Group> {
    vec![latencies(), bandwidths(), collective("allreduce"), collective("alltoall")]
}

fn sides() -> impl Iterator<Item = (&'static str, &'static str)> {
    std::iter::once((OURS, OUR_TLS)).chain(PEERS)
}

/// The best of the others.
fn best(f: &Lookup<'_>, case: &str, size: u64, better: fn(f64, f64) -> f64) -> Option<f64> {
    PEERS
        .iter()
        .map(|(side, _)| f.get(case, side, size))
        .collect::<Option<Vec<f64>>>()?
        .into_iter()
        .reduce(better)
}

fn latencies() -> Group {
    let mut measures = Vec::new();
    for case in ["tag_lat", "ucp_am_lat", "ucp_put_lat"] {
        for (side, tls) in sides() {
            let figure = Figure { case, side, size: 8, metric: "latency", unit: "us" };
            // One of loopback TCP is as long as a hundred of the others.
            let count = if tls == "tcp" { 5_000 } else { 100_000 };
            measures.push((figure, How::Ucx { tls, test: case, size: 8, count, read: Read::Typical }));
        }
    }
    let bar = |case, what, ratio| Bar { case, what, bound: Bound::AtMost(1.05), ratio };
    let bars = vec![
        bar("tag_lat", "tag_lat / the best peer's", |f| {
            Some(f.get("tag_lat", OURS, 8)? / best(f, "tag_lat", 8, f64::min)?)
        }),
        bar("ucp_am_lat", "ucp_am_lat / the best peer's", |f| {
            Some(f.get("ucp_am_lat", OURS, 8)? / best(f, "ucp_am_lat", 8, f64::min)?)
        }),
        bar("ucp_put_lat", "ucp_put_lat / the best peer's", |f| {
            Some(f.get("ucp_put_lat", OURS, 8)? / best(f, "ucp_put_lat", 8, f64::min)?)
        }),
    ];
    Group { name: "latency", measures, bars }
}

fn bandwidths() -> Group {
    let mut measures = Vec::new();
    for size in [64 * KIB, MIB] {
        for (side, tls) in sides() {
            let figure = Figure { case: "tag_bw", side, size, metric: "bandwidth", unit: "GB/s" };
            let count = if tls == "tcp" || tls == "posix" { 200 } else { 2_000 } * MIB.min(256 * KIB)
                / size.max(256 * KIB)
                * 2;
            measures.push((
                figure,
                How::Ucx { tls, test: "tag_bw", size, count: count.max(200), read: Read::Average },
            ));
        }
    }
    let bar = |what, ratio| Bar { case: "tag_bw", what, bound: Bound::AtLeast(1.5), ratio };
    let bars = vec![
        bar("tag_bw 64 KiB / the best peer's", |f| {
            Some(f.get("tag_bw", OURS, 64 * KIB)? / best(f, "tag_bw", 64 * KIB, f64::max)?)
        }),
        bar("tag_bw 1 MiB / the best peer's", |f| {
            Some(f.get("tag_bw", OURS, MIB)? / best(f, "tag_bw", MIB, f64::max)?)
        }),
    ];
    Group { name: "bandwidth", measures, bars }
}

/// A bar for each size: functions cannot carry the size, so each has one of its own.
macro_rules! bars {
    ($case:literal: $($size:expr => $name:literal, $native:expr;)*) => { vec![ $(
        Bar {
            case: $case,
            what: concat!($case, " ", $name, " / UCX posix+cma"),
            bound: Bound::AtMost(1.0),
            ratio: |f| Some(f.get($case, OURS, $size)? / f.get($case, CMA, $size)?),
        },
        Bar {
            case: $case,
            what: concat!($case, " ", $name, " / OpenMPI's own shared memory"),
            bound: $native,
            ratio: |f| Some(f.get($case, OURS, $size)? / f.get($case, NATIVE, $size)?),
        },
    )* ] };
    ($case:literal) => { bars! { $case:
        8 => "8 B", Bound::None;
        64 => "64 B", Bound::None;
        512 => "512 B", Bound::None;
        4 * KIB => "4 KiB", Bound::None;
        16 * KIB => "16 KiB", Bound::AtMost(1.0);
        64 * KIB => "64 KiB", Bound::AtMost(1.0);
        MIB => "1 MiB", Bound::AtMost(1.0);
        4 * MIB => "4 MiB", Bound::AtMost(1.0);
    } };
}

fn collective(case: &'static str) -> Group {
    let sides = [(OURS, MpiSide::Ucx(OUR_TLS)), (CMA, MpiSide::Ucx("posix,cma")), (NATIVE, MpiSide::Native)];
    let mut measures = Vec::new();
    for size in SIZES {
        for (side, carrier) in sides {
            let figure = Figure { case, side, size, metric: "time", unit: "us" };
            measures.push((figure, How::Mpi { side: carrier, op: case, size }));
        }
    }
    let bars = if case == "allreduce" { bars!("allreduce") } else { bars!("alltoall") };
    Group { name: case, measures, bars }
}

const TCP: &str = "ucx tcp";
/// What the cases between two hosts are called by.
pub const BETWEEN_HOSTS: &str = "between hosts";
const LAT: &str = "between hosts: tag_lat";
const BW: &str = "between hosts: tag_bw";

/// Beside UCX's own TCP over the same wire.
pub fn between_hosts() -> Vec<Measure> {
    const SERVER: &str = "env UCX_TLS=self,ff ucx_perftest -f";
    const TCP_SERVER: &str = "env UCX_TLS=self,tcp ucx_perftest -f";
    let latency = |side| Figure { case: LAT, side, size: 8, metric: "latency", unit: "us" };
    let bandwidth = |side| Figure { case: BW, side, size: MIB, metric: "bandwidth", unit: "GB/s" };
    let measure = |figure, over, server, client, parse| Measure { figure, over, server, client, parse };
    vec![
        measure(
            latency(OURS),
            Over::Plain,
            SERVER,
            "env UCX_TLS=self,ff ucx_perftest -f -t tag_lat -s 8 -n 20000",
            ucx_typical,
        ),
        measure(
            latency(TCP),
            Over::Kernel,
            TCP_SERVER,
            "env UCX_TLS=self,tcp ucx_perftest -f -t tag_lat -s 8 -n 20000",
            ucx_typical,
        ),
        measure(
            bandwidth(OURS),
            Over::Plain,
            SERVER,
            "env UCX_TLS=self,ff ucx_perftest -f -t tag_bw -s 1048576 -n 1000",
            ucx_average,
        ),
        measure(
            bandwidth(TCP),
            Over::Kernel,
            TCP_SERVER,
            "env UCX_TLS=self,tcp ucx_perftest -f -t tag_bw -s 1048576 -n 1000",
            ucx_average,
        ),
    ]
}

pub fn hosts_bars() -> Vec<Bar> {
    vec![
        Bar {
            case: LAT,
            what: "between hosts: tag_lat / UCX tcp's",
            bound: Bound::AtMost(1.5),
            ratio: |f| Some(f.get(LAT, OURS, 8)? / f.get(LAT, TCP, 8)?),
        },
        Bar {
            case: BW,
            what: "between hosts: tag_bw 1 MiB / UCX tcp's",
            bound: Bound::AtLeast(1.0),
            ratio: |f| Some(f.get(BW, OURS, MIB)? / f.get(BW, TCP, MIB)?),
        },
    ]
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bench::figures::Round;

    #[test]
    fn every_bar_finds_its_figures() {
        let figures = between_hosts().iter().map(|measure| measure.figure).collect();
        let here = groups().into_iter().map(|g| (g.measures.iter().map(|(f, _)| *f).collect(), g.bars));
        let all: Vec<(Vec<Figure>, Vec<Bar>)> = here.chain([(figures, hosts_bars())]).collect();
        for (figures, bars) in all {
            let round: Round = figures.into_iter().map(|figure| (figure, 2.0)).collect();
            for bar in &bars {
                assert_eq!((bar.ratio)(&Lookup(&round)), Some(1.0), "{}", bar.what);
            }
        }
    }
}
