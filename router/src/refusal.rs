//! Why a request is refused, and the one place that maps refusals to errno.

use rustix::io::Errno;

use crate::quota::Exceeded;

/// A refusal leaves the connection alive and everything as it was.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    #[error("no {what} {id}")]
    NoSuch { what: &'static str, id: u32 },
    #[error("{what} {id} belongs to another process")]
    NotYours { what: &'static str, id: u32 },
    #[error("{what} {id} is in use by a {by}")]
    Busy { what: &'static str, id: u32, by: &'static str },
    #[error("there is already such an {0}")]
    Exists(&'static str),
    #[error("{what}: {got} is not allowed (limit {limit})")]
    Range { what: &'static str, got: u64, limit: u64 },
    #[error("invalid: {0}")]
    Invalid(&'static str),
    #[error("not supported: {0}")]
    Unsupported(&'static str),
    #[error(transparent)]
    Quota(#[from] Exceeded),
    #[error("no free {0}")]
    Exhausted(&'static str),
    #[error("the peer is not there, or not connected to the asker")]
    NoPeer,
    /// A key, its rights, its PD or its bounds.
    #[error("access denied: {0}")]
    Access(&'static str),
    #[error("the caller's memory at {0:#x} cannot be reached")]
    LocalFault(u64),
    #[error("the peer's memory at {0:#x} cannot be reached")]
    RemoteFault(u64),
    #[error("too many failed accesses: {0} so far; copies are refused for a while")]
    TooOften(u64),
    #[error("the client speaks protocol {min} to {max}, this router {ours}", ours = freeflow_core::ctl::VERSION)]
    Version { min: u16, max: u16 },
    #[error("{what}: {errno}")]
    System { what: &'static str, errno: Errno },
}

impl Refusal {
    pub fn system(what: &'static str) -> impl FnOnce(Errno) -> Self {
        move |errno| Refusal::System { what, errno }
    }

    /// What the program sees.
    pub fn errno(&self) -> Errno {
        match self {
            Refusal::NoSuch { .. } => Errno::NOENT,
            Refusal::NotYours { .. } => Errno::PERM,
            Refusal::Busy { .. } => Errno::BUSY,
            Refusal::Exists(_) => Errno::EXIST,
            Refusal::Range { .. } | Refusal::Invalid(_) => Errno::INVAL,
            Refusal::Unsupported(_) => Errno::OPNOTSUPP,
            Refusal::Quota(_) | Refusal::Exhausted(_) => Errno::NOMEM,
            Refusal::NoPeer => Errno::NOTCONN,
            Refusal::Access(_) | Refusal::TooOften(_) => Errno::ACCESS,
            Refusal::LocalFault(_) => Errno::FAULT,
            Refusal::RemoteFault(_) => Errno::REMOTEIO,
            Refusal::Version { .. } => Errno::PROTONOSUPPORT,
            Refusal::System { errno, .. } => *errno,
        }
    }
}

pub type Result<T> = std::result::Result<T, Refusal>;
