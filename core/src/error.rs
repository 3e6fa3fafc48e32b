//! The errors of a verb, and the one place that maps them to errno.

use rustix::io::Errno;

/// Why a verb failed. The text says what was tried, with the numbers.
#[derive(Debug, Clone, thiserror::Error)]
pub enum Error {
    /// No router answers on the socket that was tried.
    #[error(
        "no FreeFlow router answers on {socket}: {errno} (start one with `freeflow router`, or use `freeflow run`)"
    )]
    NoRouter { socket: String, errno: Errno },
    /// The router and this library share no protocol version.
    #[error(
        "the router speaks protocol {router}, this library {ours}: install the same release on both sides"
    )]
    Version { router: u16, ours: u16 },
    /// The router broke the protocol or hung up.
    #[error("the connection to the router is gone: {0}")]
    Disconnected(String),
    /// No router is there at this time; another one may take its place.
    #[error("the router is away: {0}")]
    Away(&'static str),
    /// The router refused a request.
    #[error("the router refused {request}: {errno}")]
    Refused { request: &'static str, errno: Errno },
    /// An argument that its man page forbids.
    #[error("invalid argument: {0}")]
    Invalid(&'static str),
    /// A verb that is not built.
    #[error("not supported: {0}")]
    Unsupported(&'static str),
    /// A queue, table or quota is full.
    #[error("no room: {0}")]
    NoRoom(&'static str),
    /// A buffer that is not (wholly) the program's.
    #[error("bad address range {addr:#x}+{len:#x}: {why}")]
    BadAddress { addr: u64, len: u64, why: &'static str },
    /// Memory that cannot be registered.
    #[error("{why}")]
    Memory { errno: Errno, why: String },
    /// A system call failed.
    #[error("{what}: {errno}")]
    System { what: &'static str, errno: Errno },
}

impl Error {
    /// Wraps a failed system call.
    pub fn system(what: &'static str) -> impl FnOnce(Errno) -> Self {
        move |errno| Error::System { what, errno }
    }

    /// The errno a C caller sees.
    pub fn errno(&self) -> Errno {
        match self {
            Error::NoRouter { .. } | Error::Version { .. } => Errno::NODEV,
            Error::Disconnected(_) | Error::Away(_) => Errno::IO,
            Error::Refused { errno, .. } | Error::System { errno, .. } | Error::Memory { errno, .. } => {
                *errno
            }
            Error::Invalid(_) => Errno::INVAL,
            Error::Unsupported(_) => Errno::OPNOTSUPP,
            Error::NoRoom(_) => Errno::NOMEM,
            Error::BadAddress { .. } => Errno::FAULT,
        }
    }
}

/// Result of a control-path verb.
pub type Result<T> = std::result::Result<T, Error>;
