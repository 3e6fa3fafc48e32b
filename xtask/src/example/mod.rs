//! `cargo xtask example NAME`: whole programs over FreeFlow, with what came out under target/examples/NAME.

mod sockets;

use std::process::ExitCode;

use clap::Subcommand;

use crate::failure::Result;

#[derive(Debug, Subcommand)]
pub enum Example {
    /// TCP programs (iperf3; a web server and curl) between two containers: over the kernel's TCP, and over rsockets
    Sockets,
}

pub fn run(example: &Example) -> Result<ExitCode> {
    match example {
        Example::Sockets => sockets::run(),
    }
}
