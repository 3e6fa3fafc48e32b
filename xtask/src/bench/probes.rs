//! Compiling the small C programs of benches/probes.

use std::path::PathBuf;
use std::process::Command;
use std::time::Duration;

use crate::failure::{Context as _, Result};
use crate::{layout, process};

/// Each is one file; gcc takes a fraction of a second.
const LIMIT: Duration = Duration::from_secs(60);
const PROGRAMS: [&str; 9] =
    ["handover", "memcpy", "eventfd", "reg", "qps", "shared", "ops", "fair", "helper"];
/// Preloaded into perftest.
const LIBRARIES: [&str; 2] = ["empty", "wr_api"];

/// Compiles them; returns the folder they are in.
pub fn build() -> Result<PathBuf> {
    let from = layout::root().join("benches/probes");
    let to = layout::target().join("bench/probes");
    std::fs::create_dir_all(&to).context(format_args!("cannot make {}", to.display()))?;
    let gcc = |name: &str, product: &str, flags: &[&str]| {
        let mut gcc = Command::new("gcc");
        gcc.args(["-O2", "-Wall", "-Wextra", "-Werror", "-o"]).arg(to.join(product));
        gcc.arg(from.join(name).with_extension("c")).args(flags);
        process::must(&mut gcc, LIMIT)
    };
    for name in PROGRAMS {
        gcc(name, name, &["-libverbs"])?;
    }
    if which("mpicc.openmpi") {
        let mut mpicc = Command::new("mpicc.openmpi");
        mpicc.args(["-O2", "-Wall", "-Wextra", "-Werror", "-o"]).arg(to.join("mpi")).arg(from.join("mpi.c"));
        process::must(&mut mpicc, LIMIT)?;
    }
    for name in LIBRARIES {
        gcc(name, &library(name), &["-shared", "-fPIC"])?;
    }
    Ok(to)
}

/// Only `bench ucx` needs, and installs, an MPI.
fn which(program: &str) -> bool {
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path).any(|dir| dir.join(program).exists())
}

/// File name of a library.
pub fn library(name: &str) -> String {
    format!("lib{name}.so")
}
