//! Figures: what each one is, its values over the rounds, and ratios between figures of the same round.

use std::collections::BTreeMap;

use super::cases::{Bar, Figure};

/// What one round measured; position of the figure in its group.
pub type Round = BTreeMap<Figure, f64>;

/// Everything a run measured.
#[derive(Debug, Default)]
pub struct Results {
    /// In the order they are shown.
    pub figures: Vec<(Figure, Vec<f64>)>,
    /// Each bar with its value in every round.
    pub bars: Vec<(Bar, Vec<f64>)>,
    /// Rounds that were dropped, and other things a reader must know.
    pub notes: Vec<String>,
}

impl Results {
    /// Takes in what another run measured.
    pub fn extend(&mut self, other: Results) {
        self.figures.extend(other.figures);
        self.bars.extend(other.bars);
        self.notes.extend(other.notes);
    }

    /// Takes in a group's kept rounds.
    pub fn add(&mut self, figures: &[Figure], bars: &[Bar], rounds: &[Round]) {
        for figure in figures {
            let values = rounds.iter().filter_map(|round| round.get(figure).copied());
            // The hand-over is part of every group.
            match self.figures.iter_mut().find(|(known, _)| known == figure) {
                Some((_, all)) => all.extend(values),
                None => self.figures.push((*figure, values.collect())),
            }
        }
        for bar in bars {
            let values = rounds.iter().filter_map(|round| (bar.ratio)(&Lookup(round))).collect();
            self.bars.push((*bar, values));
        }
    }
}

/// A round's figures by name.
#[derive(Debug)]
pub struct Lookup<'a>(pub &'a Round);

impl Lookup<'_> {
    pub fn get(&self, case: &str, side: &str, size: u64) -> Option<f64> {
        let same = |f: &&Figure| f.case == case && f.side == side && f.size == size;
        self.0.keys().find(same).and_then(|figure| self.0.get(figure)).copied()
    }
}

/// Median and the tenth and ninetieth percentile, by nearest rank.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Summary {
    pub median: f64,
    pub p10: f64,
    pub p90: f64,
    pub n: usize,
}

impl Summary {
    /// None if there is nothing to sum up.
    pub fn of(values: &[f64]) -> Option<Self> {
        let mut sorted = values.to_vec();
        sorted.sort_by(f64::total_cmp);
        let last = sorted.len().checked_sub(1)?;
        let at = |share: f64| sorted[(share * last as f64).round() as usize];
        Some(Self { median: at(0.5), p10: at(0.1), p90: at(0.9), n: sorted.len() })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quantiles() {
        let values: Vec<f64> = (0..=10).rev().map(f64::from).collect();
        assert_eq!(Summary::of(&values), Some(Summary { median: 5.0, p10: 1.0, p90: 9.0, n: 11 }));
        assert_eq!(Summary::of(&[]), None);
        assert_eq!(Summary::of(&[3.0]).map(|s| s.p10), Some(3.0));
    }
}
