//! What a subcommand says when it gives up: one message that names what was tried, and an exit status.

use std::fmt::{self, Display};
use std::io::ErrorKind;

use freeflow_router::admin;

/// Exit status for a command that runs other programs and failed itself; the programs' own statuses stay below.
pub const OWN_FAILURE: u8 = 125;
/// Exit status when the program to run cannot be executed, and when it does not exist (as shells have it).
pub const CANNOT_EXECUTE: u8 = 126;
pub const NOT_FOUND: u8 = 127;

#[derive(Debug)]
pub struct Failure {
    message: String,
    status: u8,
}

impl Failure {
    pub fn new(message: impl Into<String>) -> Self {
        Self { message: message.into(), status: 1 }
    }

    pub fn with_status(mut self, status: u8) -> Self {
        self.status = status;
        self
    }

    pub fn status(&self) -> u8 {
        self.status
    }
}

impl Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)
    }
}

impl From<admin::Error> for Failure {
    fn from(error: admin::Error) -> Self {
        let advice = advice(&error).map_or(String::new(), |advice| format!("; {advice}"));
        Self::new(format!("{error}{advice}"))
    }
}

/// What to do where no router answers.
pub fn advice(error: &admin::Error) -> Option<&'static str> {
    let admin::Error::Connect { path, source } = error else { return None };
    match source.kind() {
        ErrorKind::PermissionDenied => {
            Some("it is another user's: run this as that user or as root, or name your own with --router")
        }
        ErrorKind::NotFound if path.with_file_name(admin::CONTAINER_SOCKET_NAME).exists() => {
            Some("only a container's own socket is here: run this on the host")
        }
        ErrorKind::NotFound | ErrorKind::ConnectionRefused => {
            Some("start one with freeflow router --detach, or name another with --router")
        }
        _ => None,
    }
}

pub type Result<T> = std::result::Result<T, Failure>;

/// Says what was being done when an error came up.
pub trait Context<T> {
    fn context(self, what: impl Display) -> Result<T>;
}

impl<T, E: Display> Context<T> for std::result::Result<T, E> {
    fn context(self, what: impl Display) -> Result<T> {
        self.map_err(|error| Failure::new(format!("{what}: {error}")))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn where_no_router_answers_the_next_step_is_named() {
        let dir = std::env::temp_dir().join(format!("ff-advice-{}", std::process::id()));
        std::fs::create_dir_all(&dir).unwrap();
        let path = dir.join(admin::SOCKET_NAME);
        let said = |kind: ErrorKind| {
            Failure::from(admin::Error::Connect { path: path.clone(), source: kind.into() }).to_string()
        };
        assert!(said(ErrorKind::NotFound).contains("freeflow router --detach"));
        assert!(said(ErrorKind::PermissionDenied).contains("as root"));
        std::fs::write(dir.join(admin::CONTAINER_SOCKET_NAME), "").unwrap();
        assert!(said(ErrorKind::NotFound).contains("on the host"));
        std::fs::remove_dir_all(&dir).unwrap();
    }
}
