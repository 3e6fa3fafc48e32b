//! `freeflow container add` as an operator uses it: an installed tree, a detached router, and two OCI bundles of the
//! operator's own that runc starts, with nothing of ours in them but what `--oci` prints.

use std::fs;
use std::path::PathBuf;
use std::process::Command;
use std::time::Duration;

use serde_json::{Value, json};

use crate::process::{self, Done, Echo};
use crate::{layout, perftest};

pub const NAME: &str = "lab: runc bundles work through container add";

/// For a step that hangs; all of them take two or three seconds on an idle machine.
const LIMIT: Duration = Duration::from_secs(60);
const ADDRESSES: [(&str, &str); 2] = [("a", "10.9.0.1"), ("b", "10.9.0.2")];

/// Both containers share a network namespace of the test's own, so the client finds its server at 127.0.0.1. The loop
/// ends with the server's port, with the server, or by the watchdog.
const PAIR: &str = r#"
    ip link set lo up
    for c in a b; do mount $BIND / $c/rootfs; done
    runc --root runc run --bundle a $ID-a >a/out 2>&1 </dev/null &
    server=$!
    until grep -q ':4855 00000000:0000 0A' /proc/net/tcp; do kill -0 $server; sleep 0.02; done
    runc --root runc run --bundle b $ID-b
    wait $server
"#;

type Outcome<T> = std::result::Result<T, String>;

pub fn run() -> Outcome<()> {
    let site = Site::make()?;
    site.freeflow(&["router", "--detach"])?;
    let bundles = ADDRESSES.map(|(name, ip)| site.freeflow(&["container", "add", name, "--ip", ip, "--oci"]));
    for ((name, _), printed) in ADDRESSES.iter().zip(bundles) {
        site.bundle(name, &printed?)?;
    }
    let said = site.alone("a", "/run/freeflow/bin/freeflow doctor")?;
    expect(&said, "serves this container as 10.9.0.1")?;
    let said = site.alone("a", "/run/freeflow/bin/freeflow doctor --nccl")?;
    expect(&said, "libnccl-net-freeflow.so loads, with v6, v7, v8, v9, v10, v11, v12")?;
    let said = site.alone("a", "/run/freeflow/bin/freeflow doctor --ucx")?;
    expect(&said, "LD_PRELOAD and UCX_MODULE_DIR lead UCX before 1.22 to ff")?;
    expect(&site.alone("a", "ucx_info -d")?, "Device: ff0:1")?;
    let said = site.alone("a", "cat /sys/class/infiniband/ff0/ports/1/gids/0")?;
    expect(&said, "0000:0000:0000:0000:0000:ffff:0a09:0001")?;
    site.alone("a", "test -w /dev/infiniband/uverbs0")?;
    let said = site.pair("ibv_rc_pingpong -p 18517 -g 0", " 127.0.0.1")?;
    expect(&said, "1000 iters in")?;
    expect(&said, "GID ::ffff:10.9.0.2")?;
    site.freeflow(&["router", "--stop"])?;
    site.freeflow(&["router", "--detach"])?;
    let said = site.pair("ib_write_bw -F -p 18517 -n 500", " 127.0.0.1")?;
    let rows = perftest::rows(&said);
    if perftest::row(&rows, 65536).is_none_or(|row| row[3] <= 0.0) {
        return Err(format!("no bandwidth after a restart of the router:\n{said}"));
    }
    site.freeflow(&["container", "rm", "a"])?;
    let left = site.freeflow(&["container", "ls"])?;
    if left.contains("10.9.0.1") || site.dir.join("run/containers/a").exists() {
        return Err(format!("container rm left something of a:\n{left}"));
    }
    Ok(())
}

fn expect(said: &str, text: &str) -> Outcome<()> {
    if said.contains(text) { Ok(()) } else { Err(format!("nobody said {text:?}:\n{said}")) }
}

/// The installed tree, the router's directory and the bundles; gone with the router and the containers when dropped.
struct Site {
    dir: PathBuf,
    is_root: bool,
}

impl Site {
    fn make() -> Outcome<Self> {
        let dir = std::env::temp_dir().join(format!("ff-containers-{}", std::process::id()));
        let site = Self { dir, is_root: rustix::process::geteuid().is_root() };
        for (name, _) in ADDRESSES {
            let root = site.dir.join(name).join("rootfs");
            fs::create_dir_all(&root).map_err(|e| format!("cannot make {}: {e}", root.display()))?;
        }
        site.finish(Command::new("cp").arg("-a").arg(layout::dist()).arg(site.dir.join("installed")))?;
        Ok(site)
    }

    fn socket(&self) -> PathBuf {
        self.dir.join("run/router.sock")
    }

    fn freeflow(&self, args: &[&str]) -> Outcome<String> {
        let mut command = Command::new(self.dir.join("installed/bin/freeflow"));
        self.finish(command.args(args).arg("--router").arg(self.socket()))
    }

    fn finish(&self, command: &mut Command) -> Outcome<String> {
        let done = self.start(command)?;
        if done.success() {
            return Ok(done.stdout);
        }
        let words: Vec<_> = command.get_args().map(|word| word.to_string_lossy()).collect();
        Err(format!("{}: {}\n{}{}", words.join(" "), done.how(), done.tail(), self.server_said()))
    }

    fn start(&self, command: &mut Command) -> Outcome<Done> {
        process::run(command.current_dir(&self.dir), LIMIT, Echo::Quiet).map_err(|e| e.to_string())
    }

    fn server_said(&self) -> String {
        fs::read_to_string(self.dir.join("a/out")).unwrap_or_default()
    }

    /// Writes the config.json of an operator who merged in what `container add --oci` printed.
    fn bundle(&self, name: &str, printed: &str) -> Outcome<()> {
        let ours: Value = serde_json::from_str(printed).map_err(|e| format!("--oci: {e}: {printed}"))?;
        let mut config = plain_config(self.is_root);
        for pointer in ["/mounts", "/process/env", "/hooks/createContainer"] {
            let more =
                ours.pointer(pointer).and_then(Value::as_array).ok_or(format!("--oci: no {pointer}"))?;
            if let Some(list) = config.pointer_mut(pointer).and_then(Value::as_array_mut) {
                list.extend(more.iter().cloned());
            }
        }
        self.write(name, &config)
    }

    fn write(&self, name: &str, config: &Value) -> Outcome<()> {
        let path = self.dir.join(name).join("config.json");
        fs::write(&path, config.to_string()).map_err(|e| format!("cannot write {}: {e}", path.display()))
    }

    fn set_command(&self, name: &str, command: &str) -> Outcome<()> {
        let path = self.dir.join(name).join("config.json");
        let text = fs::read_to_string(&path).map_err(|e| format!("cannot read {}: {e}", path.display()))?;
        let mut config: Value = serde_json::from_str(&text).map_err(|e| e.to_string())?;
        config["process"]["args"] = command.split(' ').collect();
        self.write(name, &config)
    }

    /// Runs a command in one container.
    fn alone(&self, name: &str, command: &str) -> Outcome<String> {
        self.set_command(name, command)?;
        let script =
            format!("mount $BIND / {name}/rootfs; exec runc --root runc run --bundle {name} $ID-{name}");
        self.script(&script)
    }

    /// Runs a server in `a` and its client in `b`; what the client said.
    fn pair(&self, server: &str, client_has: &str) -> Outcome<String> {
        self.set_command("a", server)?;
        self.set_command("b", &format!("{server}{client_has}"))?;
        self.script(PAIR)
    }

    /// A shell whose mounts and network are its own; without root, in a user namespace where this user is root.
    fn script(&self, script: &str) -> Outcome<String> {
        let mut command = Command::new("unshare");
        if !self.is_root {
            command.args(["--user", "--map-root-user"]);
        }
        command.args(["--mount", "--net", "--propagation", "private", "sh", "-ec", script]);
        // The kernel does not let a user namespace take a single mount out of the host's.
        command.env("BIND", if self.is_root { "--bind" } else { "--rbind" }).env("ID", self.id());
        self.finish(&mut command)
    }

    fn id(&self) -> String {
        format!("ff-test-{}", std::process::id())
    }
}

impl Drop for Site {
    fn drop(&mut self) {
        for (name, _) in ADDRESSES {
            // Only a container whose runc was killed by the watchdog is still there.
            let id = format!("{}-{name}", self.id());
            let mut delete = Command::new("runc");
            self.start(delete.args(["--root", "runc", "delete", "--force", &id])).ok();
        }
        if self.socket().exists()
            && let Err(why) = self.freeflow(&["router", "--stop"])
        {
            eprintln!("xtask: {why}");
        }
        if let Err(error) = fs::remove_dir_all(&self.dir) {
            eprintln!("xtask: cannot remove {}: {error}", self.dir.display());
        }
    }
}

/// An unprivileged container of this host's root file system, as an operator would write it without FreeFlow.
fn plain_config(is_root: bool) -> Value {
    let (user, first, size) = if is_root { (1000, 100_000, 65_536) } else { (0, 0, 1) };
    let ids = json!([{ "containerID": 0, "hostID": first, "size": size }]);
    let tmpfs = |at: &str, mode: &str| json!({ "destination": at, "type": "tmpfs", "source": "tmpfs", "options": ["nosuid", "nodev", mode] });
    let namespaces = ["user", "mount", "pid", "ipc", "uts", "cgroup"].map(|kind| json!({ "type": kind }));
    json!({
        "ociVersion": "1.0.2",
        "root": { "path": "rootfs", "readonly": true },
        "process": {
            "terminal": false,
            "user": { "uid": user, "gid": user },
            "args": [],
            "env": ["PATH=/usr/sbin:/usr/bin:/sbin:/bin", "HOME=/tmp"],
            "cwd": "/tmp",
            "capabilities": {},
            "noNewPrivileges": true,
        },
        "mounts": [
            { "destination": "/proc", "type": "proc", "source": "proc" },
            { "destination": "/sys", "type": "bind", "source": "/sys", "options": ["rbind", "ro", "nosuid", "nodev", "noexec"] },
            tmpfs("/dev", "mode=755"), tmpfs("/tmp", "mode=1777"), tmpfs("/run", "mode=755"),
        ],
        "hooks": { "createContainer": [] },
        "linux": {
            "namespaces": namespaces,
            "uidMappings": ids,
            "gidMappings": ids,
        },
    })
}
