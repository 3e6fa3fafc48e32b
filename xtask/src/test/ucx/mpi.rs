//! MPI programs over the transport: examples/mpi/check.c on Debian's and PyPI's, on one host and between containers.

use std::path::Path;
use std::process::Command;
use std::time::Instant;

use super::pair::venv;
use super::{LIMIT, Outcome, Place, Workplace, compile_with, finished, freeflow_run, verdict};
use crate::layout;
use crate::process::{Done, Echo, Running};

/// How an MPI is told to go by UCX, also between processes of one host.
#[derive(Debug, Clone, Copy)]
pub enum Mpi {
    Open,
    Mpich,
}

impl Mpi {
    fn arguments(self) -> &'static [&'static str] {
        match self {
            Mpi::Open => &[
                "--oversubscribe",
                "--bind-to",
                "none",
                "--mca",
                "pml",
                "ucx",
                "--mca",
                "osc",
                "ucx",
                "--mca",
                "opal_common_ucx_tls",
                "any",
                "--mca",
                "opal_common_ucx_devices",
                "any",
            ],
            Mpi::Mpich => &["-env", "MPIR_CVAR_NOLOCAL", "1", "-env", "MPIR_CVAR_CH4_NETMOD", "ucx"],
        }
    }
}

/// Runs examples/mpi/check.c.
fn run_mpi(
    work: &Workplace,
    mpi: Mpi,
    cc: &Path,
    run: &Path,
    ranks: u32,
    more: &[&str],
) -> Result<Done, String> {
    let program = work.path("check");
    compile_with(Command::new(cc), &layout::root().join("examples/mpi/check.c"), &program, &[])?;
    let mut command = freeflow_run(work);
    for name in ["OMPI_ALLOW_RUN_AS_ROOT", "PRTE_ALLOW_RUN_AS_ROOT"] {
        command.env(name, "1").env(format!("{name}_CONFIRM"), "1");
    }
    command.args(["timeout", "120"]).arg(run).args(["-np", &ranks.to_string()]).args(mpi.arguments());
    finished(command.arg(&program).args(more))
}

fn right_data(done: &Done, ranks: u32) -> Outcome {
    let said = done.stdout.contains(&format!("check: {ranks} ranks, all data right"));
    verdict(done, said, "it did not say that all data was right")
}

pub fn debian(mpi: Mpi, ranks: u32) -> Outcome {
    let work = Workplace::with_router()?;
    let name = if matches!(mpi, Mpi::Open) { "openmpi" } else { "mpich" };
    let (cc, run) = (format!("mpicc.{name}"), format!("mpirun.{name}"));
    right_data(&run_mpi(&work, mpi, Path::new(&cc), Path::new(&run), ranks, &[])?, ranks)
}

/// One of two ranks is killed in the middle: the job ends, and the router has nothing left of it.
pub fn killed_rank() -> Outcome {
    let work = Workplace::with_router()?;
    let done =
        run_mpi(&work, Mpi::Open, Path::new("mpicc.openmpi"), Path::new("mpirun.openmpi"), 2, &["die"])?;
    if done.success() || done.status.code() == Some(124) {
        return Err(format!("the job went on: {}\n{}", done.how(), done.tail()));
    }
    let mut ps = Command::new(layout::freeflow());
    ps.args(["ps", "--json", "--router"]).arg(work.path("router.sock"));
    let left = finished(&mut ps)?;
    let clean = !left.stdout.contains("\"qpn\"");
    verdict(&left, clean, "the router still has queue pairs of it")
}

/// An MPI of PyPI's, with a UCX of its own.
pub struct WheelMpi {
    pub package: &'static str,
    version: &'static str,
    run: &'static str,
    mpi: Mpi,
}

impl WheelMpi {
    pub const OPEN: Self = Self { package: "openmpi", version: "5.0.11", run: "mpirun", mpi: Mpi::Open };
    pub const MPICH: Self = Self { package: "mpich", version: "5.0.2", run: "mpiexec", mpi: Mpi::Mpich };

    pub fn run(&self, ranks: u32) -> Outcome {
        let home = venv(self.package)?;
        if !home.join("bin/mpicc").exists() {
            let mut pip = Command::new(home.join("bin/pip"));
            pip.args(["install", "--quiet", &format!("{}=={}", self.package, self.version)]);
            verdict(&finished(&mut pip)?, true, "")?;
        }
        let work = Workplace::with_router()?;
        let bin = home.join("bin");
        let (cc, run) = (bin.join("mpicc"), bin.join(self.run));
        right_data(&run_mpi(&work, self.mpi, &cc, &run, ranks, &[])?, ranks)
    }
}

/// Debian's OpenMPI between containers: mpirun on their host (the first of two), with `freeflow exec` as its rsh agent.
pub fn by_exec(place: Place) -> Outcome {
    let work = Workplace::new()?;
    let program = work.path("check");
    let source = layout::root().join("examples/mpi/check.c");
    compile_with(Command::new("mpicc.openmpi"), &source, &program, &[])?;
    // The containers' daemons want to find the agent, too, and their users may not see this tree.
    let agent = work.path("freeflow");
    std::fs::copy(layout::freeflow(), &agent).map_err(|error| format!("{}: {error}", agent.display()))?;
    // Not the first ones: other labs on this machine may have containers of the same names.
    let (count, [first, second]) = match place {
        Place::OneHost => ("8", ["c7", "c8"]),
        Place::TwoHosts => ("5", ["h1c5", "h2c5"]),
    };
    let mut lab = Command::new(layout::freeflow());
    lab.arg("lab").args(place.lab()).args([
        "--containers",
        count,
        "--run",
        &format!("{first}=exec sleep 600"),
    ]);
    let lab = Running::start(&mut lab, Echo::Quiet).map_err(|failure| failure.to_string())?;
    let outcome = exec_answers(second).and_then(|()| {
        let mut command = Command::new(layout::freeflow());
        command.args([
            "exec",
            "--host",
            first,
            "--",
            "timeout",
            "120",
            "mpirun.openmpi",
            "--allow-run-as-root",
        ]);
        command.args(["--mca", "plm_rsh_agent", &format!("{} exec", agent.display())]);
        command.args(["-np", "4", "--host", &format!("{first}:2,{second}:2"), "-x", "UCX_TLS=ff,self"]);
        command.args(Mpi::Open.arguments()).arg(&program);
        right_data(&finished(&mut command)?, 4)
    });
    lab.terminate();
    let ended = lab.finish(LIMIT).map_err(|failure| failure.to_string())?;
    outcome.map_err(|why| format!("{why}\n{}", ended.tail()))
}

/// Waits until the lab has that container.
fn exec_answers(container: &str) -> Outcome {
    let started = Instant::now();
    loop {
        let done = finished(Command::new(layout::freeflow()).args(["exec", container, "--", "true"]))?;
        if done.success() {
            return Ok(());
        }
        if started.elapsed() > LIMIT {
            return Err(format!("{container} is not there: {}", done.tail()));
        }
    }
}
