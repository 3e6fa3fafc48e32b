//! `cargo xtask test`: every check of the repository, counted; the last line of standard output is the result.

mod cargo;
mod clients;
mod contained;
mod containers;
mod device_files;
mod examples;
mod image;
mod labs;
mod operators;
mod releases;
mod transports;
mod ucx;
mod verbs_docs;
mod verbs_suite;

use std::fs;
use std::process::ExitCode;
use std::time::Instant;

use self::labs::Place;
use crate::failure::{Context as _, Failure, Result};
use crate::{dist, layout, packages, safety};

pub type Outcome = std::result::Result<(), String>;

/// What was counted so far.
#[derive(Debug, Default)]
pub struct Tally {
    passed: usize,
    failed: Vec<String>,
}

impl Tally {
    /// Counts one check and shows it.
    fn check(&mut self, name: &str, run: impl FnOnce() -> Outcome) {
        let start = Instant::now();
        let outcome = run();
        let seconds = start.elapsed().as_secs_f64();
        match outcome {
            Ok(()) => {
                println!("ok    {name} ({seconds:.1} s)");
                self.passed += 1;
            }
            Err(why) => {
                println!("FAIL  {name} ({seconds:.1} s)");
                eprintln!("{name}: {why}");
                self.failed.push(name.to_owned());
            }
        }
    }

    /// Counts tests that cargo ran.
    fn add(&mut self, name: &str, passed: usize, failed: Vec<String>) {
        println!("{}  {name}: {passed} passed, {} failed", mark(failed.is_empty()), failed.len());
        self.passed += passed;
        self.failed.extend(failed.into_iter().map(|test| format!("{name}: {test}")));
    }
}

fn mark(good: bool) -> &'static str {
    if good { "ok  " } else { "FAIL" }
}

/// Its name, and how it is made.
type Page = (&'static str, fn() -> Result<String>);

/// Pages under docs/ that are made from the tests.
const PAGES: [Page; 2] = [(verbs_docs::PAGE, verbs_docs::page), (verbs_suite::TABLE, verbs_suite::table)];

/// `cargo xtask docs`: writes them.
pub fn docs() -> Result<ExitCode> {
    for (name, make) in PAGES {
        fs::write(layout::root().join(name), make()?).context(format_args!("cannot write {name}"))?;
        println!("{name}");
    }
    Ok(ExitCode::SUCCESS)
}

fn check_page(name: &str, make: fn() -> Result<String>) -> Outcome {
    let made = make().map_err(|failure| failure.to_string())?;
    match fs::read_to_string(layout::root().join(name)) {
        Ok(there) if there == made => Ok(()),
        _ => Err(format!("{name} is not what the tests say: cargo xtask docs")),
    }
}

pub fn run(filter: Option<&str>) -> Result<ExitCode> {
    let start = Instant::now();
    packages::ensure(&[
        packages::LAB,
        packages::CLIENTS,
        packages::TESTS,
        packages::RUNTIMES,
        packages::VERBS_SUITE,
        packages::UCX,
        packages::NCCL,
    ])?;
    let tree = dist::build()?;
    let chosen = |name: &str| filter.is_none_or(|f| name.contains(f));
    let mut tally = Tally::default();
    for (name, make) in PAGES.iter().filter(|(name, _)| chosen(name)) {
        tally.check(&format!("{name} is what the tests say"), || check_page(name, *make));
    }
    cargo::lints(&mut tally, chosen);
    cargo::tests(&mut tally, filter, &tree)?;
    cargo::loom(&mut tally, filter)?;
    cargo::tsan(&mut tally, filter)?;
    cargo::asan(&mut tally, filter, &tree)?;
    for lab in labs::OWN.iter().filter(|lab| chosen(&lab.name())) {
        tally.check(&lab.name(), || lab.run());
    }
    for place in [Place::OneHost, Place::TwoHosts] {
        let clients = if place == Place::OneHost { clients::all() } else { clients::pairs() };
        for client in clients.iter().filter(|client| chosen(&place.name(client))) {
            tally.check(&place.name(client), || labs::run_client(client, place));
        }
    }
    verbs_suite::run(&mut tally, filter)?;
    for (name, check) in operators::CHECKS.iter().filter(|(name, _)| chosen(name)) {
        tally.check(name, check);
    }
    ucx::run(&mut tally, chosen);
    for (transport, name) in transports::CHECKS.iter().filter(|(_, name)| chosen(name)) {
        tally.check(name, || transports::openmpi(transport));
    }
    if chosen(device_files::NAME) {
        tally.check(device_files::NAME, device_files::run);
    }
    releases::run(&mut tally, chosen);
    if chosen(containers::NAME) {
        tally.check(containers::NAME, containers::run);
    }
    for soak in safety::short().filter(|soak| chosen(soak)) {
        tally.check(soak, || safety::run_short(soak, &tree));
    }
    if chosen(examples::HELLO) {
        tally.check(examples::HELLO, examples::hello);
    }
    if chosen(examples::NCCL) {
        tally.check(examples::NCCL, examples::nccl);
    }
    if chosen(examples::NCCL_JOB) {
        tally.check(examples::NCCL_JOB, examples::nccl_job);
    }
    summary(&tally, filter, start)
}

/// `cargo xtask soak ucx`: all that is checked of the UCX transport, on every release that it knows.
pub fn ucx_matrix(filter: Option<&str>) -> Result<ExitCode> {
    let start = Instant::now();
    packages::ensure(&[packages::LAB, packages::TESTS, packages::UCX])?;
    dist::build()?;
    let mut tally = Tally::default();
    ucx::matrix(&mut tally, |name| filter.is_none_or(|f| name.contains(f)));
    summary(&tally, filter, start)
}

/// `cargo xtask soak releases`: the portable tree, and clients of other rdma-core and Debian releases.
pub fn releases(filter: Option<&str>) -> Result<ExitCode> {
    let start = Instant::now();
    packages::ensure(&[packages::LAB, packages::TESTS, packages::PORTABLE])?;
    dist::build()?;
    let mut tally = Tally::default();
    releases::matrix(&mut tally, |name| filter.is_none_or(|f| name.contains(f)));
    summary(&tally, filter, start)
}

/// `cargo xtask soak image`: the router's image, built and run.
pub fn image() -> Result<ExitCode> {
    let start = Instant::now();
    if !rustix::process::geteuid().is_root() {
        return Err(Failure::new("soak image needs root: it makes a Debian root and mounts the image"));
    }
    packages::ensure(&[packages::LAB, packages::CLIENTS, packages::IMAGE])?;
    dist::build()?;
    let mut tally = Tally::default();
    tally.check(image::CHECK, image::check);
    summary(&tally, None, start)
}

fn summary(tally: &Tally, filter: Option<&str>, start: Instant) -> Result<ExitCode> {
    if tally.passed + tally.failed.len() == 0 {
        let filter = filter.unwrap_or_default();
        return Err(Failure::new(format!("no check's name contains {filter:?}")));
    }
    for name in &tally.failed {
        println!("failed: {name}");
    }
    println!("took {:.0} s", start.elapsed().as_secs_f64());
    println!("{} passed, {} failed", tally.passed, tally.failed.len());
    Ok(if tally.failed.is_empty() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}
