//! ucx_perftest at UCT and UCP level, between two containers of a lab.

use super::{Outcome, Place, SETTINGS, lab, verdict};

/// A ucx_perftest of UCT: test, data layout, message size.
const UCT: &[(&str, &str, u64)] = &[
    ("am_lat", "short", 8),
    ("am_lat", "short", 104),
    ("am_lat", "bcopy", 8),
    ("am_lat", "bcopy", 8192),
    ("am_lat", "zcopy", 4096),
    ("am_bw", "short", 8),
    ("am_bw", "bcopy", 8192),
    ("am_bw", "zcopy", 8192),
    ("put_lat", "short", 8),
    ("put_lat", "bcopy", 4096),
    ("put_lat", "zcopy", 65536),
    ("put_bw", "short", 1),
    ("put_bw", "bcopy", 8192),
    ("put_bw", "zcopy", 16 << 20),
    ("get", "bcopy", 8192),
    ("get", "zcopy", 16 << 20),
    ("add_mr", "short", 8),
    ("add_mr", "short", 4),
    ("add_lat", "short", 8),
    ("fadd", "short", 8),
    ("fadd", "short", 4),
    ("swap", "short", 8),
    ("swap", "short", 4),
    ("cswap", "short", 8),
    ("cswap", "short", 4),
];

/// The same of UCP: test, message size, more arguments.
const UCP: &[(&str, u64, &str)] = &[
    ("tag_lat", 1, ""),
    ("tag_lat", 65536, ""),
    ("tag_lat", 8, "-e"),
    ("tag_lat", 1 << 20, "-e"),
    ("tag_lat", 8, "-E sleep"),
    ("tag_bw", 8, ""),
    ("tag_bw", 16 << 20, ""),
    ("tag_bw", 1 << 20, "-E sleep"),
    ("tag_sync_lat", 8, ""),
    ("tag_sync_bw", 1 << 20, ""),
    ("ucp_put_lat", 8, ""),
    ("ucp_put_bw", 16 << 20, ""),
    ("ucp_get", 8, ""),
    ("ucp_get", 16 << 20, ""),
    ("ucp_add", 8, ""),
    ("ucp_fadd", 8, ""),
    ("ucp_fadd", 4, ""),
    ("ucp_swap", 8, ""),
    ("ucp_cswap", 8, ""),
    ("stream_bw", 65536, ""),
    ("stream_lat", 8, ""),
    ("ucp_am_lat", 8, ""),
    ("ucp_am_lat", 65536, "-e"),
    ("ucp_am_bw", 16 << 20, ""),
];

fn iterations(size: u64) -> u64 {
    if size > 1 << 20 { 20 } else { 1000 }
}

/// All of UCT's.
pub fn uct(place: Place) -> Outcome {
    let command = |(test, layout, size): &(&str, &str, u64)| {
        format!("-d ff0:1 -x ff -t {test} -D {layout} -s {size} -n {} -w 10", iterations(*size))
    };
    run(place, &UCT.iter().map(command).collect::<Vec<_>>())
}
/// All of UCP's.
pub fn ucp(place: Place) -> Outcome {
    let command = |(test, size, more): &(&str, u64, &str)| {
        format!("-t {test} -s {size} -n {} -w 10 {more}", iterations(*size))
    };
    run(place, &UCP.iter().map(command).collect::<Vec<_>>())
}

/// Tests whose messages may have any size, and the sizes.
const SIZED: &[&str] = &[
    "tag_lat",
    "tag_bw",
    "tag_sync_lat",
    "tag_sync_bw",
    "ucp_put_lat",
    "ucp_put_bw",
    "ucp_get",
    "stream_bw",
    "stream_lat",
    "ucp_am_lat",
    "ucp_am_bw",
];
const SIZES: &[u64] = &[1, 105, 1 << 10, 8257, 16 << 10, 33_000, 64 << 10, 100_000, 1 << 20, 16 << 20];

/// UCP's, from 1 B to 16 MiB: on both sides of each limit at which UCX does something else.
pub fn every_size(place: Place) -> Outcome {
    let command = |test: &str, size: u64| format!("-t {test} -s {size} -n {} -w 10", iterations(size) / 10);
    let all = SIZED.iter().flat_map(|test| SIZES.iter().map(|size| command(test, *size)));
    run(place, &all.collect::<Vec<_>>())
}

/// All of them, one after the other, in one lab. A server that is not there yet refuses the
/// connection; the client tries again.
fn run(place: Place, commands: &[String]) -> Outcome {
    let [server, client] = place.containers();
    let (mut servers, mut clients) = (String::from(SETTINGS), String::from(SETTINGS));
    for (i, command) in commands.iter().enumerate() {
        let port = 13_400 + i;
        servers += &format!(
            "timeout 60 ucx_perftest -p {port} {command} >/dev/null || {{ echo failed: {command}; exit 1; }}\n"
        );
        clients += &format!(
            "n=0; until timeout 60 ucx_perftest -p {port} @{server} {command} -f >/tmp/out 2>&1; do \
             n=$((n+1)); [ $n -lt 100 ] && grep -q refused /tmp/out || {{ cat /tmp/out; echo failed: {command}; exit 1; }}; \
             done; tail -1 /tmp/out; echo passed: {command}\n"
        );
    }
    let done = lab(place, &[(server, &servers), (client, &clients)])?;
    let mark = format!("{client}| passed: ");
    let passed = done.stdout.lines().filter(|line| line.starts_with(&mark)).count();
    verdict(&done, passed == commands.len(), "not every test passed")
}
