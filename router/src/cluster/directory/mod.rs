//! Where the table of hosts and containers comes from: a back-end per kind of directory, one set of rules for all.
//!
//! A back-end fills [`Hosts`] from a thread of its own and, where the directory can be written, says which containers
//! this host has. It never makes its caller wait. One suite (`suite`) runs over all of them.

#[cfg(feature = "etcd")]
pub mod etcd;
pub mod file;
#[cfg(test)]
mod memory;
#[cfg(test)]
mod suite;

use std::path::PathBuf;

pub use super::hosts::{Home, HostName, Hosts};

/// How much a claim to an address is worth.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Claim {
    /// The operator put the container here: it moves from wherever it was.
    Firm,
    /// It belongs here unless another host has it: addresses of the host itself, and what is said again.
    Modest,
}

/// A directory at work; dropping it ends its thread, and what it said about this host ends with it.
pub trait Backend: Send + Sync + std::fmt::Debug {
    /// This host has `home` now.
    fn publish(&self, home: &Home, claim: Claim);
    /// And now not any more.
    fn withdraw(&self, home: &Home);
}

/// The configuration's `directory`.
#[derive(Clone, PartialEq, Eq, serde::Deserialize)]
#[serde(try_from = "String")]
pub enum Source {
    /// This host alone.
    Alone,
    File(PathBuf),
    Etcd(Vec<String>),
}

impl TryFrom<String> for Source {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        match text.split_once(':') {
            None if text == "none" => Ok(Source::Alone),
            Some(("file", path)) if path.starts_with('/') => Ok(Source::File(path.into())),
            Some(("etcd", urls)) if urls.split(',').all(|url| url.starts_with("http")) => {
                Ok(Source::Etcd(urls.split(',').map(str::to_owned).collect()))
            }
            _ => Err(format!(
                "{text:?} is no directory: \"none\", \"file:/PATH\" or \"etcd:http://HOST:2379,...\""
            )),
        }
    }
}

impl std::fmt::Debug for Source {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Source::Alone => write!(f, "\"none\""),
            Source::File(path) => write!(f, "\"file:{}\"", path.display()),
            Source::Etcd(urls) => write!(f, "\"etcd:{}\"", urls.join(",")),
        }
    }
}
