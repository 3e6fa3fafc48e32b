//! The results: a CSV file for programs and a Markdown file for people, which is printed too.

use std::fmt::Write as _;
use std::process::ExitCode;

use super::cases::Bound;
use super::figures::{Results, Summary};
use crate::failure::{Context as _, Failure, Result};
use crate::layout;

/// Rounds below which a median says little.
const ENOUGH: usize = 5;

/// Writes target/bench/NAME.csv and .md. Fails if a figure or a ratio is missing.
pub fn write(name: &str, results: &Results) -> Result<ExitCode> {
    let (csv, md) = (csv(results)?, markdown(results)?);
    let dir = layout::target().join("bench");
    std::fs::create_dir_all(&dir).context(format_args!("cannot make {}", dir.display()))?;
    for (ending, text) in [("csv", &csv), ("md", &md)] {
        let path = dir.join(name).with_extension(ending);
        std::fs::write(&path, text).context(format_args!("cannot write {}", path.display()))?;
        eprintln!("bench: {}", path.display());
    }
    print!("{md}");
    Ok(ExitCode::SUCCESS)
}

fn summary(what: &str, values: &[f64]) -> Result<Summary> {
    let usable = values.iter().all(|value| value.is_finite());
    Summary::of(values)
        .filter(|_| usable)
        .ok_or_else(|| Failure::new(format!("no figure for {what}: the results would not be complete")))
}

fn csv(results: &Results) -> Result<String> {
    let mut out = "case,side,size,metric,unit,median,p10,p90,n\n".to_owned();
    for (f, values) in &results.figures {
        let s = summary(f.case, values)?;
        let cells = format!("{},{},{},{},{}", f.case, f.side, f.size, f.metric, f.unit);
        let _ = writeln!(out, "{cells},{:.4},{:.4},{:.4},{}", s.median, s.p10, s.p90, s.n);
    }
    for (bar, values) in &results.bars {
        let s = summary(bar.what, values)?;
        let what = bar.what.replace(',', ";");
        let _ =
            writeln!(out, "{},{what},,ratio,1,{:.4},{:.4},{:.4},{}", bar.case, s.median, s.p10, s.p90, s.n);
    }
    Ok(out)
}

fn markdown(results: &Results) -> Result<String> {
    let mut out =
        String::from("## Bars\n\n| ratio | bar | median | p10-p90 | n | |\n|---|---|---|---|---|---|\n");
    for (bar, values) in &results.bars {
        let s = summary(bar.what, values)?;
        let (bound, word) = verdict(bar.bound, s.median);
        let _ = writeln!(
            out,
            "| {} | {bound} | {:.2} | {:.2}-{:.2} | {}{} | {word} |",
            bar.what,
            s.median,
            s.p10,
            s.p90,
            s.n,
            if s.n < ENOUGH { " (few)" } else { "" },
        );
    }
    out += "\n## Figures\n\n| case | side | bytes | metric | median | p10-p90 | n |\n|---|---|---|---|---|---|---|\n";
    for (f, values) in &results.figures {
        let s = summary(f.case, values)?;
        let _ = writeln!(
            out,
            "| {} | {} | {} | {}, {} | {:.3} | {:.3}-{:.3} | {} |",
            f.case, f.side, f.size, f.metric, f.unit, s.median, s.p10, s.p90, s.n
        );
    }
    out.push('\n');
    for note in &results.notes {
        let _ = writeln!(out, "* {note}");
    }
    Ok(out)
}

fn verdict(bound: Bound, value: f64) -> (String, &'static str) {
    let word = |met: bool| if met { "pass" } else { "**miss**" };
    match bound {
        Bound::AtMost(most) => (format!("<= {most}"), word(value <= most)),
        Bound::AtLeast(least) => (format!(">= {least}"), word(value >= least)),
        Bound::None => (String::new(), ""),
    }
}

#[cfg(test)]
mod tests {
    use super::super::cases::{Bar, HAND_OVER};
    use super::*;

    fn results(values: Vec<f64>) -> Results {
        let bar = Bar { case: "a", what: "a / b, c", bound: Bound::AtMost(1.0), ratio: |_| None };
        Results { figures: vec![(HAND_OVER, vec![0.07])], bars: vec![(bar, values)], notes: Vec::new() }
    }

    #[test]
    fn bars_are_judged_by_the_median() {
        let passes = markdown(&results(vec![0.5, 0.9, 7.0])).expect("complete");
        assert!(passes.contains("| pass |"), "{passes}");
        let misses = markdown(&results(vec![0.5, 1.1, 7.0])).expect("complete");
        assert!(misses.contains("miss"), "{misses}");
    }

    #[test]
    fn a_missing_figure_is_an_error() {
        assert!(csv(&results(vec![])).is_err());
        assert!(markdown(&results(vec![f64::NAN])).is_err());
        let text = csv(&results(vec![1.0])).expect("complete");
        assert!(text.lines().all(|line| line.split(',').count() == 9), "{text}");
    }
}
