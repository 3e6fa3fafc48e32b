//! `cargo xtask dist --portable`: the same tree, for systems with glibc 2.17 or later.
//!
//! The linker decides which version of glibc's symbols a program asks for, and takes the newest of the libc it links
//! with. Zig brings a libc of stubs for each release of glibc, and cargo-zigbuild has cargo link with it; both are
//! PyPI's packages, kept in target/tools.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use crate::failure::{Context as _, Failure, Result};
use crate::process::Echo;
use crate::{dist, layout, packages, process};

/// The oldest glibc that loads the tree: RHEL 7's.
const FLOOR: Version = Version(2, 17);
const TOOLS: [&str; 2] = ["cargo-zigbuild==0.24.0", "ziglang==0.15.2"];
/// A cold build on a small, busy machine.
const LIMIT: Duration = Duration::from_secs(3600);

/// A version of glibc.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Version(u32, u32);

impl std::fmt::Display for Version {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}.{}", self.0, self.1)
    }
}

pub fn tree() -> PathBuf {
    layout::target().join("dist-portable")
}

/// Builds the tree and checks it; returns its path.
pub fn build() -> Result<PathBuf> {
    packages::ensure(&[packages::BUILD, packages::PORTABLE])?;
    let triple = format!("{}-unknown-linux-gnu", std::env::consts::ARCH);
    let tools = tools()?;
    let path = std::env::join_paths(
        std::iter::once(tools.clone())
            .chain(std::env::split_paths(&std::env::var_os("PATH").unwrap_or_default())),
    );
    let place = layout::target().join("portable");
    let mut cargo = Command::new(tools.join("cargo-zigbuild"));
    cargo.current_dir(layout::root()).env("PATH", path.context("PATH")?);
    cargo.args(["zigbuild", "--release", "--quiet", "--features", dist::FEATURES]);
    cargo.arg("--target").arg(format!("{triple}.{FLOOR}")).arg("--target-dir").arg(&place);
    for package in dist::PACKAGES {
        cargo.args(["--package", package]);
    }
    process::must(&mut cargo, LIMIT)?;
    let tree = tree();
    dist::assemble(&place.join(triple).join("release"), &tree)?;
    check(&tree)?;
    Ok(tree)
}

/// The directory of cargo-zigbuild and of the zig that it calls.
fn tools() -> Result<PathBuf> {
    let home = layout::target().join("tools/zig");
    let bin = home.join("bin");
    if !bin.join("cargo-zigbuild").exists() {
        process::must(Command::new("python3").args(["-m", "venv"]).arg(&home), LIMIT)?;
        process::must(Command::new(bin.join("pip")).args(["install", "--quiet"]).args(TOOLS), LIMIT)?;
    }
    Ok(bin)
}

/// Every program and library of the tree asks for nothing newer than the floor.
fn check(tree: &Path) -> Result<()> {
    for file in dist::binaries() {
        let path = tree.join(file);
        let symbols = dynamic_symbols(&path)?;
        let (symbol, newest) = newest(&symbols).ok_or_else(|| {
            Failure::new(format!("{} asks for no symbol of glibc: objdump -T shows none", path.display()))
        })?;
        if newest > FLOOR {
            return Err(Failure::new(format!("{} asks for {symbol} of glibc {newest}", path.display())));
        }
        eprintln!("xtask: {file}: glibc {newest} ({symbol})");
    }
    Ok(())
}

fn dynamic_symbols(path: &Path) -> Result<String> {
    fs::metadata(path).context(format_args!("cannot find {}", path.display()))?;
    let done = process::run(Command::new("objdump").arg("-T").arg(path), LIMIT, Echo::Quiet)?;
    if done.success() { Ok(done.stdout) } else { Err(Failure::new(format!("objdump -T: {}", done.tail()))) }
}

/// The newest version of glibc that `objdump -T` names, and a symbol of that.
fn newest(symbols: &str) -> Option<(&str, Version)> {
    let asked = symbols.lines().filter_map(|line| {
        let (before, symbol) = line.rsplit_once(' ')?;
        let version = before.rsplit_once("GLIBC_")?.1.trim_end().trim_end_matches(')');
        let mut numbers = version.split('.');
        let version = Version(numbers.next()?.parse().ok()?, numbers.next()?.parse().ok()?);
        Some((symbol, version))
    });
    asked.max_by_key(|(_, version)| *version)
}

/// The symbols that a library exports, with their versions, in order.
pub fn exports(path: &Path) -> Result<Vec<String>> {
    let symbols = dynamic_symbols(path)?;
    let defined = symbols.lines().filter(|line| !line.contains("*UND*"));
    let words = |line: &str| {
        let last = line.split_whitespace().rev().take(2).collect::<Vec<_>>();
        (last.len() == 2).then(|| format!("{} {}", last[1], last[0]))
    };
    let mut list: Vec<String> = defined.filter_map(words).collect();
    list.sort();
    Ok(list)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_newest_version_counts_as_a_number() {
        let text = "\
0000000000000000      DF *UND*\t0000000000000000 (GLIBC_2.2.5) read\n\
0000000000000000  w   DF *UND*\t0000000000000000 (GLIBC_2.17) secure_getenv\n\
0000000000000000      DF *UND*\t0000000000000000  GLIBC_2.9   pipe2\n\
0000000000001000 g    DF .text\t0000000000000005  IBVERBS_1.1 ibv_open_device\n";
        assert_eq!(newest(text), Some(("secure_getenv", Version(2, 17))));
        assert!(Version(2, 9) < FLOOR && Version(2, 34) > FLOOR);
        assert_eq!(newest("nothing\n"), None);
    }
}
