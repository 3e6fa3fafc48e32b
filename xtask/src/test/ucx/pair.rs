//! examples/ucp/pair.c: between containers, on PyPI's releases of UCX, and when one of the pair is killed.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use super::{Outcome, Place, SETTINGS, Workplace, compile, finished, freeflow_run, lab, verdict};
use crate::layout;

/// Releases of the wheels, and the UCX inside.
pub const WHEELS: &[&str] = &[
    "1.14.1.post2",
    "1.15.0.post2",
    "1.16.0.post2",
    "1.17.0.post1",
    "1.18.1",
    "1.19.0",
    "1.20.1",
    "1.21.0",
    "1.22.0",
];
/// Those that every run tries; the rest are the full matrix's.
pub const ALWAYS: &[&str] = &["1.15.0.post2", "1.18.1", "1.20.1", NEWEST];
/// It chooses by what each interface says of each operation; Debian's does not yet.
pub const NEWEST: &str = "1.22.0";

/// Between two containers, by the device that leads there.
pub fn example(place: Place) -> Outcome {
    let work = Workplace::new()?;
    let pair = build_pair(&work, &["-lucp", "-lucs"])?;
    between(place, &pair)
}

/// The same on the UCX of one of PyPI's wheels.
pub fn example_on(wheel: &str, place: Place) -> Outcome {
    let (work, package) = (Workplace::new()?, libucx(wheel)?);
    // The containers' users may not see this tree.
    let libraries = work.path("lib");
    let copied = finished(Command::new("cp").arg("-r").arg(package.join("lib")).arg(&libraries))?;
    verdict(&copied, true, "")?;
    let pair = build_pair_on(&package, &libraries, &work)?;
    between(place, &pair)
}

fn between(place: Place, pair: &str) -> Outcome {
    let [first, second] = place.containers();
    let server = format!("{SETTINGS}exec {pair}");
    let client = format!("{SETTINGS}UCX_LOG_LEVEL=info exec {pair} @{first} 2>&1");
    let done = lab(place, &[(first, &reported(&server)), (second, &client), (first, REPORT)])?;
    let both = done.stdout.lines().filter(|line| line.ends_with("pair: all of it arrived")).count();
    verdict(&done, both == 2, "not all of it arrived")?;
    let [device, other] = place.devices().map(|name| done.stdout.contains(&format!("(ff/{name}")));
    verdict(&done, device && !other, "it did not go by the device that leads there")
}

/// A server whose end, with its status, a third command of the lab waits for.
fn reported(server: &str) -> String {
    format!("mkfifo /tmp/end; ({server}) >/tmp/said 2>&1; s=$?; cat /tmp/said; echo $s >/tmp/end")
}

const REPORT: &str = "read -r s </tmp/end; exit $s";

fn build_pair(work: &Workplace, libraries: &[&str]) -> Result<String, String> {
    let to = work.path("pair");
    compile(&layout::root().join("examples/ucp/pair.c"), &to, libraries)?;
    Ok(to.display().to_string())
}

/// One of a pair is killed: the other hears of it from UCX.
pub fn peer_failure(place: Place) -> Outcome {
    let [first, second] = place.containers();
    let work = Workplace::new()?;
    let pair = build_pair(&work, &["-lucp", "-lucs"])?;
    let survivor = format!("{SETTINGS}timeout 30 {pair} --wait");
    let victim = format!(
        "{SETTINGS}mkfifo /tmp/out; {pair} --wait @{first} >/tmp/out & p=$!; \
         exec 3</tmp/out; read -r line <&3; [ \"$line\" = waiting ] && kill -9 $p"
    );
    let done = lab(place, &[(first, &reported(&survivor)), (second, &victim), (first, REPORT)])?;
    let told = done.stdout.contains("the partner is gone: Connection reset by remote peer");
    verdict(&done, told, "the survivor was not told")
}

fn libucx(wheel: &str) -> Result<PathBuf, String> {
    Ok(unpacked(&format!("libucx-cu12=={wheel}"), &format!("wheels/{wheel}"))?.join("libucx"))
}

/// Built against a wheel's own headers.
fn build_pair_on(package: &Path, libraries: &Path, work: &Workplace) -> Result<String, String> {
    build_pair(
        work,
        &[
            &format!("-I{}", package.join("include").display()),
            &format!("-L{}", libraries.display()),
            &format!("-Wl,-rpath,{}", libraries.display()),
            "-Wl,--unresolved-symbols=ignore-in-shared-libs",
            "-lucp",
            "-lucs",
        ],
    )
}

/// On the UCX of one of PyPI's wheels.
pub fn traffic_on(wheel: &str) -> Outcome {
    let work = Workplace::with_router()?;
    let package = libucx(wheel)?;
    let pair = build_pair_on(&package, &package.join("lib"), &work)?;
    // 0x3419 is its port.
    let script = format!(
        "{pair} & s=$!; until grep -q ':3419 00000000:0000 0A' /proc/net/tcp; do kill -0 $s || exit 1; done; \
         {pair} 127.0.0.1 && wait $s"
    );
    let done = finished(freeflow_run(&work).args(["timeout", "60", "sh", "-c", &script]))?;
    let both = done.stdout.matches("pair: all of it arrived").count();
    verdict(&done, both == 2, "not all of it arrived")
}

/// A package of PyPI's with nothing it depends on, in target/ucx.
fn unpacked(package: &str, name: &str) -> Result<PathBuf, String> {
    let to = layout::target().join("ucx").join(name);
    if !to.exists() {
        let mut pip = Command::new(venv("pip")?.join("bin/pip"));
        let aside = to.with_extension("new");
        let _ = fs::remove_dir_all(&aside);
        pip.args(["install", "--quiet", "--no-deps", "--target"]).arg(&aside).arg(package);
        verdict(&finished(&mut pip)?, true, "")?;
        fs::rename(&aside, &to).map_err(|error| error.to_string())?;
    }
    Ok(to)
}

/// A Python environment in target/ucx.
pub fn venv(name: &str) -> Result<PathBuf, String> {
    let to = layout::target().join("ucx").join(name);
    if !to.join("bin/pip").exists() {
        verdict(&finished(Command::new("python3").args(["-m", "venv"]).arg(&to))?, true, "")?;
    }
    Ok(to)
}
