//! The router daemon's entry: its configuration and `run`.
//!
//! Owns what the command line may tell the daemon. It must never know who started it.

use std::os::fd::OwnedFd;
use std::path::PathBuf;

/// Everything the command line decides for the daemon.
#[derive(Debug)]
pub struct Config {
    /// Where the router's own socket goes; `admin.sock` goes beside it.
    pub socket: PathBuf,
    /// `--config` / `FREEFLOW_CONFIG`: a TOML file.
    pub file: Option<PathBuf>,
    /// One byte is written here once all sockets listen; closed unwritten means that the start failed.
    pub ready: Option<OwnedFd>,
}

#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("the router daemon is not part of this build yet")]
    NotBuilt,
}

/// Serves until SIGTERM or SIGINT.
pub fn run(_config: Config) -> Result<(), Error> {
    Err(Error::NotBuilt)
}
