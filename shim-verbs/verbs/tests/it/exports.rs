//! The export table of the built library is exactly symbols.txt: a change of rustc or the linker can drop versions silently.

use std::collections::BTreeSet;
use std::process::Command;

const LIST: &str = include_str!("../../symbols.txt");
const PRIVATE_NODES: [u32; 7] = [25, 33, 34, 57, 59, 64, 65];

fn run(program: &str, args: &[&str]) -> String {
    let out = Command::new(program)
        .args(args)
        .arg(super::library())
        .output()
        .unwrap_or_else(|e| panic!("{program} (Debian package binutils) does not start: {e}"));
    assert!(out.status.success(), "{program}: {}", String::from_utf8_lossy(&out.stderr));
    String::from_utf8(out.stdout).expect("ASCII")
}

/// (node, symbol, "DF" or "DO") as symbols.txt wants them.
fn wanted() -> BTreeSet<(String, String, &'static str)> {
    // In front of the C library's, hence without a version: src/madvise.rs.
    let mut all = BTreeSet::from([("Base".to_owned(), "madvise".to_owned(), "DF")]);
    for line in LIST.lines().filter(|l| !l.starts_with('#')) {
        let fields: Vec<&str> = line.split(' ').collect();
        let kind = if fields[2] == "data" { "DO" } else { "DF" };
        if fields[0] == "IBVERBS_PRIVATE" {
            for n in PRIVATE_NODES {
                all.insert((format!("IBVERBS_PRIVATE_{n}"), fields[1].replace('@', &n.to_string()), kind));
            }
        } else {
            all.insert((fields[0].to_owned(), fields[1].to_owned(), kind));
        }
    }
    all
}

/// The same of the built library. A line is `address flags type section size version name`.
fn exported() -> BTreeSet<(String, String, &'static str)> {
    let table = run("objdump", &["-T"]);
    let mut all = BTreeSet::new();
    for line in table.lines() {
        let fields: Vec<&str> = line.split_whitespace().collect();
        let is_symbol = fields.first().is_some_and(|f| u64::from_str_radix(f, 16).is_ok());
        if !is_symbol || line.contains("*UND*") || line.contains("*ABS*") {
            continue;
        }
        let [.., version, name] = fields[..] else { continue };
        let kind = if fields.contains(&"DO") { "DO" } else { "DF" };
        all.insert((version.trim_matches(['(', ')']).to_owned(), name.to_owned(), kind));
    }
    all
}

#[test]
fn exports_are_the_list() {
    let (wanted, exported) = (wanted(), exported());
    let missing: Vec<_> = wanted.difference(&exported).collect();
    let extra: Vec<_> = exported.difference(&wanted).collect();
    assert!(missing.is_empty() && extra.is_empty(), "missing {missing:?}\nextra {extra:?}");
}

#[test]
fn the_list_is_complete() {
    let count = |node: &dyn Fn(&str) -> bool| LIST.lines().filter(|l| node(l)).count();
    assert_eq!(count(&|l| l.starts_with("IBVERBS_1.")), 75, "public symbols");
    assert_eq!(count(&|l| l.starts_with("IBVERBS_PRIVATE ")), 72, "private symbols");
}

#[test]
fn soname_and_nodelete() {
    let dynamic = run("readelf", &["-d"]);
    assert!(dynamic.contains("SONAME") && dynamic.contains("[libibverbs.so.1]"), "{dynamic}");
    assert!(dynamic.contains("NODELETE"), "{dynamic}");
}

/// Debian's provider libraries bind every private symbol they import at load time.
#[test]
fn provider_libraries_find_their_imports() {
    let lib = "/usr/lib/x86_64-linux-gnu/libmlx5.so.1";
    if !std::path::Path::new(lib).exists() {
        println!("skipped: {lib} (Debian package ibverbs-providers) is not installed");
        return;
    }
    let out = Command::new("objdump").args(["-T", lib]).output().expect("objdump ran above");
    let names: BTreeSet<_> = exported().into_iter().map(|(v, n, _)| (v, n)).collect();
    let table = String::from_utf8(out.stdout).expect("ASCII");
    let imports = table.lines().filter(|l| l.contains("*UND*") && l.contains("IBVERBS_"));
    let imports: Vec<Vec<&str>> = imports.map(|l| l.split_whitespace().collect()).collect();
    assert!(imports.len() > 60, "only {} imports found: objdump's format changed", imports.len());
    for fields in imports {
        let [.., version, name] = fields[..] else { panic!("objdump: {fields:?}") };
        let version = version.trim_matches(['(', ')']);
        assert!(names.contains(&(version.to_owned(), name.to_owned())), "{name}@{version} is missing");
    }
}
