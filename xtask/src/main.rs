//! `cargo xtask`: builds the distribution tree, runs demo, tests, benchmarks and soaks.
//!
//! Owns what happens outside the product: Debian packages, cargo calls, watchdogs, tables. It must never know the
//! product's insides: it uses `freeflow` and its libraries as a user does.

mod bench;
mod demo;
mod dist;
mod failure;
mod layout;
mod packages;
mod perftest;
mod process;
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
    /// Build target/dist
    Dist {
        /// Libraries that old distributions can load, in target/dist-portable
        #[arg(long)]
        portable: bool,
    },
    /// Long checks: `fresh` is demo and test in a new Debian root
    Soak { name: soak::Name },
    /// Measure: results under target/bench
    Bench(bench::Options),
}

fn main() -> ExitCode {
    let result = match Cli::parse().command {
        Command::Demo => demo::run(),
        Command::Test { filter } => test::run(filter.as_deref()),
        Command::Dist { portable } => dist::run(portable),
        Command::Soak { name } => soak::run(name),
        Command::Bench(options) => bench::run(&options),
    };
    result.unwrap_or_else(|failure| {
        eprintln!("xtask: {failure}");
        ExitCode::FAILURE
    })
}
