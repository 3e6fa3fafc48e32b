//! What an operation means: one executor over the two ends' shared state, whoever runs it.
//!
//! [`execute`] takes one send request as far as it gets: checks the poster's own buffers, then the peer's key or
//! receive, moves the bytes, completes the peer's receive and rings the peer's CQ. It knows nothing of sockets, threads
//! or time. How the peer's bytes are reached is [`PeerMemory`]'s business: a path is an implementation of it.

mod local;
mod peer;
mod pump;
mod retired;
mod run;
#[cfg(all(test, not(loom)))]
mod tests;

pub use local::LocalTable;
pub use peer::{FarCopy, Peer, PeerMemory, Reach};
pub use retired::Retired;
pub use run::{Env, Outcome, abandon, execute};

use crate::verbs::{Flush, Gid, SendFlags, SendOp, Sge};

/// Where a datagram goes.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct UdDest {
    pub dgid: Gid,
    pub qpn: u32,
    pub qkey: u32,
    pub traffic_class: u8,
    pub hop_limit: u8,
}

/// The remote side of a request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Target {
    /// SEND on a connected QP.
    Receive,
    /// WRITE, READ.
    Memory {
        addr: u64,
        rkey: u32,
    },
    Atomic {
        addr: u64,
        rkey: u32,
        compare_add: u64,
        swap: u64,
    },
    /// SEND on a UD QP.
    Datagram(UdDest),
    /// The poster's own memory window that `rkey` names but for its last byte, over `[addr, addr+len)` of its region `mr`;
    /// the request's `imm` holds the rights. Not the executor's business, as the next.
    Bind {
        rkey: u32,
        mr: u32,
        addr: u64,
        len: u64,
    },
    /// The poster's own memory window that is bound under this key.
    Invalidate {
        rkey: u32,
    },
    /// FLUSH of what was written to `[addr, addr+len)`, or to all that the key names.
    Flush {
        addr: u64,
        rkey: u32,
        len: u64,
        what: Flush,
    },
}

impl Target {
    /// Is the request about the poster's own keys?
    #[inline]
    pub fn is_own(&self) -> bool {
        matches!(self, Target::Bind { .. } | Target::Invalidate { .. })
    }
}

/// A send request, as the executor sees it.
#[derive(Debug, Clone, Copy)]
pub struct Request<'a> {
    pub op: SendOp,
    pub flags: SendFlags,
    /// Big endian, passed through; of SEND with invalidate the key that is to end.
    pub imm: u32,
    pub target: Target,
    /// XRC: the shared receive queue at the other end, which the peer in [`Env`] then receives for; else 0.
    pub srqn: u32,
    /// Scatter/gather list; with inline data one entry without a key check.
    pub sges: &'a [Sge],
}

/// How far a request got in earlier calls.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Progress {
    /// Bytes moved.
    pub moved: u64,
    /// The receive being filled.
    pub claim: Option<(u32, u32)>,
}
