//! `cargo xtask soak fresh`: demo and test from a clone in a new Debian root.
//!
//! The new root has Debian's base, this machine's package sources, and the Rust toolchain by bind mount with the linker
//! it needs: nothing else is installed by hand.

use std::env;
use std::ffi::OsString;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};
use std::time::Duration;

use crate::failure::{Context as _, Failure, Result};
use crate::{layout, packages, process};

/// Everything is downloaded and built anew.
const LIMIT: Duration = Duration::from_secs(7200);
/// What rustc needs to link, and what fetches crates; the toolchain's part of the root.
const TOOLCHAIN_PACKAGES: &str = "ca-certificates,gcc,libc6-dev";
/// Variables with proxies, certificates and cargo's registry configuration.
const KEPT_PREFIXES: [&str; 3] = ["CARGO_REGISTR", "CARGO_SOURCE_", "CARGO_HTTP_"];
const KEPT: [&str; 8] = [
    "http_proxy",
    "https_proxy",
    "no_proxy",
    "HTTP_PROXY",
    "HTTPS_PROXY",
    "NO_PROXY",
    "SSL_CERT_FILE",
    "SSL_CERT_DIR",
];

pub fn fresh() -> Result<ExitCode> {
    if !rustix::process::geteuid().is_root() {
        return Err(Failure::new("soak fresh needs root: it makes a Debian root and enters it"));
    }
    packages::ensure(&[packages::FRESH])?;
    let toolchain = Toolchain::find()?;
    let root = Root::make()?;
    bootstrap(&root.0)?;
    copy_configuration(&root.0, &toolchain)?;
    clone(&root.0)?;
    let done = process::run(&mut enter(&root.0, &toolchain), LIMIT, process::Echo::Shown)?;
    print!("{}", done.stdout);
    if done.success() {
        println!("soak fresh: demo and test passed in a new Debian root");
        return Ok(ExitCode::SUCCESS);
    }
    Err(Failure::new(format!("in the new Debian root: {}", done.how())))
}

/// The installed Rust: the toolchain's own directory, without rustup's choice of one.
struct Toolchain {
    sysroot: PathBuf,
    cargo_home: PathBuf,
}

impl Toolchain {
    fn find() -> Result<Self> {
        let rustc = env::var_os("RUSTC").unwrap_or_else(|| "rustc".into());
        let output = Command::new(rustc)
            .args(["--print", "sysroot"])
            .current_dir(layout::root())
            .output()
            .context("cannot ask rustc for its directory")?;
        let sysroot = PathBuf::from(String::from_utf8_lossy(&output.stdout).trim());
        if !sysroot.join("bin/cargo").exists() {
            return Err(Failure::new(format!("no bin/cargo in rustc's directory {}", sysroot.display())));
        }
        let home = env::var_os("HOME").map(|home| Path::new(&home).join(".cargo"));
        let cargo_home = env::var_os("CARGO_HOME").map(PathBuf::from).or(home);
        let cargo_home = cargo_home.ok_or_else(|| Failure::new("neither CARGO_HOME nor HOME is set"))?;
        Ok(Self { sysroot, cargo_home })
    }
}

/// The new root's directory, removed at the end. Its mounts live in a mount namespace of their own.
struct Root(PathBuf);

impl Root {
    fn make() -> Result<Self> {
        let path = layout::target().join(format!("fresh-{}", std::process::id()));
        fs::create_dir_all(&path).context(format_args!("cannot make {}", path.display()))?;
        Ok(Self(path))
    }
}

impl Drop for Root {
    fn drop(&mut self) {
        if let Err(error) = fs::remove_dir_all(&self.0) {
            eprintln!("xtask: cannot remove {}: {error}", self.0.display());
        }
    }
}

/// Files of a directory whose name ends in one of `extensions`; none where there is no directory.
fn files(dir: &str, extensions: &[&str]) -> Vec<PathBuf> {
    let entries = fs::read_dir(dir).into_iter().flatten().flatten().map(|e| e.path());
    let wanted = |p: &PathBuf| {
        extensions.is_empty() || p.extension().is_some_and(|e| extensions.iter().any(|w| e == *w))
    };
    let mut files: Vec<_> = entries.filter(|p| p.is_file() && wanted(p)).collect();
    files.sort();
    files
}

/// This machine's package sources.
fn sources() -> Vec<PathBuf> {
    let mut sources = files("/etc/apt/sources.list.d", &["list", "sources"]);
    sources.extend(Some(PathBuf::from("/etc/apt/sources.list")).filter(|p| p.is_file()));
    sources
}

fn bootstrap(root: &Path) -> Result<()> {
    let mut command = Command::new("mmdebstrap");
    command.args(["--variant=minbase", "--quiet"]).arg(format!("--include={TOOLCHAIN_PACKAGES}"));
    // Options that matter to a download only; hooks of this machine stay here.
    for file in files("/etc/apt/apt.conf.d", &[]).iter().filter(|file| mentions_acquire(file)) {
        command.arg(format!("--aptopt={}", file.display()));
    }
    command.arg("bookworm").arg(root).args(sources());
    process::must(&mut command, LIMIT).map(drop)
}

fn mentions_acquire(file: &Path) -> bool {
    let text = fs::read_to_string(file).unwrap_or_default();
    let mut lines = text.lines().map(str::trim).filter(|l| !l.is_empty() && !l.starts_with("//"));
    lines.clone().next().is_some() && lines.all(|l| l.starts_with("Acquire"))
}

/// How crates are found: cargo's configuration, and this machine's name resolution and certificates.
fn copy_configuration(root: &Path, toolchain: &Toolchain) -> Result<()> {
    let cargo_home = root.join("root/.cargo");
    fs::create_dir_all(&cargo_home).context("cannot make the root's cargo directory")?;
    for name in ["config.toml", "config", "credentials.toml"] {
        copy_if_there(&toolchain.cargo_home.join(name), &cargo_home.join(name))?;
    }
    for file in ["/etc/resolv.conf", "/etc/hosts", "/etc/ssl/certs/ca-certificates.crt"] {
        copy_if_there(Path::new(file), &root.join(file.trim_start_matches('/')))?;
    }
    Ok(())
}

fn copy_if_there(from: &Path, to: &Path) -> Result<()> {
    if !from.is_file() {
        return Ok(());
    }
    fs::copy(from, to).map(drop).context(format_args!("cannot copy {}", from.display()))
}

fn clone(root: &Path) -> Result<()> {
    let mut git = Command::new("git");
    git.args(["clone", "--quiet", "--no-hardlinks"]).arg(layout::root()).arg(root.join("root/freeflow"));
    process::must(&mut git, LIMIT).map(drop)
}

/// The commands of README's first run, in the new root.
fn enter(root: &Path, toolchain: &Toolchain) -> Command {
    // rbind: runc needs this machine's cgroups, and /proc must be whole for containers to mount their own. pivot_root: the
    // kernel gives no user namespace to a process in a plain chroot.
    const SCRIPT: &str = r#"
        set -e
        mount --bind "$ROOT" "$ROOT"
        for dir in proc sys dev; do mount --rbind /$dir "$ROOT/$dir"; done
        mount -t tmpfs tmpfs "$ROOT/run"
        mount -t tmpfs tmpfs "$ROOT/tmp"
        mkdir -p "$ROOT/opt/rust"
        mount --bind -o ro "$TOOLCHAIN" "$ROOT/opt/rust"
        cd "$ROOT"
        pivot_root . mnt
        cd /root/freeflow
        umount -l /mnt
        exec sh -ec '
            export PATH=/opt/rust/bin:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin
            cargo xtask demo
            exec cargo xtask test'
    "#;
    let mut command = Command::new("unshare");
    command.args(["--mount", "--propagation", "private", "sh", "-c", SCRIPT]);
    command.env_clear().envs(kept_variables());
    command.env("ROOT", root).env("TOOLCHAIN", &toolchain.sysroot).env("HOME", "/root");
    command.env("PATH", "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin");
    command
}

fn kept_variables() -> impl Iterator<Item = (OsString, OsString)> {
    env::vars_os().filter(|(name, _)| {
        let name = name.to_string_lossy();
        KEPT.contains(&&*name) || KEPT_PREFIXES.iter().any(|p| name.starts_with(p))
    })
}
