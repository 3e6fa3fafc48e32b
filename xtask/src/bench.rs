//! `cargo xtask bench`: not there yet; says so.

use std::process::ExitCode;

use clap::ValueEnum;

use crate::failure::{Failure, Result};

#[derive(Debug, Clone, Copy, ValueEnum)]
pub enum Name {
    Host,
    Hosts,
    Nccl,
    Ucx,
}

pub fn run(name: Name) -> Result<ExitCode> {
    let value = name.to_possible_value();
    let name = value.as_ref().map_or("", |v| v.get_name());
    Err(Failure::new(format!("bench {name} is not there yet; cargo xtask demo shows bandwidth and latency")))
}
