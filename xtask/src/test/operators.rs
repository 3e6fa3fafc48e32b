//! What an operator installs, from the tree: the unit, the examples of configuration, and the router in a container.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use super::Outcome;
use super::contained::{self, Image};
use crate::layout;
use crate::process::{self, Echo};

/// A check and its name.
type Check = (&'static str, fn() -> Outcome);

pub const CHECKS: [Check; 3] = [
    ("operators: systemd takes the unit", unit),
    ("operators: the examples of configuration are read", examples),
    ("operators: the router serves from a container", contained),
];

/// For a step that hangs.
pub const LIMIT: Duration = Duration::from_secs(60);

fn shared(name: &str) -> PathBuf {
    layout::dist().join("share/freeflow").join(name)
}

pub fn read(path: &Path) -> Result<String, String> {
    fs::read_to_string(path).map_err(|e| format!("cannot read {}: {e}", path.display()))
}

pub fn quietly(command: &mut Command) -> Outcome {
    let done = process::run(command, LIMIT, Echo::Quiet).map_err(|e| e.to_string())?;
    if done.success() { Ok(()) } else { Err(format!("{}\n{}", done.how(), done.tail())) }
}

/// A directory that goes with its owner.
pub struct Scratch(pub PathBuf);

impl Scratch {
    pub fn new(what: &str) -> Result<Self, String> {
        let dir = std::env::temp_dir().join(format!("ff-operators-{}-{what}", std::process::id()));
        fs::create_dir_all(&dir).map_err(|e| format!("cannot make {}: {e}", dir.display()))?;
        Ok(Scratch(dir))
    }

    pub fn write(&self, name: &str, text: &str) -> Result<PathBuf, String> {
        let path = self.0.join(name);
        fs::write(&path, text).map_err(|e| format!("cannot write {}: {e}", path.display()))?;
        Ok(path)
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        if let Err(error) = fs::remove_dir_all(&self.0) {
            eprintln!("xtask: cannot remove {}: {error}", self.0.display());
        }
    }
}

/// systemd-analyze warns of what it would ignore, and succeeds.
fn unit() -> Outcome {
    let scratch = Scratch::new("unit")?;
    let text = read(&shared("freeflow.service"))?;
    let installed = text.replace("/usr/local/bin/freeflow", &layout::freeflow().display().to_string());
    let verify = |text: &str| {
        let path = scratch.write("freeflow.service", text)?;
        let mut command = Command::new("systemd-analyze");
        process::run(command.arg("verify").arg(path), LIMIT, Echo::Quiet).map_err(|e| e.to_string())
    };
    let done = verify(&installed)?;
    if !done.success() || !done.stderr.is_empty() {
        return Err(done.stderr);
    }
    match verify(&installed.replace("Restart=always", "Restart=sometimes"))?.stderr.contains("sometimes") {
        true => Ok(()),
        false => Err("systemd-analyze takes anything".into()),
    }
}

/// Each line that is commented out is a key that the router knows; a whole cluster's configuration starts one.
fn examples() -> Outcome {
    let scratch = Scratch::new("examples")?;
    let certs = scratch.0.join("ca");
    let mut command = Command::new(layout::freeflow());
    command.arg("certs").arg(&certs).args(["--host", "h1"]);
    quietly(&mut command)?;
    let directory = scratch.write("directory.toml", &read(&shared("directory.toml"))?)?;
    let example = read(&shared("router.toml"))?;
    let keys = example.lines().filter_map(|line| line.strip_prefix("# ").filter(|line| line.contains(" = ")));
    let config = keys.collect::<Vec<_>>().join("\n");
    let config = config.replace("/etc/freeflow/directory.toml", &directory.display().to_string());
    let config = config.replace("/etc/freeflow/tls", &certs.join("h1").display().to_string());
    let config = config.replace("0.0.0.0:4790", "127.0.0.1:4790") + "\nmetrics = \"127.0.0.1:0\"\n";
    let (config, socket) = (scratch.write("router.toml", &config)?, scratch.0.join("router.sock"));
    let router = |args: &[&str]| {
        let mut command = Command::new(layout::freeflow());
        command.arg("router").arg("--socket").arg(&socket).args(args);
        quietly(&mut command)
    };
    router(&["--detach", "--config", &config.display().to_string()])?;
    router(&["--stop"])
}

/// The flags that the Containerfile names; programs of the host use the router in it.
fn contained() -> Outcome {
    if !rustix::process::geteuid().is_root() {
        println!("skipped: a container that sees the host's processes takes root");
        return Ok(());
    }
    let text = read(&shared("Containerfile"))?;
    let label = text.lines().find_map(|line| line.strip_prefix("LABEL flags=\"")?.strip_suffix('"'));
    let flags = label.ok_or("the Containerfile has no label of flags")?.to_owned();
    let words =
        [&layout::freeflow().display().to_string(), "router", "--socket", "/run/freeflow/router.sock"];
    let words = words.map(str::to_owned).to_vec();
    contained::serves(&Image { root: "/".into(), words, flags })
}
