//! What an operator installs, from the tree: the unit, the examples of configuration, and the router in a container.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::process::{self, Echo};
use crate::{layout, perftest};

type Outcome = std::result::Result<(), String>;

/// A check and its name.
type Check = (&'static str, fn() -> Outcome);

pub const CHECKS: [Check; 3] = [
    ("operators: systemd takes the unit", unit),
    ("operators: the examples of configuration are read", examples),
    ("operators: the router serves from a container", contained),
];

/// For a step that hangs.
const LIMIT: Duration = Duration::from_secs(60);

fn shared(name: &str) -> PathBuf {
    layout::dist().join("share/freeflow").join(name)
}

fn read(path: &Path) -> Result<String, String> {
    fs::read_to_string(path).map_err(|e| format!("cannot read {}: {e}", path.display()))
}

fn quietly(command: &mut Command) -> Outcome {
    let done = process::run(command, LIMIT, Echo::Quiet).map_err(|e| e.to_string())?;
    if done.success() { Ok(()) } else { Err(format!("{}\n{}", done.how(), done.tail())) }
}

/// A directory that goes with its owner.
struct Scratch(PathBuf);

impl Scratch {
    fn new(what: &str) -> Result<Self, String> {
        let dir = std::env::temp_dir().join(format!("ff-operators-{}-{what}", std::process::id()));
        fs::create_dir_all(&dir).map_err(|e| format!("cannot make {}: {e}", dir.display()))?;
        Ok(Scratch(dir))
    }

    fn write(&self, name: &str, text: &str) -> Result<PathBuf, String> {
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

/// The flags that the Containerfile names, as an OCI bundle; programs of the host use the router in it.
fn contained() -> Outcome {
    if !rustix::process::geteuid().is_root() {
        println!("skipped: a container that sees the host's processes takes root");
        return Ok(());
    }
    let scratch = Scratch::new("contained")?;
    let (root, run) = (scratch.0.join("rootfs"), scratch.0.join("run"));
    for dir in [&root, &run] {
        fs::create_dir_all(dir).map_err(|e| e.to_string())?;
    }
    let flags = read(&shared("Containerfile"))?;
    scratch.write("config.json", &bundle(&flags, &run)?.to_string())?;
    let _router = Contained::start(&scratch.0, &run)?;
    let mut server = user_program(&run, "a", &[])?;
    let server = server.stdout(Stdio::null()).stderr(Stdio::null()).spawn().map_err(|e| e.to_string())?;
    let _server = Ended(server);
    let start = Instant::now();
    // Until the server listens.
    loop {
        let mut client = user_program(&run, "b", &["127.0.0.1"])?;
        let done = process::run(&mut client, LIMIT, Echo::Quiet).map_err(|e| e.to_string())?;
        let rows = perftest::rows(&done.stdout);
        if done.success() && perftest::row(&rows, 65536).is_some_and(|row| row[3] > 0.0) {
            break;
        }
        if start.elapsed() > LIMIT {
            return Err(format!("{}\n{}", done.how(), done.tail()));
        }
    }
    let log = read(&scratch.0.join("log"))?;
    if log.contains("cannot be opened") { Err(log) } else { Ok(()) }
}

/// One side of ib_write_bw, in a container of its own as far as the router sees, and of another user than the router's: without
/// its capabilities the router could not open its memory.
fn user_program(run: &Path, name: &str, args: &[&str]) -> Result<Command, String> {
    let dir = run.join(name);
    fs::create_dir_all(&dir).map_err(|e| e.to_string())?;
    let mut add = Command::new(layout::freeflow());
    add.args(["container", "add", name, "--router"]).arg(run.join("router.sock")).arg("--dir").arg(&dir);
    quietly(&mut add)?;
    let mut command = Command::new("setpriv");
    command.args([
        "--reuid",
        "1000",
        "--regid",
        "1000",
        "--clear-groups",
        "ib_write_bw",
        "-F",
        "-p",
        "18519",
        "-n",
        "500",
    ]);
    command.args(args).current_dir("/").env("FREEFLOW_SOCKET", dir.join("router.sock"));
    command.env("LD_LIBRARY_PATH", dir.join("lib/freeflow"));
    Ok(command)
}

/// A process that ends with its owner.
struct Ended(Child);

impl Drop for Ended {
    fn drop(&mut self) {
        // It may have ended by itself.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

struct Contained {
    dir: PathBuf,
    child: Child,
}

impl Contained {
    const SCRIPT: &str =
        r#"mount --bind / rootfs; exec runc --root runc run --bundle . "$ID" >log 2>&1 </dev/null"#;

    fn id() -> String {
        format!("ff-router-{}", std::process::id())
    }

    fn start(dir: &Path, run: &Path) -> Result<Self, String> {
        let mut command = Command::new("unshare");
        command.args(["--mount", "--propagation", "private", "sh", "-ec", Self::SCRIPT]);
        let child = command.env("ID", Self::id()).current_dir(dir).spawn().map_err(|e| e.to_string())?;
        let mut router = Contained { dir: dir.into(), child };
        let start = Instant::now();
        while !run.join("router.sock").exists() {
            let ended = router.child.try_wait().map_err(|e| e.to_string())?.is_some();
            if ended || start.elapsed() > LIMIT {
                return Err(format!("the router does not come up:\n{}", read(&dir.join("log"))?));
            }
            std::thread::yield_now();
        }
        Ok(router)
    }
}

impl Drop for Contained {
    fn drop(&mut self) {
        let mut kill = Command::new("runc");
        kill.args(["--root", "runc", "kill", &Self::id(), "TERM"]).current_dir(&self.dir);
        // It ends by itself only where it failed, and that was said.
        let _ = process::run(&mut kill, LIMIT, Echo::Quiet);
        let _ = self.child.wait();
    }
}

/// What an engine makes of the flags: the host's process ids and network, these capabilities and mounts, nothing else.
fn bundle(containerfile: &str, run: &Path) -> Result<Value, String> {
    let flags = containerfile.lines().find_map(|line| line.strip_prefix("LABEL flags=\"")?.strip_suffix('"'));
    let words: Vec<&str> = flags.ok_or("the Containerfile has no label of flags")?.split(' ').collect();
    let pairs = words.windows(2);
    let added = pairs.filter(|pair| pair[0] == "--cap-add").map(|pair| format!("CAP_{}", pair[1]));
    let caps: Vec<String> = added.collect();
    let needs = [["--pid", "host"], ["--network", "host"], ["--cap-drop", "ALL"]];
    if let Some(missing) = needs.iter().find(|needed| !words.windows(2).any(|pair| pair == *needed)) {
        return Err(format!("the check of {missing:?} is not written for {words:?}"));
    }
    let bind = |from: &str, to: &str, how: &str| json!({ "destination": to, "type": "bind", "source": from, "options": ["rbind", how] });
    let tmpfs = |at: &str| json!({ "destination": at, "type": "tmpfs", "source": "tmpfs" });
    let run = run.display().to_string();
    // The socket's directory has the same name inside and outside, as containers' mounts take it from there.
    let args = json!([layout::freeflow(), "router", "--socket", format!("{run}/router.sock")]);
    Ok(json!({
        "ociVersion": "1.0.2",
        "root": { "path": "rootfs", "readonly": true },
        "process": {
            "terminal": false,
            "user": { "uid": 0, "gid": 0 },
            "args": args,
            "env": ["PATH=/usr/sbin:/usr/bin:/sbin:/bin"],
            "cwd": "/",
            "capabilities": { "bounding": caps, "effective": caps, "permitted": caps },
            "noNewPrivileges": true,
        },
        "mounts": [
            { "destination": "/proc", "type": "proc", "source": "proc" },
            tmpfs("/dev"), bind(&run, &run, "rw"),
        ],
        "linux": { "namespaces": [{ "type": "mount" }, { "type": "ipc" }, { "type": "uts" }] },
    }))
}
