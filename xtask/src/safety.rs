//! The soaks of what the direct path and NCCL's plugin survive. The programs are `freeflow-tests`'; here they are built, given their lengths
//! and run: long ones for `cargo xtask soak`, short ones for `cargo xtask test`.

use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};
use std::time::Duration;

use clap::Args;

use crate::failure::{Failure, Result};
use crate::process::{self, Echo};
use crate::{dist, layout, packages};

/// Of `soak kill`.
#[derive(Debug, Args)]
pub struct Kill {
    #[arg(long, default_value_t = 1000)]
    rounds: u32,
    /// What a failing run printed
    #[arg(long)]
    seed: Option<u64>,
}

/// Of `soak hostile`.
#[derive(Debug, Args)]
pub struct Hostile {
    /// How long to scribble
    #[arg(long, default_value_t = 600)]
    seconds: u32,
    /// Mutated control messages before that
    #[arg(long, default_value_t = 1_000_000)]
    messages: u32,
    /// What a failing run printed
    #[arg(long)]
    seed: Option<u64>,
}

/// Of `soak restart`.
#[derive(Debug, Args)]
pub struct Restart {
    #[arg(long, default_value_t = 300)]
    rounds: u32,
    /// What a failing run printed
    #[arg(long)]
    seed: Option<u64>,
}

/// Of `soak wire`.
#[derive(Debug, Args)]
pub struct Wire {
    /// Cuts of each kind of link
    #[arg(long, default_value_t = 300)]
    rounds: u32,
    /// What a failing run printed
    #[arg(long)]
    seed: Option<u64>,
}

/// Of `soak nccl`.
#[derive(Debug, Args)]
pub struct Nccl {
    /// Mixed operations of each rank
    #[arg(long, default_value_t = 1_000_000)]
    operations: u64,
    /// What a failing run printed
    #[arg(long)]
    seed: Option<u64>,
}

/// Of `soak revoke`.
#[derive(Debug, Args)]
pub struct Revoke {
    /// Steps to stop a copier at; 0 is every one
    #[arg(long, default_value_t = 0)]
    samples: u32,
    /// What a failing run printed
    #[arg(long)]
    seed: Option<u64>,
}

/// The longest soak, with room for a busy machine.
const LIMIT: Duration = Duration::from_secs(4 * 3600);
/// What `cargo xtask test` runs.
const SHORT: [(&str, &[&str]); 6] = [
    ("soak kill", &["kill", "--rounds", "50", "--lenient"]),
    ("soak hostile", &["hostile", "--seconds", "60"]),
    ("soak cluster", &["cluster", "--lenient"]),
    ("soak restart", &["restart", "--rounds", "12", "--lenient"]),
    ("soak wire", &["wire", "--rounds", "20", "--lenient"]),
    ("soak revoke", &["revoke", "--samples", "10"]),
];

pub fn kill(args: &Kill) -> Result<ExitCode> {
    long(&["kill", "--rounds", &args.rounds.to_string()], args.seed)
}

pub fn hostile(args: &Hostile) -> Result<ExitCode> {
    let mut cargo = layout::cargo();
    cargo.args([
        "test",
        "--release",
        "--package",
        "freeflow-router",
        "--test",
        "hostile",
        "--",
        "--nocapture",
    ]);
    cargo.env("FF_TEST_MESSAGES", args.messages.to_string());
    cargo.envs(args.seed.map(|seed| ("FF_TEST_SEED", seed.to_string())));
    process::must(&mut cargo, LIMIT)?;
    long(&["hostile", "--seconds", &args.seconds.to_string()], args.seed)
}

pub fn cluster() -> Result<ExitCode> {
    long(&["cluster"], None)
}

pub fn restart(args: &Restart) -> Result<ExitCode> {
    long(&["restart", "--rounds", &args.rounds.to_string()], args.seed)
}

pub fn wire(args: &Wire) -> Result<ExitCode> {
    long(&["wire", "--rounds", &args.rounds.to_string()], args.seed)
}

pub fn nccl(args: &Nccl) -> Result<ExitCode> {
    long(&["nccl", "--operations", &args.operations.to_string(), "--whole"], args.seed)
}

pub fn revoke(args: &Revoke) -> Result<ExitCode> {
    long(&["revoke", "--samples", &args.samples.to_string()], args.seed)
}

fn long(args: &[&str], seed: Option<u64>) -> Result<ExitCode> {
    packages::ensure(&[packages::TESTS])?;
    let tree = dist::build()?;
    let mut soak = command(&tree, args)?;
    soak.args(seed.map(|seed| format!("--seed={seed}")));
    process::must(&mut soak, LIMIT).map(|_| ExitCode::SUCCESS)
}

/// Builds the soaks and returns the command that runs one of them on `tree`.
fn command(tree: &Path, args: &[&str]) -> Result<Command> {
    let mut cargo = layout::cargo();
    cargo.args(["build", "--quiet", "--release", "--package", "freeflow-tests", "--bins"]);
    process::must(&mut cargo, LIMIT)?;
    let mut soak = Command::new(layout::target().join("release/soak"));
    soak.args(args).env("FF_TEST_DIST", tree);
    if args.first() == Some(&"nccl") {
        soak.arg("--sanitized").arg(sanitized()?);
    }
    Ok(soak)
}

/// nccl-replay and the plugin under AddressSanitizer, in a target directory of their own; returns where they are. Stable
/// cargo has no switch for it, hence the bootstrap variable.
fn sanitized() -> Result<PathBuf> {
    const TARGET: &str = "x86_64-unknown-linux-gnu";
    let target = layout::target().join("asan");
    let mut cargo = layout::cargo();
    cargo.args(["build", "--quiet", "--release", "--target", TARGET, "--target-dir"]).arg(&target);
    cargo.args(["--package", "freeflow-nccl-net", "--package", "freeflow-tests"]);
    cargo.args(["--lib", "--bin", "nccl-replay"]);
    cargo.env("RUSTC_BOOTSTRAP", "1").env("CARGO_PROFILE_RELEASE_LTO", "off");
    // -rdynamic: the plugin finds the runtime in the program that loads it.
    cargo.env("RUSTFLAGS", "-Zsanitizer=address -Cforce-frame-pointers=yes -Clink-arg=-rdynamic");
    process::must(&mut cargo, LIMIT)?;
    Ok(target.join(TARGET).join("release"))
}

/// Each short soak by name.
pub fn short() -> impl Iterator<Item = &'static str> {
    SHORT.iter().map(|(name, _)| *name)
}

/// Runs a short soak.
pub fn run_short(name: &str, tree: &Path) -> std::result::Result<(), String> {
    let (_, args) = SHORT.iter().find(|(known, _)| *known == name).ok_or("no such soak")?;
    let run = |tree: &Path| process::run(&mut command(tree, args)?, LIMIT, Echo::Shown);
    let done = run(tree).map_err(|failure: Failure| failure.to_string())?;
    if done.success() { Ok(()) } else { Err(format!("{}\n{}", done.how(), done.tail())) }
}
