//! docs/security.md's table of promises, held to the sources: each test it names is there.

use std::collections::BTreeSet;
use std::fs;
use std::io;
use std::path::Path;

/// Folders with Rust sources.
const SOURCES: [&str; 5] = ["core", "router", "shim-verbs", "tests", "xtask"];
/// Where the soaks are named.
const SOAKS: &str = "xtask/src/safety.rs";

/// Names in the last column of the table of promises: at least one in each row.
pub fn promised(text: &str) -> Result<Vec<String>, String> {
    let section =
        text.split("\n## ").find(|part| part.starts_with("Promises")).ok_or("no section Promises")?;
    let rows: Vec<&str> = section.lines().filter(|line| line.starts_with('|')).skip(2).collect();
    let mut names = Vec::new();
    for row in &rows {
        let last = row.trim_end_matches('|').rsplit('|').next().unwrap_or_default();
        let found: Vec<String> = last.split('`').skip(1).step_by(2).map(str::to_owned).collect();
        if found.is_empty() {
            return Err(format!("no test holds {row}"));
        }
        names.extend(found);
    }
    if names.is_empty() { Err("the table of promises is empty".to_owned()) } else { Ok(names) }
}

/// Names of the table that no test has.
pub fn broken(root: &Path) -> io::Result<Vec<String>> {
    let text = fs::read_to_string(root.join("docs/security.md"))?;
    let promised = promised(&text).map_err(io::Error::other)?;
    let mut tests = BTreeSet::new();
    for folder in SOURCES {
        collect(&root.join(folder), &mut tests)?;
    }
    let soaks = fs::read_to_string(root.join(SOAKS))?;
    let is_there = |name: &String| match name.strip_prefix("soak ") {
        Some(_) => soaks.contains(&format!("(\"{name}\",")),
        None => tests.contains(name),
    };
    Ok(promised.into_iter().filter(|name| !is_there(name)).collect())
}

fn collect(dir: &Path, tests: &mut BTreeSet<String>) -> io::Result<()> {
    for entry in fs::read_dir(dir)? {
        let path = entry?.path();
        if path.is_dir() {
            collect(&path, tests)?;
        } else if path.extension().is_some_and(|e| e == "rs") {
            tests.extend(tests_of(&fs::read_to_string(&path)?));
        }
    }
    Ok(())
}

/// Functions under `#[test]`, and the models that the loom tests make by macro (`name: protocol without ...`).
fn tests_of(source: &str) -> BTreeSet<String> {
    let mut names = BTreeSet::new();
    let mut marked = false;
    for line in source.lines().map(str::trim) {
        if line == "#[test]" {
            marked = true;
        } else if let Some(rest) = line.strip_prefix("fn ") {
            let name = rest.split(['(', '<']).next().unwrap_or_default();
            if std::mem::take(&mut marked) {
                names.insert(name.to_owned());
            }
        } else if let Some((name, _)) =
            line.split_once(':').filter(|(name, _)| name.starts_with("loom_without_"))
        {
            names.insert(name.to_owned());
        } else if !line.starts_with("#[") && !line.starts_with("//") {
            marked = false;
        }
    }
    names
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_row_without_a_test_and_a_name_without_a_function_are_found() {
        let table =
            |row: &str| format!("x\n## Promises\n\n| p | path | held by |\n|---|---|---|\n{row}\n\n## y\n");
        assert_eq!(
            promised(&table("| a | b | `c`, `soak d` |")),
            Ok(vec!["c".to_owned(), "soak d".to_owned()])
        );
        promised(&table("| a | b | nothing |")).expect_err("no test");
        promised("x").expect_err("no table");
        let source =
            "#[test]\n#[should_panic]\nfn one() {}\nfn two() {}\n    loom_without_x: p without Y, \"z\";\n";
        assert_eq!(tests_of(source), ["one".to_owned(), "loom_without_x".to_owned()].into());
    }
}
