//! C programs and Debian's own tools on the built libraries, with and without a router.

use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::sync::OnceLock;

fn tmp() -> &'static Path {
    Path::new(env!("CARGO_TARGET_TMPDIR"))
}

/// A directory to put on LD_LIBRARY_PATH: the libraries under the names programs look for.
fn lib_dir() -> &'static Path {
    static DIR: OnceLock<PathBuf> = OnceLock::new();
    DIR.get_or_init(|| {
        let dir = tmp().join("cm-lib");
        std::fs::create_dir_all(&dir).expect("a directory");
        for (library, name) in [(super::library(), "librdmacm.so.1"), (super::verbs(), "libibverbs.so.1")] {
            let link = dir.join(name);
            let _ = std::fs::remove_file(&link); // of an earlier run
            std::os::unix::fs::symlink(library, &link).expect("a link");
        }
        dir
    })
}

/// Compiles tests/c/NAME.c, or says what is missing.
fn compile(name: &str) -> Option<PathBuf> {
    if !Path::new("/usr/include/rdma/rdma_cma.h").exists() {
        println!("skipped: librdmacm-dev is not installed");
        return None;
    }
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/c").join(name).with_extension("c");
    let exe = tmp().join(format!("cm-{name}"));
    let mut cc = Command::new("cc");
    cc.args(["-D_GNU_SOURCE", "-Wall", "-Wextra", "-Werror", "-O1", "-g"]);
    let status = cc.arg(source).arg("-o").arg(&exe).args(["-lrdmacm", "-libverbs", "-lpthread"]).status();
    assert!(status.expect("cc (Debian package gcc) starts").success(), "{name}.c does not compile");
    Some(exe)
}

/// A program on our libraries; `timeout` (coreutils) is its watchdog.
fn command(program: &Path, args: &[&str], socket: &Path) -> Command {
    let mut command = Command::new("timeout");
    command.args(["-k", "1", "60"]).arg(program).args(args);
    command.env("LD_LIBRARY_PATH", lib_dir()).env("FREEFLOW_SOCKET", socket);
    command
}

fn assert_ok(what: &str, out: &Output) {
    let (stdout, stderr) = (String::from_utf8_lossy(&out.stdout), String::from_utf8_lossy(&out.stderr));
    assert!(out.status.success(), "{what}: {}\n{stdout}{stderr}", out.status);
}

/// A router of this test's own; stopped when dropped.
struct Router {
    child: Child,
    dir: PathBuf,
}

impl Router {
    fn start(name: &str) -> Self {
        let dir = tmp().join(format!("cm-{name}-{}", std::process::id()));
        std::fs::create_dir_all(&dir).expect("a directory");
        let mut command = Command::new(super::router());
        command.arg("router").arg("--socket").arg(dir.join("router.sock"));
        command.env("FREEFLOW_LOG", "info").stderr(Stdio::piped());
        let mut child = command.spawn().expect("freeflow starts");
        let mut lines = BufReader::new(child.stderr.take().expect("piped")).lines();
        // Ends with an error if the router does: its stderr closes.
        let up = lines.any(|line| line.is_ok_and(|line| line.contains("listens on")));
        std::thread::spawn(move || lines.for_each(drop));
        let router = Self { child, dir };
        assert!(up, "the router did not come up");
        router
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
    assert_ok(name, &command(&program, &[], &router.socket()).output().expect("timeout starts"));
}

#[test]
fn without_a_router_there_is_no_device() {
    let Some(program) = compile("no_router") else { return };
    let run = command(&program, &[], Path::new("/nonexistent/router.sock")).output();
    assert_ok("no_router", &run.expect("timeout starts"));
}

#[test]
fn addresses_and_channels_keep_the_rules() {
    run_with_router("addresses");
}

#[test]
fn handshakes_have_their_events_in_order() {
    run_with_router("handshake");
}

#[test]
fn synchronous_endpoints_wait_for_themselves() {
    run_with_router("synchronous");
}

#[test]
fn streams_carry_every_byte_once() {
    run_with_router("rs_stream");
}

#[test]
fn a_call_may_be_left_by_longjmp() {
    run_with_router("rs_longjmp");
}

#[test]
fn xrc_endpoints_share_receives() {
    run_with_router("xrc");
}

#[test]
fn mapped_buffers_take_the_peers_bytes() {
    run_with_router("rs_mapped");
}

#[test]
fn datagrams_keep_their_boundaries() {
    run_with_router("rs_datagram");
}

#[test]
fn forks_and_deaths_are_told_apart() {
    run_with_router("processes");
}

#[test]
fn blocked_readers_can_be_cancelled() {
    run_with_router("threads");
}

#[test]
fn a_blocked_reader_hears_of_the_routers_end() {
    let Some(program) = compile("router_ends") else { return };
    let router = Router::start("ends");
    let mut command = command(&program, &[], &router.socket());
    let mut child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().expect("timeout starts");
    let mut ready = String::new();
    let mut stdout = BufReader::new(child.stdout.take().expect("piped"));
    stdout.read_line(&mut ready).expect("a line");
    assert_eq!(ready, "ready\n");
    drop(router);
    assert_ok("router_ends", &child.wait_with_output().expect("it can be waited for"));
}
