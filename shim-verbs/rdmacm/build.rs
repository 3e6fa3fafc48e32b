//! Makes a plain `cargo build` export versioned symbols, from the one list in symbols.txt.
//!
//! Each exported name is a one-jump trampoline in `global_asm!`: rustc does not know names defined in assembly, so it
//! leaves them out of its own anonymous version script, and the named script made here decides their versions.
//! rust-lld, the default linker, takes both scripts, exact names winning over rustc's `local: *`; where only the last
//! script counts (cargo-zigbuild), the one made here hides Rust's own names. It must not say `local: *`: what is to come before the
//! C library's function of that name (`#[no_mangle]`) has no version, and would be hidden with the rest.

use std::collections::BTreeMap;
use std::fmt::Write;
use std::path::PathBuf;
use std::{env, fs};

fn main() {
    println!("cargo::rerun-if-changed=symbols.txt");
    println!("cargo::rerun-if-changed=build.rs");
    let out = PathBuf::from(env::var("OUT_DIR").expect("cargo sets OUT_DIR"));
    let list = fs::read_to_string("symbols.txt").expect("symbols.txt is readable");
    let jump = match env::var("CARGO_CFG_TARGET_ARCH").expect("cargo sets it").as_str() {
        "x86_64" => "jmp",
        "aarch64" => "b",
        other => panic!("no trampoline for {other}"),
    };

    let mut nodes: BTreeMap<&str, Vec<&str>> = BTreeMap::new();
    let mut assembly = String::new();
    for line in list.lines().filter(|line| !line.starts_with('#')) {
        let fields: Vec<&str> = line.split(' ').collect();
        let [node, name, module] = fields[..] else {
            panic!("symbols.txt: {line:?} is not <node> <symbol> <module>")
        };
        nodes.entry(node).or_default().push(name);
        let path = if module.contains("::") { module.to_string() } else { format!("{module}::{name}") };
        writeln!(
            assembly,
            "core::arch::global_asm!(\".pushsection .text.{name},\\\"ax\\\",@progbits\", \".globl {name}\", \
             \".type {name},@function\", \"{name}: {jump} {{f}}\", \".size {name}, .-{name}\", \".popsection\", \
             f = sym crate::{path});"
        )
        .expect("writing to a String");
    }
    let map = out.join("librdmacm.map");
    fs::write(&map, version_script(&nodes)).expect("OUT_DIR is writable");
    fs::write(out.join("trampolines.rs"), assembly).expect("OUT_DIR is writable");
    println!("cargo::rustc-cdylib-link-arg=-Wl,--version-script={}", map.display());
    println!("cargo::rustc-cdylib-link-arg=-Wl,-soname,librdmacm.so.1");
    // The fork handlers registered at load must stay where they are.
    println!("cargo::rustc-cdylib-link-arg=-Wl,-z,nodelete");
}

/// The named version script: nodes in a chain, oldest first (their names sort that way).
fn version_script(nodes: &BTreeMap<&str, Vec<&str>>) -> String {
    let (mut text, mut previous) = (String::new(), String::new());
    for (node, names) in nodes {
        let local = if previous.is_empty() { " local: _ZN*; _R*; __rust*; rust_*;" } else { "" };
        writeln!(text, "{node} {{ global: {};{local} }} {previous};", names.join("; "))
            .expect("writing to a String");
        previous = node.to_string();
    }
    text
}
