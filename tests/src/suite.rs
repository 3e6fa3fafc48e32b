//! Every program over every path, as tests that look like cargo's own: one line each, and a `test result:` line.

use std::env;
use std::io::{self, Write};
use std::path::{Path as FsPath, PathBuf};
use std::process::ExitCode;
use std::time::Instant;

use clap::Parser;

use crate::launch::Ended;
use crate::path::{Between, Containers, Host, Ipv6, Native, Path, Run, Tree};
use crate::programs::{self, PROGRAMS, Variant};
use crate::report::Report;

/// Runs the verbs conformance programs over each path.
#[derive(Debug, Parser)]
pub struct Args {
    /// Only tests whose name (path::program) contains one of these
    filters: Vec<String>,
    /// Name the tests and run none
    #[arg(long)]
    list: bool,
    /// Show what passing programs print, too
    #[arg(long)]
    nocapture: bool,
    /// Compile the programs with AddressSanitizer
    #[arg(long)]
    asan: bool,
    /// Use this machine's own libibverbs and device instead of FreeFlow
    #[arg(long)]
    native: bool,
    /// For the programs: only cases whose name contains this
    #[arg(long)]
    only: Option<String>,
    /// For the programs: the seed that a failing run printed
    #[arg(long)]
    seed: Option<String>,
    /// For the programs: the GID to use
    #[arg(long)]
    gid_index: Option<u32>,
    /// For the programs: factor on their time limits
    #[arg(long)]
    patience: Option<f64>,
    /// Accepted for cargo's sake
    #[arg(long, hide = true)]
    quiet: bool,
    #[arg(long, hide = true)]
    exact: bool,
    #[arg(long, hide = true)]
    test_threads: Option<usize>,
}

impl Args {
    fn chosen(&self, name: &str) -> bool {
        let fits = |f: &String| if self.exact { name == f } else { name.contains(f.as_str()) };
        self.filters.is_empty() || self.filters.iter().any(fits)
    }

    fn for_programs(&self) -> Vec<String> {
        let options = [
            ("--only", self.only.clone()),
            ("--seed", self.seed.clone()),
            ("--gid-index", self.gid_index.map(|i| i.to_string())),
            ("--patience", self.patience.map(|p| p.to_string())),
        ];
        let given = options.into_iter().filter_map(|(name, value)| Some([name.to_owned(), value?]));
        given.flatten().collect()
    }
}

/// Names of the paths over FreeFlow, known before any of it is started.
const FREEFLOW: [&str; 6] =
    ["direct_self", "direct_processes", "direct_ipv6", "direct_containers", "link_hosts", "link_tls"];
/// Where addresses matter.
const ON_IPV6: [&str; 5] = ["device", "rc_ops", "ud", "uc", "mcast"];
/// What runs over TLS too: enough to see every kind of message pass through it, whole and in pieces.
const OVER_TLS: [&str; 4] = ["large", "rc_errors", "rc_ops", "ud"];
/// What a link does not do yet.
const NOT_ON_LINK: &str = include_str!("../verbs/not-on-link.txt");
const NATIVE: [&str; 2] = ["native_self", "native_processes"];

/// The main function of the test target.
pub fn main() -> ExitCode {
    let args = Args::parse();
    let names: &[&str] = if args.native { &NATIVE } else { &FREEFLOW };
    let all: Vec<(&str, &str)> =
        names.iter().flat_map(|path| PROGRAMS.iter().map(move |program| (*path, *program))).collect();
    let all: Vec<(&str, &str)> = all.into_iter().filter(|(path, program)| is_there(path, program)).collect();
    let chosen: Vec<_> = all.iter().copied().filter(|(p, n)| args.chosen(&test_name(p, n))).collect();
    if args.list {
        for (path, program) in &chosen {
            println!("{}: test", test_name(path, program));
        }
        return ExitCode::SUCCESS;
    }
    println!("\nrunning {} tests", chosen.len());
    let mut tally =
        Tally { start: Instant::now(), filtered: all.len() - chosen.len(), passed: 0, failed: Vec::new() };
    if !chosen.is_empty()
        && let Err(why) = run_all(&args, &chosen, &mut tally)
    {
        tally.failed("conformance::setup", &why);
    }
    tally.finish()
}

/// Does the path do what the program tests?
fn is_there(path: &str, program: &str) -> bool {
    let left_out = |line: &str| line.split(' ').next() == Some(program);
    match path {
        "link_hosts" => !NOT_ON_LINK.lines().any(left_out),
        "link_tls" => OVER_TLS.contains(&program),
        "direct_ipv6" => ON_IPV6.contains(&program),
        _ => true,
    }
}

fn test_name(path: &str, program: &str) -> String {
    format!("conformance::{path}::{program}")
}

/// Cargo's target directory: this binary is in `target/PROFILE/deps`.
fn target() -> Result<PathBuf, String> {
    let own = env::current_exe().map_err(|e| format!("where this binary is: {e}"))?;
    let target =
        own.ancestors().nth(3).ok_or_else(|| format!("{} is not in a target directory", own.display()))?;
    Ok(target.to_owned())
}

fn run_all(args: &Args, chosen: &[(&str, &str)], tally: &mut Tally) -> Result<(), String> {
    let target = target()?;
    let variant = if args.asan { Variant::Asan } else { Variant::Plain };
    let dir = programs::build(&target.join("conformance"), variant).map_err(|e| e.to_string())?;
    if args.native {
        let paths: [&dyn Path; 2] = [&Native { processes: 1 }, &Native { processes: 2 }];
        run_paths(args, &dir, &paths, chosen, tally);
        return Ok(());
    }
    let tree = Tree::find(&target)?;
    let host = Host::start(&tree).map_err(|e| format!("a router for the tests: {e}"))?;
    let own = [Run { host: &host, processes: 1 }, Run { host: &host, processes: 2 }];
    let ipv6 = Ipv6(&host);
    let containers = [Between::Nothing, Between::Tcp, Between::Tls];
    let containers = containers.map(|between| Containers { tree: &tree, between });
    let failed_before = tally.failed.len();
    let paths: [&dyn Path; 6] = [&own[0], &own[1], &ipv6, &containers[0], &containers[1], &containers[2]];
    run_paths(args, &dir, &paths, chosen, tally);
    if tally.failed.len() > failed_before {
        println!("router's log:\n{}", host.log());
    }
    Ok(())
}

fn run_paths(args: &Args, dir: &FsPath, paths: &[&dyn Path], chosen: &[(&str, &str)], tally: &mut Tally) {
    let options = args.for_programs();
    for (path_name, program) in chosen {
        let Some(path) = paths.iter().find(|path| path.name() == *path_name) else {
            tally.failed(&test_name(path_name, program), "no such path");
            continue;
        };
        run_one(args, *path, dir, program, &options, tally);
    }
}

fn run_one(args: &Args, path: &dyn Path, dir: &FsPath, program: &str, options: &[String], tally: &mut Tally) {
    let name = test_name(path.name(), program);
    let ended = match path.run(&dir.join(program), options) {
        Ok(ended) => ended,
        Err(why) => return tally.failed(&name, &why.to_string()),
    };
    let report = Report::of(program, path.sides(), &ended, path.strict());
    if report.failures.is_empty() {
        if args.nocapture {
            print!("{}", text_of(&ended));
        }
        tally.passed(&name);
    } else {
        tally.failed(
            &name,
            &format!("{}\n--- all it printed\n{}", report.failures.join("\n"), text_of(&ended)),
        );
    }
}

fn text_of(ended: &Ended) -> String {
    ended.lines.iter().map(|line| format!("{}: {}\n", line.side, line.text)).collect()
}

struct Tally {
    start: Instant,
    filtered: usize,
    passed: usize,
    failed: Vec<(String, String)>,
}

impl Tally {
    fn passed(&mut self, name: &str) {
        println!("test {name} ... ok");
        self.passed += 1;
    }

    fn failed(&mut self, name: &str, why: &str) {
        println!("test {name} ... FAILED");
        self.failed.push((name.to_owned(), why.to_owned()));
    }

    fn finish(self) -> ExitCode {
        for (name, why) in &self.failed {
            println!("\n---- {name} ----\n{why}");
        }
        let word = if self.failed.is_empty() { "ok" } else { "FAILED" };
        println!(
            "\ntest result: {word}. {} passed; {} failed; 0 ignored; 0 measured; {} filtered out; finished in {:.2}s\n",
            self.passed,
            self.failed.len(),
            self.filtered,
            self.start.elapsed().as_secs_f64()
        );
        let _nobody_reads = io::stdout().flush();
        if self.failed.is_empty() { ExitCode::SUCCESS } else { ExitCode::FAILURE }
    }
}
