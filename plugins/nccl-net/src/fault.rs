//! Errors: the number NCCL gets and the text its log gets.

use freeflow_core::error::Error;
use freeflow_core::verbs::WcStatus;
use freeflow_nccl_abi::{NcclResult, result};

/// Why a call failed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Fault {
    pub code: NcclResult,
    /// Empty: it was told before.
    pub text: String,
}

pub type Result<T> = std::result::Result<T, Fault>;

impl Fault {
    /// This host: no router, no room, a system call.
    pub fn system(text: impl Into<String>) -> Self {
        Fault { code: result::SYSTEM_ERROR, text: text.into() }
    }

    /// The other end is gone, or broke the protocol.
    pub fn remote(text: impl Into<String>) -> Self {
        Fault { code: result::REMOTE_ERROR, text: text.into() }
    }

    /// The caller did what the interface forbids.
    pub fn usage(text: impl Into<String>) -> Self {
        Fault { code: result::INVALID_USAGE, text: text.into() }
    }

    /// A bug in here.
    pub fn internal(text: impl Into<String>) -> Self {
        Fault { code: result::INTERNAL_ERROR, text: text.into() }
    }

    /// The same number once more, without words.
    pub fn again(code: NcclResult) -> Self {
        Fault { code, text: String::new() }
    }

    /// A send request ended with `status`.
    pub fn of_completion(status: u32, what: &str) -> Self {
        let Ok(known) = WcStatus::try_from(status) else {
            return Fault::internal(format!("{what}: unknown completion status {status}"));
        };
        match known {
            WcStatus::LocLenErr | WcStatus::LocQpOpErr => Fault::internal(format!("{what}: {known:?}")),
            WcStatus::LocProtErr => Fault::usage(format!("{what}: its memory was deregistered meanwhile")),
            WcStatus::RetryExcErr | WcStatus::WrFlushErr => {
                Fault::remote(format!("{what}: the peer is gone ({known:?})"))
            }
            _ => Fault::remote(format!("{what}: the peer refused it ({known:?})")),
        }
    }
}

impl From<Error> for Fault {
    fn from(error: Error) -> Self {
        let code = match &error {
            Error::Invalid(_) | Error::Unsupported(_) => result::INTERNAL_ERROR,
            Error::BadAddress { .. } => result::INVALID_USAGE,
            _ => result::SYSTEM_ERROR,
        };
        Fault { code, text: error.to_string() }
    }
}
