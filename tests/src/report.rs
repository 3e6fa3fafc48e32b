//! What the programs' output amounts to. Knows their line format and the skips that are allowed, and no path.

use crate::launch::Ended;

/// Cases that may say EOPNOTSUPP (or that a limit is out of reach) and still count as conforming.
const MAY_SKIP: [(&str, &str); 2] = [("objects", "cq_resize"), ("large", "longer_than_max_msg_sz")];

/// The verdict on one program over one path.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Report {
    pub passed: usize,
    pub skipped: usize,
    pub failures: Vec<String>,
}

impl Report {
    /// `sides` processes of `program` were to run to their end. Foreign devices (`strict` false) may skip anything.
    pub fn of(program: &str, sides: usize, ended: &Ended, strict: bool) -> Self {
        let mut report = Self::default();
        let mut finished = 0;
        for line in &ended.lines {
            // `freeflow lab` puts the container's name first
            let text = line.text.split_once("| ").map_or(line.text.as_str(), |(_, text)| text);
            if text.starts_with("ok ") {
                report.passed += 1;
            } else if text.starts_with("FAIL ") {
                report.failures.push(line.text.clone());
            } else if let Some(skip) = text.strip_prefix("skip ") {
                report.skip(program, skip, &line.text, strict);
            } else if text.starts_with("# ") && text.ends_with(" skipped") {
                finished += 1;
            } else if text.contains("ERROR: AddressSanitizer") {
                report.failures.push(line.text.clone());
            }
        }
        if finished != sides {
            report.failures.push(format!("{finished} of {sides} processes came to their end"));
        }
        report.judge_statuses(ended);
        report
    }

    fn skip(&mut self, program: &str, skip: &str, line: &str, strict: bool) {
        let case = skip.split(':').next().unwrap_or_default();
        if strict && !MAY_SKIP.contains(&(program, case)) {
            self.failures.push(format!("{line} (FreeFlow has to do this)"));
        } else {
            self.skipped += 1;
        }
    }

    fn judge_statuses(&mut self, ended: &Ended) {
        for (side, status) in ended.statuses.iter().enumerate() {
            match status {
                None => self.failures.push(format!("process {side} did not end in time and was killed")),
                Some(status) if !status.success() => self.failures.push(format!("process {side}: {status}")),
                Some(_) => {}
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::process::ExitStatusExt;
    use std::process::ExitStatus;

    use super::*;
    use crate::launch::Line;

    fn ended(texts: &[&str]) -> Ended {
        let lines = texts.iter().map(|text| Line { side: 0, text: (*text).to_owned() }).collect();
        Ended { lines, statuses: vec![Some(ExitStatus::from_raw(0))] }
    }

    #[test]
    fn counts_cases_of_both_containers() {
        let out = ended(&[
            "c1| ok a",
            "c2| ok a",
            "c1| # 1 ok, 0 failed, 0 skipped",
            "c2| # 1 ok, 0 failed, 0 skipped",
        ]);
        assert_eq!(Report::of("rc_ops", 2, &out, true), Report { passed: 2, ..Report::default() });
    }

    #[test]
    fn a_process_that_vanishes_is_a_failure() {
        let report = Report::of("rc_ops", 2, &ended(&["ok a", "# 1 ok, 0 failed, 0 skipped"]), true);
        assert_eq!(report.failures, ["1 of 2 processes came to their end"]);
    }

    #[test]
    fn only_listed_skips_are_free() {
        let out = ended(&["skip cq_resize: EOPNOTSUPP", "# 0 ok, 0 failed, 1 skipped"]);
        assert!(Report::of("objects", 1, &out, true).failures.is_empty());
        assert_eq!(Report::of("ud", 1, &out, true).failures.len(), 1);
        assert!(Report::of("ud", 1, &out, false).failures.is_empty());
    }

    #[test]
    fn a_bad_exit_status_alone_is_a_failure() {
        let mut out = ended(&["ok a", "# 1 ok, 0 failed, 0 skipped"]);
        out.statuses = vec![Some(ExitStatus::from_raw(11)), None];
        assert_eq!(Report::of("ud", 1, &out, true).failures.len(), 2);
    }
}
