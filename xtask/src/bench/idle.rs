//! Processor time of a router and of clients that have nothing to do: none at all.

use std::fs;
use std::process::Command;
use std::time::Duration;

use super::cases::{Bar, Bound, Figure};
use super::figures::{Results, Round};
use super::side::{Provider, Stage, background};
use crate::failure::{Failure, Result};
use crate::process::Running;

const ROUTER: Figure =
    Figure { case: "idle", side: "router", size: 0, metric: "utime+stime over 10 s", unit: "ticks" };
const CLIENTS: Figure = Figure { side: "clients", ..ROUTER };

/// What is looked at, and time for programs to get to where they sleep.
const WINDOW: Duration = Duration::from_secs(10);
const SETTLE: Duration = Duration::from_secs(2);

pub fn run(stage: &Stage, only: &str, results: &mut Results) -> Result<()> {
    if !"idle".contains(only) {
        return Ok(());
    }
    eprintln!("bench: idle");
    let mut clients = start(stage)?;
    std::thread::sleep(SETTLE);
    let router = stage.router().ok_or_else(|| Failure::new("no router"))?;
    let before = (ticks(router)?, total(&clients)?);
    std::thread::sleep(WINDOW);
    let after = (ticks(router)?, total(&clients)?);
    if clients.iter_mut().any(Running::has_ended) {
        return Err(Failure::new("an idle client ended by itself"));
    }
    let round = Round::from([(ROUTER, (after.0 - before.0) as f64), (CLIENTS, (after.1 - before.1) as f64)]);
    let bar = Bar {
        case: "idle",
        what: "processor ticks of an idle router and idle clients in 10 s",
        bound: Bound::AtMost(0.0),
        ratio: |f| Some(f.get("idle", "router", 0)? + f.get("idle", "clients", 0)?),
    };
    results.add(&[ROUTER, CLIENTS], &[bar], &[round]);
    Ok(())
}

/// Two processes with 256 connected QPs between them, and one that waits for asynchronous events.
fn start(stage: &Stage) -> Result<Vec<Running>> {
    let mut qps: Command = stage.with_device(Provider::Ours);
    qps.arg(stage.probe_path("qps")).args(["0", "1", "256", "idle"]);
    let mut watch = stage.with_device(Provider::Ours);
    watch.arg("ibv_asyncwatch");
    Ok(vec![background(&mut qps)?, background(&mut watch)?])
}

fn total(clients: &[Running]) -> Result<u64> {
    clients.iter().map(|client| ticks(client.group())).sum()
}

/// utime + stime of all processes of a group.
fn ticks(group: i32) -> Result<u64> {
    let stats = fs::read_dir("/proc").into_iter().flatten().flatten();
    let used: Vec<u64> = stats
        .filter_map(|entry| fs::read_to_string(entry.path().join("stat")).ok())
        .filter_map(|stat| of_group(&stat, group))
        .collect();
    if used.is_empty() { Err(Failure::new("an idle process is gone")) } else { Ok(used.iter().sum()) }
}

fn of_group(stat: &str, group: i32) -> Option<u64> {
    // Behind the name, which may hold anything: state ppid pgrp ... utime is field 14, stime 15 of proc(5).
    let fields: Vec<&str> = stat.rsplit_once(')')?.1.split_whitespace().collect();
    if fields.get(2)?.parse() != Ok(group) {
        return None;
    }
    Some(fields.get(11)?.parse::<u64>().ok()? + fields.get(12)?.parse::<u64>().ok()?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ticks_of_a_group() {
        let stat = "7 (a ) b) S 1 42 42 0 -1 4194560 1 0 0 0 30 12 0 0 20 0 1 0 5 0 0";
        assert_eq!(of_group(stat, 42), Some(42));
        assert_eq!(of_group(stat, 7), None);
    }
}
