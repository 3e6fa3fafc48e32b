//! C programs and Debian's own tools on the built library, with and without a router.

use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::sync::OnceLock;

fn tmp() -> &'static Path {
    Path::new(env!("CARGO_TARGET_TMPDIR"))
}

/// A directory to put on LD_LIBRARY_PATH: the library under the name programs look for.
fn lib_dir() -> &'static Path {
    static DIR: OnceLock<PathBuf> = OnceLock::new();
    DIR.get_or_init(|| {
        let dir = tmp().join("lib");
        std::fs::create_dir_all(&dir).expect("a directory");
        let link = dir.join("libibverbs.so.1");
        let _ = std::fs::remove_file(&link); // of an earlier run
        std::os::unix::fs::symlink(super::library(), &link).expect("a link");
        dir
    })
}

/// Compiles tests/c/NAME.c, or says what is missing.
fn compile(name: &str) -> Option<PathBuf> {
    if !Path::new("/usr/include/infiniband/verbs.h").exists() {
        println!("skipped: libibverbs-dev is not installed");
        return None;
    }
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/c").join(name).with_extension("c");
    let exe = tmp().join(name);
    let mut cc = Command::new("cc");
    cc.args(["-Wall", "-Wextra", "-Werror", "-O1", "-g"]).arg(source).arg("-o").arg(&exe);
    let status = cc.args(["-libverbs", "-lpthread"]).status().expect("cc (Debian package gcc) starts");
    assert!(status.success(), "{name}.c does not compile");
    Some(exe)
}

/// A program on our library; `timeout` (coreutils) is its watchdog.
fn command(program: &Path, args: &[&str], socket: &Path) -> Command {
    let mut command = Command::new("timeout");
    command.arg("60").arg(program).args(args);
    command.env("LD_LIBRARY_PATH", lib_dir()).env("FREEFLOW_SOCKET", socket);
    command
}

fn run(program: &Path, args: &[&str], socket: &Path) -> Output {
    command(program, args, socket).output().expect("timeout starts")
}

fn assert_ok(what: &str, out: &Output) {
    let (stdout, stderr) = (String::from_utf8_lossy(&out.stdout), String::from_utf8_lossy(&out.stderr));
    assert!(out.status.success(), "{what}: {}\n{stdout}{stderr}", out.status);
}

#[test]
fn without_a_router_the_list_is_empty_and_nothing_is_said() {
    let Some(program) = compile("no_router") else { return };
    let out = run(&program, &[], Path::new("/nonexistent/router.sock"));
    assert_ok("no_router", &out);
    assert!(out.stderr.is_empty(), "{}", String::from_utf8_lossy(&out.stderr));
}

#[test]
fn without_a_router_debians_tools_see_no_device() {
    for (tool, status, says) in [("ibv_devices", 0, "node GUID"), ("ibv_devinfo", 255, "No IB devices found")]
    {
        let path = Path::new("/usr/bin").join(tool);
        if !path.exists() {
            println!("skipped: {tool} (Debian package ibverbs-utils) is not installed");
            continue;
        }
        let out = run(&path, &[], Path::new("/nonexistent/router.sock"));
        let text = String::from_utf8_lossy(&out.stdout) + String::from_utf8_lossy(&out.stderr);
        assert!(text.contains(says) && !text.contains("ff0"), "{tool}: {text}");
        assert_eq!(out.status.code(), Some(status), "{tool}: {text}");
    }
}

/// A router of this test's own; stopped when dropped.
struct Router {
    child: Child,
    dir: PathBuf,
}

impl Router {
    fn start(name: &str) -> Self {
        let dir = tmp().join(format!("{name}-{}", std::process::id()));
        std::fs::create_dir_all(&dir).expect("a directory");
        Self { child: Self::spawn(&dir), dir }
    }

    /// Starts one and waits until it serves.
    fn spawn(dir: &Path) -> Child {
        let mut command = Command::new(super::router());
        command.arg("router").arg("--socket").arg(dir.join("router.sock"));
        command.env("FREEFLOW_LOG", "info").stderr(Stdio::piped());
        let mut child = command.spawn().expect("freeflow starts");
        let mut lines = BufReader::new(child.stderr.take().expect("piped")).lines();
        // Ends with an error if the router does: its stderr closes.
        let up = lines.any(|line| line.is_ok_and(|line| line.contains("listens on")));
        std::thread::spawn(move || lines.for_each(drop));
        assert!(up, "the router did not come up");
        child
    }

    fn socket(&self) -> PathBuf {
        self.dir.join("router.sock")
    }
}

impl Drop for Router {
    fn drop(&mut self) {
        let pid = libc::pid_t::try_from(self.child.id()).expect("a pid");
        // SAFETY: our own child, not waited for yet.
        unsafe { libc::kill(pid, libc::SIGTERM) };
        let ended = self.child.wait();
        if !std::thread::panicking() {
            assert!(ended.expect("it can be waited for").success(), "the router did not end well");
        }
        let _ = std::fs::remove_dir_all(&self.dir);
    }
}

fn run_with_router(name: &str) {
    let Some(program) = compile(name) else { return };
    let router = Router::start(name);
    assert_ok(name, &run(&program, &[], &router.socket()));
}

#[test]
fn objects_are_those_of_libibverbs() {
    run_with_router("objects");
}

#[test]
fn events_are_delivered_and_acknowledged() {
    run_with_router("events");
}

#[test]
fn extended_posting_and_polling() {
    run_with_router("extended");
}

#[test]
fn atomics_between_small_regions_of_two_contexts() {
    run_with_router("contexts");
}

#[test]
fn datagrams_arrive_with_their_senders_address() {
    run_with_router("datagram");
}

#[test]
fn async_events_name_their_object_and_hold_up_its_end() {
    run_with_router("async");
}

#[test]
fn a_forked_child_neither_disturbs_nor_hangs() {
    run_with_router("forked");
}

#[test]
fn signals_interrupt_a_wait_as_they_do_a_read() {
    run_with_router("signals");
}

#[test]
fn connections_outlive_the_router() {
    let Some(program) = compile("router_gone") else { return };
    let mut router = Router::start("gone");
    let mut command = command(&program, &[], &router.socket());
    command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = command.spawn().expect("timeout starts");
    let mut stdout = BufReader::new(child.stdout.take().expect("piped")).lines();
    let mut hear = |word: &str| assert_eq!(stdout.next().expect("a line").expect("text"), word);
    hear("ready");
    router.child.kill().and_then(|()| router.child.wait()).expect("the router dies");
    child.stdin.take().expect("piped").write_all(b"x").expect("it listens");
    hear("alone");
    router.child = Router::spawn(&router.dir);
    assert_ok("router_gone", &child.wait_with_output().expect("it can be waited for"));
}

#[test]
fn ibv_devinfo_shows_the_device() {
    let tool = Path::new("/usr/bin/ibv_devinfo");
    if !tool.exists() {
        println!("skipped: ibv_devinfo (Debian package ibverbs-utils) is not installed");
        return;
    }
    let router = Router::start("devinfo");
    let out = run(tool, &["-v"], &router.socket());
    assert_ok("ibv_devinfo", &out);
    let text = String::from_utf8_lossy(&out.stdout);
    for line in
        ["hca_id:\tff0", "PORT_ACTIVE (4)", "link_layer:\t\tEthernet", "RoCE v2", "phys_port_cnt:\t\t\t1"]
    {
        assert!(text.contains(line), "no {line:?} in\n{text}");
    }
}
