//! The router's image, built from its Containerfile and run, without an engine and without a registry.
//!
//! buildah builds what `docker build` builds. The image that it begins with is made here, of this machine's package sources, and
//! gets the name that the Containerfile asks for.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use serde_json::Value;

use super::Outcome;
use super::contained::{self, Image};
use super::operators::Scratch;
use crate::layout;
use crate::process::{self, Echo};

pub const CHECK: &str = "image: the Containerfile builds, and its router serves";

/// What the Containerfile begins with, as an engine completes its name.
const BASE: &str = "docker.io/library/debian:12-slim";
const OURS: &str = "freeflow";
/// A Debian root is downloaded.
const LIMIT: Duration = Duration::from_secs(900);

pub fn check() -> Outcome {
    let scratch = Scratch::new("image")?;
    let store = Store(&scratch.0);
    store.import(BASE, &debian(&scratch.0)?)?;
    let tree = layout::dist().display().to_string();
    let file = format!("{tree}/share/freeflow/Containerfile");
    store.buildah(&["bud", "--pull-never", "--isolation", "chroot", "-f", &file, "-t", OURS, &tree])?;
    let container = store.buildah(&["from", "--pull-never", OURS])?;
    let judged = store.image(&container).and_then(|image| contained::serves(&image));
    // Its mount would keep the directory.
    store.buildah(&["umount", &container])?;
    judged
}

/// A Debian root as small as the image that bears its name.
fn debian(dir: &Path) -> Result<PathBuf, String> {
    let tar = dir.join("debian.tar");
    let mut make = Command::new("mmdebstrap");
    make.args(["--quiet", "--variant=minbase", "bookworm"]).arg(&tar);
    said(&mut make)?;
    Ok(tar)
}

/// What a program printed, without the last line's end.
fn said(command: &mut Command) -> Result<String, String> {
    let done = process::run(command, LIMIT, Echo::Quiet).map_err(|failure| failure.to_string())?;
    if done.success() {
        Ok(done.stdout.trim().to_owned())
    } else {
        Err(format!("{}\n{}", done.how(), done.tail()))
    }
}

/// Images and containers, in a directory of their own.
struct Store<'a>(&'a Path);

impl Store<'_> {
    fn buildah(&self, args: &[&str]) -> Result<String, String> {
        let mut command = Command::new("buildah");
        command.arg("--root").arg(self.0.join("store")).arg("--runroot").arg(self.0.join("run"));
        command.args(["--storage-driver", "vfs"]).args(args);
        said(&mut command)
    }

    fn import(&self, name: &str, tar: &Path) -> Outcome {
        let container = self.buildah(&["from", "scratch"])?;
        self.buildah(&["add", "--quiet", &container, &tar.display().to_string(), "/"])?;
        self.buildah(&["commit", "--quiet", "--rm", &container, name]).map(drop)
    }

    /// What the image says of itself, and where `container`, which is made of it, has its root.
    fn image(&self, container: &str) -> Result<Image, String> {
        let root = self.buildah(&["mount", container])?.into();
        let said = self.buildah(&["inspect", "--type", "image", OURS])?;
        let said: Value = serde_json::from_str(&said).map_err(|e| e.to_string())?;
        let config = &said["OCIv1"]["config"];
        let listed = |name: &str| config[name].as_array().into_iter().flatten().filter_map(Value::as_str);
        let words = listed("Entrypoint").chain(listed("Cmd")).map(str::to_owned).collect();
        let flags = config["Labels"]["flags"].as_str().ok_or("the image has no label of flags")?.to_owned();
        Ok(Image { root, words, flags })
    }
}
