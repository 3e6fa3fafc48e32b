//! docs/verbs.md: what is supported, by verb, and by opcode and type of queue pair. No cell is written by hand: each comes
//! from the conformance case that shows it, in `tests/verbs`, and those cases are run with every change.
//!
//! A verb's cases are found in the sources of the programs: those that call it, themselves or by a function of theirs.
//! A request's are named in `support.txt`, line by line; a line whose case does not exist is an error.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write as _;
use std::fs;
use std::path::PathBuf;

use crate::failure::{Context as _, Failure, Result};
use crate::layout;

pub const PAGE: &str = "docs/verbs.md";
/// Cases that are named; of others there is the number.
const NAMED: usize = 3;
const TYPES: [&str; 4] = ["RC", "UC", "UD", "XRC_SEND"];

fn read(name: &str) -> Result<String> {
    let path: PathBuf = layout::root().join(name);
    fs::read_to_string(&path).context(format_args!("cannot read {}", path.display()))
}

fn lines(text: &str) -> impl Iterator<Item = &str> {
    text.lines().filter(|line| !line.starts_with('#') && !line.is_empty())
}

// ---- the programs

/// What is known of a program from its source.
#[derive(Debug, Default)]
struct Program {
    name: String,
    /// Name of a case, and the function that it is; in the order of the table.
    cases: Vec<(String, String)>,
    /// Function, and what it calls.
    calls: BTreeMap<String, BTreeSet<String>>,
}

fn is_word(c: char) -> bool {
    c.is_ascii_alphanumeric() || c == '_'
}

/// The names in a piece of C.
fn words(code: &str) -> impl Iterator<Item = &str> {
    code.split(|c: char| !is_word(c)).filter(|word| !word.is_empty())
}

/// The names that a line of C calls.
fn called(line: &str) -> impl Iterator<Item = String> {
    let code = line.split("/*").next().unwrap_or_default();
    let code = if code.trim_start().starts_with('*') { "" } else { code };
    let before = code.match_indices('(').map(|(at, _)| &code[..at]);
    before.filter(|head| head.ends_with(is_word)).filter_map(|head| words(head).last().map(str::to_owned))
}

/// The functions of a source file and what each calls. A definition begins in the first column.
fn functions(source: &str) -> BTreeMap<String, BTreeSet<String>> {
    let mut found: BTreeMap<String, BTreeSet<String>> = BTreeMap::new();
    let mut inside: Option<String> = None;
    for line in source.lines() {
        if let Some(name) = &inside {
            found.entry(name.clone()).or_default().extend(called(line));
            if line.starts_with('}') {
                inside = None;
            }
            continue;
        }
        let begins = line.starts_with(|c: char| c.is_ascii_alphabetic());
        let Some((head, _)) = line.split_once('(').filter(|_| begins && !line.ends_with(';')) else {
            continue;
        };
        let Some(name) = words(head).last().map(str::to_owned) else { continue };
        found.entry(name.clone()).or_default().extend(called(line).filter(|word| *word != name));
        let whole = line.contains('{') && line.ends_with('}');
        inside = (!whole).then_some(name);
    }
    found
}

/// The table of cases: `CASE(f)`, `ROWS(f)` and `{ "name", f, flags }`.
fn cases(source: &str) -> Vec<(String, String)> {
    let table = source.split_once("test_case cases[] = {").map_or("", |(_, rest)| rest);
    let table = table.split_once("\n};").map_or("", |(table, _)| table);
    let mut found = vec![];
    let mut rest = table;
    while let Some(at) = rest.find(['C', 'R', '{']) {
        rest = &rest[at..];
        let argument = |text: &str| text.split(')').next().unwrap_or_default().to_owned();
        if let Some(text) = rest.strip_prefix("CASE(") {
            found.push((argument(text), argument(text)));
        } else if let Some(text) = rest.strip_prefix("ROWS(") {
            let name = argument(text);
            found.extend(["post", "wr"].map(|by| (format!("{name}/{by}"), format!("{name}_{by}"))));
        } else if let Some((name, text)) = rest.strip_prefix("{ \"").and_then(|text| text.split_once('"')) {
            found.push((name.to_owned(), words(text).next().unwrap_or_default().to_owned()));
        }
        let end = rest.find([')', '}']).map_or(rest.len(), |end| end + 1);
        rest = &rest[end..];
    }
    found
}

fn program(name: &str, shared: &BTreeMap<String, BTreeSet<String>>) -> Result<Program> {
    let source = read(&format!("tests/verbs/{name}.c"))?;
    let mut calls = shared.clone();
    calls.extend(functions(&source));
    Ok(Program { name: name.to_owned(), cases: cases(&source), calls })
}

/// The names in the list of programs, in its order.
fn programs() -> Result<Vec<Program>> {
    let list = read("tests/src/programs.rs")?;
    let list = list.split_once("PROGRAMS: [&str;").and_then(|(_, rest)| rest.split_once('[')).map(|(_, l)| l);
    let list = list.and_then(|l| l.split_once(']')).map(|(list, _)| list.to_owned());
    let list = list.ok_or_else(|| Failure::new("tests/src/programs.rs has no list of programs"))?;
    let mut shared = BTreeMap::new();
    for file in ["common", "oob", "pair", "work"] {
        shared.extend(functions(&read(&format!("tests/verbs/{file}.c"))?));
    }
    list.split('"').skip(1).step_by(2).map(|name| program(name, &shared)).collect()
}

impl Program {
    /// How many calls away each verb is that a function comes to.
    fn verbs(&self, function: &str) -> BTreeMap<String, usize> {
        let (mut found, mut seen) = (BTreeMap::new(), BTreeSet::from([function]));
        let mut level = vec![function];
        for depth in 0.. {
            let next: Vec<&str> =
                level.iter().filter_map(|f| self.calls.get(*f)).flatten().map(String::as_str).collect();
            for word in next.iter().filter(|word| word.starts_with("ibv_")) {
                found.entry((*word).to_owned()).or_insert(depth);
            }
            level = next.into_iter().filter(|f| self.calls.contains_key(*f) && seen.insert(f)).collect();
            if level.is_empty() {
                break;
            }
        }
        found
    }
}

// ---- the page

/// A case that shows something.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
struct Proof {
    depth: usize,
    program: String,
    case: String,
}

fn named(proofs: &[Proof]) -> String {
    let mut text = String::new();
    for proof in proofs.iter().take(NAMED) {
        let comma = if text.is_empty() { "" } else { ", " };
        let _ = write!(text, "{comma}{} {}", proof.program, proof.case);
    }
    if proofs.len() > NAMED {
        let _ = write!(text, " and {} more", proofs.len() - NAMED);
    }
    text
}

/// The page, from the sources alone.
pub fn page() -> Result<String> {
    let programs = programs()?;
    let here_only = read("tests/verbs/not-on-link.txt")?;
    let here_only: BTreeMap<&str, &str> = lines(&here_only).filter_map(|line| line.split_once(' ')).collect();
    let mut text = String::from(
        "# Verbs: what is supported\n\n\
         Made from the conformance programs in tests/verbs by `cargo xtask docs`; do not edit.\n\
         `cargo xtask test` runs every case that is named here, in one process, between two processes, between two containers, and\n\
         between two hosts where nothing else is said. What rdma-core's own tests say is in verbs-suite.md.\n\n",
    );
    if !here_only.is_empty() {
        text.push_str("Not run between two hosts:\n\n");
    }
    for (program, why) in &here_only {
        writeln!(text, "* {program}: {why}.").context("a list")?;
    }
    requests(&mut text, &programs, &here_only)?;
    verbs(&mut text, &programs)?;
    Ok(text)
}

/// A line of support.txt.
struct Shown<'a> {
    /// Empty: it works.
    errno: &'a str,
    program: &'a str,
    case: &'a str,
}

/// The table of opcodes and types of queue pair.
fn requests(text: &mut String, programs: &[Program], here_only: &BTreeMap<&str, &str>) -> Result<()> {
    let support = read("tests/verbs/support.txt")?;
    let mut opcodes: Vec<&str> = vec![];
    let mut cells: BTreeMap<(&str, &str), Vec<Shown<'_>>> = BTreeMap::new();
    for line in lines(&support) {
        let words: Vec<&str> = line.split(' ').collect();
        let (opcode, kind, errno, program, case) = match words[..] {
            [opcode, kind, program, case] => (opcode, kind, "", program, case),
            [opcode, kind, errno, program, case] if errno.starts_with('!') => {
                (opcode, kind, &errno[1..], program, case)
            }
            _ => return Err(Failure::new(format!("support.txt: {line:?} is no line of it"))),
        };
        let exists =
            programs.iter().any(|p| p.name == program && p.cases.iter().any(|(name, _)| name == case));
        if !exists || !TYPES.contains(&kind) {
            return Err(Failure::new(format!(
                "support.txt: there is no such case, or no such type: {line:?}"
            )));
        }
        if !opcodes.contains(&opcode) {
            opcodes.push(opcode);
        }
        cells.entry((opcode, kind)).or_default().push(Shown { errno, program, case });
    }
    text.push_str(
        "\n## Requests\n\nOf `enum ibv_wr_opcode`, without IBV_WR_; `/wr` and `_wr` are cases that use ibv_wr_start and its\n\
         like, others use ibv_post_send. A dash: no case shows anything. *One host* marks what no case shows between two.\n\n",
    );
    writeln!(text, "| opcode | {} |\n|---|{}", TYPES.join(" | "), "---|".repeat(TYPES.len()))
        .context("a table")?;
    for opcode in opcodes {
        write!(text, "| {opcode} |").context("a table")?;
        for kind in TYPES {
            let cell = cells.get(&(opcode, kind)).map(Vec::as_slice).unwrap_or_default();
            write!(text, " {} |", cell_text(cell, here_only)).context("a table")?;
        }
        text.push('\n');
    }
    Ok(())
}

fn cell_text(proofs: &[Shown<'_>], here_only: &BTreeMap<&str, &str>) -> String {
    let Some(Shown { errno, .. }) = proofs.first() else { return "-".to_owned() };
    let list: Vec<String> = proofs.iter().map(|shown| format!("{} {}", shown.program, shown.case)).collect();
    if !errno.is_empty() {
        return format!("{errno}: {}", list.join(", "));
    }
    let one_host = proofs.iter().all(|shown| here_only.contains_key(shown.program));
    format!("{}: {}", if one_host { "one host" } else { "yes" }, list.join(", "))
}

/// The table of verbs: the library's exports, and the inline functions that the programs call.
fn verbs(text: &mut String, programs: &[Program]) -> Result<()> {
    let mut proofs: BTreeMap<String, Vec<Proof>> = BTreeMap::new();
    for program in programs {
        for (case, function) in &program.cases {
            for (verb, depth) in program.verbs(function) {
                let proof = Proof { depth, program: program.name.clone(), case: case.clone() };
                proofs.entry(verb).or_default().push(proof);
            }
        }
    }
    proofs.values_mut().for_each(|list| list.sort());
    let symbols = read("shim-verbs/verbs/symbols.txt")?;
    let exported: BTreeMap<&str, &str> = lines(&symbols)
        .filter_map(|line| {
            let mut words = line.split_whitespace();
            let public = words.next().is_some_and(|node| node.starts_with("IBVERBS_1"));
            words.next().zip(words.next()).filter(|_| public)
        })
        .collect();
    text.push_str("\n## Verbs\n\n| verb | shown by |\n|---|---|\n");
    let all: BTreeSet<&str> = exported.keys().copied().chain(proofs.keys().map(String::as_str)).collect();
    for verb in all {
        let alias = verb.trim_start_matches('_');
        let list = proofs.get(verb).or_else(|| proofs.get(alias));
        let shown = match (list, exported.get(verb)) {
            (Some(list), _) => named(list),
            (None, Some(kind)) if kind.starts_with("unsupported") => "EOPNOTSUPP".to_owned(),
            (None, _) => "no case of its own".to_owned(),
        };
        writeln!(text, "| {verb} | {shown} |").context("a table")?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    const SOURCE: &str = "\
static int help(void)
{
\treturn ibv_poll_cq(cq, 1, &wc);
}

static void one(void) { help(); }

static void two_wr(void)
{
\tOK(ibv_modify_qp(qp, &a, 0));
\tone();
}
static const struct test_case cases[] = {
\tCASE(one), { \"two/x\", two_wr, LOCAL },
\tROWS(two),
};
SUITE(cases)
";

    #[test]
    fn cases_and_what_they_call_are_found() {
        let found = cases(SOURCE);
        let want = [("one", "one"), ("two/x", "two_wr"), ("two/post", "two_post"), ("two/wr", "two_wr")];
        assert_eq!(found, want.map(|(a, b)| (a.to_owned(), b.to_owned())));
        let program = Program { name: "p".into(), cases: found, calls: functions(SOURCE) };
        let verbs = program.verbs("two_wr");
        assert_eq!(verbs.get("ibv_modify_qp"), Some(&0));
        assert_eq!(verbs.get("ibv_poll_cq"), Some(&2));
    }

    #[test]
    fn every_program_has_cases() {
        let programs = programs().expect("sources");
        assert!(programs.len() > 10);
        for program in programs {
            assert!(!program.cases.is_empty(), "{}", program.name);
        }
    }
}
