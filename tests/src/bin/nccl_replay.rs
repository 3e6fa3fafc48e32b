//! `nccl-replay`: does with a network plugin what NCCL does, as one rank or as all ranks on this host.

use std::path::PathBuf;
use std::process::{Command, ExitCode, Stdio};

use clap::{Parser, Subcommand};
use freeflow_nccl_abi::TRAFFIC_CLASS_UNDEF;
use freeflow_tests::nccl::oob::Oob;
use freeflow_tests::nccl::plugin::{Plugin, VERSIONS, take_log};
use freeflow_tests::nccl::rank::Rank;
use freeflow_tests::nccl::{Outcome, bench, contract, failing, mixed, traffic};

/// Do with a NCCL network plugin what NCCL does, without NCCL and GPUs.
#[derive(Debug, Clone, Parser)]
#[command(
    name = "nccl-replay",
    after_help = "\
Examples:
  nccl-replay --plugin /usr/lib/libnccl-net-x.so contract
  nccl-replay --plugin libnccl-net-freeflow.so --ranks 4 --spawn ring
  nccl-replay --plugin P --ranks 2 --rank 0 --at 0.0.0.0:7000 ring   (and on the other host: --rank 1 --at HOST:7000)"
)]
struct Args {
    /// File or name of the plugin, as dlopen takes it
    #[arg(long, default_value = "libnccl-net-freeflow.so")]
    plugin: PathBuf,
    /// Version of the interface; contract takes all, the others the newest, if none is given
    #[arg(long)]
    api: Option<u32>,
    #[arg(long, default_value_t = 1)]
    ranks: usize,
    #[arg(long, default_value_t = 0)]
    rank: usize,
    /// Where rank 0 listens for the others
    #[arg(long, default_value = "127.0.0.1:0")]
    at: String,
    /// Start the other ranks, too, as processes of this host
    #[arg(long)]
    spawn: bool,
    /// The same, as threads of this process, as NCCL has with several GPUs in one
    #[arg(long, conflicts_with = "spawn")]
    threads: bool,
    /// What communicators are configured for
    #[arg(long, default_value_t = TRAFFIC_CLASS_UNDEF)]
    traffic_class: i32,
    /// Keep each rank on a processor of its own
    #[arg(long)]
    pin: bool,
    /// What a failing run printed
    #[arg(long, overrides_with = "seed")]
    seed: Option<u64>,
    /// The plugin's log must have a line with each of these (may be given several times)
    #[arg(long)]
    logged: Vec<String>,
    #[command(subcommand)]
    scenario: Scenario,
}

#[derive(Debug, Clone, Subcommand)]
enum Scenario {
    /// Every point of the contract, on every version
    Contract { filter: Option<String> },
    /// That isend, irecv and test allocate nothing; with tests/nccl/allocations.c preloaded
    Allocations,
    /// A ring of all sizes up to --max, then groups up to the limits
    Ring {
        #[arg(long, default_value_t = 16 << 20)]
        max: usize,
    },
    /// Everybody to everybody, itself included
    AllToAll {
        #[arg(long, default_value_t = 100_000)]
        max: usize,
    },
    /// A ring all-reduce with its sum checked
    AllReduce {
        #[arg(long, default_value_t = 1_000_000)]
        words: usize,
    },
    /// Ranks that abort at random instants
    Aborts {
        #[arg(long, default_value_t = 30)]
        rounds: u64,
    },
    /// Rank 1 dies under load
    Killed,
    /// The router dies (somebody else kills it)
    Orphaned,
    /// Unload and load again
    Reloads {
        #[arg(long, default_value_t = 20)]
        times: u64,
    },
    /// Mixed operations, so many for each rank
    Mixed {
        #[arg(long, default_value_t = 1_000_000)]
        operations: u64,
    },
    /// Figure: GB/s with eight in flight
    Bandwidth { size: usize, total: usize },
    /// Figure: GB/s of memcpy, same buffers
    Memcpy { size: usize, total: usize },
    /// Figure: half a round trip, us
    Latency { size: usize, count: usize },
}

fn main() -> ExitCode {
    let args = Args::parse();
    let seed = args.seed.unwrap_or_else(|| u64::from(std::process::id()));
    let all = if args.spawn { spawned(args.clone(), seed) } else { one_process(&args, seed) };
    match all {
        Ok(()) => {
            println!("rank {} passed", args.rank);
            ExitCode::SUCCESS
        }
        Err(why) => {
            eprintln!("rank {} failed (--seed {seed}): {why}", args.rank);
            ExitCode::FAILURE
        }
    }
}

/// A port that nobody uses at the moment, for the ranks of this host.
fn meeting_place(args: &Args) -> Outcome<String> {
    if !args.at.ends_with(":0") {
        return Ok(args.at.clone());
    }
    let probe = std::net::TcpListener::bind(&args.at).map_err(|e| format!("{}: {e}", args.at))?;
    probe.local_addr().map(|at| at.to_string()).map_err(|e| e.to_string())
}

fn spawned(mut args: Args, seed: u64) -> Outcome {
    args.at = meeting_place(&args)?;
    let own = std::env::current_exe().map_err(|e| e.to_string())?;
    let given: Vec<_> = std::env::args_os().skip(1).filter(|arg| arg != "--spawn").collect();
    let mut children = Vec::new();
    for rank in 1..args.ranks {
        let mut command = Command::new(&own);
        command.args(["--at", &args.at, "--rank", &rank.to_string(), "--seed", &seed.to_string()]);
        command.args(&given).stdin(Stdio::null());
        children.push(command.spawn().map_err(|e| e.to_string())?);
    }
    let mine = one_process(&args, seed);
    let killed = matches!(args.scenario, Scenario::Killed);
    for (rank, mut child) in (1..).zip(children) {
        let status = child.wait().map_err(|e| e.to_string())?;
        let expected = status.success() || killed && rank == 1;
        if !expected {
            return Err(format!("{mine:?}; rank {rank}: {status}"));
        }
    }
    mine
}

fn one_process(args: &Args, seed: u64) -> Outcome {
    if !args.threads {
        return one_rank(args, seed);
    }
    let args = Args { at: meeting_place(args)?, ..args.clone() };
    let ranks: Vec<_> = (0..args.ranks)
        .map(|rank| {
            let args = Args { rank, ..args.clone() };
            std::thread::spawn(move || one_rank(&args, seed))
        })
        .collect();
    ranks.into_iter().try_for_each(|rank| rank.join().map_err(|_| "a rank panicked".to_owned())?)
}

fn one_rank(args: &Args, seed: u64) -> Outcome {
    if args.pin {
        bench::pin(args.rank)?;
    }
    let version = args.api.unwrap_or(VERSIONS[0]);
    match &args.scenario {
        Scenario::Contract { filter } => return contract(args, filter.as_deref().unwrap_or("")),
        Scenario::Allocations => {
            let plugin = Plugin::open(&args.plugin, version, TRAFFIC_CLASS_UNDEF)?;
            return contract::allocations(&plugin);
        }
        _ => {}
    }
    let oob =
        Oob::join(&args.at, args.rank, args.ranks).map_err(|e| format!("meeting at {}: {e}", args.at))?;
    let rank = Rank::open(&args.plugin, version, args.traffic_class, oob, seed)?;
    logged(args, &rank.plugin)?;
    if let Scenario::Reloads { times } = &args.scenario {
        return failing::reloads(rank, &args.plugin, *times);
    }
    run(args, &rank).map_err(|why| format!("{why}; logged: {:?}", take_log()))?;
    rank.unload().map(drop)
}

fn run(args: &Args, rank: &Rank) -> Outcome {
    match &args.scenario {
        Scenario::Contract { .. } | Scenario::Allocations | Scenario::Reloads { .. } => Ok(()),
        Scenario::Ring { max } => traffic::ring(rank, *max),
        Scenario::AllToAll { max } => traffic::all_to_all(rank, *max),
        Scenario::AllReduce { words } => traffic::all_reduce(rank, *words),
        Scenario::Aborts { rounds } => failing::aborts(rank, *rounds),
        Scenario::Killed => failing::killed(rank),
        Scenario::Orphaned => failing::orphaned(rank),
        Scenario::Mixed { operations } => mixed::run(rank, *operations),
        Scenario::Bandwidth { size, total } => bench::bandwidth(rank, *size, *total),
        Scenario::Memcpy { size, total } => bench::memcpy(rank, *size, *total, args.pin),
        Scenario::Latency { size, count } => bench::latency(rank, *size, *count),
    }
}

fn contract(args: &Args, filter: &str) -> Outcome {
    let versions: Vec<u32> = args.api.map_or(VERSIONS.to_vec(), |version| vec![version]);
    let mut failures = Vec::new();
    for version in versions {
        let plugin = Plugin::open(&args.plugin, version, TRAFFIC_CLASS_UNDEF)?;
        logged(args, &plugin)?;
        failures.extend(contract::run(&plugin, filter));
        plugin.close()?;
    }
    if failures.is_empty() {
        Ok(())
    } else {
        Err(format!("{}\nlogged: {:?}", failures.join("\n"), take_log()))
    }
}

/// What a user would look for in NCCL's log.
fn logged(args: &Args, plugin: &Plugin) -> Outcome {
    let log = take_log();
    println!("# {} {:?}", plugin.name(), log);
    match args.logged.iter().find(|wanted| !log.iter().any(|(_, line)| line.contains(*wanted))) {
        None => Ok(()),
        Some(missing) => Err(format!("nothing logged with {missing:?}: {log:?}")),
    }
}
