//! Tests of the built library from outside, as a C program sees it.

mod exports;
mod programs;

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;

/// The library, built now: `cargo test` does not build a cdylib for its package's own tests.
fn library() -> &'static Path {
    static PATH: OnceLock<PathBuf> = OnceLock::new();
    PATH.get_or_init(|| build(env!("CARGO_PKG_NAME")).join("libff_rdmacm.so"))
}

/// The verbs library, built now.
fn verbs() -> &'static Path {
    static PATH: OnceLock<PathBuf> = OnceLock::new();
    PATH.get_or_init(|| build("freeflow-verbs").join("libff_ibverbs.so"))
}

/// The router's program, built now.
fn router() -> &'static Path {
    static PATH: OnceLock<PathBuf> = OnceLock::new();
    PATH.get_or_init(|| build("freeflow-router").join("freeflow"))
}

/// Builds a package with this test's profile; returns the directory of what was made.
fn build(package: &str) -> PathBuf {
    let exe = std::env::current_exe().expect("a test has a path");
    let profile = exe.parent().and_then(Path::parent).expect("TARGET/PROFILE/deps/TEST");
    let mut cargo = Command::new(env!("CARGO"));
    cargo.args(["build", "--quiet", "--package", package, "--target-dir"]);
    cargo.arg(profile.parent().expect("TARGET/PROFILE")).current_dir(env!("CARGO_MANIFEST_DIR"));
    if profile.ends_with("release") {
        cargo.arg("--release");
    }
    assert!(cargo.status().expect("cargo starts").success(), "{package} does not build");
    profile.to_owned()
}
