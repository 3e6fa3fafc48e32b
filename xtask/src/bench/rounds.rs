//! Rounds: every figure of every group once, then again. A group's round is bracketed by the hand-over between the two
//! processors; if that moved meanwhile (a virtual machine's processors are placed anew), the round is dropped.

use super::cases::{Figure, Group, HAND_OVER};
use super::figures::{Results, Round};
use super::side::{How, Stage};
use crate::failure::{Failure, Result};

/// Two hand-overs that differ by more are not one machine.
const SAME: f64 = 1.3;
/// Rounds tried for each one wanted.
const PATIENCE: usize = 3;

/// Measures those of `all` that `only` selects until `wanted` rounds of each are kept.
pub fn run(stage: &Stage, all: Vec<Group>, only: &str, wanted: usize) -> Result<Results> {
    let groups: Vec<Group> = all.into_iter().filter_map(|group| select(group, only)).collect();
    let mut kept: Vec<Vec<Round>> = groups.iter().map(|_| Vec::new()).collect();
    let mut dropped = vec![0; groups.len()];
    for turn in 1..=wanted * PATIENCE {
        for (index, group) in groups.iter().enumerate() {
            if kept[index].len() == wanted {
                continue;
            }
            eprintln!("bench: turn {turn}, {}: {} of {wanted} rounds", group.name, kept[index].len());
            match round(stage, &group.measures)? {
                Some(figures) => kept[index].push(figures),
                None => dropped[index] += 1,
            }
        }
    }
    let mut results = Results::default();
    for ((group, rounds), dropped) in groups.iter().zip(&kept).zip(dropped) {
        if rounds.is_empty() {
            return Err(Failure::new(format!(
                "{}: the hand-over between the processors moved in every one of {dropped} rounds; try on a quieter machine",
                group.name
            )));
        }
        let mut figures = vec![HAND_OVER];
        figures.extend(group.measures.iter().map(|(figure, _)| *figure));
        results.add(&figures, &group.bars, rounds);
        results.notes.push(format!("{}: {} rounds kept, {dropped} dropped", group.name, rounds.len()));
    }
    Ok(results)
}

/// A group as far as `only` asks for it. A bar needs its whole group, so cases are taken with their group.
fn select(group: Group, only: &str) -> Option<Group> {
    let wanted = group.name.contains(only) || group.measures.iter().any(|(f, _)| f.case.contains(only));
    wanted.then_some(group)
}

fn round(stage: &Stage, measures: &[(Figure, How)]) -> Result<Option<Round>> {
    let before = stage.hand_over()?;
    let mut round = Round::new();
    for (figure, how) in measures {
        let value = stage.figure(*how).map_err(|failure| {
            Failure::new(format!("{} of {}, {} bytes: {failure}", figure.case, figure.side, figure.size))
        })?;
        eprintln!(
            "bench:   {:<12} {:<16} {:>9} B {value:>10.3} {}",
            figure.case, figure.side, figure.size, figure.unit
        );
        round.insert(*figure, value);
    }
    let after = stage.hand_over()?;
    round.insert(HAND_OVER, (before + after) / 2.0);
    let same = before.max(after) <= SAME * before.min(after);
    if !same {
        eprintln!("bench:   dropped: the hand-over went from {before:.3} to {after:.3} us");
    }
    Ok(same.then_some(round))
}
