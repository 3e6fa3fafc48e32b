//! An interface: one worker's end of the transport. Owns the completion queue, the datagram queue pair that answers requests,
//! and what came in for it; endpoints are their users', and known here by number.
//!
//! UCX calls an interface and its endpoints from one thread at a time, but calls back from within our calls: nothing
//! stays borrowed over a callback that the callback may need.

mod incoming;
mod open;
mod progress;
mod query;

use std::cell::{Cell, RefCell};
use std::collections::VecDeque;
use std::ffi::{c_uint, c_void};
use std::rc::Rc;
use std::sync::Arc;

use freeflow_core::client::{Channel, Cq, Mr, Qp, SendWr};
use freeflow_core::exec::{Request, Target, UdDest};
use freeflow_core::verbs::{Gid, SendFlags, SendOp, Sge, Wc};
use slab::Slab;
use zerocopy::IntoBytes;

use crate::device::{Device, Presence};
use crate::ep::Ep;
use crate::ep::queue::{Bounce, Jobs, Op};
use crate::md::Md;
use crate::uct::types::{AM_IDS, AmHandler, BaseIface, Status};
use crate::wire::{Datagram, QKEY};
pub use incoming::{Incoming, pool_offset};
pub use open::open;
pub use progress::fence_stores;
pub use query::read_address;

/// The transport's variables, behind UCX's own (`uct_iface_config_t`).
#[derive(Debug, Clone, Copy)]
#[repr(C)]
pub struct Config {
    base: [u64; 4],
    pub fifo_size: c_uint,
    pub rx_queue_len: c_uint,
    pub seg_size: usize,
    pub pool_size: usize,
    pub bandwidth: f64,
    pub net_seg_size: usize,
    pub net_bandwidth: f64,
}

impl Config {
    /// As it is on that device.
    fn on(self, device: Device) -> Self {
        match device {
            Device::Here => self,
            // A pool is there in case that it serves peers of this host as well.
            Device::Far => Config {
                seg_size: self.net_seg_size,
                pool_size: self.pool_size.max(4 * self.net_seg_size),
                ..self
            },
        }
    }
}

/// What a completion is about, as its wr_id says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Event {
    /// Nothing to do.
    None,
    /// A datagram in this buffer.
    Datagram(usize),
    /// A SEND to incoming connection (number), in this buffer.
    Message(usize, usize),
    /// The receive that never completes: the endpoint's peer is gone.
    Sentinel(usize),
    /// A request of [`Iface::ops`].
    Op(usize),
}

impl Event {
    pub fn pack(self) -> u64 {
        match self {
            Event::None => 0,
            Event::Datagram(buffer) => 1 << 56 | buffer as u64,
            Event::Message(number, buffer) => 2 << 56 | (number as u64) << 16 | buffer as u64,
            Event::Sentinel(ep) => 3 << 56 | ep as u64,
            Event::Op(op) => 4 << 56 | op as u64,
        }
    }

    pub fn unpack(wr_id: u64) -> Self {
        let rest = wr_id as usize & ((1 << 56) - 1);
        match wr_id >> 56 {
            1 => Event::Datagram(rest),
            2 => Event::Message(rest >> 16, rest & 0xffff),
            3 => Event::Sentinel(rest),
            4 => Event::Op(rest),
            _ => Event::None,
        }
    }
}

/// A `uct_iface_t` of ours.
#[repr(C)]
pub struct Iface {
    base: BaseIface,
    presence: Presence,
    pub config: Config,
    pub cq: Arc<Cq>,
    channel: Arc<Channel>,
    /// Receives requests and answers.
    ud: Arc<Qp>,
    /// Buffers of its receives.
    datagrams: Arc<Mr>,
    incoming: RefCell<Slab<Rc<Incoming>>>,
    pub eps: RefCell<Slab<*const Ep>>,
    /// Numbers of endpoints with pending requests.
    pub waiting: RefCell<VecDeque<usize>>,
    pub ops: RefCell<Slab<Op>>,
    /// Those of them that wait for a peer's answer.
    pub asked: RefCell<Vec<usize>>,
    pub bounce: RefCell<Bounce>,
    pub jobs: RefCell<Jobs>,
    /// Endpoints whose failure UCX must hear of.
    pub failed: RefCell<Vec<(usize, Status)>>,
    /// Endpoints that wait for an answer.
    pub connecting: Cell<u32>,
    /// Something goes by requests: the completion queue is worth a look each time.
    pub queued: Cell<bool>,
    /// Completions that are to be handled. Those of an endpoint go with it.
    pub polled: RefCell<VecDeque<Wc>>,
    /// Something waits: pending requests, copies, completions, bad news. Set by whoever adds it.
    pub work: Cell<bool>,
    ticks: Cell<u32>,
    pub serials: Cell<u64>,
}

impl Iface {
    /// # Safety
    /// `iface` came from [`open`] and is not closed.
    pub unsafe fn from_raw<'a>(iface: *const c_void) -> &'a Iface {
        // SAFETY: by the caller's promise.
        unsafe { &*iface.cast() }
    }

    pub fn md(&self) -> &Md {
        // SAFETY: UCX closes a domain after its interfaces.
        unsafe { Md::from_raw(self.base.md) }
    }

    pub fn device(&self) -> Device {
        self.presence.device
    }

    pub fn as_raw(&self) -> *mut c_void {
        std::ptr::from_ref(self).cast_mut().cast()
    }

    /// Hands a message to UCX. False: the sender wrote an id that there is not.
    #[inline]
    fn deliver(&self, id: u8, data: *mut u8, len: usize) -> bool {
        let Some(AmHandler { callback: Some(callback), arg, .. }) = self.base.am.get(usize::from(id)) else {
            return false;
        };
        // SAFETY: UCX's handler and its argument; without a descriptor flag it keeps nothing of the data.
        unsafe { callback(*arg, data.cast(), len, 0) };
        true
    }

    /// Sends a datagram. It may get lost: whoever needs an answer repeats.
    pub fn send_datagram(&self, said: &Datagram, dgid: Gid, qpn: u32) {
        let bytes = said.as_bytes();
        let sge = Sge { addr: bytes.as_ptr() as u64, length: bytes.len() as u32, lkey: 0 };
        let (op, flags, target) =
            (SendOp::Send, SendFlags::INLINE, Target::Datagram(datagrams_to(dgid, qpn)));
        let request = Request { op, flags, imm: 0, target, srqn: 0, sges: &[sge] };
        let _ = self.ud.post_send(&SendWr { wr_id: Event::None.pack(), request });
    }

    /// The endpoint of that number.
    pub fn ep(&self, number: usize) -> Option<&Ep> {
        let ep = *self.eps.borrow().get(number)?;
        // SAFETY: endpoints take themselves out before they are freed.
        Some(unsafe { &*ep })
    }
}

/// Where a peer's interface takes datagrams.
fn datagrams_to(dgid: Gid, qpn: u32) -> UdDest {
    UdDest { dgid, qpn, qkey: QKEY, traffic_class: 0, hop_limit: 64 }
}

const _: () = assert!(AM_IDS <= crate::wire::ATOMIC as usize);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn events_survive_a_wr_id() {
        for event in [
            Event::None,
            Event::Datagram(63),
            Event::Message(70_000, 65_535),
            Event::Sentinel(5),
            Event::Op(1 << 40),
        ] {
            assert_eq!(Event::unpack(event.pack()), event);
        }
    }
}
