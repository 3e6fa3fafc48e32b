//! NCCL's network plugin under `nccl-replay`: one process, several, threads of one, containers; and ranks and routers that
//! die. Each run prints its seed when it fails.

use std::io;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use freeflow_tests::launch::{Ended, Group};
use freeflow_tests::nccl::launch::{Replay, judge, text};
use freeflow_tests::path::{Host, Tree};

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

fn run(replay: impl FnOnce(&Replay<'_>) -> io::Result<Ended>, wanted: &[&str]) {
    let _turn = turn();
    let ended = replay(&Replay { tree: &tree(), program: Path::new(REPLAY), limit: LIMIT });
    judge(&ended.expect("a router, or a lab"), wanted).unwrap_or_else(|why| panic!("{why}"));
}

/// Runs nccl-replay with a router of its own.
fn replay(args: &str) {
    let args: Vec<&str> = args.split(' ').collect();
    run(|replay| replay.alone(&args), &[]);
}

/// Two ranks, each in a container of its own.
fn in_containers(hosts: usize, scenario: &str) {
    run(|replay| replay.in_containers(hosts, scenario), &["rank 0 passed", "rank 1 passed"]);
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
fn ring_with_every_other_version() {
    for version in 7..=11 {
        replay(&format!("--ranks 2 --spawn --api {version} ring --max 20000"));
    }
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
    replay("--ranks 2 --spawn reloads --times 6");
    replay("--ranks 2 --spawn --api 10 reloads --times 3");
}

#[test]
fn mixed_operations() {
    replay("--ranks 3 --spawn mixed --operations 100000");
}

#[test]
fn ring_of_containers() {
    in_containers(1, "ring");
}

#[test]
fn mixed_operations_of_containers() {
    in_containers(1, "--logged vIP mixed --operations 30000");
}

#[test]
fn ring_between_hosts() {
    in_containers(2, "ring");
}

#[test]
fn ring_between_hosts_with_the_oldest_version() {
    in_containers(2, "--api 6 ring --max 100000");
}

#[test]
fn mixed_operations_between_hosts() {
    in_containers(2, "mixed --operations 20000");
}

#[test]
fn aborts_between_hosts() {
    in_containers(2, "aborts --rounds 6");
}

#[test]
fn a_rank_dies_between_hosts() {
    run(|replay| replay.in_containers(2, "killed"), &["rank 0 passed", "# noticed: "]);
}

/// Two ranks that have connected and only receive.
fn idle_ranks(host: &Host, options: &[&str]) -> Group {
    let mut group = Group::new(LIMIT);
    let mut command = host.run(Path::new(REPLAY));
    command.args(["--ranks", "2", "--spawn"]).args(options).arg("orphaned");
    group.start(&mut command).expect("nccl-replay starts");
    let idle = |line: &freeflow_tests::launch::Line| (line.text == "# idle").then_some(());
    assert!(group.wait_for(idle).is_some() && group.wait_for(idle).is_some(), "both ranks get that far");
    group
}

#[test]
fn the_router_dies() {
    let _turn = turn();
    let host = Host::start(&tree()).expect("a router");
    let group = idle_ranks(&host, &[]);
    host.kill();
    judge(&group.finish(), &["noticed: test of a receive: 2"]).unwrap_or_else(|why| panic!("{why}"));
}

/// It is given to connect in v10, and so to those that send; to init since v11; before, there is none.
#[test]
fn connections_have_their_communicators_traffic_class() {
    let _turn = turn();
    for (version, expected) in [("9", 0), ("10", 2), ("12", 4)] {
        let host = Host::start(&tree()).expect("a router");
        let _ranks = idle_ranks(&host, &["--api", version, "--traffic-class", "104"]);
        let mut ps = Command::new(tree().freeflow());
        let ps = ps.args(["ps", "--json", "--router"]).arg(host.socket()).output().expect("freeflow ps");
        let said = String::from_utf8_lossy(&ps.stdout);
        // Each rank has one that sends and one that receives.
        let counts =
            ["\"traffic_class\": ", "\"traffic_class\": 104,"].map(|what| said.matches(what).count());
        assert_eq!(counts, [4, expected], "v{version}: {said}{}", String::from_utf8_lossy(&ps.stderr));
    }
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
    judge(&group.finish(), &[]).unwrap_or_else(|why| panic!("{why}"));
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
