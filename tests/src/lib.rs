//! The suites that judge FreeFlow from outside.
//!
//! `verbs/` holds small C programs that use nothing but the public verbs API; `programs` compiles them, a `Path` starts
//! their two sides, `report` reads what they print, and `suite` runs every program over every path. A new path is a new
//! implementation of `Path`; programs never know which one they run on. `soak` runs the programs of `soak/` for long,
//! against deaths and a hostile neighbour, and judges who came through how. `nccl` replays what NCCL does with a network plugin. `security` holds the promises of
//! docs/security.md to the tests it names. `layers` reads the sources and holds the
//! architecture's arrows.

pub mod launch;
pub mod layers;
pub mod nccl;
pub mod path;
pub mod programs;
pub mod report;
pub mod security;
pub mod soak;
pub mod suite;

use std::path::Path;

/// The repository's root.
pub fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap_or(Path::new("/"))
}
