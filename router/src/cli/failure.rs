//! What a subcommand says when it gives up: one message that names what was tried, and an exit status.

use std::fmt::{self, Display};

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

impl From<freeflow_router::admin::Error> for Failure {
    fn from(error: freeflow_router::admin::Error) -> Self {
        Self::new(error.to_string())
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
