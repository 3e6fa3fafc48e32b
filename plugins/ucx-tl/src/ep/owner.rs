//! Atomics on memory whose pages cannot move (a stack, static data): its owner carries them out, in its progress.
//!
//! The request is a message, which keeps its order; the answer is a WRITE into a buffer of ours, which we look at.

use std::ffi::c_void;
use std::sync::atomic::{AtomicU64, Ordering};

use freeflow_core::verbs::{Access, Sge};
use zerocopy::{FromBytes, IntoBytes};

use super::Ep;
use super::atomic::{Asked, carry_out, store_result};
use super::queue::{Buffer, Op, Then, end};
use crate::iface::Iface;
use crate::md::Md;
use crate::rkey::Rkey;
use crate::uct::types::{Completion, Status};
use crate::wire::{ATOMIC, AtomicAnswer, AtomicRequest, answer};

/// Where an answer will be.
pub struct Awaited {
    size: usize,
    /// Null: nobody wants the old value.
    result: *mut c_void,
}

impl Ep {
    /// Asks the memory's owner.
    #[cold]
    pub fn atomic_by_owner(&self, asked: Asked, rkey: &Rkey, comp: *mut Completion) -> Status {
        let iface = self.iface();
        let Some(buffer) = iface.buffer() else { return Status::NO_RESOURCE };
        verdict(&buffer).store(answer::NONE, Ordering::Relaxed);
        let Asked { op, size, value, compare, addr, result } = asked;
        let request = AtomicRequest {
            op,
            size: size as u32,
            value,
            compare,
            addr,
            key: rkey.key(),
            answer_key: buffer.lkey,
            answer_addr: buffer.at as u64,
        };
        let len = size_of::<AtomicRequest>();
        let sent = self.send_short(ATOMIC, len, |to| {
            // SAFETY: a short message's room, which a request fits into.
            unsafe { to.copy_from_nonoverlapping(request.as_bytes().as_ptr(), len) };
        });
        if sent != Status::OK {
            iface.give_back(buffer);
            return sent;
        }
        let op = Op::new(self, Then::Answer(Awaited { size, result }), comp, Some(buffer));
        let number = iface.ops.borrow_mut().insert(op);
        iface.asked.borrow_mut().push(number);
        iface.work.set(true);
        self.started.set(self.started.get() + 1);
        Status::INPROGRESS
    }
}

fn verdict(buffer: &Buffer) -> &AtomicU64 {
    let at = buffer.at.wrapping_add(std::mem::offset_of!(AtomicAnswer, verdict));
    // SAFETY: a buffer of ours, larger than an answer and aligned to a line; only atomics look at this word.
    unsafe { AtomicU64::from_ptr(at.cast()) }
}

/// Ends what has been answered. Returns how many.
pub fn poll_answers(iface: &Iface) -> u32 {
    let asked = std::mem::take(&mut *iface.asked.borrow_mut());
    let mut done = 0;
    for number in asked {
        match take_answer(iface, number) {
            Taken::Waits => iface.asked.borrow_mut().push(number),
            Taken::Ended => done += 1,
            Taken::Gone => {}
        }
    }
    done
}

enum Taken {
    Waits,
    Ended,
    /// Cancelled with its endpoint.
    Gone,
}

fn take_answer(iface: &Iface, number: usize) -> Taken {
    let said = {
        let ops = iface.ops.borrow();
        let Some(Op { then: Then::Answer(_), bounce: Some(buffer), .. }) = ops.get(number) else {
            return Taken::Gone;
        };
        // Acquire: the value was written before.
        verdict(buffer).load(Ordering::Acquire)
    };
    if said == answer::NONE {
        return Taken::Waits;
    }
    let op = iface.ops.borrow_mut().remove(number);
    let (Then::Answer(Awaited { size, result }), Some(buffer)) = (&op.then, op.bounce) else {
        return Taken::Gone;
    };
    let status = if said == answer::DONE { Status::OK } else { Status::CONNECTION_RESET };
    if status == Status::OK {
        // SAFETY: a buffer of ours, whose first word is the old value.
        let old = unsafe { buffer.at.cast::<u64>().read() };
        // SAFETY: UCX's place for a result of that size, or null.
        unsafe { store_result(*result, *size, old) };
    }
    iface.give_back(buffer);
    let ep = op.ep(iface);
    end(ep, op.comp, status);
    if let Some(ep) = ep.filter(|_| status.is_error()) {
        ep.fail(status);
    }
    Taken::Ended
}

/// A peer's request, copied out, is carried out on memory of ours. None: it is none.
pub fn serve(md: &Md, said: &[u8]) -> Option<(AtomicRequest, AtomicAnswer)> {
    let request = AtomicRequest::read_from_bytes(said).ok()?;
    let answer = match perform(md, &request) {
        Some(old) => AtomicAnswer { old, verdict: answer::DONE },
        None => AtomicAnswer { old: 0, verdict: answer::REFUSED },
    };
    Some((request, answer))
}

fn perform(md: &Md, request: &AtomicRequest) -> Option<u64> {
    const NEED: Access = Access::REMOTE_READ.union(Access::REMOTE_WRITE);
    let AtomicRequest { op, size, value, compare, addr, key, .. } = *request;
    if !matches!(size, 4 | 8) || !addr.is_multiple_of(size.into()) {
        return None;
    }
    let sge = Sge { addr, length: size, lkey: key };
    let at = md.pd.resolve(&sge, NEED)?;
    if md.pd.resolve(&sge, Access::REMOTE_ATOMIC).is_some() {
        // Memory that others can map: they do it themselves. Only regions that a handle holds get here, never cached ones, so
        // that the program has not unmapped it.
        return None;
    }
    // SAFETY: registered, so the program keeps it; aligned, by its address, and of that size. Atomics are what it is used for.
    unsafe { carry_out(at as *mut u8, op, size as usize, value, compare) }
}
