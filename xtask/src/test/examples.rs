//! The examples, built as their Makefiles say and run between two lab containers.

use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use super::clients::{Check, Client};
use super::labs;
use crate::layout;
use crate::process::{self, Echo};

const LIMIT: Duration = Duration::from_secs(60);

pub const HELLO: &str = "example hello";

pub const NCCL: &str = "example nccl";
pub const NCCL_JOB: &str = "example nccl: the job's script";

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

/// examples/nccl/run.sh with an engine that only says what it is asked for: the job itself needs GPUs. And Python reads train.py.
pub fn nccl_job() -> std::result::Result<(), String> {
    let (dir, examples) = (OpenDir::make()?, layout::root().join("examples/nccl"));
    let docker = dir.0.join("docker");
    let written = fs::write(&docker, "#!/bin/sh\n[ \"$1\" != run ] || echo \"docker $*\"\n");
    let executable = written.and_then(|()| fs::set_permissions(&docker, fs::Permissions::from_mode(0o755)));
    executable.map_err(|error| error.to_string())?;
    let socket = dir.0.join("run/router.sock");
    let said = with_tree(Command::new("sh").arg(examples.join("run.sh")).arg("job"), &socket, &docker);
    with_tree(Command::new(layout::freeflow()).args(["router", "--stop"]), &socket, &docker)?;
    let said = said?;
    for rank in ["0", "1"] {
        let line = said.lines().find(|line| line.contains(&format!("--name rank{rank} ")));
        let line = line.ok_or_else(|| format!("rank {rank} was not started:\n{said}"))?;
        let words =
            ["dst=/run/freeflow,readonly", "NCCL_NET_PLUGIN=freeflow", "NCCL_NET=FreeFlow", "RANK=", " job"];
        if let Some(missing) = words.into_iter().find(|word| !line.contains(word)) {
            return Err(format!("rank {rank} does not get {missing}: {line}"));
        }
    }
    let read = "import ast, sys; ast.parse(open(sys.argv[1]).read())";
    with_tree(Command::new("python3").args(["-c", read]).arg(examples.join("train.py")), &socket, &docker)
        .map(drop)
}

/// Runs a command as on a host where the tree is installed and the router is at `socket`.
fn with_tree(command: &mut Command, socket: &Path, docker: &Path) -> std::result::Result<String, String> {
    let path = std::env::var("PATH").unwrap_or_default();
    command.env("PATH", format!("{}:{path}", layout::dist().join("bin").display()));
    command.env("FREEFLOW_SOCKET", socket).env("DOCKER", docker);
    let done = process::run(command, LIMIT, Echo::Quiet).map_err(|failure| failure.to_string())?;
    if done.success() { Ok(done.stdout) } else { Err(format!("{}\n{}", done.how(), done.tail())) }
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
