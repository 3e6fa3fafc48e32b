//! rdma-core's own suite (its pyverbs tests, as Debian ships them) on the virtual NIC: what must pass, and the table that
//! shows our results beside those of the kernel's software RDMA.
//!
//! `tests/rdma-core` has the runner, the names that must pass, and what came out of the kernel's.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write as _;
use std::path::PathBuf;
use std::process::Command;
use std::time::{Duration, SystemTime, UNIX_EPOCH};
use std::{env, fs};

use super::Tally;
use crate::failure::{Context as _, Failure, Result};
use crate::process::{self, Echo};
use crate::{hugepages, layout};

const NAME: &str = "rdma-core's suite";
pub const TABLE: &str = "docs/verbs-suite.md";
/// Where the package `rdma-core` puts its tests, most of them compressed.
const SHIPPED: &str = "/usr/share/doc/rdma-core/tests";
/// All of it takes a few seconds on an idle machine.
const LIMIT: Duration = Duration::from_secs(300);
/// 2 MiB pages that the tests which use them hold at one time.
const HUGE_PAGES: u64 = 16;

/// A line of `must-pass.txt`.
struct Wanted {
    name: String,
    huge_pages: bool,
}

/// What came out of one test: a word, and why.
type Outcomes = BTreeMap<String, (String, String)>;

pub fn run(tally: &mut Tally, filter: Option<&str>) -> Result<()> {
    let chosen = |name: &str| filter.is_none_or(|f| name.contains(f));
    if chosen(NAME) {
        let (passed, failed) = judge()?;
        tally.add(NAME, passed, failed);
    }
    Ok(())
}

fn file(name: &str) -> PathBuf {
    layout::root().join("tests/rdma-core").join(name)
}

fn lines(name: &str) -> Result<Vec<String>> {
    let path = file(name);
    let text = fs::read_to_string(&path).context(format_args!("cannot read {}", path.display()))?;
    Ok(text.lines().filter(|l| !l.starts_with('#') && !l.is_empty()).map(str::to_owned).collect())
}

fn wanted() -> Result<Vec<Wanted>> {
    let parse = |line: String| {
        let mut words = line.split_whitespace();
        let name = words.next().unwrap_or_default().to_owned();
        Wanted { name, huge_pages: words.next() == Some("hugepages") }
    };
    Ok(lines("must-pass.txt")?.into_iter().map(parse).collect())
}

/// Lines `WORD NAME REASON`.
fn outcomes(lines: impl IntoIterator<Item = impl AsRef<str>>) -> Outcomes {
    let parse = |line: &str| {
        let mut words = line.splitn(3, ' ');
        let (word, name) = (words.next()?.to_owned(), words.next()?.to_owned());
        name.starts_with("tests.").then(|| (name, (word, words.next().unwrap_or_default().to_owned())))
    };
    lines.into_iter().filter_map(|line| parse(line.as_ref())).collect()
}

/// Runs the suite: how many of the wanted tests passed, and which did not.
fn judge() -> Result<(usize, Vec<String>)> {
    let pages = hugepages::reserve(HUGE_PAGES);
    let seed = env::var("FF_TEST_SEED").unwrap_or_else(|_| fresh_seed());
    println!("      {NAME}: order of seed {seed} (FF_TEST_SEED={seed} repeats it)");
    let done = process::run(command(&seed)?.env("PYTHONDONTWRITEBYTECODE", "1"), LIMIT, Echo::Quiet)?;
    let got = outcomes(done.stdout.lines());
    if got.is_empty() {
        return Err(Failure::new(format!("{NAME} did not run: {}\n{}", done.how(), done.tail())));
    }
    let (mut passed, mut failed) = (0, Vec::new());
    for test in wanted()? {
        match got.get(&test.name) {
            Some((word, _)) if word == "OK" => passed += 1,
            _ if test.huge_pages && pages.is_none() => {
                println!("      {}: left out, no 2 MiB pages can be reserved here", test.name);
            }
            Some((word, why)) => failed.push(format!("{} {word} {why}", test.name)),
            None => failed.push(format!("{} has no result ({})", test.name, done.how())),
        }
    }
    for line in &failed {
        eprintln!("{NAME}: {line}");
    }
    if !failed.is_empty() {
        eprintln!("{}", done.tail());
    }
    announce_newcomers(&got)?;
    Ok((passed, failed))
}

/// A test that passes and is not on the list is not held to it.
fn announce_newcomers(got: &Outcomes) -> Result<()> {
    let listed: BTreeSet<String> = wanted()?.into_iter().map(|test| test.name).collect();
    for (name, (word, _)) in got {
        if word == "OK" && !listed.contains(name) {
            println!("      {name} passes, but is not in tests/rdma-core/must-pass.txt");
        }
    }
    Ok(())
}

fn fresh_seed() -> String {
    let since = SystemTime::now().duration_since(UNIX_EPOCH);
    (since.map_or(0, |d| d.as_nanos()) % 1_000_000).to_string()
}

/// The suite on a router of its own, which ends with it.
fn command(seed: &str) -> Result<Command> {
    let tests = unpack()?;
    let dir = tests.parent().unwrap_or(&tests).to_owned();
    let script = r#"
        "$1" router --socket "$2/router.sock" --ready-on-stdout >"$2/ready" 2>"$2/router.log" &
        router=$!
        trap 'kill $router; wait $router' EXIT
        until [ -s "$2/ready" ]; do kill -0 $router || exit 1; sleep 0.02; done
        "$1" run --router "$2/router.sock" -- /usr/bin/python3 "$3" "$4" "$5" --dev ff0 --gid 0
    "#;
    let mut command = Command::new("sh");
    command.args(["-c", script, "sh"]).arg(layout::freeflow()).arg(&dir);
    command.arg(file("run.py")).arg(&tests).arg(seed);
    Ok(command)
}

/// A copy of the shipped tests that Python can import.
fn unpack() -> Result<PathBuf> {
    let dir = layout::target().join("verbs-suite");
    if dir.exists() {
        fs::remove_dir_all(&dir).context(format_args!("cannot remove {}", dir.display()))?;
    }
    fs::create_dir_all(&dir).context(format_args!("cannot make {}", dir.display()))?;
    let tests = dir.join("tests");
    process::must(Command::new("cp").arg("-r").arg(SHIPPED).arg(&tests), LIMIT)?;
    let packed = r#"find "$1" -name '*.gz' -exec gunzip {} +"#;
    process::must(Command::new("sh").args(["-c", packed, "sh"]).arg(&tests), LIMIT)?;
    Ok(tests)
}

/// The table, from the lists alone.
pub fn table() -> Result<String> {
    let kernel = outcomes(lines("rxe-6.1.txt")?);
    let ours: BTreeMap<String, bool> = wanted()?.into_iter().map(|t| (t.name, t.huge_pages)).collect();
    let reasons: BTreeMap<String, String> = lines("not-here.txt")?
        .iter()
        .filter_map(|line| line.split_once(' ').map(|(name, why)| (name.to_owned(), why.to_owned())))
        .collect();
    let both = kernel.values().filter(|(word, _)| word == "PASS").count();
    let mut text = format!(
        "# rdma-core's own tests\n\n\
         Made from the lists in tests/rdma-core by `cargo xtask docs`; do not edit. The {} tests of rdma-core 44 that are for no\n\
         vendor's hardware: FreeFlow passes {}, the kernel's software RDMA (rxe, Linux 6.1) {both}. `cargo xtask test` runs them\n\
         all in shuffled order and fails if one that is said to pass here does not.\n",
        kernel.len(),
        ours.len()
    );
    let mut module = "";
    for (name, (word, why)) in &kernel {
        let (file, test) = split(name);
        if file != module {
            write!(text, "\n## {file}\n\n| test | FreeFlow | rxe |\n|---|---|---|\n").context("a table")?;
            module = file;
        }
        let here = match (ours.get(name), reason(&reasons, name)) {
            (Some(false), _) => "passes".to_owned(),
            (Some(true), _) => "passes (needs 2 MiB pages)".to_owned(),
            (None, why) => format!("no: {}", why.unwrap_or("not built yet")),
        };
        let there = if word == "PASS" { "passes".to_owned() } else { format!("no: {}", tidy(why)) };
        writeln!(text, "| {test} | {here} | {there} |").context("a table")?;
    }
    Ok(text)
}

/// Of the longest beginning of the name that the list has.
fn reason<'a>(reasons: &'a BTreeMap<String, String>, name: &str) -> Option<&'a str> {
    let fits = reasons.iter().filter(|(start, _)| name.starts_with(start.as_str()));
    fits.max_by_key(|(start, _)| start.len()).map(|(_, why)| why.as_str())
}

/// `tests.test_cq.CQTest.test_resize_cq`: `test_cq` and the rest.
fn split(name: &str) -> (&str, &str) {
    let name = name.strip_prefix("tests.").unwrap_or(name);
    name.split_once('.').unwrap_or((name, ""))
}

/// A reason without what breaks a table.
fn tidy(why: &str) -> String {
    why.split(" @ ").next().unwrap_or_default().replace('|', "/").trim().to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_are_read_and_the_rest_is_passed_over() {
        let got = outcomes(["OK tests.a.B.c ", "SKIP tests.a.B.d not supported here", "END 2", ""]);
        assert_eq!(got["tests.a.B.c"], ("OK".to_owned(), String::new()));
        assert_eq!(got["tests.a.B.d"].1, "not supported here");
        assert_eq!(got.len(), 2);
    }

    #[test]
    fn every_listed_test_exists() {
        let known = outcomes(lines("rxe-6.1.txt").expect("list"));
        for test in wanted().expect("list") {
            assert!(known.contains_key(&test.name), "{} is no test of the suite", test.name);
        }
        for line in lines("not-here.txt").expect("list") {
            let start = line.split(' ').next().unwrap_or_default();
            assert!(known.keys().any(|name| name.starts_with(start)), "{start} fits no test");
        }
    }

    #[test]
    fn the_longest_beginning_gives_the_reason() {
        let reasons =
            [("tests.a", "x"), ("tests.a.B.c", "y")].map(|(n, w)| (n.to_owned(), w.to_owned())).into();
        assert_eq!(reason(&reasons, "tests.a.B.c"), Some("y"));
        assert_eq!(reason(&reasons, "tests.a.B.d"), Some("x"));
        assert_eq!(reason(&reasons, "tests.b"), None);
    }
}
