//! Are our libraries there, and would a program find them first?

use std::fs;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};

use super::{Args, Finding};
use crate::cli::nic;
use crate::cli::paths::Dist;

const VERBS: &str = "libibverbs.so.1";
const CM: &str = "librdmacm.so.1";

pub fn check(args: &Args) -> Vec<Finding> {
    let dist = match Dist::find() {
        Ok(dist) => dist,
        Err(failure) => {
            let advice = "run bin/freeflow of a dist tree; cargo xtask dist makes one";
            return vec![Finding::bad("libraries", failure.to_string(), advice)];
        }
    };
    let wanted: &[&str] = match (args.nccl, args.ucx) {
        (true, _) => &[VERBS, "libnccl-net-freeflow.so"],
        (_, true) => &[VERBS, "ucx/libuct_ff.so.0", "ucx/libucx-ff-preload.so"],
        _ => &[VERBS, CM],
    };
    let mut findings: Vec<_> = wanted.iter().map(|library| present(&dist.libraries, library)).collect();
    let search = std::env::var_os("LD_LIBRARY_PATH").unwrap_or_default();
    findings.push(first_found(&dist.libraries, std::env::split_paths(&search)));
    findings.push(device_files());
    if args.ucx {
        findings.extend(super::ucx::check(&dist.libraries, |name| std::env::var(name).ok()));
    }
    findings
}

/// The device's files are a program's own: only where this runs as programs do can it see them.
fn device_files() -> Finding {
    const CHECK: &str = "device files";
    if nic::is_present() {
        return Finding::ok(CHECK, format!("{} and /sys/class/infiniband", nic::node()));
    }
    Finding::note(
        CHECK,
        format!("no {} and no /sys/class/infiniband here", nic::node()),
        "only UCX's own verbs transports and a few others look for them: freeflow run shows them to a program, where it \
         may make a mount namespace, and the flags and the hook of freeflow container add to a container",
    )
}

fn present(dir: &Path, library: &str) -> Finding {
    let path = dir.join(library);
    if path.is_file() {
        return Finding::ok("library", path.display().to_string());
    }
    Finding::bad(
        "library",
        format!("{} is missing", path.display()),
        "this build does not have it, or its tree is incomplete: make it again with cargo xtask dist",
    )
}

/// Whether the search path leads to our libibverbs first.
fn first_found(ours: &Path, search: impl Iterator<Item = PathBuf>) -> Finding {
    const CHECK: &str = "search path";
    let same = |a: &Path, b: &Path| {
        let id = |p: &Path| fs::metadata(p).map(|m| (m.dev(), m.ino())).ok();
        id(a).is_some() && id(a) == id(b)
    };
    match search.map(|dir| dir.join(VERBS)).find(|path| path.exists()) {
        Some(first) if same(&first, &ours.join(VERBS)) => {
            Finding::ok(CHECK, format!("LD_LIBRARY_PATH leads to {}", first.display()))
        }
        Some(first) => Finding::bad(
            CHECK,
            format!("LD_LIBRARY_PATH leads to another {}", first.display()),
            format!("put {} first in LD_LIBRARY_PATH, or use freeflow run", ours.display()),
        ),
        None => Finding::note(
            CHECK,
            "LD_LIBRARY_PATH does not lead to FreeFlow",
            "start programs with freeflow run, or with the flags of freeflow container add",
        ),
    }
}

#[cfg(test)]
mod tests {
    use super::super::Level;
    use super::*;

    #[test]
    fn another_copy_in_front_is_bad() {
        let base = std::env::temp_dir().join(format!("ff-doctor-{}", std::process::id()));
        let (ours, other) = (base.join("ours"), base.join("other"));
        for dir in [&ours, &other] {
            fs::create_dir_all(dir).unwrap();
            fs::write(dir.join(VERBS), "").unwrap();
        }
        let level = |path: &[&PathBuf]| first_found(&ours, path.iter().map(|p| (*p).clone())).level;
        assert_eq!(level(&[&ours, &other]), Level::Ok);
        assert_eq!(level(&[&other, &ours]), Level::Bad);
        assert_eq!(level(&[]), Level::Note);
        fs::remove_dir_all(&base).unwrap();
    }
}
