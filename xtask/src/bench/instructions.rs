//! Instructions of one operation, post and poll, as callgrind counts them: the figure that no noise reaches.
//!
//! A program that does N operations runs twice, with N small and large, and what the second run had more is divided by what it
//! did more: making and connecting the queue pairs falls out.

use std::time::Duration;

use super::cases::Figure;
use super::figures::{Results, Round};
use super::side::{Provider, Stage};
use crate::failure::{Failure, Result};
use crate::process::{self, Echo};

const CASE: &str = "instructions";
const FEW: u64 = 1_600;
const MANY: u64 = 17_600;

/// Words of benches/probes/ops.c, and what each does to eight bytes.
const OPERATIONS: [(&str, &str); 3] =
    [("write", "WRITE"), ("wr", "WRITE by ibv_wr_*"), ("send", "SEND with its receive")];

/// callgrind makes a program some fifty times slower.
const LIMIT: Duration = Duration::from_secs(120);

pub fn run(stage: &Stage, only: &str, results: &mut Results) -> Result<()> {
    if !CASE.contains(only) {
        return Ok(());
    }
    eprintln!("bench: {CASE}");
    let mut round = Round::new();
    for (word, side) in OPERATIONS {
        let more = counted(stage, word, MANY)? - counted(stage, word, FEW)?;
        let figure = Figure { case: CASE, side, size: 8, metric: "post and poll", unit: "instructions" };
        round.insert(figure, more / (MANY - FEW) as f64);
    }
    let figures: Vec<Figure> = round.keys().copied().collect();
    results.add(&figures, &[], &[round]);
    Ok(())
}

/// Instructions of the whole program.
fn counted(stage: &Stage, word: &str, operations: u64) -> Result<f64> {
    let mut command = stage.with_device(Provider::Ours);
    command.args(["valgrind", "--tool=callgrind", "--callgrind-out-file=/dev/null"]);
    command.arg(stage.probe_path("ops")).args([word, &operations.to_string()]);
    let done = process::run(&mut command, LIMIT, Echo::Quiet)?;
    let collected = total(&done.stderr).filter(|_| done.success());
    collected.ok_or_else(|| Failure::new(format!("ops {word} ended with {}: {}", done.how(), done.tail())))
}

/// From valgrind's summary: "==PID== Collected : 123456".
fn total(text: &str) -> Option<f64> {
    text.lines().find_map(|line| line.split_once("Collected : ")?.1.trim().parse().ok())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn valgrinds_summary_is_read() {
        assert_eq!(total("==7== Events    : Ir\n==7== Collected : 813\n==7== \n"), Some(813.0));
        assert_eq!(total("==7== Command: ops\n"), None);
    }
}
