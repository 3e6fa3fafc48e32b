//! Send requests not yet finished: private memory of the poster.

use std::sync::Arc;

use crate::error::Result;
use crate::exec::{Request, Target};
use crate::shm::{Array, Lender, Purpose};
use crate::verbs::{QpCaps, SendFlags, SendOp, Sge};

use super::send::SendWr;

/// One waiting request.
#[derive(Debug, Clone, Copy)]
struct Wqe {
    wr_id: u64,
    op: SendOp,
    flags: SendFlags,
    imm: u32,
    target: Target,
    srqn: u32,
    sges: usize,
}

impl Default for Wqe {
    fn default() -> Self {
        Wqe {
            wr_id: 0,
            op: SendOp::Send,
            flags: SendFlags::empty(),
            imm: 0,
            target: Target::Receive,
            srqn: 0,
            sges: 0,
        }
    }
}

/// The waiting requests of a send queue, with copies of their lists and inline data. The memory for them comes with the first
/// that waits: most queues never have one, and what many queues use all the time lies closer together without it. A lender is asked
/// at once: it is the program's, which expects that where it makes the queue.
#[derive(Debug)]
pub struct Queue {
    depth: usize,
    wqes: Array<Wqe>,
    sges: Array<Sge>,
    max_sge: usize,
    inline: Array<u8>,
    max_inline: usize,
    /// Requests posted, finished ones included.
    pub posted: u32,
    /// The request to run next.
    pub next: u32,
}

impl Queue {
    pub fn new(caps: &QpCaps, lender: Option<&Arc<dyn Lender>>) -> Result<Self> {
        let depth = caps.max_send_wr.max(1).next_power_of_two() as usize;
        let (max_sge, max_inline) = (caps.max_send_sge.max(1) as usize, caps.max_inline_data.max(8) as usize);
        let (wqes, sges, inline) = Default::default();
        let mut queue = Queue { depth, wqes, sges, max_sge, inline, max_inline, posted: 0, next: 0 };
        if lender.is_some() {
            queue.wqes = Array::new(depth, lender, Purpose::SendQueue)?;
            queue.sges = Array::new(depth * max_sge, lender, Purpose::SendQueue)?;
            queue.inline = Array::new(depth * max_inline, lender, Purpose::SendQueue)?;
        }
        Ok(queue)
    }

    #[cold]
    fn make_room(&mut self) {
        self.wqes = Array::on_heap(self.depth);
        self.sges = Array::on_heap(self.depth * self.max_sge);
        self.inline = Array::on_heap(self.depth * self.max_inline);
    }

    fn index(&self, seq: u32) -> usize {
        seq as usize & (self.depth - 1)
    }

    pub fn is_idle(&self) -> bool {
        self.posted == self.next
    }

    /// Remembers a request at the end. Inline data is copied now: its buffers are the program's again.
    pub fn push(&mut self, wr: &SendWr<'_>) {
        let SendWr { wr_id, request: Request { op, flags, imm, target, srqn, sges: list } } = *wr;
        if self.wqes.is_empty() {
            self.make_room();
        }
        let at = self.index(self.posted);
        let lists = at * self.max_sge;
        let mut sges = list.len();
        if flags.contains(SendFlags::INLINE) {
            let buffer = &mut self.inline[at * self.max_inline..][..self.max_inline];
            let length = super::send::gather_inline(list, buffer);
            self.sges[lists] = Sge { addr: buffer.as_ptr() as u64, length, lkey: 0 };
            sges = 1;
        } else {
            self.sges[lists..][..sges].copy_from_slice(list);
        }
        self.wqes[at] = Wqe { wr_id, op, flags, imm, target, srqn, sges };
        self.posted = self.posted.wrapping_add(1);
    }

    /// The request to run next.
    pub fn head(&self) -> Option<SendWr<'_>> {
        self.at(self.next)
    }

    /// Request `seq`, if it was posted; the caller knows that it is not finished.
    pub fn at(&self, seq: u32) -> Option<SendWr<'_>> {
        if seq == self.posted {
            return None;
        }
        let at = self.index(seq);
        let wqe = &self.wqes[at];
        let sges = &self.sges[at * self.max_sge..][..wqe.sges];
        let Wqe { wr_id, op, flags, imm, target, srqn, .. } = *wqe;
        Some(SendWr { wr_id, request: Request { op, flags, imm, target, srqn, sges } })
    }

    pub fn reset(&mut self) {
        (self.posted, self.next) = (0, 0);
    }
}
