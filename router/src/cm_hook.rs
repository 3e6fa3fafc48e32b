//! Where sessions meet the connection manager.

use freeflow_core::ctl::{Incoming, SocketError};

use crate::session::Session;
use crate::shared::Shared;
use crate::state::Owner;

/// A connection with purpose CM said hello.
pub fn join(_shared: &Shared, _owner: Owner) {}

/// A client is gone.
pub fn leave(_shared: &Shared, _client: u32) {}

/// Answers a connection manager's request; false if it is none.
pub fn handle(_session: &Session, _message: &Incoming) -> Result<bool, SocketError> {
    Ok(false)
}

/// Ports on which a container listens.
pub fn ports(_shared: &Shared, _container: u32) -> Vec<u16> {
    vec![]
}
