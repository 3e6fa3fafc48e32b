//! The control protocol between a client and its router: fixed-layout messages over SOCK_SEQPACKET, fds attached.
//!
//! One packet is one message: a [`Header`], then the body its kind names, then at most [`MAX_FDS`] descriptors. A
//! request is answered by one reply of the same kind, in order. Events travel the other way on a second socket.
//! Readers check header, number of fds, size and body, in that order; this module owns the layouts and must never
//! know what the messages do.

pub mod cm;
mod messages;
mod socket;

pub use messages::*;
pub use socket::{Incoming, Socket, SocketError};

/// Protocol version of this build. Both sides must name a range that holds a common one.
pub const VERSION: u16 = 3;
/// First bytes of every message: "FFlw".
pub const MAGIC: u32 = u32::from_le_bytes(*b"FFlw");
/// Longest body.
pub const MAX_BODY: usize = 4096;
/// Most descriptors on one message.
pub const MAX_FDS: usize = 8;
