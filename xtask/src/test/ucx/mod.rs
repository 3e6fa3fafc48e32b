//! Unmodified UCX and MPI programs over our transport: Debian's, and (in the full matrix) each release of PyPI's wheels.
//!
//! UCX_TLS=ff,self leaves no other way: what works went by FreeFlow.

mod layout;
mod mpi;
mod pair;
mod perftest;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use super::{Outcome, Tally};
use crate::process::{self, Done, Echo};
use mpi::{Mpi, WheelMpi};
use pair::{ALWAYS, NEWEST, WHEELS};

const LIMIT: Duration = Duration::from_secs(240);

pub fn run(tally: &mut Tally, chosen: impl Fn(&str) -> bool) {
    let mut check = |name: &str, run: &dyn Fn() -> Outcome| {
        if chosen(name) {
            tally.check(name, run);
        }
    };
    check("ucx info", &info);
    check("ucx layout of Debian's release", &layout::debian);
    for place in [Place::OneHost, Place::TwoHosts] {
        let between = place.name();
        check(&format!("ucx perftest, UCT, between {between}"), &|| perftest::uct(place));
        check(&format!("ucx perftest, UCP, between {between}"), &|| perftest::ucp(place));
        check(&format!("ucx example between {between}"), &|| pair::example(place));
        check(&format!("ucx peer failure between {between}"), &|| pair::peer_failure(place));
        check(&format!("ucx mpi: freeflow exec as rsh agent between {between}"), &|| mpi::by_exec(place));
    }
    check("ucx refuses what it does not know", &refusal);
    for (name, mpi) in [("openmpi", Mpi::Open), ("mpich", Mpi::Mpich)] {
        for ranks in [2, 4] {
            check(&format!("ucx mpi: Debian's {name}, {ranks} ranks"), &|| mpi::debian(mpi, ranks));
        }
    }
    check("ucx mpi: a rank is killed", &mpi::killed_rank);
    for wheel in WHEELS.iter().filter(|wheel| ALWAYS.contains(wheel)) {
        check(&format!("ucx wheel {wheel}"), &|| pair::traffic_on(wheel));
    }
    for place in [Place::OneHost, Place::TwoHosts] {
        let name = format!("ucx wheel {NEWEST} between {}", place.name());
        check(&name, &|| pair::example_on(NEWEST, place));
    }
    for mpi in [WheelMpi::OPEN, WheelMpi::MPICH] {
        for ranks in [2, 4] {
            check(&format!("ucx mpi: PyPI's {}, {ranks} ranks", mpi.package), &|| mpi.run(ranks));
        }
    }
}

/// All of that, the other releases, and messages of every size.
pub fn matrix(tally: &mut Tally, chosen: impl Fn(&str) -> bool) {
    run(tally, &chosen);
    for place in [Place::OneHost, Place::TwoHosts] {
        let name = format!("ucx perftest, every size, between {}", place.name());
        if chosen(&name) {
            tally.check(&name, || perftest::every_size(place));
        }
    }
    for wheel in WHEELS.iter().filter(|wheel| !ALWAYS.contains(wheel)) {
        let name = format!("ucx wheel {wheel}");
        if chosen(&name) {
            tally.check(&name, || pair::traffic_on(wheel));
        }
    }
}

const SETTINGS: &str = "export UCX_TLS=ff,self UCX_WARN_UNUSED_ENV_VARS=n\n";

/// Where the two of a pair are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Place {
    OneHost,
    TwoHosts,
}

impl Place {
    fn name(self) -> &'static str {
        if self == Place::OneHost { "containers" } else { "hosts" }
    }

    /// The pair's containers.
    fn containers(self) -> [&'static str; 2] {
        if self == Place::OneHost { ["c1", "c2"] } else { ["h1c1", "h2c1"] }
    }

    /// The transport's device that leads from one to the other, and the one that does not.
    fn devices(self) -> [&'static str; 2] {
        if self == Place::OneHost { ["ff0:1", "ff0:net"] } else { ["ff0:net", "ff0:1"] }
    }

    /// Arguments of the lab that has them.
    fn lab(self) -> &'static [&'static str] {
        if self == Place::OneHost { &[] } else { &["--hosts", "2"] }
    }
}

fn lab(place: Place, runs: &[(&str, &str)]) -> Result<Done, String> {
    let mut command = Command::new(crate::layout::freeflow());
    command.arg("lab").args(place.lab());
    for (container, script) in runs {
        command.arg("--run").arg(format!("{container}={script}"));
    }
    finished(&mut command)
}

fn finished(command: &mut Command) -> Result<Done, String> {
    process::run(command, LIMIT, Echo::Quiet).map_err(|failure| failure.to_string())
}

fn verdict(done: &Done, holds: bool, why: &str) -> Outcome {
    if done.success() && holds {
        return Ok(());
    }
    let how = if done.success() { why.to_owned() } else { done.how() };
    Err(format!("{how}\n{}", done.tail()))
}

// ---- on this host -----------------------------------------------------------------------------------------------

/// `freeflow run` with a router of the tests' own.
fn freeflow_run(work: &Workplace) -> Command {
    let mut command = Command::new(crate::layout::freeflow());
    command.arg("run").arg("--router").arg(work.path("router.sock")).arg("--");
    command.env("UCX_TLS", "ff,self").env("UCX_WARN_UNUSED_ENV_VARS", "n");
    command
}

/// A directory for a test's files, and its router, which ends with it.
struct Workplace(PathBuf, Option<process::Running>);

impl Workplace {
    fn new() -> Result<Self, String> {
        static COUNT: std::sync::atomic::AtomicU32 = std::sync::atomic::AtomicU32::new(0);
        let count = COUNT.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
        let dir = PathBuf::from(format!("/var/tmp/freeflow-ucx-{}-{count}", std::process::id()));
        fs::create_dir_all(&dir).map_err(|error| error.to_string())?;
        Ok(Self(dir, None))
    }

    fn with_router() -> Result<Self, String> {
        let mut work = Self::new()?;
        let socket = work.path("router.sock");
        let mut router = Command::new(crate::layout::freeflow());
        router.args(["router", "--socket"]).arg(&socket);
        work.1 =
            Some(process::Running::start(&mut router, Echo::Quiet).map_err(|failure| failure.to_string())?);
        let deadline = std::time::Instant::now() + Duration::from_secs(20);
        while !socket.exists() {
            if std::time::Instant::now() > deadline {
                return Err("the router did not start".into());
            }
            std::thread::yield_now();
        }
        Ok(work)
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.join(name)
    }
}

impl Drop for Workplace {
    fn drop(&mut self) {
        if let Some(router) = self.1.take() {
            router.terminate();
            let _ = router.finish(Duration::from_secs(20));
        }
        let _ = fs::remove_dir_all(&self.0);
    }
}

fn info() -> Outcome {
    let work = Workplace::with_router()?;
    for (flag, needed) in [
        ("-d", &["Transport: ff", "Device: ff0:1", "Device: ff0:net"][..]),
        ("-f", &["UCX_FF_FIFO_SIZE=128"]),
    ] {
        let done = finished(freeflow_run(&work).args(["ucx_info", flag]))?;
        let missing = needed.iter().find(|text| !done.stdout.contains(**text));
        verdict(&done, missing.is_none(), &format!("ucx_info {flag} does not say {missing:?}"))?;
    }
    Ok(())
}

/// A UCX that is newer than any we know, or built otherwise, must not be guessed at: a library that looks like one.
fn refusal() -> Outcome {
    let work = Workplace::with_router()?;
    let source = crate::layout::root().join("plugins/ucx-tl/tests/strange.c");
    for (mark, says) in [("uct_ep_get_sgl_zcopy", "newer than"), ("ucs_stats_node_alloc", "statistics")] {
        let library = work.path(&format!("libuct-{mark}.so"));
        let host = work.path(&format!("{mark}.host"));
        compile(&source, &library, &["-shared", "-fPIC", "-DLIBRARY", &format!("-DMARK={mark}")])?;
        compile(&source, &host, &["-ldl"])?;
        let plugin = crate::layout::dist().join("lib/freeflow/ucx/libuct_ff.so.0");
        let done = finished(Command::new(&host).arg(&library).arg(plugin))?;
        verdict(&done, done.stderr.contains(says), &format!("it did not say {says:?}"))?;
    }
    Ok(())
}

fn compile(source: &Path, to: &Path, arguments: &[&str]) -> Outcome {
    compile_with(Command::new("cc"), source, to, arguments)
}

fn compile_with(mut cc: Command, source: &Path, to: &Path, arguments: &[&str]) -> Outcome {
    cc.args(["-O2", "-Wall", "-Wextra", "-o"]).arg(to).arg(source).args(arguments);
    let done = finished(&mut cc)?;
    verdict(&done, true, "")
}
