//! `freeflow doctor`: why something does not work, in plain words, each finding with what to do.
//!
//! Owns the report. The checks are in `host` (this machine), `router` (the daemon), `libraries` (the doors), `nccl` and `ucx`.

mod host;
mod libraries;
mod nccl;
mod router;
mod ucx;

use std::path::PathBuf;
use std::process::ExitCode;

use clap::Parser;
use serde::Serialize;

use super::failure::{Context as _, Result};

/// Check this machine, the router and the libraries; exit status 0 if fine, 1 if not.
#[derive(Debug, Parser)]
#[command(after_help = "\
Run it where programs fail: on the host, as `freeflow run -- freeflow doctor`, or in a container as
/run/freeflow/bin/freeflow doctor.

Examples:
  freeflow doctor
  freeflow doctor --json --verbs
  freeflow run -- freeflow doctor --ucx")]
pub struct Args {
    #[arg(long)]
    json: bool,
    /// Check what NCCL needs
    #[arg(long, group = "door")]
    nccl: bool,
    /// Check what UCX needs
    #[arg(long, group = "door")]
    ucx: bool,
    /// Check what verbs programs need (the default)
    #[arg(long, group = "door")]
    verbs: bool,
    /// Socket of the router to check
    #[arg(long, visible_alias = "socket", value_name = "SOCK")]
    router: Option<PathBuf>,
}

/// How bad a finding is: a note restricts only what it names.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
enum Level {
    Ok,
    Note,
    Bad,
}

#[derive(Debug, Serialize)]
struct Finding {
    check: &'static str,
    level: Level,
    found: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    advice: Option<String>,
}

impl Finding {
    fn ok(check: &'static str, found: impl Into<String>) -> Self {
        Self { check, level: Level::Ok, found: found.into(), advice: None }
    }

    fn note(check: &'static str, found: impl Into<String>, advice: impl Into<String>) -> Self {
        Self { check, level: Level::Note, found: found.into(), advice: Some(advice.into()) }
    }

    fn bad(check: &'static str, found: impl Into<String>, advice: impl Into<String>) -> Self {
        Self { check, level: Level::Bad, found: found.into(), advice: Some(advice.into()) }
    }
}

#[derive(Serialize)]
struct Report<'a> {
    version: u32,
    ok: bool,
    findings: &'a [Finding],
}

pub fn main(args: &Args) -> Result<ExitCode> {
    let mut findings = router::check(args.router.as_deref());
    findings.extend(libraries::check(args));
    if args.nccl {
        findings.extend(nccl::check());
    }
    findings.extend(host::check());
    if !router::is_inside(args.router.as_deref()) {
        findings.extend(host::lab());
    }
    let ok = findings.iter().all(|f| f.level != Level::Bad);
    if args.json {
        let report = Report { version: 1, ok, findings: &findings };
        println!("{}", serde_json::to_string_pretty(&report).context("cannot print")?);
    } else {
        print(&findings);
    }
    Ok(if ok { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

fn print(findings: &[Finding]) {
    for finding in findings {
        let mark = match finding.level {
            Level::Ok => "ok  ",
            Level::Note => "note",
            Level::Bad => "BAD ",
        };
        println!("{mark} {:<18} {}", finding.check, finding.found);
        if let Some(advice) = &finding.advice {
            println!("     {:<18} -> {advice}", "");
        }
    }
}
