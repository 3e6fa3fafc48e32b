//! `cargo xtask dist`: the tree that users get.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};
use std::time::Duration;

use crate::failure::{Context as _, Result};
use crate::{layout, packages, portable, process};

/// Packages that make the tree, and what cargo calls their products.
pub const PACKAGES: [&str; 6] = [
    "freeflow-router",
    "freeflow-verbs",
    "freeflow-rdmacm",
    "freeflow-nccl-net",
    "freeflow-ucx",
    "freeflow-ucx-preload",
];
/// What the tree's freeflow can do beyond a plain `cargo build`'s.
pub const FEATURES: &str = "freeflow-router/etcd";
/// Cargo's file, and where it goes.
const FILES: [(&str, &str); 6] = [
    ("freeflow", "bin/freeflow"),
    ("libff_ibverbs.so", "lib/freeflow/libibverbs.so.1"),
    ("libff_rdmacm.so", "lib/freeflow/librdmacm.so.1"),
    ("libff_nccl_net.so", "lib/freeflow/libnccl-net-freeflow.so"),
    ("libuct_ff.so", "lib/freeflow/ucx/libuct_ff.so.0.0.0"),
    ("libucx_ff_preload.so", "lib/freeflow/ucx/libucx-ff-preload.so"),
];
/// Links for `dlopen("libibverbs.so")`, for linkers, and for UCX, whose module names end like its own libraries'.
const LINKS: [(&str, &str); 3] = [
    ("libibverbs.so.1", "lib/freeflow/libibverbs.so"),
    ("librdmacm.so.1", "lib/freeflow/librdmacm.so"),
    ("libuct_ff.so.0.0.0", "lib/freeflow/ucx/libuct_ff.so.0"),
];

/// What operators need, from the repository.
const SHARED: [(&str, &str); 8] = [
    ("packaging/freeflow.service", "share/freeflow/freeflow.service"),
    ("packaging/router.toml", "share/freeflow/router.toml"),
    ("packaging/directory.toml", "share/freeflow/directory.toml"),
    ("packaging/Containerfile", "share/freeflow/Containerfile"),
    ("docs/operate.md", "share/doc/freeflow/operate.md"),
    ("docs/config.md", "share/doc/freeflow/config.md"),
    ("LICENSE-APACHE", "share/doc/freeflow/LICENSE-APACHE"),
    ("LICENSE-MIT", "share/doc/freeflow/LICENSE-MIT"),
];

/// A cold release build on a small, busy machine.
const LIMIT: Duration = Duration::from_secs(1800);

pub fn run(portable: bool) -> Result<ExitCode> {
    let (tree, mark) = if portable { (portable::build()?, "-portable") } else { (build()?, "") };
    eprintln!("xtask: the same as a file: {}", pack(&tree, mark)?.display());
    println!("{}", tree.display());
    Ok(ExitCode::SUCCESS)
}

/// The tree as a tarball, of the same bytes for the same tree: `tar -C /usr/local --strip-components=1 -xf` installs it.
fn pack(tree: &Path, mark: &str) -> Result<PathBuf> {
    let name = format!("freeflow-{}", env!("CARGO_PKG_VERSION"));
    let file = layout::target().join(format!("{name}-linux-{}{mark}.tar.gz", std::env::consts::ARCH));
    let mut tar = Command::new("tar");
    tar.args([
        "--sort=name",
        "--owner=0",
        "--group=0",
        "--numeric-owner",
        "--mtime=@0",
        "--use-compress-program=gzip -n",
    ]);
    tar.arg(format!("--transform=s,^\\.,{name},")).arg("-C").arg(tree).arg("-cf").arg(&file).arg(".");
    process::must(&mut tar, LIMIT)?;
    Ok(file)
}

/// Builds the tree and returns its path.
pub fn build() -> Result<PathBuf> {
    packages::ensure(&[packages::BUILD])?;
    let mut cargo = layout::cargo();
    cargo.args(["build", "--release", "--quiet", "--features", FEATURES]);
    for package in PACKAGES {
        cargo.args(["--package", package]);
    }
    process::must(&mut cargo, LIMIT)?;
    let tree = layout::dist();
    assemble(&layout::target().join("release"), &tree)?;
    Ok(tree)
}

/// Lays a new tree out aside and puts it in the old one's place, so that nothing old stays in it.
pub fn assemble(built: &Path, tree: &Path) -> Result<()> {
    let aside = tree.with_extension("new");
    remove(&aside)?;
    let files = FILES.map(|(from, to)| (built.join(from), to));
    let shared = SHARED.map(|(from, to)| (layout::root().join(from), to));
    for (from, to) in files.into_iter().chain(shared) {
        let to = aside.join(to);
        make_parent(&to)?;
        fs::copy(&from, &to).context(format_args!("cannot copy {} to {}", from.display(), to.display()))?;
    }
    for (to, link) in LINKS {
        let link = aside.join(link);
        std::os::unix::fs::symlink(to, &link).context(format_args!("cannot link {}", link.display()))?;
    }
    remove(tree)?;
    fs::rename(&aside, tree).context(format_args!("cannot put {} in place", tree.display()))
}

/// What of a tree the dynamic linker loads.
pub fn binaries() -> impl Iterator<Item = &'static str> {
    FILES.iter().map(|(_, to)| *to)
}

fn remove(dir: &Path) -> Result<()> {
    if !dir.exists() {
        return Ok(());
    }
    fs::remove_dir_all(dir).context(format_args!("cannot remove {}", dir.display()))
}

fn make_parent(path: &Path) -> Result<()> {
    let dir = path.parent().unwrap_or(path);
    fs::create_dir_all(dir).context(format_args!("cannot make {}", dir.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_new_tree_holds_nothing_of_the_old_one() {
        let base = std::env::temp_dir().join(format!("ff-dist-{}", std::process::id()));
        let (built, tree) = (base.join("release"), base.join("dist"));
        fs::create_dir_all(&built).unwrap();
        for (file, _) in FILES {
            fs::write(built.join(file), file).unwrap();
        }
        fs::create_dir_all(&tree).unwrap();
        fs::write(tree.join("old"), "").unwrap();
        assemble(&built, &tree).unwrap();
        assert!(!tree.join("old").exists());
        let text = fs::read_to_string(tree.join("lib/freeflow/libibverbs.so")).unwrap();
        assert_eq!(text, "libff_ibverbs.so", "the link leads to the library");
        fs::remove_dir_all(&base).unwrap();
    }
}
