//! UCX's pending requests: what found no resources waits here, in order, and new sends wait behind it.

use std::ffi::{c_uint, c_void};

use super::{Ep, Mode};
use crate::uct::types::{PendingReq, PurgeCallback, Status};

impl Ep {
    /// Has its requests run at the next progress.
    pub fn schedule(&self) {
        if self.pending.borrow().is_empty() {
            return;
        }
        self.iface().work.set(true);
        let mut waiting = self.iface().waiting.borrow_mut();
        if !waiting.contains(&self.number) {
            waiting.push_back(self.number);
        }
    }

    /// Could anything be started now? UCX is told so by BUSY and then tries until it can, without progress: what is missing for
    /// any call counts.
    fn has_resources(&self) -> bool {
        let queue = || self.qp().send_room() > 0 && self.iface().bounce.borrow().has_room();
        match self.mode.get() {
            Mode::Asking => false,
            Mode::Direct => self.has_fifo_room() && queue(),
            Mode::Queued => queue(),
            // The request is to learn of the failure.
            Mode::Failed(_) => true,
        }
    }

    fn has_fifo_room(&self) -> bool {
        let mut fifo = self.fifo.borrow_mut();
        fifo.as_mut().is_some_and(|out| {
            let (fifo, segment) = (out.fifo(), out.segment as u32);
            out.sender.slot_and_place(fifo, segment).is_some()
        })
    }

    /// Runs what waits, as far as it goes. Returns how many requests ended.
    pub fn dispatch(&self) -> u32 {
        let (number, iface) = (self.number, self.iface());
        let mut done = 0;
        while iface.ep(number).is_some() && self.has_resources() {
            let Some(request) = self.pending.borrow_mut().pop_front() else { return done };
            self.dispatching.set(true);
            // SAFETY: UCX's request, which is ours until its function says that it is done.
            let run = unsafe { (*request).func };
            // SAFETY: its own function.
            let status = unsafe { run(request) };
            if iface.ep(number).is_none() {
                return done + 1; // the request's end was the endpoint's
            }
            self.dispatching.set(false);
            if status == Status::OK {
                done += 1;
                continue;
            }
            self.pending.borrow_mut().push_front(request);
            break;
        }
        if iface.ep(number).is_some() {
            self.schedule();
        }
        done
    }
}

/// `ep_pending_add`.
pub unsafe extern "C" fn add(ep: *mut c_void, request: *mut PendingReq, _flags: c_uint) -> Status {
    // SAFETY: an endpoint of ours.
    let ep = unsafe { Ep::from_raw(ep) };
    if ep.pending.borrow().is_empty() && ep.has_resources() {
        return Status::BUSY;
    }
    ep.pending.borrow_mut().push_back(request);
    ep.schedule();
    Status::OK
}

/// `ep_pending_purge`.
pub unsafe extern "C" fn purge(ep: *mut c_void, callback: Option<PurgeCallback>, arg: *mut c_void) {
    // SAFETY: an endpoint of ours.
    let ep = unsafe { Ep::from_raw(ep) };
    let purged = std::mem::take(&mut *ep.pending.borrow_mut());
    ep.iface().waiting.borrow_mut().retain(|number| *number != ep.number);
    let Some(callback) = callback else { return };
    for request in purged {
        // SAFETY: UCX's function for its own request.
        unsafe { callback(request, arg) };
    }
}
