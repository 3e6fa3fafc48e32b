//! Progress: FIFOs first, each time; the completion queue where something is marked or expected; requests that wait for an answer,
//! and failures, less often. And sleeping.

use std::ffi::{c_int, c_uint, c_void};
use std::os::fd::AsRawFd;
use std::rc::Rc;
use std::sync::Arc;

use freeflow_core::client::{Channel, offer_processor};
use freeflow_core::error::{Error, Result};
use freeflow_core::verbs::{Gid, Wc, WcStatus};
use rustix::fs::{OFlags, fcntl_getfl, fcntl_setfl};

use super::{Event, Iface, Incoming};
use crate::device::Device;
use crate::ep::{Ep, owner, queue};
use crate::uct::symbols::Level;
use crate::uct::types::{Completion, Status, event};
use crate::wire::{Datagram, kind};

/// Calls between two looks for failed endpoints, and into the completion queue where nothing is expected nor marked.
const RARELY: u32 = 1024;
/// Calls after which a program that waits in vain offers its processor: to peers on this host that may need it, and to the
/// router, which brings everything that comes from other hosts.
const PATIENCE: u32 = 1 << 16;
const PATIENCE_FAR: u32 = 64;
/// Completions taken at a time.
const BATCH: usize = 16;

/// `iface_progress`. A program that waits for its own memory to change looks there once for each call: where there is
/// nothing to do, it must be short.
pub unsafe extern "C" fn progress(iface: *mut c_void) -> c_uint {
    // SAFETY: an interface of ours.
    let iface = unsafe { Iface::from_raw(iface) };
    iface.ticks.set(iface.ticks.get().wrapping_add(1));
    if iface.has_message() || iface.is_queue_due() || iface.work.get() { iface.advance() } else { 0 }
}

impl Iface {
    #[inline]
    fn has_message(&self) -> bool {
        self.incoming.borrow().iter().any(|(_, connection)| connection.has_message())
    }

    #[inline]
    fn is_queue_due(&self) -> bool {
        let expected = self.queued.get() || self.connecting.get() != 0;
        self.cq.is_marked() || expected || self.is_time_to_look()
    }

    fn is_time_to_look(&self) -> bool {
        self.ticks.get().is_multiple_of(RARELY)
    }

    #[inline(never)]
    fn advance(&self) -> u32 {
        let mut done = self.poll_fifos();
        if self.is_queue_due() {
            done += self.poll_queue();
            if self.is_time_to_look() {
                self.look_for_failures();
            }
        }
        if self.work.get() {
            done += self.work();
        }
        if done == 0 {
            self.wait_a_little();
        }
        done
    }

    fn wait_a_little(&self) {
        let after = |calls| self.ticks.get().is_multiple_of(calls);
        match self.device() {
            Device::Here if after(PATIENCE) => std::thread::yield_now(),
            Device::Far if after(PATIENCE_FAR) => offer_processor(),
            _ => {}
        }
    }

    fn poll_fifos(&self) -> u32 {
        let incoming = self.incoming.borrow();
        incoming.iter().map(|(_, connection)| connection.poll(self)).sum()
    }

    fn has_work(&self) -> bool {
        !self.waiting.borrow().is_empty()
            || !self.jobs.borrow().is_empty()
            || !self.asked.borrow().is_empty()
            || !self.failed.borrow().is_empty()
            || !self.polled.borrow().is_empty()
    }

    /// What could not be done at once: copies, pending requests, bad news.
    fn work(&self) -> u32 {
        let mut done = self.handle_taken() + queue::run_jobs(self) + owner::poll_answers(self);
        let waiting = self.waiting.borrow().len();
        for _ in 0..waiting {
            let Some(number) = self.waiting.borrow_mut().pop_front() else { break };
            done += self.ep(number).map_or(0, |ep| ep.dispatch());
        }
        done += self.report_failures();
        self.work.set(self.has_work());
        done
    }

    /// Takes completions, which also frees the places of requests that want none. False: there were none.
    pub fn take_completions(&self) -> bool {
        let mut batch = [Wc::default(); BATCH];
        let filled = self.cq.poll(&mut batch);
        if filled > 0 {
            self.polled.borrow_mut().extend(&batch[..filled]);
            self.work.set(true);
        }
        filled > 0
    }

    /// Handles what was taken, also by a sender, who must not be called back. One by one: a callback may destroy endpoints,
    /// and their completions with them.
    fn handle_taken(&self) -> u32 {
        let mut done = 0;
        loop {
            let Some(wc) = self.polled.borrow_mut().pop_front() else { return done };
            self.handle(&wc);
            done += 1;
        }
    }

    fn poll_queue(&self) -> u32 {
        self.take_completions();
        let done = self.handle_taken();
        if self.connecting.get() != 0 {
            self.repeat_requests();
        }
        if self.is_time_to_look() || done > 0 {
            self.drop_ended();
        }
        done
    }

    fn handle(&self, wc: &Wc) {
        let fine = wc.status == WcStatus::Success as u32;
        match Event::unpack(wc.wr_id) {
            Event::None => {}
            Event::Datagram(buffer) => {
                let said = if fine { self.datagram(buffer, wc.byte_len as usize) } else { None };
                self.post_datagram(buffer);
                if let Some(said) = said {
                    self.hear(&said, wc.src_qp);
                }
            }
            Event::Message(number, buffer) => {
                let connection = self.incoming.borrow().get(number).map(Rc::clone);
                if let Some(connection) = connection.filter(|_| fine) {
                    self.queued.set(self.queued.get() || wc.byte_len > 0);
                    connection.take(self, buffer, wc.byte_len as usize);
                    connection.post(number, buffer);
                }
            }
            Event::Sentinel(number) => {
                if let Some(ep) = self.ep(number) {
                    ep.fail(Status::CONNECTION_RESET);
                }
            }
            Event::Op(number) => queue::completed(self, number, wc),
        }
    }

    /// A datagram. `from` is the sender's datagram queue pair.
    fn hear(&self, said: &Datagram, from: u32) {
        match said.kind {
            kind::REQUEST => self.answer(said, from),
            kind::REPLY | kind::REFUSAL => {
                if let Some(ep) = self.ep(said.token as u32 as usize) {
                    ep.answered(said);
                }
            }
            _ => {}
        }
    }

    fn answer(&self, request: &Datagram, from: u32) {
        let known = self.incoming.borrow().iter().find(|(_, c)| c.is_of(request)).map(|(_, c)| c.reply);
        let reply = known.unwrap_or_else(|| {
            self.accept(request).unwrap_or_else(|error| {
                let why = format!("ff: cannot take a connection: {error}");
                self.md().ucx.log(Level::Error, &why);
                Datagram::new(kind::REFUSAL, request.token)
            })
        });
        self.send_datagram(&reply, Gid(request.gid), from);
    }

    fn accept(&self, request: &Datagram) -> Result<Datagram> {
        let connection = Rc::new(Incoming::accept(self, self.md(), request)?);
        let mut incoming = self.incoming.borrow_mut();
        let number = incoming.insert(Rc::clone(&connection));
        connection.start(number, self.config.rx_queue_len as usize);
        Ok(connection.reply)
    }

    fn drop_ended(&self) {
        self.incoming.borrow_mut().retain(|_, connection| !connection.is_over());
    }

    fn repeat_requests(&self) {
        let now = std::time::Instant::now();
        let waiting: Vec<_> = self.eps.borrow().iter().map(|(number, _)| number).collect();
        waiting.into_iter().filter_map(|number| self.ep(number)).for_each(|ep| ep.ask_again(now));
    }

    fn look_for_failures(&self) {
        let all: Vec<_> = self.eps.borrow().iter().map(|(number, _)| number).collect();
        all.into_iter().filter_map(|number| self.ep(number)).for_each(|ep| ep.look());
    }

    /// Tells UCX of endpoints that failed.
    fn report_failures(&self) -> u32 {
        let failed = std::mem::take(&mut *self.failed.borrow_mut());
        let count = failed.len() as u32;
        for (number, status) in failed {
            let Some(ep) = self.ep(number).map(Ep::as_raw) else { continue };
            // SAFETY: UCX's own function on its own objects; it may destroy the endpoint.
            unsafe { (self.md().ucx.call.uct_iface_handle_ep_err)(self.as_raw(), ep, status) };
        }
        count
    }

    /// Before sleeping: whatever comes next makes the descriptor readable. False: something is there.
    fn arm(&self) -> bool {
        while self.channel.next_event().is_ok() {}
        self.cq.arm(false);
        let asleep = self.incoming.borrow().iter().all(|(_, connection)| connection.arm());
        // After arming: what completed before rings nobody.
        self.poll_queue() == 0 && asleep
    }
}

/// The channel's descriptor is only ever waited on by others.
pub fn never_block(channel: &Arc<Channel>) -> Result<()> {
    let fd = channel.fd();
    fcntl_getfl(fd)
        .and_then(|flags| fcntl_setfl(fd, flags | OFlags::NONBLOCK))
        .map_err(Error::system("fcntl of a completion channel"))
}

/// `iface_event_fd_get`.
pub unsafe extern "C" fn event_fd(iface: *mut c_void, fd: *mut c_int) -> Status {
    // SAFETY: an interface of ours.
    let iface = unsafe { Iface::from_raw(iface) };
    // SAFETY: UCX's place for the result.
    unsafe { fd.write(iface.channel.fd().as_raw_fd()) };
    Status::OK
}

/// `iface_event_arm`.
pub unsafe extern "C" fn arm(iface: *mut c_void, events: c_uint) -> Status {
    // SAFETY: an interface of ours.
    let iface = unsafe { Iface::from_raw(iface) };
    // What waits for room in a FIFO is told by nobody, and a request may have to be repeated.
    let sends = events & event::SEND_COMP != 0 && iface.has_work();
    if sends || iface.connecting.get() != 0 || !iface.arm() {
        return Status::BUSY;
    }
    Status::OK
}

/// `iface_flush`.
pub unsafe extern "C" fn flush(iface: *mut c_void, _flags: c_uint, comp: *mut Completion) -> Status {
    if !comp.is_null() {
        return Status::UNSUPPORTED;
    }
    // SAFETY: an interface of ours.
    let iface = unsafe { Iface::from_raw(iface) };
    fence_stores();
    // UCX asks no endpoint if the interface has nothing under way: what waits for resources counts.
    let busy = iface.has_work() || !iface.ops.borrow().is_empty();
    if busy { Status::INPROGRESS } else { Status::OK }
}

/// `iface_fence`.
pub unsafe extern "C" fn fence(_iface: *mut c_void, _flags: c_uint) -> Status {
    fence_stores();
    Status::OK
}

/// Loads and stores to peers' memory before it are done before those after it. Requests are run in order anyway.
pub fn fence_stores() {
    std::sync::atomic::fence(std::sync::atomic::Ordering::SeqCst);
}
