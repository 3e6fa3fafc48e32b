//! Programs under other allocators and runtimes register memory and keep working: `runtimes/`, run with the tree that
//! users get. Each says "kept working" at its end; what it did until then it checks itself.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use freeflow_tests::launch::Group;
use freeflow_tests::path::{Host, Tree};

/// A watchdog: each takes a few seconds.
const LIMIT: Duration = Duration::from_secs(170);

fn source(name: &str) -> PathBuf {
    freeflow_tests::root().join("tests/runtimes").join(name)
}

/// Where programs are built.
fn made() -> PathBuf {
    let dir = Path::new(env!("CARGO_TARGET_TMPDIR")).join("runtimes");
    std::fs::create_dir_all(&dir).expect("a directory for programs");
    dir
}

fn compile(command: &mut Command) {
    let done = command.output().unwrap_or_else(|e| panic!("{command:?}: {e} (cargo xtask test installs it)"));
    assert!(done.status.success(), "{command:?}: {}", String::from_utf8_lossy(&done.stderr));
}

fn keeps_working(program: impl AsRef<Path>, args: &[&str]) {
    let target = Path::new(env!("CARGO_TARGET_TMPDIR")).parent().expect("cargo's target directory");
    let tree = Tree::find(target).unwrap_or_else(|why| panic!("{why}"));
    let host = Host::start(&tree).expect("a router");
    let mut group = Group::new(LIMIT);
    group.start(host.run(program.as_ref()).args(args)).expect("the program starts");
    let ended = group.finish();
    let well = ended.statuses[0].is_some_and(|status| status.success());
    let text: Vec<&str> = ended.lines.iter().map(|line| line.text.as_str()).collect();
    assert!(well && text.contains(&"kept working"), "{:?}: {}", ended.statuses, text.join("\n"));
}

fn malloc(name: &str, libraries: &[&str]) {
    let program = made().join(name);
    let mut gcc = Command::new("gcc");
    gcc.args(["-std=c11", "-D_GNU_SOURCE", "-O1", "-g", "-Wall", "-Wextra", "-Werror", "-pthread"]);
    compile(gcc.arg(source("malloc.c")).arg("-o").arg(&program).args(libraries));
    keeps_working(program, &[]);
}

#[test]
fn glibc_malloc() {
    malloc("glibc", &["-libverbs"]);
}

#[test]
fn jemalloc() {
    // Debian's package without headers is enough.
    malloc("jemalloc", &["-l:libjemalloc.so.2", "-libverbs"]);
}

#[test]
fn python() {
    // Debian's: other interpreters in PATH may load libraries of their own.
    keeps_working("/usr/bin/python3", &[source("python.py").to_str().expect("UTF-8")]);
}

#[test]
fn go() {
    let program = made().join("go");
    let mut go = Command::new("go");
    go.env("GO111MODULE", "off").env("GOCACHE", made().join("go-cache"));
    compile(go.args(["build", "-o"]).arg(&program).arg(source("go.go")));
    keeps_working(program, &[]);
}

#[test]
fn jvm() {
    // A small heap, so that the collector has to work.
    let options = ["--add-modules", "jdk.incubator.foreign", "--enable-native-access=ALL-UNNAMED", "-Xmx96m"];
    let source = source("Jvm.java");
    keeps_working("/usr/bin/java", &[&options[..], &[source.to_str().expect("UTF-8")]].concat());
}
