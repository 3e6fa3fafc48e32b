//! The program's side of the virtual NIC: contexts, protection domains, memory regions, queues.
//!
//! The doors translate to this; it knows the router ([`Conn`]), shared memory and the executor, and never a C struct.
//! Control-path calls are requests to the router; data-path calls (post, poll, arm) touch memory only.

mod ah;
mod channel;
mod cm;
mod conn;
mod context;
mod cq;
mod events;
mod fork;
mod helper;
mod keys;
mod lanes;
mod ledger;
mod link;
mod lock;
mod mcast;
pub mod mem;
mod moderation;
mod mw;
mod null_mr;
mod offer;
mod path;
mod pd;
mod peers;
mod qp;
mod slab;
mod srq;
mod stall;
mod tickets;
mod window;

pub use ah::Ah;
pub use channel::Channel;
pub use cm::{Cm, CmId};
pub use conn::{Conn, Opened, socket_candidates};
pub use context::{Context, DeviceInfo, available};
pub use cq::Cq;
pub use events::{AsyncEvent, AsyncKind};
pub use mw::Mw;
pub use null_mr::NullMr;
pub use offer::offer_processor;
pub use pd::{Mr, Pd};
pub use qp::{Qp, QpInit, SendWr};
pub use srq::{Srq, SrqInit, Xrcd};
pub use tickets::Source;
pub use window::Window;
