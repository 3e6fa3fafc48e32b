//! The router in a container, as an engine starts it from the flags of its image, and programs of the host that use it.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Instant;

use serde_json::{Value, json};

use super::Outcome;
use super::operators::{LIMIT, Scratch, quietly, read};
use crate::process::{self, Echo};
use crate::{layout, perftest};

/// What an engine knows of an image.
pub struct Image {
    pub root: PathBuf,
    /// What is run in it.
    pub words: Vec<String>,
    /// What it says it is to be run with.
    pub flags: String,
}

/// Where the image has its socket.
const SOCKETS: &str = "/run/freeflow";

/// Starts the router in it, and ib_write_bw of another user over that.
pub fn serves(image: &Image) -> Outcome {
    let scratch = Scratch::new("contained")?;
    let (root, run) = (scratch.0.join("rootfs"), scratch.0.join("run"));
    for dir in [&root, &run] {
        fs::create_dir_all(dir).map_err(|e| e.to_string())?;
    }
    scratch.write("config.json", &bundle(image, &run)?.to_string())?;
    let _router = Contained::start(&scratch.0, &image.root, &run)?;
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
        r#"mount --bind "$ROOT" rootfs; exec runc --root runc run --bundle . "$ID" >log 2>&1 </dev/null"#;

    fn id() -> String {
        format!("ff-router-{}", std::process::id())
    }

    fn start(dir: &Path, root: &Path, run: &Path) -> Result<Self, String> {
        let mut command = Command::new("unshare");
        command.args(["--mount", "--propagation", "private", "sh", "-ec", Self::SCRIPT]);
        let child = command
            .env("ID", Self::id())
            .env("ROOT", root)
            .current_dir(dir)
            .spawn()
            .map_err(|e| e.to_string())?;
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
fn bundle(image: &Image, run: &Path) -> Result<Value, String> {
    let words: Vec<&str> = image.flags.split(' ').collect();
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
    let args: Vec<String> = image.words.iter().map(|word| word.replace(SOCKETS, &run)).collect();
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
