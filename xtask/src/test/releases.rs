//! Clients of other rdma-core releases on the same libraries: built from the sources that PyPI's pyverbs brings, with that
//! release's own headers, and the programs of other Debian releases, with their own libc.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use super::Tally;
use super::clients::{Check, Client};
use super::examples::OpenDir;
use super::labs::{self, Place};
use crate::process::{self, Echo};
use crate::{dist, layout, portable};

/// Releases of pyverbs on PyPI; each has the sources of the rdma-core of that number in it.
const SOURCES: [&str; 2] = ["57.0", "59.0"];
/// Debian releases, their rdma-core, and whether only the portable tree can be loaded there.
const DEBIAN: [(&str, &str, bool); 2] = [("bullseye", "33", true), ("trixie", "56", false)];

/// Fetching and unpacking on a busy machine.
const LIMIT: Duration = Duration::from_secs(400);

type Outcome<T> = Result<T, String>;

pub fn run(tally: &mut Tally, chosen: impl Fn(&str) -> bool) {
    for version in SOURCES {
        let name = format!("release: clients built with rdma-core {version}");
        if chosen(&name) {
            tally.check(&name, || built(version));
        }
    }
}

/// All of that, the portable tree, and the clients of other Debian releases.
pub fn matrix(tally: &mut Tally, chosen: impl Fn(&str) -> bool) {
    run(tally, &chosen);
    if chosen(PORTABLE) {
        tally.check(PORTABLE, portable_tree);
    }
    for (debian, rdma_core, old) in DEBIAN {
        let name = format!("release: Debian {debian}'s clients, rdma-core {rdma_core}");
        if chosen(&name) {
            tally.check(&name, || in_root(debian, old));
        }
    }
}

const PORTABLE: &str = "release: the portable tree needs glibc 2.17 and exports the same";

fn finish(command: &mut Command) -> Outcome<String> {
    let done = process::run(command, LIMIT, Echo::Quiet).map_err(|e| e.to_string())?;
    if done.success() { Ok(done.stdout) } else { Err(format!("{}\n{}", done.how(), done.tail())) }
}

fn said<T>(result: std::io::Result<T>, what: &Path) -> Outcome<T> {
    result.map_err(|error| format!("{}: {error}", what.display()))
}

// ---- built from source ------------------------------------------------------------------------------------------

/// The example programs of a release, compiled with its headers, between two containers.
fn built(version: &str) -> Outcome<()> {
    let source = source(version)?;
    let dir = OpenDir::make()?;
    let include = headers(&source, &dir.0)?;
    let compile = |name: &str, files: &[&str], libraries: &[&str]| {
        let program = dir.0.join(name);
        let mut cc = Command::new("cc");
        cc.args(["-O1", "-w", "-D_GNU_SOURCE", "-DHAVE_STATEMENT_EXPR=1", "-DHAVE_TYPEOF=1", "-I"])
            .arg(&include);
        cc.arg("-o").arg(&program).args(files.iter().map(|file| source.join(file)));
        finish(cc.args(libraries)).map(|_| program.display().to_string())
    };
    for kind in ["rc", "uc", "ud", "srq", "xsrq"] {
        let name = format!("{kind}_pingpong");
        let main = format!("libibverbs/examples/{name}.c");
        let program = compile(&name, &[&main, "libibverbs/examples/pingpong.c"], &["-libverbs"])?;
        let works = if kind == "xsrq" { Check::Says("success") } else { Check::Says("1000 iters in") };
        labs::run_client(&Client::same(&format!("{program} -g 0"), &[works]), Place::OneHost)?;
    }
    for (name, file) in [("rping", "rping"), ("ucmatose", "cmatose")] {
        let main = format!("librdmacm/examples/{file}.c");
        let libraries = ["-lrdmacm", "-libverbs", "-lpthread"];
        let program = compile(name, &[&main, "librdmacm/examples/common.c"], &libraries)?;
        labs::run_client(&cm_client(name, &program), Place::OneHost)?;
    }
    // By the inline function and the numbers of a header that has them, which Debian 12's has not.
    let files = ["flush", "common", "oob", "pair", "work"].map(conformance);
    let files: Vec<&str> = files.iter().map(String::as_str).collect();
    let program = compile("flush", &files, &["-DHAVE_WR_FLUSH", "-libverbs", "-lpthread"])?;
    let none_failed = Check::Says("0 failed, 0 skipped");
    labs::run_client(&Client::alone(&format!("{program} --self"), &[none_failed]), Place::OneHost)
}

/// A source of the conformance programs.
fn conformance(name: &str) -> String {
    layout::root().join("tests/verbs").join(name).with_extension("c").display().to_string()
}

fn cm_client(name: &str, program: &str) -> Client {
    match name {
        "rping" => Client::pair(
            &format!("{program} -s -a @c1 -v -C 10"),
            true,
            &format!("{program} -c -a @c1 -v -C 10"),
            &[Check::Says("rdma-ping-9")],
        ),
        _ => Client::pair(program, true, &format!("{program} -s @c1"), &[Check::Says("return status 0")]),
    }
}

/// The folder of rdma-core's sources.
fn source(version: &str) -> Outcome<PathBuf> {
    let home = layout::target().join("tools/pyverbs");
    let folder = home.join(format!("pyverbs-{version}"));
    if !folder.exists() {
        let pip = home.join("venv/bin/pip");
        if !pip.exists() {
            finish(Command::new("python3").args(["-m", "venv"]).arg(home.join("venv")))?;
        }
        let mut fetch = Command::new(pip);
        fetch.args(["download", "--quiet", "--no-deps", "--dest"]);
        // Unpacking is ours: pip would build what it fetches, and has said so by its exit status where it cannot.
        let fetched = finish(fetch.arg(&home).arg(format!("pyverbs=={version}")));
        let archive = home.join(format!("pyverbs-{version}.tar.gz"));
        if !archive.exists() {
            return Err(format!("pip did not fetch pyverbs {version}: {fetched:?}"));
        }
        finish(Command::new("tar").arg("-C").arg(&home).arg("-xf").arg(archive))?;
    }
    Ok(folder.join("rdma-core"))
}

/// An include directory as the release installs it, with what its examples need of its build.
fn headers(source: &Path, dir: &Path) -> Outcome<PathBuf> {
    let include = dir.join("include");
    let folders = [
        ("infiniband", "libibverbs"),
        ("infiniband", "libibumad"),
        ("rdma", "kernel-headers/rdma"),
        ("rdma", "librdmacm"),
    ];
    for (to, from) in folders {
        let to = include.join(to);
        said(fs::create_dir_all(&to), &to)?;
        for entry in said(fs::read_dir(source.join(from)), source)? {
            let path = said(entry, source)?.path();
            if path.extension().is_some_and(|end| end == "h") {
                let link = to.join(path.file_name().unwrap_or_default());
                said(symlink(&path, &link), &link)?;
            }
        }
    }
    for folder in ["util", "ccan"] {
        said(symlink(source.join(folder), include.join(folder)), &include)?;
    }
    said(fs::write(include.join("config.h"), ""), &include)?;
    Ok(include)
}

// ---- other Debian releases --------------------------------------------------------------------------------------

fn portable_tree() -> Outcome<()> {
    let tree = portable::build().map_err(|failure| failure.to_string())?;
    for library in dist::binaries().filter(|file| file.ends_with(".so.1")) {
        let exports =
            |tree: &Path| portable::exports(&tree.join(library)).map_err(|failure| failure.to_string());
        let (ours, there) = (exports(&tree)?, exports(&layout::dist())?);
        if ours != there {
            return Err(format!("{library} exports {} symbols, in target/dist {}", ours.len(), there.len()));
        }
    }
    Ok(())
}

/// The clients of a Debian root, in containers of it.
fn in_root(debian: &str, old: bool) -> Outcome<()> {
    let Some(root) = root(debian) else { return Ok(()) };
    let tree = if old { portable::tree() } else { layout::dist() };
    if !tree.exists() {
        return Err(format!("there is no {}: the check before this one makes it", tree.display()));
    }
    let clients = [
        Client::alone("ibv_devinfo -v", &[Check::Says("ff0"), Check::Says("PORT_ACTIVE")]),
        Client::same("ibv_rc_pingpong -g 0", &[Check::Says("1000 iters in")]),
        Client::same("ib_write_bw -F -n 1000", &[Check::Sizes(65536, 65536)]),
        cm_client("rping", "rping"),
        cm_client("ucmatose", "ucmatose"),
    ];
    let binary = tree.join("bin/freeflow");
    let place = root.display().to_string();
    let judged = clients.iter().try_for_each(|client| labs::run_client_in(client, &binary, &place));
    // Hundreds of megabytes.
    said(fs::remove_dir_all(&root), &root)?;
    judged
}

/// Makes a root of that release. None, and a word, where the archive does not have it any more, or this user may not.
fn root(debian: &str) -> Option<PathBuf> {
    let root = PathBuf::from(format!("/var/tmp/freeflow-{debian}-{}", std::process::id()));
    let mut make = Command::new("mmdebstrap");
    make.args(["--quiet", "--variant=minbase", "--include=ibverbs-utils,rdmacm-utils,perftest"]);
    make.args(["--aptopt=Acquire::Check-Valid-Until \"false\""]).arg(debian).arg(&root);
    match finish(&mut make) {
        Ok(_) => Some(root),
        Err(why) => {
            println!("      release: no root of Debian {debian} can be made here: {why}");
            // What there is of it is of no use.
            let _ = fs::remove_dir_all(&root);
            None
        }
    }
}
