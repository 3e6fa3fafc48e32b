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

/// Private nodes of the rdma-core releases in use: provider libraries of each distribution ask for theirs.
const PRIVATE_NODES: [u32; 7] = [25, 33, 34, 57, 59, 64, 65];
/// The one whose names a link against this library binds to (rdma-core 34-56).
const DEFAULT_PRIVATE: u32 = 34;

fn main() {
    println!("cargo::rerun-if-changed=symbols.txt");
    println!("cargo::rerun-if-changed=build.rs");
    let out = PathBuf::from(env::var("OUT_DIR").expect("cargo sets OUT_DIR"));
    let list = fs::read_to_string("symbols.txt").expect("symbols.txt is readable");
    let symbols: Vec<Symbol> = list.lines().filter(|l| !l.starts_with('#')).map(Symbol::parse).collect();

    let map = out.join("libibverbs.map");
    fs::write(&map, version_script(&symbols)).expect("OUT_DIR is writable");
    let asm: String = symbols.iter().map(Symbol::assembly).collect();
    fs::write(out.join("trampolines.rs"), asm).expect("OUT_DIR is writable");
    println!("cargo::rustc-cdylib-link-arg=-Wl,--version-script={}", map.display());
    println!("cargo::rustc-cdylib-link-arg=-Wl,-soname,libibverbs.so.1");
    // Programs dlclose verbs libraries; our helper thread must keep its code.
    println!("cargo::rustc-cdylib-link-arg=-Wl,-z,nodelete");
}

/// A line of symbols.txt.
struct Symbol<'a> {
    node: &'a str,
    name: &'a str,
    kind: &'a str,
}

impl<'a> Symbol<'a> {
    fn parse(line: &'a str) -> Self {
        let fields: Vec<&str> = line.split(' ').collect();
        let [node, name, kind] = fields[..] else {
            panic!("symbols.txt: {line:?} is not <node> <symbol> <kind>")
        };
        Self { node, name, kind }
    }

    fn is_private(&self) -> bool {
        self.node == "IBVERBS_PRIVATE"
    }

    /// The path of the Rust function a trampoline jumps to, or None for data.
    fn target(&self) -> Option<String> {
        Some(match self.kind {
            "implemented" => format!("crate::exports::{}", self.name),
            "unsupported-int" => "crate::unsupported::int".into(),
            "unsupported-minus" => "crate::unsupported::minus".into(),
            "unsupported-ptr" => "crate::unsupported::ptr".into(),
            "unsupported-void" => "crate::unsupported::void".into(),
            "data" => return None,
            other => panic!("symbols.txt: unknown kind {other:?} of {}", self.name),
        })
    }

    fn assembly(&self) -> String {
        let name = self.name.replace('@', "");
        // A private symbol's label stays local; only its versioned names are exported.
        let label = if self.is_private() { format!("{name}__unversioned") } else { name };
        let versions = if self.is_private() { self.private_versions(&label) } else { String::new() };
        match self.target() {
            Some(target) => format!(
                "core::arch::global_asm!(\".pushsection .text.{label},\\\"ax\\\",@progbits\", \".globl {label}\", \
                 \".type {label},@function\", \"{label}: {} {{f}}\", \".size {label}, .-{label}\", {versions}\
                 \".popsection\", f = sym {target});\n",
                jump()
            ),
            None => format!(
                "core::arch::global_asm!(\".pushsection .data.{label},\\\"aw\\\",@progbits\", \".globl {label}\", \
                 \".type {label},@object\", \"{label}: .byte 0\", \".size {label}, 1\", {versions}\".popsection\");\n"
            ),
        }
    }

    /// `.symver` lines: the name of the symbol in each private node.
    fn private_versions(&self, label: &str) -> String {
        let mut text = String::new();
        for node in PRIVATE_NODES {
            let name = self.name.replace('@', &node.to_string());
            let at = if node == DEFAULT_PRIVATE { "@@" } else { "@" };
            let kind = if self.kind == "data" { "object" } else { "function" };
            write!(
                text,
                "\".globl {label}{node}\", \".type {label}{node},@{kind}\", \".set {label}{node}, {label}\", \
                 \".size {label}{node}, .-{label}\", \".symver {label}{node}, {name}{at}IBVERBS_PRIVATE_{node}\", "
            )
            .expect("writing to a String");
        }
        text
    }
}

fn jump() -> &'static str {
    match env::var("CARGO_CFG_TARGET_ARCH").expect("cargo sets it").as_str() {
        "x86_64" => "jmp",
        "aarch64" => "b",
        other => panic!("no trampoline for {other}"),
    }
}

/// The named version script: public nodes in a chain, oldest first; private ones and ours beside it.
fn version_script(symbols: &[Symbol]) -> String {
    let mut nodes: BTreeMap<(u32, u32), Vec<&str>> = BTreeMap::new();
    let mut text = String::new();
    for symbol in symbols.iter().filter(|s| !s.is_private()) {
        match symbol.node.strip_prefix("IBVERBS_").and_then(|v| v.split_once('.')) {
            Some((major, minor)) => {
                let number =
                    |s: &str| s.parse().unwrap_or_else(|_| panic!("symbols.txt: node {}", symbol.node));
                nodes.entry((number(major), number(minor))).or_default().push(symbol.name);
            }
            None => writeln!(
                text,
                "{} {{ global: {}; local: _ZN*; _R*; __rust*; rust_*; *__unversioned*; }};",
                symbol.node, symbol.name
            )
            .expect("writing to a String"),
        }
    }
    let mut previous = String::new();
    for ((major, minor), names) in nodes {
        let node = format!("IBVERBS_{major}.{minor}");
        writeln!(text, "{node} {{ global: {}; }} {previous};", names.join("; "))
            .expect("writing to a String");
        previous = node;
    }
    for node in PRIVATE_NODES {
        writeln!(text, "IBVERBS_PRIVATE_{node} {{ }};").expect("writing to a String");
    }
    text
}
