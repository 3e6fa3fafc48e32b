//! Running one figure: two programs pinned to the two processors, or a probe, and reading the number it prints.
//!
//! Every side runs the same way: the server on one processor, the client, which measures, on the other.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use super::cases::HAND_OVER;
use super::probes;
use crate::failure::{Context as _, Failure, Result};
use crate::perftest;
use crate::process::{self, Echo, Running};

const SERVER_CPU: &str = "0";
const CLIENT_CPU: &str = "1";
/// One figure takes a second or less on an idle machine.
const LIMIT: Duration = Duration::from_secs(60);

/// Which device perftest runs on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Provider {
    Ours,
    /// Ours, with perftest using the `ibv_wr_*` interface.
    OursWr,
    /// Does nothing but complete.
    Empty,
}

/// The processors a probe runs on.
#[derive(Debug, Clone, Copy)]
pub enum Cpus {
    One,
    Both,
}

/// Which number of a program's table.
#[derive(Debug, Clone, Copy)]
pub enum Read {
    /// Median latency.
    Typical,
    /// Mean latency.
    Mean,
    /// Bandwidth over the whole run.
    Average,
    /// Messages per second over the whole run.
    Rate,
}

/// UCX's name of our transport.
pub const OUR_TLS: &str = "ff";

/// What carries an MPI's messages.
#[derive(Debug, Clone, Copy)]
pub enum MpiSide {
    /// UCX over these transports.
    Ucx(&'static str),
    /// OpenMPI's own shared memory.
    Native,
}

/// How a figure is had.
#[derive(Debug, Clone, Copy)]
pub enum How {
    /// A program of benches/probes that prints the figure.
    Probe {
        program: &'static str,
        cpus: Cpus,
        arg: Option<&'static str>,
    },
    /// The same, on our device.
    Verbs {
        program: &'static str,
        cpus: Cpus,
        arg: &'static str,
    },
    Perftest {
        program: &'static str,
        provider: Provider,
        size: u64,
        count: u64,
        read: Read,
        more: &'static [&'static str],
    },
    Ucx {
        tls: &'static str,
        test: &'static str,
        size: u64,
        count: u64,
        read: Read,
    },
    /// A collective operation of MPI's between two processes.
    Mpi {
        side: MpiSide,
        op: &'static str,
        size: u64,
    },
    /// A figure of the NCCL plugin: the scenario's own words after the number of ranks, and the line to read.
    Replay {
        ranks: u32,
        scenario: &'static str,
        size: u64,
        amount: u64,
        line: &'static str,
    },
    /// qperf over loopback.
    Tcp {
        test: &'static str,
        size: u64,
    },
}

/// What all figures share: the probes and a router of our own.
#[derive(Debug)]
pub struct Stage {
    probes: PathBuf,
    freeflow: PathBuf,
    socket: PathBuf,
    router: Option<Running>,
}

impl Stage {
    pub fn new(tree: &Path, probes: PathBuf) -> Result<Self> {
        let dir = std::env::temp_dir().join(format!("ff-bench-{}", std::process::id()));
        std::fs::create_dir_all(&dir).context(format_args!("cannot make {}", dir.display()))?;
        let (freeflow, socket) = (tree.join("bin/freeflow"), dir.join("router.sock"));
        let mut command = Command::new(&freeflow);
        command.arg("router").arg("--socket").arg(&socket).env("FREEFLOW_LOG", "warn");
        let mut router = Running::start(&mut command, Echo::Quiet)?;
        until("the router's socket", || socket.exists() || router.has_ended())?;
        Ok(Self { probes, freeflow, socket, router: Some(router) })
    }

    /// Process group of the router.
    pub fn router(&self) -> Option<i32> {
        self.router.as_ref().map(Running::group)
    }

    /// Ends the router.
    pub fn end(mut self) -> Result<()> {
        if let Some(router) = self.router.take() {
            router.terminate();
            let done = router.finish(LIMIT)?;
            if !done.success() {
                return Err(Failure::new(format!("the router ended with {}: {}", done.how(), done.tail())));
            }
        }
        Ok(())
    }

    /// Runs one figure.
    pub fn figure(&self, how: How) -> Result<f64> {
        match how {
            How::Probe { program, cpus, arg } => self.probe(Command::new("env"), program, cpus, arg),
            How::Verbs { program, cpus, arg } => {
                self.probe(self.with_device(Provider::Ours), program, cpus, Some(arg))
            }
            How::Perftest { program, provider, size, count, read, more } => {
                self.perftest((program, more), provider, size, count, read)
            }
            How::Ucx { tls, test, size, count, read } => self.ucx(tls, test, size, count, read),
            How::Mpi { side, op, size } => self.mpi(side, op, size),
            How::Replay { ranks, scenario, size, amount, line } => {
                self.replay(ranks, [scenario, &size.to_string(), &amount.to_string()], line)
            }
            How::Tcp { test, size } => tcp(test, size),
        }
    }

    /// The raw hand-over between the two processors, in microseconds.
    pub fn hand_over(&self) -> Result<f64> {
        self.figure(How::Probe { program: HAND_OVER_PROBE, cpus: Cpus::Both, arg: None })
            .map_err(|failure| Failure::new(format!("{}: {failure}", HAND_OVER.case)))
    }

    /// The start of a command line that gives the rest of it a device.
    pub fn with_device(&self, provider: Provider) -> Command {
        let preload = |name| self.probes.join(probes::library(name)).display().to_string();
        let mut command = Command::new(&self.freeflow);
        command.env("FREEFLOW_SOCKET", &self.socket).args(["run", "--"]);
        match provider {
            Provider::Ours => drop(command.arg("env")),
            // In front of our library, which `freeflow run` preloads.
            Provider::OursWr => {
                let script = format!("LD_PRELOAD={}:$LD_PRELOAD exec \"$@\"", preload("wr_api"));
                command.args(["sh", "-c", &script, "sh"]);
            }
            Provider::Empty => {
                command = Command::new("env");
                command.arg(format!("LD_PRELOAD={}", preload("empty")));
            }
        }
        command
    }

    pub fn probe_path(&self, program: &str) -> PathBuf {
        self.probes.join(program)
    }

    fn probe(&self, mut command: Command, program: &str, cpus: Cpus, arg: Option<&str>) -> Result<f64> {
        command.arg(self.probe_path(program));
        if matches!(cpus, Cpus::Both) {
            command.arg(SERVER_CPU);
        }
        command.arg(CLIENT_CPU).args(arg);
        let done = process::run(&mut command, LIMIT, Echo::Quiet)?;
        let value = done.stdout.trim().parse().ok().filter(|_| done.success());
        value.ok_or_else(|| Failure::new(format!("{program} ended with {}: {}", done.how(), done.tail())))
    }

    fn replay(&self, ranks: u32, scenario: [&str; 3], line: &str) -> Result<f64> {
        let mut command = self.with_device(Provider::Ours);
        command.arg(super::nccl::program()).args(["--pin", "--spawn", "--ranks", &ranks.to_string()]);
        let done = process::run(command.args(scenario), LIMIT, Echo::Quiet)?;
        let figure = done.stdout.lines().find_map(|l| l.strip_prefix(line)?.trim().parse().ok());
        figure.filter(|_| done.success()).ok_or_else(|| {
            Failure::new(format!("nccl-replay {scenario:?} ended with {}: {}", done.how(), done.tail()))
        })
    }

    fn perftest(
        &self,
        (program, more): (&str, &[&str]),
        provider: Provider,
        size: u64,
        count: u64,
        read: Read,
    ) -> Result<f64> {
        let port = free_port()?;
        let command = |cpu: &str| {
            let mut command = self.with_device(provider);
            command.args(["taskset", "-c", cpu, program, "-F", "--report_gbits"]).args(more);
            command.args(["-s", &size.to_string(), "-n", &count.to_string(), "-p", &port.to_string()]);
            if matches!(read, Read::Typical | Read::Mean) {
                command.arg("-C"); // cycles: microseconds come with two decimals only
            }
            command
        };
        let mut client = command(CLIENT_CPU);
        client.arg("127.0.0.1");
        let text = pair(command(SERVER_CPU), client, port, Server::Ends)?;
        let rows = perftest::rows(&text);
        let row = perftest::row(&rows, size).ok_or_else(|| missing(program, &text))?;
        let column = |index: usize| row.get(index).copied().ok_or_else(|| missing(program, &text));
        match read {
            Read::Typical => Ok(column(4)? / cycles_per_us()?),
            Read::Mean => Ok(column(5)? / cycles_per_us()?),
            Read::Average => Ok(column(3)? / 8.0),
            Read::Rate => column(4),
        }
    }

    fn ucx(&self, tls: &str, test: &str, size: u64, count: u64, read: Read) -> Result<f64> {
        let port = free_port()?;
        let command = |cpu: &str| {
            let ours = tls == OUR_TLS;
            let mut command = if ours { self.with_device(Provider::Ours) } else { Command::new("env") };
            command.arg(format!("UCX_TLS=self,{tls}")).args(["taskset", "-c", cpu, "ucx_perftest", "-f"]);
            command.args(["-t", test, "-s", &size.to_string(), "-n", &count.to_string()]);
            command.args(["-p", &port.to_string()]);
            command
        };
        let mut client = command(CLIENT_CPU);
        client.arg("127.0.0.1");
        let text = pair(command(SERVER_CPU), client, port, Server::Ends)?;
        let rows = perftest::rows(&text);
        // iterations; median, mean and overall time; mean and overall MB/s; mean and overall rate
        let row = rows.last().filter(|row| row.len() == 8).ok_or_else(|| missing("ucx_perftest", &text))?;
        Ok(match read {
            Read::Typical => row[1],
            Read::Mean => row[3],
            Read::Average => row[5] * f64::from(1 << 20) / 1e9,
            Read::Rate => row[7] / 1e6,
        })
    }

    /// Microseconds of one collective operation between two processes, as benches/probes/mpi.c prints them.
    fn mpi(&self, side: MpiSide, op: &str, size: u64) -> Result<f64> {
        let mut command = match side {
            MpiSide::Ucx(OUR_TLS) => self.with_device(Provider::Ours),
            _ => Command::new("env"),
        };
        for name in ["OMPI_ALLOW_RUN_AS_ROOT=1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1"] {
            command.arg(name);
        }
        let mca: &[&str] = match side {
            MpiSide::Ucx(tls) => {
                command.arg(format!("UCX_TLS=self,{tls}")).arg("UCX_WARN_UNUSED_ENV_VARS=n");
                &["pml", "ucx", "opal_common_ucx_tls", "any", "opal_common_ucx_devices", "any"]
            }
            MpiSide::Native => &["pml", "ob1", "btl", "self,vader"],
        };
        command.args(["mpirun.openmpi", "-np", "2", "--bind-to", "none"]);
        for pair in mca.chunks(2) {
            command.arg("--mca").args(pair);
        }
        command.arg(self.probe_path("mpi")).args([op, &size.to_string()]);
        let done = process::run(&mut command, LIMIT, Echo::Quiet)?;
        let value = done.stdout.trim().parse().ok().filter(|_| done.success());
        value.ok_or_else(|| Failure::new(format!("mpirun ended with {}: {}", done.how(), done.tail())))
    }
}

impl Drop for Stage {
    fn drop(&mut self) {
        if let Some(dir) = self.socket.parent() {
            // Left behind, it is an empty folder under /tmp.
            std::fs::remove_dir_all(dir).ok();
        }
    }
}

const HAND_OVER_PROBE: &str = "handover";

fn missing(program: &str, text: &str) -> Failure {
    Failure::new(format!("no figure in what {program} printed:\n{text}"))
}

/// What perftest itself divides by: the time stamp counter's rate, as the kernel prints it.
fn cycles_per_us() -> Result<f64> {
    let text = std::fs::read_to_string("/proc/cpuinfo").context("cannot read /proc/cpuinfo")?;
    let line = text.lines().find_map(|line| line.strip_prefix("cpu MHz")?.split_once(": "));
    let mhz = line.and_then(|(_, mhz)| mhz.trim().parse().ok());
    mhz.ok_or_else(|| Failure::new("no cpu MHz in /proc/cpuinfo"))
}

fn tcp(test: &str, size: u64) -> Result<f64> {
    let port = free_port()?.to_string();
    let mut server = Command::new("taskset");
    server.args(["-c", SERVER_CPU, "qperf", "-lp", &port]);
    let mut client = Command::new("taskset");
    client.args([
        "-c",
        CLIENT_CPU,
        "qperf",
        "-lp",
        &port,
        "127.0.0.1",
        "-t",
        "1",
        "-m",
        &size.to_string(),
        test,
    ]);
    let text = pair(server, client, port.parse().unwrap_or(0), Server::Serves)?;
    let figure = text.lines().find_map(|line| match *line.split_whitespace().collect::<Vec<_>>() {
        ["bw", "=", value, unit] => perftest::scaled(value, unit, 1e9),
        ["latency", "=", value, unit] => perftest::scaled(value, unit, 1e-6),
        _ => None,
    });
    figure.ok_or_else(|| missing("qperf", &text))
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Server {
    /// By itself, after its client.
    Ends,
    /// Until it is told to stop.
    Serves,
}

/// Runs a server and its client, and returns what the client printed.
fn pair(mut server: Command, mut client: Command, port: u16, how: Server) -> Result<String> {
    let mut serving = Running::start(&mut server, Echo::Quiet)?;
    until("a server's port", || listens(port) || serving.has_ended())?;
    let done = process::run(&mut client, LIMIT, Echo::Quiet)?;
    if !done.success() {
        return Err(Failure::new(format!("{client:?} ended with {}: {}", done.how(), done.tail())));
    }
    if how == Server::Serves {
        serving.terminate();
    }
    let served = serving.finish(LIMIT)?;
    if how == Server::Ends && !served.success() {
        return Err(Failure::new(format!("{server:?} ended with {}: {}", served.how(), served.tail())));
    }
    Ok(done.stdout)
}

/// Waits for something the kernel has no event for.
fn until(what: &str, mut happened: impl FnMut() -> bool) -> Result<()> {
    let start = Instant::now();
    while !happened() {
        if start.elapsed() > LIMIT {
            return Err(Failure::new(format!("waited in vain for {what}")));
        }
        std::thread::sleep(Duration::from_millis(2));
    }
    Ok(())
}

/// Does anybody listen on TCP `port`?
fn listens(port: u16) -> bool {
    let wanted = format!(":{port:04X}");
    let tables = ["/proc/net/tcp", "/proc/net/tcp6"];
    tables.iter().filter_map(|table| std::fs::read_to_string(table).ok()).any(|text| {
        text.lines().any(|line| {
            let words: Vec<&str> = line.split_whitespace().collect();
            words.get(1).is_some_and(|local| local.ends_with(&wanted)) && words.get(3) == Some(&"0A")
        })
    })
}

/// A port nobody uses at the moment.
fn free_port() -> Result<u16> {
    let socket = std::net::TcpListener::bind("127.0.0.1:0").context("cannot bind a TCP port")?;
    Ok(socket.local_addr().context("cannot ask for a socket's port")?.port())
}

/// Starts a program whose output nobody reads.
pub fn background(command: &mut Command) -> Result<Running> {
    command.stdin(Stdio::null());
    Running::start(command, Echo::Quiet)
}
