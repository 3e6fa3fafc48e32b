//! The receiving half of a connection: a peer's endpoint has a queue pair of ours for a partner, and its FIFO lies here.

use std::cell::Cell;
use std::sync::Arc;

use freeflow_core::client::{Mr, Qp, SendWr};
use freeflow_core::error::Result;
use freeflow_core::exec::{Request, Target};
use freeflow_core::ring::fifo::Message;
use freeflow_core::ring::{Fifo, FifoReceiver, FifoShared, FifoSlot};
use freeflow_core::verbs::{Access, Gid, QpState, SendFlags, SendOp, Sge};
use zerocopy::IntoBytes;

use super::{Config, Event, Iface};
use crate::connect::{connect_rc, make_rc};
use crate::ep::{SEND_DEPTH, owner};
use crate::md::Md;
use crate::uct::types::AM_IDS;
use crate::wire::{ATOMIC, AtomicRequest, BYE, Datagram, SEND_HEADER, kind};

/// Answers on their way to one peer: it waits for as many as it has buffers; the word that one has come may be late.
const ANSWERS: u32 = 2 * SEND_DEPTH;
/// Messages taken from one FIFO before the next has its turn.
const TURN: u32 = 16;

/// A connection that a peer asked for.
pub struct Incoming {
    qp: Arc<Qp>,
    /// FIFO, pool, and the buffers of its receives, in this order.
    memory: Arc<Mr>,
    receiver: Cell<FifoReceiver>,
    slots: usize,
    pool: usize,
    /// Size of a receive's buffer.
    room: usize,
    /// The request, as the peer may repeat it, and what it is told then.
    request: Datagram,
    pub reply: Datagram,
    /// The peer has left, or broke the rules.
    ended: Cell<bool>,
}

/// Bytes in front of the pool.
pub fn pool_offset(slots: usize) -> usize {
    size_of::<FifoShared>() + slots * size_of::<FifoSlot>()
}

impl Incoming {
    /// Makes a partner for the queue pair that asks.
    pub fn accept(iface: &Iface, md: &Md, request: &Datagram) -> Result<Self> {
        let Config { fifo_size, rx_queue_len, seg_size, pool_size, .. } = iface.config;
        let (slots, pool) = (fifo_size as usize, pool_size / 64 * 64);
        let room = (SEND_HEADER + seg_size).next_multiple_of(64);
        let len = pool_offset(slots) + pool + room * rx_queue_len as usize;
        let memory =
            md.pd.allocate(len as u64, Access::LOCAL_WRITE | Access::REMOTE_WRITE | Access::REMOTE_READ)?;
        let qp = make_rc(&md.pd, &iface.cq, ANSWERS, rx_queue_len)?;
        connect_rc(&qp, Gid(request.gid), request.qpn)?;
        let reply = Datagram {
            gid: md.context.gid().0,
            qpn: qp.qpn(),
            key: memory.key(),
            addr: memory.addr(),
            slots: fifo_size,
            pool: pool as u32,
            segment: seg_size as u32,
            ..Datagram::new(kind::REPLY, request.token)
        };
        let (receiver, ended) = Default::default();
        Ok(Incoming { qp, memory, receiver, slots, pool, room, request: *request, reply, ended })
    }

    /// The number is known: from now on it takes messages.
    pub fn start(&self, number: usize, receives: usize) {
        (0..receives).for_each(|buffer| self.post(number, buffer));
    }

    /// Receives into that buffer, again.
    pub fn post(&self, number: usize, buffer: usize) {
        let sge = Sge { addr: self.buffer(buffer), length: self.room as u32, lkey: self.memory.key() };
        let _ = self.qp.post_recv(Event::Message(number, buffer).pack(), &[sge]);
    }

    pub fn buffer(&self, buffer: usize) -> u64 {
        self.memory.addr() + (pool_offset(self.slots) + self.pool + buffer * self.room) as u64
    }

    pub fn is_of(&self, request: &Datagram) -> bool {
        self.request == *request
    }

    fn fifo(&self) -> Fifo<'_> {
        let at = self.memory.addr() as *const u8;
        // SAFETY: the region begins with it, zeroed at birth and only atomics, and lives as long as self.
        let shared = unsafe { &*at.cast::<FifoShared>() };
        let first = at.wrapping_add(size_of::<FifoShared>()).cast::<FifoSlot>();
        // SAFETY: as above; accept() made room for so many.
        let slots = unsafe { std::slice::from_raw_parts(first, self.slots) };
        Fifo { shared, slots }
    }

    /// Where a message's payload is. The sender's claim, judged.
    #[inline]
    fn payload(&self, message: Message, slot: &FifoSlot, place: u64) -> Option<*mut u8> {
        let len = usize::from(message.len);
        if !message.pooled {
            return (len <= freeflow_core::ring::fifo::SLOT_BYTES).then(|| slot.payload());
        }
        let place = usize::try_from(place).ok().filter(|at| *at <= self.pool && len <= self.pool - *at)?;
        Some((self.memory.addr() as *mut u8).wrapping_add(pool_offset(self.slots) + place))
    }

    #[inline]
    pub fn has_message(&self) -> bool {
        self.receiver.get().peek(self.fifo()).is_some()
    }

    /// Takes what is there, up to a fair share. Returns how many messages.
    #[inline]
    pub fn poll(&self, iface: &Iface) -> u32 {
        let fifo = self.fifo();
        let mut taken = 0;
        while taken < TURN {
            let Some((message, slot, place)) = self.receiver.get().peek(fifo) else {
                if taken > 0 {
                    self.give_back(fifo);
                }
                break;
            };
            let said = self.payload(message, slot, place).filter(|_| usize::from(message.id) < AM_IDS);
            let Some(data) = said else {
                if !self.take_own(iface, message, slot.payload()) {
                    break;
                }
                self.consume(fifo);
                taken += 1;
                continue;
            };
            iface.deliver(message.id, data, usize::from(message.len));
            self.consume(fifo);
            taken += 1;
        }
        taken
    }

    #[inline]
    fn consume(&self, fifo: Fifo<'_>) {
        let mut receiver = self.receiver.get();
        receiver.consume(fifo);
        self.receiver.set(receiver);
    }

    /// A message that is not UCX's: one of ours, or nonsense. False: it was the last.
    #[cold]
    fn take_own(&self, iface: &Iface, message: Message, payload: *const u8) -> bool {
        let taken =
            message.id == ATOMIC && !message.pooled && self.serve(iface, payload, usize::from(message.len));
        if !taken {
            self.end(iface, message.id == BYE);
        }
        taken
    }

    /// Carries out a peer's atomic, and writes the answer. False: it is none, or the peer has more under way than it may.
    fn serve(&self, iface: &Iface, at: *const u8, len: usize) -> bool {
        let mut said = [0; size_of::<AtomicRequest>()];
        if len != said.len() {
            return false;
        }
        // SAFETY: a message of that length, in memory of ours; copied before it is judged.
        unsafe { at.copy_to_nonoverlapping(said.as_mut_ptr(), len) };
        let Some((request, answer)) = owner::serve(iface.md(), &said) else { return false };
        while self.qp.send_room() == 0 && iface.take_completions() {}
        let AtomicRequest { answer_addr: addr, answer_key: rkey, .. } = request;
        let sge =
            Sge { addr: answer.as_bytes().as_ptr() as u64, length: size_of_val(&answer) as u32, lkey: 0 };
        let (op, flags, target) = (SendOp::Write, SendFlags::INLINE, Target::Memory { addr, rkey });
        let request = Request { op, flags, imm: 0, target, srqn: 0, sges: &[sge] };
        self.qp.post_send(&SendWr { wr_id: Event::None.pack(), request }).is_ok()
    }

    /// All that came is read: the sender gets its room back.
    fn give_back(&self, fifo: Fifo<'_>) {
        let mut receiver = self.receiver.get();
        receiver.idle(fifo);
        self.receiver.set(receiver);
    }

    #[cold]
    fn end(&self, iface: &Iface, politely: bool) {
        if self.ended.replace(true) {
            return;
        }
        if !politely {
            use crate::uct::symbols::Level;
            iface
                .md()
                .ucx
                .log(Level::Error, "ff: a peer wrote nonsense into its FIFO; its connection is closed");
        }
    }

    /// A message that came as a SEND.
    pub fn take(&self, iface: &Iface, buffer: usize, len: usize) {
        if len < SEND_HEADER || len > self.room {
            return; // nothing but a wake-up
        }
        let at = self.buffer(buffer) as *mut u8;
        // SAFETY: in the region's receive buffers.
        let id = unsafe { at.read() };
        let (data, len) = (at.wrapping_add(SEND_HEADER), len - SEND_HEADER);
        // A peer on the direct path could still write there; it then harms what it sends itself.
        let taken = if id == ATOMIC { self.serve(iface, data, len) } else { iface.deliver(id, data, len) };
        if !taken {
            self.end(iface, id == BYE);
        }
    }

    /// Is there nothing more to expect?
    pub fn is_over(&self) -> bool {
        self.ended.get() || (self.qp.state() == QpState::Err && !self.has_message())
    }

    /// Before sleeping. False: a message is there.
    pub fn arm(&self) -> bool {
        let mut receiver = self.receiver.get();
        let sleeps = receiver.arm(self.fifo());
        self.receiver.set(receiver);
        sleeps
    }
}
