//! `cargo xtask`: builds the distribution tree, runs demo, tests, benchmarks and soaks.
//!
//! Owns what happens outside the product: Debian packages, cargo calls, watchdogs, tables. It must never know the
//! product's insides: it uses `freeflow` and its libraries as a user does.

mod bench;
mod demo;
mod dist;
mod example;
mod failure;
mod hugepages;
mod layout;
mod packages;
mod perftest;
mod portable;
mod process;
mod safety;
mod soak;
mod test;

use std::process::ExitCode;

use clap::{Parser, Subcommand};

/// Build, show and test FreeFlow.
#[derive(Debug, Parser)]
#[command(name = "cargo xtask", bin_name = "cargo xtask")]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Two unprivileged containers: Debian's perftest between them, next to TCP
    Demo,
    /// Run every check; FILTER selects those whose name contains it
    Test { filter: Option<String> },
    /// Write the pages under docs/ that are made from the tests
    Docs,
    /// Build target/dist
    Dist {
        /// Libraries that old distributions can load, in target/dist-portable
        #[arg(long)]
        portable: bool,
    },
    /// Long checks
    #[command(subcommand)]
    Soak(Soak),
    /// Measure: results under target/bench
    Bench(bench::Options),
    /// Run whole programs over FreeFlow: results under target/examples
    #[command(subcommand)]
    Example(example::Example),
}

#[derive(Debug, Subcommand)]
enum Soak {
    /// demo and test in a new Debian root
    Fresh,
    /// SIGKILL and SIGSTOP at random instants of either side under load
    Kill(safety::Kill),
    /// A neighbour of the same tenant that scribbles over all it was given, and mutated control messages
    Hostile(safety::Hostile),
    /// Three hosts, TLS and etcd, and what happens when parts of that go away
    Cluster,
    /// The router killed and started again at random instants under load
    Restart(safety::Restart),
    /// The connections between two hosts cut at random instants under load, then silent
    Wire(safety::Wire),
    /// The NCCL plugin: a million mixed operations under AddressSanitizer, messages of 1 GiB, two hosts
    Nccl(safety::Nccl),
    /// Everything of the UCX transport, on every UCX release; FILTER selects as in test
    Ucx { filter: Option<String> },
    /// The portable tree, and clients of other rdma-core and Debian releases; FILTER selects as in test
    Releases { filter: Option<String> },
    /// The router's container image: built from its Containerfile, without an engine, and run
    Image,
    /// Deregistration while a copier is stopped at each of its steps
    Revoke(safety::Revoke),
}

fn main() -> ExitCode {
    let result = match Cli::parse().command {
        Command::Demo => demo::run(),
        Command::Test { filter } => test::run(filter.as_deref()),
        Command::Docs => test::docs(),
        Command::Dist { portable } => dist::run(portable),
        Command::Soak(Soak::Fresh) => soak::fresh(),
        Command::Soak(Soak::Releases { filter }) => test::releases(filter.as_deref()),
        Command::Soak(Soak::Image) => test::image(),
        Command::Soak(Soak::Ucx { filter }) => test::ucx_matrix(filter.as_deref()),
        Command::Soak(Soak::Kill(args)) => safety::kill(&args),
        Command::Soak(Soak::Hostile(args)) => safety::hostile(&args),
        Command::Soak(Soak::Cluster) => safety::cluster(),
        Command::Soak(Soak::Restart(args)) => safety::restart(&args),
        Command::Soak(Soak::Wire(args)) => safety::wire(&args),
        Command::Soak(Soak::Nccl(args)) => safety::nccl(&args),
        Command::Soak(Soak::Revoke(args)) => safety::revoke(&args),
        Command::Bench(options) => bench::run(&options),
        Command::Example(example) => example::run(&example),
    };
    result.unwrap_or_else(|failure| {
        eprintln!("xtask: {failure}");
        ExitCode::FAILURE
    })
}
