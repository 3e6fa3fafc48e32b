//! The soaks: `soak kill`, `soak hostile`, and so on. `cargo xtask soak` builds what they need and runs them.

use std::env;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use clap::{Parser, Subcommand};
use freeflow_tests::path::Tree;
use freeflow_tests::soak::{cluster, hostile, kill, nccl, restart, revoke, wire};

#[derive(Debug, Parser)]
struct Args {
    #[command(subcommand)]
    what: What,
    /// What a failing run printed
    #[arg(long, global = true)]
    seed: Option<u64>,
    /// Report times and rates, and judge only what a busy machine cannot spoil
    #[arg(long, global = true)]
    lenient: bool,
}

#[derive(Debug, Subcommand)]
enum What {
    /// SIGKILL and SIGSTOP at random instants under load
    Kill {
        #[arg(long, default_value_t = 1000)]
        rounds: u32,
    },
    /// A neighbour that scribbles over everything it was given
    Hostile {
        #[arg(long, default_value_t = 600)]
        seconds: u64,
    },
    /// Three hosts, TLS and etcd, and what happens when parts of that go away
    Cluster,
    /// The router killed and started again at random instants under load
    Restart {
        #[arg(long, default_value_t = 300)]
        rounds: u32,
    },
    /// The connections between two hosts cut at random instants under load, then silent
    Wire {
        #[arg(long, default_value_t = 300)]
        rounds: u32,
    },
    /// NCCL's plugin: mixed operations, aborts and reloads under AddressSanitizer
    Nccl {
        #[arg(long, default_value_t = 1_000_000)]
        operations: u64,
        /// Directory of nccl-replay and the plugin, built with AddressSanitizer
        #[arg(long)]
        sanitized: PathBuf,
        /// Messages of 1 GiB, and two hosts, too
        #[arg(long)]
        whole: bool,
    },
    /// Deregistration while a copier is stopped at each of its steps
    Revoke {
        /// Steps to stop at; 0 is every one
        #[arg(long, default_value_t = 0)]
        samples: u32,
    },
}

fn main() -> ExitCode {
    let args = Args::parse();
    let seed = args.seed.unwrap_or_else(|| u64::from(std::process::id()));
    match run(args, seed) {
        Ok(()) => ExitCode::SUCCESS,
        Err(why) => {
            eprintln!("soak failed (--seed {seed}): {why}");
            ExitCode::FAILURE
        }
    }
}

fn run(args: Args, seed: u64) -> Result<(), String> {
    let own = env::current_exe().map_err(|e| format!("where this binary is: {e}"))?;
    let target = own.ancestors().nth(2).ok_or("this binary is not in a target directory")?;
    let tree = Tree::find(target)?;
    let lenient = args.lenient;
    match args.what {
        What::Kill { rounds } => kill::run(&tree, target, &kill::Options { rounds, seed, lenient }),
        What::Hostile { seconds } => {
            hostile::run(&tree, target, &hostile::Options { time: Duration::from_secs(seconds), seed })
        }
        What::Cluster => cluster::run(&tree, target, &cluster::Options { lenient }),
        What::Restart { rounds } => restart::run(&tree, target, &restart::Options { rounds, seed, lenient }),
        What::Wire { rounds } => wire::run(&tree, target, &wire::Options { rounds, seed, lenient }),
        What::Nccl { operations, sanitized, whole } => {
            nccl::run(&tree, target, &nccl::Options { operations, seed, sanitized, whole })
        }
        What::Revoke { samples } => revoke::run(&tree, target, &revoke::Options { samples, seed }),
    }
}
