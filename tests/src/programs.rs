//! The C programs under `verbs/`: which there are, and compiling them once. Knows nothing of how they are run.

use std::io;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::SystemTime;
use std::{fs, process};

/// One area each, in the order in which their failures are best read.
pub const PROGRAMS: [&str; 18] = [
    "device",
    "objects",
    "qp_states",
    "rc_ops",
    "rc_order",
    "rc_errors",
    "rc_teardown",
    "events",
    "ud",
    "uc",
    "srq",
    "xrc",
    "control",
    "memory",
    "mw",
    "flush",
    "mcast",
    "large",
];
/// Linked into each.
const SHARED: [&str; 4] = ["common.c", "oob.c", "pair.c", "work.c"];
const HEADERS: [&str; 2] = ["common.h", "internal.h"];
const FLAGS: [&str; 8] =
    ["-std=c11", "-D_GNU_SOURCE", "-O1", "-g", "-Wall", "-Wextra", "-Werror", "-pthread"];
/// Linked in, the runtime need not come before the preloaded libraries of `freeflow run`.
const ASAN: [&str; 3] = ["-fsanitize=address", "-fno-omit-frame-pointer", "-static-libasan"];

/// How the programs are compiled.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Variant {
    Plain,
    Asan,
}

/// Compiles what is older than its sources into `dir` and returns the programs' directory.
pub fn build(dir: &Path, variant: Variant) -> io::Result<PathBuf> {
    let dir = dir.join(if variant == Variant::Asan { "asan" } else { "plain" });
    fs::create_dir_all(&dir)?;
    let sources = Path::new(env!("CARGO_MANIFEST_DIR")).join("verbs");
    let common = newest(SHARED.iter().chain(&HEADERS).map(|name| sources.join(name)))?;
    for program in PROGRAMS {
        let source = sources.join(program).with_extension("c");
        let made = dir.join(program);
        let wanted = common.max(newest([source.clone()])?);
        if modified(&made).is_none_or(|at| at < wanted) {
            compile(&sources, &source, &made, variant)?;
        }
    }
    Ok(dir)
}

fn modified(path: &Path) -> Option<SystemTime> {
    fs::metadata(path).and_then(|m| m.modified()).ok()
}

fn newest(paths: impl IntoIterator<Item = PathBuf>) -> io::Result<SystemTime> {
    let mut newest = SystemTime::UNIX_EPOCH;
    for path in paths {
        newest = newest.max(fs::metadata(path)?.modified()?);
    }
    Ok(newest)
}

/// Into a file of this process's own first: two test runs may compile at once.
fn compile(sources: &Path, source: &Path, made: &Path, variant: Variant) -> io::Result<()> {
    let aside = made.with_extension(process::id().to_string());
    let mut cc = Command::new("cc");
    cc.args(FLAGS).arg("-o").arg(&aside).arg(source);
    cc.args(SHARED.map(|name| sources.join(name)));
    if variant == Variant::Asan {
        cc.args(ASAN);
    }
    let done =
        cc.arg("-libverbs").output().map_err(|e| io::Error::new(e.kind(), format!("cannot run cc: {e}")))?;
    if !done.status.success() {
        let said = String::from_utf8_lossy(&done.stderr);
        return Err(io::Error::other(format!("cc {}: {}\n{said}", source.display(), done.status)));
    }
    fs::rename(aside, made)
}
