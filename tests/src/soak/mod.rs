//! Long checks of what the direct path survives: deaths of peers, a hostile neighbour, copies stopped half way; and of NCCL's plugin.

pub mod cluster;
pub mod dice;
pub mod hostile;
pub mod kill;
pub mod nccl;
pub mod neighbour;
pub mod process;
pub mod restart;
pub mod revoke;
pub mod wire;
pub mod worker;

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::process::Command;

const FLAGS: [&str; 8] =
    ["-std=c11", "-D_GNU_SOURCE", "-O1", "-g", "-Wall", "-Wextra", "-Werror", "-pthread"];

/// What a soak has to say when it does not pass.
pub type Result<T> = std::result::Result<T, String>;

/// Compiles one of the programs under `soak/`.
pub fn compile(target: &Path, name: &str) -> io::Result<PathBuf> {
    let dir = target.join("soak");
    fs::create_dir_all(&dir)?;
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("soak").join(name).with_extension("c");
    let (made, aside) = (dir.join(name), dir.join(format!("{name}.{}", std::process::id())));
    let done = Command::new("cc").args(FLAGS).arg("-o").arg(&aside).arg(&source).arg("-libverbs").output()?;
    if !done.status.success() {
        return Err(io::Error::other(String::from_utf8_lossy(&done.stderr).into_owned()));
    }
    fs::rename(aside, &made)?;
    Ok(made)
}
