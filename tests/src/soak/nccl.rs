//! The NCCL plugin for hours: mixed operations, aborts and reloads under AddressSanitizer, messages at the limit, and all of it between hosts.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use super::Result;
use crate::nccl::launch::{Replay, judge};
use crate::path::{Host, Tree};

#[derive(Debug, Clone)]
pub struct Options {
    /// Mixed operations of each rank under AddressSanitizer; the rest is measured by it.
    pub operations: u64,
    pub seed: u64,
    /// nccl-replay and the plugin, built with AddressSanitizer.
    pub sanitized: PathBuf,
    /// Also what needs gigabytes and two hosts, which `cargo xtask test` has elsewhere or spares.
    pub whole: bool,
}

/// A watchdog; the longest takes minutes.
const LIMIT: Duration = Duration::from_secs(3600);
const MEBIBYTE: u64 = 1 << 20;

pub fn run(tree: &Tree, target: &Path, options: &Options) -> Result<()> {
    println!("soak nccl: {} operations, --seed {}", options.operations, options.seed);
    sanitized(tree, options)?;
    if options.whole { whole(tree, target, options) } else { Ok(()) }
}

/// Reports of the sanitizer end a rank, and so fail the run.
fn sanitized(tree: &Tree, options: &Options) -> Result<()> {
    let host = Host::start(tree).map_err(|e| e.to_string())?;
    let program = options.sanitized.join("nccl-replay");
    let plugin = options.sanitized.join("libff_nccl_net.so").display().to_string();
    let replay = Replay { tree, program: &program, limit: LIMIT };
    let operations = options.operations;
    for (ranks, scenario) in [
        ("3", format!("mixed --operations {operations}")),
        ("2", format!("aborts --rounds {}", (operations / 10_000).max(3))),
        ("2", format!("reloads --times {}", (operations / 30_000).max(2))),
    ] {
        let seed = options.seed.to_string();
        let mut args = vec!["--plugin", &plugin, "--ranks", ranks, "--seed", &seed, "--spawn"];
        args.extend(scenario.split(' '));
        step(&format!("under AddressSanitizer: {scenario}"), || replay.on(&host, &args))?;
    }
    Ok(())
}

fn whole(tree: &Tree, target: &Path, options: &Options) -> Result<()> {
    let program = target.join("release/nccl-replay");
    let replay = Replay { tree, program: &program, limit: LIMIT };
    let huge = ["--ranks", "2", "--spawn", "ring", "--max", &(1024 * MEBIBYTE).to_string()];
    step("messages of 1 GiB", || replay.alone(&huge))?;
    let seed = options.seed;
    for scenario in [
        format!("ring --max {}", 256 * MEBIBYTE),
        format!("mixed --operations {}", options.operations / 4),
        format!("aborts --rounds {}", (options.operations / 20_000).max(3)),
    ] {
        let name = format!("between hosts: {scenario}");
        step(&name, || replay.in_containers(2, &format!("--seed {seed} {scenario}")))?;
    }
    Ok(())
}

fn step(name: &str, run: impl FnOnce() -> std::io::Result<crate::launch::Ended>) -> Result<()> {
    let start = Instant::now();
    let ended = run().map_err(|e| format!("{name}: {e}"))?;
    judge(&ended, &["rank 0 passed"]).map_err(|why| format!("{name}: {why}"))?;
    for line in ended.lines.iter().filter(|line| line.text.contains("operations in")).rev().take(1) {
        println!("  {}", line.text);
    }
    println!("  {name}: passed in {:.0} s", start.elapsed().as_secs_f64());
    Ok(())
}
