//! The built library exports exactly symbols.txt, with versions: a changed compiler or linker can drop them silently.

use std::collections::BTreeSet;
use std::process::Command;

fn output(program: &str, args: &[&str]) -> String {
    let run = Command::new(program).args(args).arg(super::library()).output();
    let run = run.unwrap_or_else(|error| panic!("{program} (package binutils): {error}"));
    assert!(run.status.success(), "{program}: {}", String::from_utf8_lossy(&run.stderr));
    String::from_utf8(run.stdout).expect("objdump writes ASCII")
}

#[test]
fn exports_are_the_list() {
    let listed: BTreeSet<String> = include_str!("../../symbols.txt")
        .lines()
        .filter(|line| !line.starts_with('#'))
        .map(|line| line.rsplit_once(' ').expect("three fields").0.to_string())
        .collect();
    assert_eq!(listed.len(), 68);
    // In front of the C library's, hence without a version: src/rsocket/preload.rs.
    let ours = ["accept4", "fcntl64", "ioctl"].map(|name| format!("Base {name}"));
    let listed: BTreeSet<String> = listed.into_iter().chain(ours).collect();
    let exported: BTreeSet<String> = output("objdump", &["-T"])
        .lines()
        .filter(|line| line.contains(" g ") && !line.contains("*UND*") && !line.contains("*ABS*"))
        .map(|line| line.split_whitespace().rev().take(2).collect::<Vec<_>>())
        .map(|fields| format!("{} {}", fields[1], fields[0]))
        .collect();
    assert_eq!(exported, listed);
}

#[test]
fn the_library_has_its_name() {
    let dynamic = output("readelf", &["-d"]);
    assert!(dynamic.contains("Library soname: [librdmacm.so.1]"), "{dynamic}");
    assert!(dynamic.contains("NODELETE"), "{dynamic}");
    assert!(!dynamic.contains("libibverbs"), "libibverbs is found at run time");
}
