//! Asynchronous events: a queue and a descriptor that is readable while it holds something.

use std::collections::VecDeque;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::{Mutex, PoisonError};

use rustix::event::{EventfdFlags, eventfd};
use rustix::io::{IoSliceMut, ReadWriteFlags, preadv2};

use crate::error::{Error, Result};

/// `ibv_event_type`, as far as a software NIC has reasons for them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u32)]
pub enum AsyncKind {
    CqErr = 0,
    QpFatal = 1,
    QpReqErr = 2,
    QpAccessErr = 3,
    CommEst = 4,
    SqDrained = 5,
    DeviceFatal = 8,
    SrqLimit = 15,
    QpLastWqe = 16,
}

/// An event, and what it is about: the cookie its object was created with, 0 for the device.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct AsyncEvent {
    pub kind: AsyncKind,
    pub cookie: u64,
}

/// The events of a context not yet read.
#[derive(Debug)]
pub struct AsyncQueue {
    fd: OwnedFd,
    queue: Mutex<VecDeque<AsyncEvent>>,
}

impl AsyncQueue {
    pub fn new() -> Result<Self> {
        let fd = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::SEMAPHORE);
        Ok(AsyncQueue { fd: fd.map_err(Error::system("eventfd for async events"))?, queue: Mutex::default() })
    }

    pub fn push(&self, event: AsyncEvent) {
        self.queue.lock().unwrap_or_else(PoisonError::into_inner).push_back(event);
        // The counter cannot overflow: one per event in memory.
        let _ = rustix::io::write(&self.fd, &1u64.to_ne_bytes());
    }

    /// Waits for an event; EAGAIN if the program made the descriptor non-blocking.
    pub fn next(&self) -> Result<AsyncEvent> {
        loop {
            let mut count = [0u8; 8];
            rustix::io::read(&self.fd, &mut count).map_err(Error::system("read of async events"))?;
            // Events of a destroyed object are withdrawn after they were counted: then wait for the next.
            if let Some(event) = self.queue.lock().unwrap_or_else(PoisonError::into_inner).pop_front() {
                return Ok(event);
            }
        }
    }

    /// Withdraws what is queued about a destroyed object.
    pub fn withdraw(&self, cookie: u64) {
        let mut queue = self.queue.lock().unwrap_or_else(PoisonError::into_inner);
        let before = queue.len();
        queue.retain(|event| event.cookie != cookie);
        for _ in queue.len()..before {
            // Taken out of the count, so that the descriptor is not readable for nothing. Without waiting, whatever mode the
            // program chose: next() may have read it already, and then finds the queue empty.
            let mut count = [0u8; 8];
            let _ = preadv2(&self.fd, &mut [IoSliceMut::new(&mut count)], u64::MAX, ReadWriteFlags::NOWAIT);
        }
    }
}

impl AsFd for AsyncQueue {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustix::event::{PollFd, PollFlags, poll};

    #[test]
    fn the_descriptor_is_readable_while_an_event_waits() {
        let events = AsyncQueue::new().expect("eventfd");
        let readable = || {
            let mut fds = [PollFd::new(&events, PollFlags::IN)];
            poll(&mut fds, Some(&Default::default())).expect("poll") == 1
        };
        assert!(!readable());
        for cookie in [7, 8, 7] {
            events.push(AsyncEvent { kind: AsyncKind::QpFatal, cookie });
        }
        events.withdraw(7);
        assert!(readable());
        assert_eq!(events.next().expect("event").cookie, 8);
        assert!(!readable(), "the withdrawn events would be waited for");
    }
}
