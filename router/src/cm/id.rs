//! One cm id: who owns it and how far it got. Owns data only; the rules are in `address`, `connect` and `ends`.

use std::time::Instant;

use super::far::End;
use freeflow_core::ctl::cm::{CmAddr, cm_family, cm_flags, cm_space};

use super::Home;

/// How far an id is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum State {
    Idle,
    Bound,
    AddrResolved,
    RouteResolved,
    Listening,
    /// Active: asked, no answer yet.
    ReqSent,
    /// Passive: asked, not answered yet.
    ReqRcvd,
    /// Passive: accepted, the other side is not ready yet.
    RepSent,
    /// Active: was accepted, did not say that it is ready.
    RepRcvd,
    Established,
    DreqSent,
    DreqRcvd,
    TimeWait,
    /// Datagrams: the lookup is done.
    Datagram,
    /// Turned down, timed out or through with time-wait. Nothing but destroying is left.
    Ended,
}

impl State {
    /// Whether rdma_disconnect makes sense at all: there was a connection.
    pub fn has_connected(self) -> bool {
        !matches!(
            self,
            State::Idle | State::Bound | State::AddrResolved | State::RouteResolved | State::Listening
        )
    }
}

/// A cm id.
#[derive(Debug)]
pub struct Id {
    pub client: u32,
    pub channel: u32,
    /// [`cm_space`]
    pub space: u32,
    pub state: State,
    /// [`cm_flags`] of the bind.
    pub flags: u32,
    pub local: CmAddr,
    pub remote: CmAddr,
    /// Active: the container `remote` leads to. Passive: where the request came from.
    pub to: Option<Home>,
    /// The id at the other end.
    pub peer: Option<End>,
    /// Holds a port in its port space (passive ids share their listener's).
    pub holds_port: bool,
    /// Listener: requests that may wait, and do wait, unfetched.
    pub backlog: u32,
    pub waiting: u32,
    /// When the manager acts by itself.
    pub deadline: Option<Instant>,
}

impl Id {
    pub fn new(client: u32, channel: u32, space: u32) -> Self {
        Id {
            client,
            channel,
            space,
            state: State::Idle,
            flags: 0,
            local: CmAddr::default(),
            remote: CmAddr::default(),
            to: None,
            peer: None,
            holds_port: false,
            backlog: 0,
            waiting: 0,
            deadline: None,
        }
    }

    pub fn is_datagram(&self) -> bool {
        self.space == cm_space::UDP
    }

    pub fn has(&self, flag: u32) -> bool {
        self.flags & flag != 0
    }

    /// An IPv6 wildcard that leaves IPv4 alone.
    pub fn family_only(&self) -> bool {
        self.has(cm_flags::AF_ONLY) && self.local.family == cm_family::V6
    }
}
