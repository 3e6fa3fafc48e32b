//! The examples, built as their Makefiles say and run between two lab containers.

use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::path::PathBuf;
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
    let dir = OpenDir::make()?;
    let binary = dir.0.join("hello");
    let mut cc = Command::new("cc");
    cc.args(["-O2", "-Wall", "-Wextra", "-Werror", "-o"])
        .arg(&binary)
        .arg(layout::root().join("examples/hello/hello.c"))
        .arg("-libverbs");
    let built = process::run(&mut cc, LIMIT, Echo::Quiet).map_err(|failure| failure.to_string())?;
    if !built.success() {
        return Err(format!("{}\n{}", built.how(), built.tail()));
    }
    let program = binary.display().to_string();
    let client =
        Client::same(&program, &[Check::Says("written: success"), Check::Anywhere("by RDMA over ff0")]);
    labs::run_client(&client, labs::Place::OneHost)
}

/// A directory that a lab's users may enter, which a clone in a private home directory is not. Not in /tmp: a lab has its own.
struct OpenDir(PathBuf);

impl OpenDir {
    fn make() -> std::result::Result<Self, String> {
        let path = PathBuf::from(format!("/var/tmp/freeflow-example-{}", std::process::id()));
        let made = fs::create_dir(&path);
        made.map_err(|error| format!("cannot make {}: {error}", path.display()))?;
        let dir = Self(path);
        fs::set_permissions(&dir.0, fs::Permissions::from_mode(0o755)).map_err(|error| error.to_string())?;
        Ok(dir)
    }
}

impl Drop for OpenDir {
    fn drop(&mut self) {
        if let Err(error) = fs::remove_dir_all(&self.0) {
            eprintln!("xtask: cannot remove {}: {error}", self.0.display());
        }
    }
}
