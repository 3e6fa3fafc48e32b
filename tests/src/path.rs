//! Paths: how the two sides of a program are started so that they meet. Knows the command lines of `freeflow`, and
//! nothing of what the programs do.

use std::ffi::OsStr;
use std::io::{self, Read};
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path as FsPath, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;
use std::{env, fs, process};

use rustix::process::{Pid, Signal, kill_process};

use crate::launch::{Ended, Group};

/// No program takes this long on any path; its own watchdog speaks before.
const LIMIT: Duration = Duration::from_secs(170);

/// A way for two sides to meet. The suite is the same over all of them.
pub trait Path {
    fn name(&self) -> &str;
    /// Processes of a program that one run starts.
    fn sides(&self) -> usize;
    /// Whether the device is FreeFlow's, which has no excuse for a skip.
    fn strict(&self) -> bool {
        true
    }
    /// Runs `program` with `args` to its end.
    fn run(&self, program: &FsPath, args: &[String]) -> io::Result<Ended>;
}

/// A command that starts a program on the machine at hand, before its own arguments.
type Wrap<'a> = dyn Fn(&FsPath) -> Command + 'a;

fn one_process(wrap: &Wrap<'_>, program: &FsPath, args: &[String]) -> io::Result<Ended> {
    let mut group = Group::new(LIMIT);
    group.start(wrap(program).arg("--self").args(args))?;
    Ok(group.finish())
}

/// The first is the server's.
fn two_processes([server, client]: [&Wrap<'_>; 2], program: &FsPath, args: &[String]) -> io::Result<Ended> {
    let mut group = Group::new(LIMIT);
    group.start(server(program).args(["--server", "0"]).args(args))?;
    let port = group.wait_for(|line| line.text.strip_prefix("# listening on ").map(str::to_owned));
    if let Some(port) = port {
        group.start(client(program).args(["--client", &format!("127.0.0.1:{port}")]).args(args))?;
    }
    Ok(group.finish())
}

/// `freeflow run`, on a router of its own: both sides in one process, or in two of the same container.
#[derive(Debug)]
pub struct Run<'h> {
    pub host: &'h Host,
    pub processes: usize,
}

impl Path for Run<'_> {
    fn name(&self) -> &str {
        if self.processes == 1 { "direct_self" } else { "direct_processes" }
    }

    fn sides(&self) -> usize {
        self.processes
    }

    fn run(&self, program: &FsPath, args: &[String]) -> io::Result<Ended> {
        let wrap = |program: &FsPath| self.host.run(program);
        let own = ["--dev".to_owned(), "ff0".to_owned()];
        let args = [&own, args].concat();
        if self.processes == 1 {
            one_process(&wrap, program, &args)
        } else {
            two_processes([&wrap, &wrap], program, &args)
        }
    }
}

/// `freeflow run`, each side in a container of its own with an IPv6 address.
#[derive(Debug)]
pub struct Ipv6<'h>(pub &'h Host);

impl Path for Ipv6<'_> {
    fn name(&self) -> &str {
        "direct_ipv6"
    }

    fn sides(&self) -> usize {
        2
    }

    fn run(&self, program: &FsPath, args: &[String]) -> io::Result<Ended> {
        let server = |program: &FsPath| self.0.run_at("six-a", "fd00:ff::a", program);
        let client = |program: &FsPath| self.0.run_at("six-b", "fd00:ff::b", program);
        let args = [&["--dev".to_owned(), "ff0".to_owned()], args].concat();
        two_processes([&server, &client], program, &args)
    }
}

/// What is between the containers of a [`Containers`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Between {
    /// One host.
    Nothing,
    /// Two hosts, and their routers' plain TCP, where bytes go from file to socket and from socket into place.
    Tcp,
    /// The same with TLS, where they pass through the record layer.
    Tls,
}

/// `freeflow lab`: each side in a container of its own, unprivileged, on one host, or on two.
#[derive(Debug)]
pub struct Containers<'t> {
    pub tree: &'t Tree,
    pub between: Between,
}

impl Path for Containers<'_> {
    fn name(&self) -> &str {
        match self.between {
            Between::Nothing => "direct_containers",
            Between::Tcp => "link_hosts",
            Between::Tls => "link_tls",
        }
    }

    fn sides(&self) -> usize {
        2
    }

    fn run(&self, program: &FsPath, args: &[String]) -> io::Result<Ended> {
        let quoted: String = args.iter().map(|arg| format!(" '{arg}'")).collect();
        let staged = Staged::new(program)?;
        let side = |name: &str, role: &str| {
            format!("{name}='{}' {role} --dev ff0{quoted}", staged.program.display())
        };
        let mut group = Group::new(LIMIT);
        let mut lab = Command::new(self.tree.freeflow());
        let (options, server, client): (&[&str], _, _) = match self.between {
            Between::Nothing => (&[], "c1", "c2"),
            Between::Tcp => (&["--hosts", "2", "--insecure-plain-tcp"], "h1c1", "h2c1"),
            Between::Tls => (&["--hosts", "2"], "h1c1", "h2c1"),
        };
        lab.arg("lab").args(options).args(["--run", &side(server, "--server 7471")]);
        lab.args(["--run", &side(client, &format!("--client @{server}:7471"))]);
        group.start(&mut lab)?;
        Ok(group.finish())
    }
}

/// A copy of a program where every user may go: a lab's users have no way into a private home directory.
pub struct Staged {
    dir: PathBuf,
    pub program: PathBuf,
}

impl Staged {
    pub fn new(program: &FsPath) -> io::Result<Self> {
        static MADE: AtomicUsize = AtomicUsize::new(0);
        let number = MADE.fetch_add(1, Ordering::Relaxed);
        // Not /tmp: a lab has its own.
        let dir = PathBuf::from(format!("/var/tmp/freeflow-conformance-{}-{number}", process::id()));
        fs::create_dir(&dir)?;
        let staged = Self { program: dir.join(program.file_name().unwrap_or_default()), dir };
        fs::set_permissions(&staged.dir, fs::Permissions::from_mode(0o755))?;
        fs::copy(program, &staged.program)?;
        fs::set_permissions(&staged.program, fs::Permissions::from_mode(0o755))?;
        Ok(staged)
    }
}

impl Drop for Staged {
    fn drop(&mut self) {
        if let Err(error) = fs::remove_dir_all(&self.dir) {
            eprintln!("cannot remove {}: {error}", self.dir.display());
        }
    }
}

/// The libibverbs and device of this machine: a kernel's soft-RoCE or hardware, against which the suite itself is checked.
#[derive(Debug)]
pub struct Native {
    pub processes: usize,
}

impl Path for Native {
    fn name(&self) -> &str {
        if self.processes == 1 { "native_self" } else { "native_processes" }
    }

    fn sides(&self) -> usize {
        self.processes
    }

    fn strict(&self) -> bool {
        false
    }

    fn run(&self, program: &FsPath, args: &[String]) -> io::Result<Ended> {
        let wrap = |program: &FsPath| Command::new(program);
        if self.processes == 1 {
            one_process(&wrap, program, args)
        } else {
            two_processes([&wrap, &wrap], program, args)
        }
    }
}

/// The tree that users get.
#[derive(Debug, Clone)]
pub struct Tree(PathBuf);

impl Tree {
    /// `FF_TEST_DIST`, else `dist` in cargo's target directory.
    pub fn find(target: &FsPath) -> Result<Self, String> {
        let tree = Self(env::var_os("FF_TEST_DIST").map_or_else(|| target.join("dist"), PathBuf::from));
        if tree.freeflow().is_file() {
            return Ok(tree);
        }
        Err(format!("{} is not there: cargo xtask dist makes it", tree.freeflow().display()))
    }

    pub fn freeflow(&self) -> PathBuf {
        self.0.join("bin/freeflow")
    }
}

/// A router of this test's own, and its directory; both go with it.
#[derive(Debug)]
pub struct Host {
    tree: Tree,
    dir: PathBuf,
    router: Child,
}

impl Host {
    /// Starts the router and waits until it serves.
    pub fn start(tree: &Tree) -> io::Result<Self> {
        Self::configured(tree, "")
    }

    /// The same with a configuration (TOML) of its own.
    pub fn configured(tree: &Tree, config: &str) -> io::Result<Self> {
        static STARTED: AtomicUsize = AtomicUsize::new(0);
        let number = STARTED.fetch_add(1, Ordering::Relaxed);
        let dir = env::temp_dir().join(format!("freeflow-conformance-{}-{number}", process::id()));
        fs::create_dir(&dir)?;
        fs::write(dir.join("router.toml"), config)?;
        let router = spawn_router(tree, &dir).inspect_err(|_| drop(fs::remove_dir_all(&dir)))?;
        let mut host = Self { tree: tree.clone(), dir, router };
        host.await_router()?;
        Ok(host)
    }

    /// Waits until the router serves.
    fn await_router(&mut self) -> io::Result<()> {
        let mut ready = [0];
        let stdout = self.router.stdout.take();
        if stdout.is_none_or(|mut pipe| pipe.read_exact(&mut ready).is_err()) {
            return Err(io::Error::other(format!("the router did not start:\n{}", self.log())));
        }
        Ok(())
    }

    /// Ends the router at once, as SIGKILL does.
    pub fn kill_router(&mut self) -> io::Result<()> {
        self.router.kill()?;
        self.router.wait().map(drop)
    }

    /// Starts another one in its place, and waits until it serves.
    pub fn start_router_again(&mut self) -> io::Result<()> {
        self.router = spawn_router(&self.tree, &self.dir)?;
        self.await_router()
    }

    /// What the router logged.
    pub fn log(&self) -> String {
        fs::read_to_string(self.dir.join("router.log")).unwrap_or_default()
    }

    /// For whoever reads why a test failed.
    pub fn show_log(&self) {
        eprintln!("log of {}'s router:\n{}", self.dir.display(), self.log());
    }

    pub fn socket(&self) -> PathBuf {
        self.dir.join("router.sock")
    }

    /// Kills the router, as a crash would.
    pub fn kill(&self) {
        if let Some(pid) = i32::try_from(self.router.id()).ok().and_then(Pid::from_raw) {
            // It is not reaped yet, so the id cannot be another's.
            let _dead_already = kill_process(pid, Signal::KILL);
        }
    }

    /// The router's.
    pub fn pid(&self) -> u32 {
        self.router.id()
    }

    /// `program` in a container of its own, by name.
    pub fn run_in(&self, container: &str, program: &FsPath) -> Command {
        let mut command = Command::new(self.tree.freeflow());
        command.arg("run").arg("--router").arg(self.socket()).args(["--name", container, "--"]).arg(program);
        command
    }

    /// The same with an address of its own choice.
    pub fn run_at(&self, container: &str, ip: &str, program: &FsPath) -> Command {
        let mut command = Command::new(self.tree.freeflow());
        command.arg("run").arg("--router").arg(self.socket());
        command.args(["--name", container, "--ip", ip, "--"]).arg(program);
        command
    }

    /// A command that runs a program with this router; its arguments may follow.
    pub fn run(&self, program: &FsPath) -> Command {
        let mut command = Command::new(self.tree.freeflow());
        command.arg("run").arg("--router").arg(self.socket()).arg("--").arg(program);
        command
    }
}

fn spawn_router(tree: &Tree, dir: &FsPath) -> io::Result<Child> {
    let log = fs::OpenOptions::new().create(true).append(true).open(dir.join("router.log"))?;
    let mut command = Command::new(tree.freeflow());
    command.args([OsStr::new("router"), OsStr::new("--socket"), dir.join("router.sock").as_os_str()]);
    command.arg("--config").arg(dir.join("router.toml"));
    command.arg("--ready-on-stdout").stdin(Stdio::null()).stdout(Stdio::piped()).stderr(log).spawn()
}

impl Drop for Host {
    fn drop(&mut self) {
        if let Some(pid) = i32::try_from(self.router.id()).ok().and_then(Pid::from_raw) {
            let _ended_already = kill_process(pid, Signal::TERM);
        }
        let _reaped = self.router.wait();
        let _left = fs::remove_dir_all(&self.dir);
    }
}
