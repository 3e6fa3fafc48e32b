//! What `bench host` measures, beside what, and the bars.

use super::figures::Lookup;
use super::side::{Cpus, How, Provider, Read};

const KIB: u64 = 1 << 10;
const MIB: u64 = 1 << 20;

/// One row of the results.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Figure {
    pub case: &'static str,
    pub side: &'static str,
    pub size: u64,
    pub metric: &'static str,
    pub unit: &'static str,
}

/// What is asked of a ratio.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Bound {
    AtMost(f64),
    AtLeast(f64),
    /// Only shown.
    None,
}

/// A ratio between figures of one round.
#[derive(Debug, Clone, Copy)]
pub struct Bar {
    pub case: &'static str,
    pub what: &'static str,
    pub bound: Bound,
    pub ratio: fn(&Lookup<'_>) -> Option<f64>,
}

/// Figures that are measured together and compared with each other.
pub struct Group {
    pub name: &'static str,
    pub measures: Vec<(Figure, How)>,
    pub bars: Vec<Bar>,
}

/// The hand-over that brackets every round.
pub const HAND_OVER: Figure =
    Figure { case: "hand_over", side: "cache line", size: 64, metric: "one way", unit: "us" };

const OURS: &str = "freeflow";
const OURS_WR: &str = "freeflow ibv_wr";
const EMPTY: &str = "empty provider";
const POSIX: &str = "ucx posix";
const CMA: &str = "ucx posix+cma";
const TCP: &str = "kernel tcp";

fn latency(case: &'static str, side: &'static str, size: u64, how: How) -> (Figure, How) {
    (Figure { case, side, size, metric: "latency", unit: "us" }, how)
}

fn bandwidth(case: &'static str, side: &'static str, size: u64, how: How) -> (Figure, How) {
    (Figure { case, side, size, metric: "bandwidth", unit: "GB/s" }, how)
}

fn rate(case: &'static str, side: &'static str, size: u64, how: How) -> (Figure, How) {
    (Figure { case, side, size, metric: "rate", unit: "M/s" }, how)
}

/// perftest with `count` messages of `size` bytes.
fn perftest(program: &'static str, provider: Provider, size: u64, count: u64, read: Read) -> How {
    How::Perftest { program, provider, size, count, read, more: &[] }
}

fn probe(program: &'static str, cpus: Cpus, arg: Option<&'static str>) -> How {
    How::Probe { program, cpus, arg }
}

fn ucx(tls: &'static str, test: &'static str, size: u64, count: u64, read: Read) -> How {
    How::Ucx { tls, test, size, count, read }
}

pub fn groups() -> Vec<Group> {
    vec![small(), rates(), bulk(), many(), shared(), blocking(), registration()]
}

fn small() -> Group {
    let lat = |program, provider| perftest(program, provider, 8, 100_000, Read::Typical);
    let am = |test| ucx("posix", test, 8, 100_000, Read::Typical);
    let measures = vec![
        latency("write_lat", OURS, 8, lat("ib_write_lat", Provider::Ours)),
        latency("write_lat", OURS_WR, 8, lat("ib_write_lat", Provider::OursWr)),
        latency("send_lat", OURS, 8, lat("ib_send_lat", Provider::Ours)),
        latency("send_lat", OURS_WR, 8, lat("ib_send_lat", Provider::OursWr)),
        latency("ucp_am_lat", POSIX, 8, am("ucp_am_lat")),
        latency("ucp_put_lat", POSIX, 8, am("ucp_put_lat")),
        // READ does not wait for the peer: one turn of perftest's loop, get_cycles, post and poll.
        latency("loop", EMPTY, 8, lat("ib_read_lat", Provider::Empty)),
        latency("tcp_lat", TCP, 8, How::Tcp { test: "tcp_lat", size: 8 }),
    ];
    let bars = vec![
        Bar {
            case: "write_lat",
            what: "ib_write_lat / (1.5 x hand-over + empty loop)",
            bound: Bound::AtMost(1.0),
            ratio: |f| Some(f.get("write_lat", OURS, 8)? / floor(f)?),
        },
        Bar {
            case: "write_lat",
            what: "ib_write_lat by ibv_wr_* / (1.5 x hand-over + empty loop)",
            bound: Bound::AtMost(1.0),
            ratio: |f| Some(f.get("write_lat", OURS_WR, 8)? / floor(f)?),
        },
        Bar {
            case: "write_lat",
            what: "ib_write_lat / UCX posix ucp_am_lat",
            bound: Bound::AtMost(1.0),
            ratio: |f| Some(f.get("write_lat", OURS, 8)? / f.get("ucp_am_lat", POSIX, 8)?),
        },
        Bar {
            case: "write_lat",
            what: "ib_write_lat by ibv_wr_* / UCX posix ucp_am_lat",
            bound: Bound::AtMost(1.0),
            ratio: |f| Some(f.get("write_lat", OURS_WR, 8)? / f.get("ucp_am_lat", POSIX, 8)?),
        },
        Bar {
            case: "write_lat",
            what: "ib_write_lat / UCX posix ucp_put_lat",
            bound: Bound::None,
            ratio: |f| Some(f.get("write_lat", OURS, 8)? / f.get("ucp_put_lat", POSIX, 8)?),
        },
        Bar {
            case: "send_lat",
            what: "ib_send_lat / UCX posix ucp_am_lat",
            bound: Bound::AtMost(1.0),
            ratio: |f| Some(f.get("send_lat", OURS, 8)? / f.get("ucp_am_lat", POSIX, 8)?),
        },
        Bar {
            case: "send_lat",
            what: "ib_send_lat by ibv_wr_* / UCX posix ucp_am_lat",
            bound: Bound::AtMost(1.0),
            ratio: |f| Some(f.get("send_lat", OURS_WR, 8)? / f.get("ucp_am_lat", POSIX, 8)?),
        },
    ];
    Group { name: "small", measures, bars }
}

/// What no WRITE can be much below: the line has to travel, and perftest's loop has to turn.
fn floor(f: &Lookup<'_>) -> Option<f64> {
    let hand_over = f.get(HAND_OVER.case, HAND_OVER.side, HAND_OVER.size)?;
    Some(1.5 * hand_over + f.get("loop", EMPTY, 8)?)
}

fn rates() -> Group {
    let writes = |provider| perftest("ib_write_bw", provider, 8, 2_000_000, Read::Rate);
    let measures = vec![
        rate("write_rate", OURS, 8, writes(Provider::Ours)),
        rate("write_rate", OURS_WR, 8, writes(Provider::OursWr)),
        rate("write_rate", EMPTY, 8, writes(Provider::Empty)),
        rate("ucp_am_bw", POSIX, 8, ucx("posix", "ucp_am_bw", 8, 2_000_000, Read::Rate)),
    ];
    let bars = vec![
        Bar {
            case: "write_rate",
            what: "8 B ib_write_bw / UCX posix ucp_am_bw, messages",
            bound: Bound::AtLeast(2.0),
            ratio: |f| Some(f.get("write_rate", OURS, 8)? / f.get("ucp_am_bw", POSIX, 8)?),
        },
        Bar {
            case: "write_rate",
            what: "8 B ib_write_bw by ibv_wr_* / UCX posix ucp_am_bw, messages",
            bound: Bound::AtLeast(2.0),
            ratio: |f| Some(f.get("write_rate", OURS_WR, 8)? / f.get("ucp_am_bw", POSIX, 8)?),
        },
    ];
    Group { name: "rate", measures, bars }
}

fn bulk() -> Group {
    let mut measures = Vec::new();
    for (size, arg) in [(64 * KIB, "65536"), (MIB, "1048576")] {
        let bw =
            |program| perftest(program, Provider::Ours, size, (4 << 30) / size.max(128 * KIB), Read::Average);
        measures.extend([
            bandwidth("memcpy", "libc", size, probe("memcpy", Cpus::One, Some(arg))),
            bandwidth("write_bw", OURS, size, bw("ib_write_bw")),
            bandwidth("send_bw", OURS, size, bw("ib_send_bw")),
            bandwidth("read_bw", OURS, size, bw("ib_read_bw")),
            bandwidth("tag_bw", CMA, size, ucx("posix,cma", "tag_bw", size, 2_000, Read::Average)),
            bandwidth("tcp_bw", TCP, size, How::Tcp { test: "tcp_bw", size }),
        ]);
    }
    let bars = vec![
        Bar {
            case: "write_bw",
            what: "ib_write_bw / memcpy, 64 KiB",
            bound: Bound::AtLeast(0.8),
            ratio: |f| Some(f.get("write_bw", OURS, 64 * KIB)? / f.get("memcpy", "libc", 64 * KIB)?),
        },
        Bar {
            case: "write_bw",
            what: "ib_write_bw / memcpy, 1 MiB",
            bound: Bound::AtLeast(0.9),
            ratio: |f| Some(f.get("write_bw", OURS, MIB)? / f.get("memcpy", "libc", MIB)?),
        },
        Bar {
            case: "write_bw",
            what: "ib_write_bw / UCX posix+cma tag_bw, 1 MiB",
            bound: Bound::AtLeast(3.0),
            ratio: |f| Some(f.get("write_bw", OURS, MIB)? / f.get("tag_bw", CMA, MIB)?),
        },
        Bar {
            case: "send_bw",
            what: "ib_send_bw / ib_write_bw, 64 KiB",
            bound: Bound::AtLeast(0.8),
            ratio: |f| Some(f.get("send_bw", OURS, 64 * KIB)? / f.get("write_bw", OURS, 64 * KIB)?),
        },
        Bar {
            case: "send_bw",
            what: "ib_send_bw / ib_write_bw, 1 MiB",
            bound: Bound::AtLeast(0.8),
            ratio: |f| Some(f.get("send_bw", OURS, MIB)? / f.get("write_bw", OURS, MIB)?),
        },
        Bar {
            case: "read_bw",
            what: "ib_read_bw / ib_write_bw, 64 KiB",
            bound: Bound::AtLeast(0.8),
            ratio: |f| Some(f.get("read_bw", OURS, 64 * KIB)? / f.get("write_bw", OURS, 64 * KIB)?),
        },
        Bar {
            case: "read_bw",
            what: "ib_read_bw / ib_write_bw, 1 MiB",
            bound: Bound::AtLeast(0.8),
            ratio: |f| Some(f.get("read_bw", OURS, MIB)? / f.get("write_bw", OURS, MIB)?),
        },
    ];
    Group { name: "bulk", measures, bars }
}

fn many() -> Group {
    let qps = |count| How::Verbs { program: "qps", cpus: Cpus::Both, arg: count };
    let measures = vec![
        bandwidth("many_qps", "1 qp", 4 * KIB, qps("1")),
        bandwidth("many_qps", "256 qps", 4 * KIB, qps("256")),
    ];
    let bars = vec![Bar {
        case: "many_qps",
        what: "4 KiB writes over 256 QPs / over one, same buffers",
        bound: Bound::AtLeast(0.9),
        ratio: |f| Some(f.get("many_qps", "256 qps", 4 * KIB)? / f.get("many_qps", "1 qp", 4 * KIB)?),
    }];
    Group { name: "many", measures, bars }
}

fn shared() -> Group {
    let sends = |arg| How::Verbs { program: "shared", cpus: Cpus::Both, arg };
    let figure = |side| Figure { case: "shared", side, size: 8, metric: "per message", unit: "us" };
    let measures = vec![
        (figure("own queues"), sends("private")),
        (figure("one cq"), sends("cq")),
        (figure("one srq"), sends("srq")),
    ];
    let bars = vec![
        Bar {
            case: "shared",
            what: "8 B sends over 64 QPs: one CQ / a CQ for each",
            bound: Bound::AtMost(1.3),
            ratio: |f| Some(f.get("shared", "one cq", 8)? / f.get("shared", "own queues", 8)?),
        },
        Bar {
            case: "shared",
            what: "8 B sends over 64 QPs: one SRQ / receives for each",
            bound: Bound::AtMost(1.3),
            ratio: |f| Some(f.get("shared", "one srq", 8)? / f.get("shared", "own queues", 8)?),
        },
    ];
    Group { name: "shared", measures, bars }
}

fn blocking() -> Group {
    let events = How::Perftest {
        program: "ib_send_lat",
        provider: Provider::Ours,
        size: 8,
        count: 5_000,
        read: Read::Typical,
        more: &["-e"],
    };
    let measures = vec![
        (
            Figure { case: "eventfd", side: "kernel", size: 8, metric: "round trip", unit: "us" },
            probe("eventfd", Cpus::Both, None),
        ),
        latency("send_lat -e", OURS, 8, events),
    ];
    let bars = vec![Bar {
        case: "send_lat -e",
        what: "2 x ib_send_lat -e / eventfd round trip",
        bound: Bound::AtMost(1.3),
        ratio: |f| Some(2.0 * f.get("send_lat -e", OURS, 8)? / f.get("eventfd", "kernel", 8)?),
    }];
    Group { name: "blocking", measures, bars }
}

fn registration() -> Group {
    let reg = |arg| How::Verbs { program: "reg", cpus: Cpus::One, arg };
    let measures = vec![
        bandwidth("reg_mr", "new memory", 64 * MIB, reg("new")),
        (
            Figure { case: "reg_mr", side: "known memory", size: 64 * MIB, metric: "call", unit: "us" },
            reg("known"),
        ),
    ];
    Group { name: "registration", measures, bars: Vec::new() }
}
