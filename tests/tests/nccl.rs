//! NCCL's network plugin under `nccl-replay`: one process, several, threads of one, containers; and ranks and routers that
//! die. Each run prints its seed when it fails.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use freeflow_tests::launch::{Ended, Group};
use freeflow_tests::path::{Host, Staged, Tree};

/// A watchdog: each takes a few seconds; nccl-replay's own speaks before.
const LIMIT: Duration = Duration::from_secs(170);
const REPLAY: &str = env!("CARGO_BIN_EXE_nccl-replay");

/// One at a time: ranks poll, and more of them than processors only wait for each other.
fn turn() -> MutexGuard<'static, ()> {
    static TURN: Mutex<()> = Mutex::new(());
    TURN.lock().unwrap_or_else(PoisonError::into_inner)
}

fn tree() -> Tree {
    let target = Path::new(env!("CARGO_TARGET_TMPDIR")).parent().expect("cargo's target directory");
    Tree::find(target).unwrap_or_else(|why| panic!("{why}"))
}

fn text(ended: &Ended) -> String {
    ended.lines.iter().map(|line| format!("{}: {}\n", line.side, line.text)).collect()
}

fn judge(ended: &Ended) {
    let well = ended.statuses.iter().all(|status| status.is_some_and(|status| status.success()));
    assert!(well, "{:?}\n{}", ended.statuses, text(ended));
}

/// Runs nccl-replay with a router of its own.
fn replay(args: &str) {
    let _turn = turn();
    let host = Host::start(&tree()).expect("a router");
    let mut group = Group::new(LIMIT);
    group.start(host.run(Path::new(REPLAY)).args(args.split(' '))).expect("nccl-replay starts");
    judge(&group.finish());
}

/// Two ranks, each in a container of its own.
fn in_containers(scenario: &str) {
    let _turn = turn();
    let staged = Staged::new(Path::new(REPLAY)).expect("a place that containers see");
    let rank = |rank: usize, at: &str| {
        format!("{} --ranks 2 --rank {rank} --at {at} {scenario}", staged.program.display())
    };
    // The lab ends with its last command, which here waits for rank 0; rank 1 then hears SIGTERM, and may still be writing.
    let first = format!("c1=mkfifo /tmp/end; {}; s=$?; echo $s >/tmp/end; exit $s", rank(0, "0.0.0.0:7000"));
    let second = format!("c2=trap '' TERM; {}", rank(1, "@c1:7000"));
    let mut lab = Command::new(tree().freeflow());
    lab.args(["lab", "--run", &first, "--run", &second, "--run", "c1=read -r s </tmp/end; exit $s"]);
    let mut group = Group::new(LIMIT);
    group.start(&mut lab).expect("a lab");
    let ended = group.finish();
    judge(&ended);
    assert!(
        text(&ended).contains("rank 0 passed") && text(&ended).contains("rank 1 passed"),
        "{}",
        text(&ended)
    );
}

#[test]
fn contract_of_every_version() {
    replay("--logged libnccl-net-freeflow.so --logged vIP --logged ff0 contract");
}

#[test]
fn ring_of_all_sizes() {
    replay("--ranks 2 --spawn ring");
}

#[test]
fn ring_with_the_oldest_version() {
    replay("--ranks 2 --spawn --api 6 ring --max 1048576");
}

#[test]
fn all_to_all_of_processes() {
    replay("--ranks 4 --spawn --api 8 all-to-all");
}

#[test]
fn all_to_all_of_threads() {
    replay("--ranks 4 --threads --api 10 all-to-all");
}

#[test]
fn all_reduce() {
    replay("--ranks 4 --spawn all-reduce");
}

#[test]
fn aborts_at_random() {
    replay("--ranks 2 --spawn aborts --rounds 6");
}

#[test]
fn a_rank_dies() {
    replay("--ranks 3 --spawn killed");
}

#[test]
fn reloads() {
    replay("reloads");
    replay("--api 10 reloads --times 5");
}

#[test]
fn mixed_operations() {
    replay("--ranks 3 --spawn mixed --operations 100000");
}

#[test]
fn ring_of_containers() {
    in_containers("ring");
}

#[test]
fn mixed_operations_of_containers() {
    in_containers("--logged vIP mixed --operations 30000");
}

#[test]
fn the_router_dies() {
    let _turn = turn();
    let host = Host::start(&tree()).expect("a router");
    let mut group = Group::new(LIMIT);
    group
        .start(host.run(Path::new(REPLAY)).args(["--ranks", "2", "--spawn", "orphaned"]))
        .expect("nccl-replay starts");
    let idle = |line: &freeflow_tests::launch::Line| (line.text == "# idle").then_some(());
    assert!(group.wait_for(idle).is_some() && group.wait_for(idle).is_some(), "both ranks get that far");
    host.kill();
    let ended = group.finish();
    judge(&ended);
    assert!(text(&ended).contains("noticed: test of a receive: 2"), "{}", text(&ended));
}

#[test]
fn the_data_path_allocates_nothing() {
    let _turn = turn();
    let counter = Path::new(env!("CARGO_TARGET_TMPDIR")).join("liballocations.so");
    compile("allocations.c", &counter, &["-shared", "-fPIC"]);
    let host = Host::start(&tree()).expect("a router");
    let mut group = Group::new(LIMIT);
    let mut command = host.run(Path::new(REPLAY));
    group.start(command.arg("allocations").env("LD_PRELOAD", counter)).expect("nccl-replay starts");
    judge(&group.finish());
}

/// Compiles a file of tests/nccl.
fn compile(source: &str, program: &Path, options: &[&str]) {
    let mut cc = Command::new("cc");
    cc.args(["-std=c11", "-D_GNU_SOURCE", "-O1", "-Wall", "-Wextra", "-Werror", "-o"]).arg(program);
    cc.arg(freeflow_tests::root().join("tests/nccl").join(source)).args(options);
    let built = cc.output().expect("cc runs");
    assert!(built.status.success(), "{}", String::from_utf8_lossy(&built.stderr));
}

/// The real NCCL looks the plugin up and finds our newest version that it knows.
#[test]
fn nccl_itself_loads_it() {
    let _turn = turn();
    let program = Path::new(env!("CARGO_TARGET_TMPDIR")).join("unique_id");
    compile("unique_id.c", &program, &["-ldl"]);
    let library = nccl().unwrap_or_else(|why| panic!("{why}"));
    let host = Host::start(&tree()).expect("a router");
    let mut group = Group::new(LIMIT);
    group.start(host.run(&program).arg(library).env("NCCL_DEBUG", "INFO")).expect("the program starts");
    let ended = group.finish();
    let text = text(&ended);
    assert!(text.contains("ncclGetUniqueId: 0") && text.contains("mapped: "), "{text}");
    // It says so of each version that it looks for in vain.
    assert!(!text.contains("Failed to find ncclNetPlugin"), "{text}");
}

/// NCCL 2.21.5's library, from PyPI: the last one that opens plugins without a driver. It is fetched once.
fn nccl() -> Result<PathBuf, String> {
    const PACKAGE: &str = "nvidia-nccl-cu12==2.21.5";
    let target = Path::new(env!("CARGO_TARGET_TMPDIR"));
    let library = target.join("nccl-2.21.5/nvidia/nccl/lib/libnccl.so.2");
    if library.is_file() {
        return Ok(library);
    }
    let (venv, into) = (target.join("venv"), target.join("nccl-2.21.5"));
    let run = |command: &mut Command| {
        let done = command.output().map_err(|e| format!("{command:?}: {e}"))?;
        let said = String::from_utf8_lossy(&done.stderr).into_owned();
        if done.status.success() { Ok(()) } else { Err(format!("{command:?}: {said}")) }
    };
    run(Command::new("/usr/bin/python3").args(["-m", "venv"]).arg(&venv))?;
    let mut pip = Command::new(venv.join("bin/pip"));
    run(pip.args(["install", "--quiet", "--no-deps", "--target"]).arg(&into).arg(PACKAGE))?;
    if library.is_file() { Ok(library) } else { Err(format!("{} is not there", library.display())) }
}
