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

pub const NCCL: &str = "example nccl";

/// Builds examples/hello and runs it: the server prints the line that the client wrote into its memory.
pub fn hello() -> std::result::Result<(), String> {
    let dir = OpenDir::make()?;
    let program = compile(&dir, "hello/hello.c", "-libverbs")?;
    let client =
        Client::same(&program, &[Check::Says("written: success"), Check::Anywhere("by RDMA over ff0")]);
    labs::run_client(&client, labs::Place::OneHost)
}

/// Builds examples/nccl's program over the plugin's interface and runs it.
pub fn nccl() -> std::result::Result<(), String> {
    let dir = OpenDir::make()?;
    let program = compile(&dir, "nccl/plugin.c", "-ldl")?;
    let said = [Check::Says("device: ff0"), Check::Says("received 32 bytes: hello")];
    labs::run_client(&Client::alone(&program, &said), labs::Place::OneHost)
}

/// Compiles an example as its Makefile does; returns the program's path.
fn compile(dir: &OpenDir, source: &str, library: &str) -> std::result::Result<String, String> {
    let binary = dir.0.join("example");
    let mut cc = Command::new("cc");
    cc.args(["-std=gnu11", "-O2", "-Wall", "-Wextra", "-Werror", "-o"]).arg(&binary);
    cc.arg(layout::root().join("examples").join(source)).arg(library);
    let built = process::run(&mut cc, LIMIT, Echo::Quiet).map_err(|failure| failure.to_string())?;
    if built.success() {
        Ok(binary.display().to_string())
    } else {
        Err(format!("{}\n{}", built.how(), built.tail()))
    }
}

/// A directory that a lab's users may enter, which a clone in a private home directory is not. Not in /tmp: a lab has its own.
pub struct OpenDir(pub PathBuf);

impl OpenDir {
    pub fn make() -> std::result::Result<Self, String> {
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
