//! Lints and cargo's own tests, and counting them from what cargo prints.

use std::path::Path;
use std::process::Command;
use std::time::Duration;

use super::Tally;
use crate::dist::FEATURES;
use crate::failure::Result;
use crate::layout;
use crate::process::{self, Done, Echo};

/// A cold build and all tests on a small, busy machine.
const LIMIT: Duration = Duration::from_secs(1500);

pub fn lints(tally: &mut Tally, chosen: impl Fn(&str) -> bool) {
    let clippy = ["clippy", "--quiet", "--workspace", "--all-targets", "--features", FEATURES];
    let lints: [(&str, &[&str]); 2] = [
        ("fmt", &["fmt", "--all", "--check"]),
        ("clippy", &[&clippy[..], &["--", "-D", "warnings"]].concat()),
    ];
    for (name, args) in lints {
        if chosen(name) {
            tally.check(name, || shown(layout::cargo().args(args)));
        }
    }
}

fn shown(command: &mut Command) -> std::result::Result<(), String> {
    let done = process::run(command, LIMIT, Echo::Shown).map_err(|failure| failure.to_string())?;
    if done.success() { Ok(()) } else { Err(done.how()) }
}

/// Unit, integration and conformance tests; `tree` is the distribution tree for those that use it as users do.
pub fn tests(tally: &mut Tally, filter: Option<&str>, tree: &Path) -> Result<()> {
    let mut cargo = layout::cargo();
    cargo.args(["test", "--workspace", "--no-fail-fast", "--features", FEATURES]).args(filter);
    cargo.env("FF_TEST_DIST", tree);
    count(tally, "cargo test", &mut cargo, filter)
}

/// Exhaustive interleavings of core's protocols, in a target directory of their own: the flag rebuilds everything.
pub fn loom(tally: &mut Tally, filter: Option<&str>) -> Result<()> {
    if filter.is_some_and(|f| !f.contains("loom")) {
        return Ok(());
    }
    let mut cargo = layout::cargo();
    cargo.args(["test", "--package", "freeflow-core", "--lib", "--release", "--target-dir"]);
    cargo.arg(layout::target().join("loom")).arg(filter.unwrap_or("loom_"));
    cargo.env("RUSTFLAGS", "--cfg loom");
    count(tally, "loom", &mut cargo, filter)
}

/// The queues between threads under ThreadSanitizer. Stable cargo has no switch for it, hence the bootstrap variable; std
/// itself is not instrumented, hence the suppressions.
pub fn tsan(tally: &mut Tally, filter: Option<&str>) -> Result<()> {
    if filter.is_some_and(|f| !f.contains("tsan")) {
        return Ok(());
    }
    let suppressions = layout::root().join("core/tests/tsan.txt");
    let mut cargo = layout::cargo();
    cargo.args(["test", "--package", "freeflow-core", "--test", "ring_threads"]);
    cargo.args(["--target", "x86_64-unknown-linux-gnu", "--target-dir"]).arg(layout::target().join("tsan"));
    cargo.env("RUSTC_BOOTSTRAP", "1");
    cargo.env("RUSTFLAGS", "-Zsanitizer=thread -Cunsafe-allow-abi-mismatch=sanitizer");
    cargo.env("TSAN_OPTIONS", format!("suppressions={}", suppressions.display()));
    count(tally, "tsan", &mut cargo, None)
}

/// The conformance programs of one process and of two under AddressSanitizer, with our libraries preloaded.
pub fn asan(tally: &mut Tally, filter: Option<&str>, tree: &Path) -> Result<()> {
    if filter.is_some_and(|f| !f.contains("asan")) {
        return Ok(());
    }
    let mut cargo = layout::cargo();
    cargo.args(["test", "--package", "freeflow-tests", "--test", "conformance", "--"]);
    cargo.args(["--asan", "direct_self", "direct_processes"]).env("FF_TEST_DIST", tree);
    count(tally, "asan", &mut cargo, None)
}

fn count(tally: &mut Tally, name: &str, cargo: &mut Command, filter: Option<&str>) -> Result<()> {
    let done = process::run(cargo, LIMIT, Echo::Shown)?;
    let (passed, failed) = outcome(&done);
    if filter.is_none() || passed + failed.len() > 0 {
        tally.add(name, passed, failed);
    }
    Ok(())
}

/// Tests passed, and the names of those that did not. Cargo failing without a failed test is a failure too.
fn outcome(done: &Done) -> (usize, Vec<String>) {
    let (passed, failed) = results(&done.stdout);
    let mut names: Vec<String> = failed_names(&done.stdout);
    while names.len() < failed {
        names.push("a test without a name".to_owned());
    }
    if !done.success() && names.is_empty() {
        names.push(done.how());
    }
    (passed, names)
}

/// Sums of the `test result:` lines: passed, failed.
fn results(stdout: &str) -> (usize, usize) {
    let number = |line: &str, what: &str| {
        let words: Vec<&str> = line.split([' ', ';', '.']).filter(|w| !w.is_empty()).collect();
        let at = words.iter().position(|w| *w == what)?;
        words.get(at.checked_sub(1)?)?.parse::<usize>().ok()
    };
    let lines = stdout.lines().filter(|l| l.starts_with("test result:"));
    lines.fold((0, 0), |(passed, failed), line| {
        (passed + number(line, "passed").unwrap_or(0), failed + number(line, "failed").unwrap_or(0))
    })
}

fn failed_names(stdout: &str) -> Vec<String> {
    let name = |line: &str| Some(line.strip_prefix("test ")?.strip_suffix(" ... FAILED")?.to_owned());
    stdout.lines().filter_map(name).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn result_lines_are_summed() {
        let stdout = "\
test a::b ... ok
test a::c ... FAILED
test result: FAILED. 1 passed; 1 failed; 0 ignored; 0 measured; 0 filtered out; finished in 0.00s
test result: ok. 5 passed; 0 failed; 2 ignored; 0 measured; 9 filtered out; finished in 0.00s
";
        assert_eq!(results(stdout), (6, 1));
        assert_eq!(failed_names(stdout), ["a::c"]);
    }

    #[test]
    fn a_build_that_fails_is_a_failure() {
        let done =
            process::run(&mut Command::new("false"), Duration::from_secs(60), Echo::Quiet).expect("runs");
        assert_eq!(outcome(&done), (0, vec!["exit status 1".to_owned()]));
    }
}
