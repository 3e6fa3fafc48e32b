//! The connection manager: port spaces, listeners and connection handshakes of all containers on this host.
//!
//! [`Manager`] owns every cm id, its state and its waiting events. It takes requests and time as arguments and gives
//! answers and wake-ups back; it must never know sockets, threads or clocks. [`Service`] is the part that does.
//! Which requests exist is `freeflow_core::ctl::cm`; what their order means is rdma_cm(7).

mod address;
mod call;
mod connect;
mod ends;
mod far;
mod id;
mod manager;
mod ports;
mod service;
#[cfg(test)]
mod tests;

use std::sync::Arc;

use freeflow_core::ctl::RawGid;
use freeflow_core::ctl::cm::{CmAddr, CmDropped, CmNext};
use rustix::io::Errno;

pub use call::Call;
pub use far::{FarOutput, HostName};
pub use manager::Manager;
pub use service::Service;

/// Whose port space an id lives in: one container.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Home {
    pub tenant: Arc<str>,
    pub vip: RawGid,
}

/// Who has which address. Answers only for `from`'s own tenant: an address of another one does not exist for it.
pub trait Directory: Send {
    /// The container that `addr` leads to when a program in `from` names it.
    fn locate(&self, from: &Home, addr: &RawGid) -> Option<Home>;

    /// The other host that has a container.
    fn host(&self, _: &Home) -> Option<HostName> {
        None
    }
}

/// What can happen to the manager.
#[derive(Debug)]
#[allow(clippy::large_enum_variant, reason = "lives on one stack for the length of one call")]
pub enum Input {
    /// A connection with purpose CM said hello.
    Join { client: u32, home: Home },
    /// It hung up or its process died.
    Leave { client: u32 },
    /// It asks for something.
    Call { client: u32, call: Call },
    /// [`Manager::deadline`] has passed.
    Tick,
    /// Another host's manager says something.
    Far { host: HostName, bytes: Vec<u8> },
    /// It is gone: it has forgotten everything.
    HostGone { host: HostName },
}

/// What a call is answered with.
#[derive(Debug, Clone, PartialEq)]
pub enum Answer {
    Done,
    Id(u32),
    /// A new channel, whose socket's other end goes into the reply.
    Channel(u32),
    Dropped {
        channel: u32,
        dropped: CmDropped,
    },
    Addr(CmAddr),
    Next {
        channel: u32,
        event: Box<CmNext>,
    },
}

/// What the manager wants done after one input.
#[derive(Debug, Default)]
pub struct Output {
    /// To a [`Input::Call`]; `None` for the other inputs.
    pub answer: Option<Result<Answer, Errno>>,
    /// Channels that got one event more each time they are named.
    pub tickets: Vec<u32>,
    /// Channels that are gone.
    pub closed: Vec<u32>,
    /// To other hosts' managers.
    pub far: Vec<FarOutput>,
}
