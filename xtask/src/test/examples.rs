//! The examples, built as their Makefiles say and run between two lab containers.

use std::process::Command;
use std::time::Duration;

use super::clients::{Check, Client};
use super::labs;
use crate::layout;
use crate::process::{self, Echo};

const LIMIT: Duration = Duration::from_secs(60);

pub const HELLO: &str = "example hello";

/// Builds examples/hello and runs it: the server prints the line that the client wrote into its memory.
pub fn hello() -> std::result::Result<(), String> {
    let source = layout::root().join("examples/hello");
    let binary = layout::target().join("examples-hello");
    let mut cc = Command::new("cc");
    cc.args(["-O2", "-Wall", "-Wextra", "-Werror", "-o"])
        .arg(&binary)
        .arg(source.join("hello.c"))
        .arg("-libverbs");
    let built = process::run(&mut cc, LIMIT, Echo::Quiet).map_err(|failure| failure.to_string())?;
    if !built.success() {
        return Err(format!("{}\n{}", built.how(), built.tail()));
    }
    let program = binary.display().to_string();
    let client =
        Client::same(&program, &[Check::Says("written: success"), Check::Anywhere("by RDMA over ff0")]);
    labs::run_client(&client)
}
