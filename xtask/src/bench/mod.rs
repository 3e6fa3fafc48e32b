//! `cargo xtask bench`: measurements beside the same run's peers. Results go to target/bench.
//!
//! `host` is the direct path, `nccl` the plugin ([`nccl`]): [`cases`] says what is measured and against what, [`side`] runs
//! one figure, [`rounds`] interleaves them, [`report`] writes the tables. Nothing here passes or fails by time: a bar that is missed is said.

mod busy;
mod cases;
mod figures;
mod hosts;
mod idle;
mod instructions;
mod nccl;
mod probes;
mod report;
mod rounds;
mod side;
mod ucx;

use std::process::ExitCode;

use clap::{Args, ValueEnum};

use crate::failure::Result;
use crate::{dist, packages};

#[derive(Debug, Clone, Copy, ValueEnum)]
pub enum Name {
    Host,
    Hosts,
    Nccl,
    Ucx,
}

#[derive(Debug, Args)]
pub struct Options {
    name: Name,
    /// Measure only groups and cases whose name contains this
    #[arg(long, value_name = "CASE")]
    only: Option<String>,
    /// Rounds to keep; medians are over these
    #[arg(long, value_name = "N", default_value_t = 5)]
    rounds: usize,
}

pub fn run(options: &Options) -> Result<ExitCode> {
    match options.name {
        Name::Host => host(options),
        Name::Hosts => hosts(options),
        Name::Ucx => ucx(options),
        Name::Nccl => nccl(options),
    }
}

/// Between two hosts.
fn hosts(options: &Options) -> Result<ExitCode> {
    packages::ensure(&[packages::CLIENTS, packages::BENCH])?;
    let tree = dist::build()?;
    let results = hosts::run(&tree, options.only.as_deref().unwrap_or(""), options.rounds)?;
    report::write("hosts", &results)
}

fn ucx(options: &Options) -> Result<ExitCode> {
    packages::ensure(&[packages::CLIENTS, packages::BENCH, packages::UCX])?;
    let tree = dist::build()?;
    let stage = side::Stage::new(&tree, probes::build()?)?;
    let only = options.only.as_deref().unwrap_or("");
    let mut results = rounds::run(&stage, ucx::groups(), only, options.rounds)?;
    stage.end()?;
    if ucx::BETWEEN_HOSTS.contains(only) {
        results.extend(hosts::measure(&tree, &ucx::between_hosts(), ucx::hosts_bars(), options.rounds)?);
    }
    report::write("ucx", &results)
}

fn host(options: &Options) -> Result<ExitCode> {
    packages::ensure(&[packages::CLIENTS, packages::BENCH])?;
    let tree = dist::build()?;
    let stage = side::Stage::new(&tree, probes::build()?)?;
    let only = options.only.as_deref().unwrap_or("");
    let mut results = rounds::run(&stage, cases::groups(), only, options.rounds)?;
    let rest = idle::run(&stage, only, &mut results)
        .and_then(|()| instructions::run(&stage, only, &mut results))
        .and_then(|()| busy::run(&stage, only, options.rounds, &mut results))
        .and_then(|()| stage.end());
    // What was measured is kept, whatever happened to the rest.
    let written = report::write("host", &results);
    rest.and(written)
}

fn nccl(options: &Options) -> Result<ExitCode> {
    packages::ensure(&[packages::CLIENTS, packages::BENCH])?;
    let tree = dist::build()?;
    nccl::build()?;
    let stage = side::Stage::new(&tree, probes::build()?)?;
    let only = options.only.as_deref().unwrap_or("");
    let mut results = rounds::run(&stage, nccl::groups(), only, options.rounds)?;
    stage.end()?;
    if nccl::BETWEEN_HOSTS.contains(only) {
        results.extend(hosts::measure(&tree, &nccl::between_hosts(), nccl::hosts_bars(), options.rounds)?);
    }
    report::write("nccl", &results)
}
