//! C programs and Debian's own tools on the built library, with and without a router.

use std::path::{Path, PathBuf};
use std::process::{Command, Output};
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
fn run(program: &Path, args: &[&str], socket: &Path) -> Output {
    let mut command = Command::new("timeout");
    command.arg("60").arg(program).args(args);
    command.env("LD_LIBRARY_PATH", lib_dir()).env("FREEFLOW_SOCKET", socket);
    command.output().expect("timeout starts")
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
