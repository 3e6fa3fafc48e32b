//! What two processes share: layouts in shared memory and the protocols on them.
//!
//! * [`rq`]: receive slots. The owner posts, a peer claims, fills and completes, the owner takes.
//! * [`srq`]: a receive queue that many QPs share. Takers take a slot and complete it by a ticket of their QP's.
//! * [`cq`]: a CQ's arm word. Peers ring, the owner arms and looks.
//! * [`marks`]: which of a CQ's many queues have something.
//! * [`qp`]: a QP's header: who may reach it, and the words its peer writes.
//! * [`fifo`]: messages of a door's own to one peer.
//! * [`link`]: requests on their way to the router, for peers on other hosts.
//! * [`mr`]: the table of memory regions. The owner writes, peers read.
//!
//! Everything here is atomics at fixed offsets; a peer may write anything at any time, so each reader copies once and
//! judges the copy. This module never knows addresses, descriptors or who runs it.

pub mod cq;
pub mod fifo;
pub mod link;
pub mod marks;
pub mod mr;
pub mod qp;
pub mod rq;
pub mod srq;

#[cfg(all(test, loom))]
mod loom_link;
#[cfg(all(test, loom))]
mod loom_srq;
#[cfg(all(test, loom))]
mod loom_tests;

pub use cq::{CqShared, Ring};
pub use fifo::{Fifo, FifoReceiver, FifoSender, FifoShared, FifoSlot};
pub use link::{LinkDone, LinkHeader, LinkWord, Submissions, Wqe};
pub use mr::{Extent, MR_SLOTS, MrEntry, MrView};
pub use qp::{InFlight, QpShared};
pub use rq::{
    Claim, Completion, INLINE_BYTES, MAX_SGE, Phase, RecvSlot, RqShared, SlotPayload, SlotState, Taken,
};
pub use srq::{Ready, SrqRing, SrqShared};
