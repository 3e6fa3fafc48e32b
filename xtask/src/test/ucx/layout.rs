//! The plugin's table of offsets and sizes for Debian's release.

use std::fs;
use std::path::PathBuf;
use std::process::Command;

use super::{Outcome, Workplace, compile, finished, verdict};
use crate::layout;

/// Offsets and sizes as Debian's source package has them, against the plugin's table for that release.
pub fn debian() -> Outcome {
    let work = Workplace::new()?;
    let source = debian_source(&work)?;
    let program = work.path("layout");
    let include = format!("-I{}", source.join("src").display());
    let config = format!("-I{}", work.0.display());
    fs::write(work.path("config.h"), "").map_err(|error| error.to_string())?;
    let settings = "-DENABLE_PARAMS_CHECK=0 -DENABLE_ASSERT=0 -DENABLE_DEBUG_DATA=0 -DENABLE_MEMTRACK=0 -DENABLE_BUILTIN_MEMCPY=1 -DUCS_MAX_LOG_LEVEL=UCS_LOG_LEVEL_DEBUG -Ducs_max_log_level=UCS_LOG_LEVEL_DEBUG";
    let mut arguments = vec![include.as_str(), config.as_str(), "-w"];
    arguments.extend(settings.split_whitespace());
    compile(&layout::root().join("plugins/ucx-tl/tests/layout.c"), &program, &arguments)?;
    let offsets = work.path("offsets");
    let done = finished(&mut Command::new(&program))?;
    fs::write(&offsets, &done.stdout).map_err(|error| error.to_string())?;
    let mut cargo = layout::cargo();
    cargo.args(["test", "--quiet", "--package", "freeflow-ucx", "--", "--ignored", "debian"]);
    let done = finished(cargo.env("FF_UCX_LAYOUT", &offsets))?;
    verdict(&done, done.stdout.contains("1 passed"), "the comparison did not run")
}

/// Unpacks Debian's ucx, from the same place as its binaries: their lists, with sources.
fn debian_source(work: &Workplace) -> Result<PathBuf, String> {
    let parts = work.path("sources.list.d");
    fs::create_dir_all(&parts).map_err(|error| error.to_string())?;
    let script = format!(
        "cd {parts} && for f in /etc/apt/sources.list /etc/apt/sources.list.d/*; do case $f in \
         *.sources) sed 's/^Types: deb$/Types: deb-src/' \"$f\" >\"$(basename \"$f\")\";; \
         *.list) [ -e \"$f\" ] && sed -n 's/^deb /deb-src /p' \"$f\" >\"$(basename \"$f\")\";; esac; done; \
         mkdir -p ../lists/partial && cd .. && o=\"-q -o Dir::Etc::SourceList=/dev/null -o Dir::Etc::SourceParts={parts} -o Dir::State::Lists=$PWD/lists\" && \
         apt-get $o update && apt-get $o --download-only source ucx && mkdir source && tar -xf ucx_*.orig.tar.* -C source --strip-components=1",
        parts = parts.display()
    );
    let done = finished(Command::new("sh").args(["-c", &script]))?;
    let source = work.path("source");
    verdict(
        &done,
        source.join("src/uct/base/uct_iface.h").exists(),
        "no headers in Debian's source package",
    )?;
    Ok(source)
}
