//! A completion queue with a descriptor to sleep on.

use std::mem::MaybeUninit;
use std::os::fd::{BorrowedFd, RawFd};

use freeflow_verbs_abi::*;
use rustix::fs::{OFlags, fcntl_setfl};

use crate::edge::Result;
use crate::id::{Id, field};
use crate::verbs::Verbs;

/// Completions taken at a time.
pub const BATCH: usize = 16;

/// Room for one batch.
pub type Room = [MaybeUninit<ibv_wc>; BATCH];

/// A CQ and the channel its events come through. Queue pairs on it go first.
#[derive(Debug)]
pub struct Completions {
    verbs: &'static Verbs,
    cq: *mut ibv_cq,
    channel: *mut ibv_comp_channel,
    armed: bool,
}

impl Completions {
    pub fn open(verbs: &'static Verbs, id: &Id, size: u32) -> Result<Completions> {
        let context = field!(id, verbs);
        let channel = verbs.create_channel(context)?;
        // SAFETY: just created.
        let fd = unsafe { (*channel).fd };
        // SAFETY: open as long as the channel is.
        let fd = unsafe { BorrowedFd::borrow_raw(fd) };
        let made = fcntl_setfl(fd, OFlags::NONBLOCK)
            .and_then(|()| verbs.create_cq(context, size, std::ptr::null_mut(), channel));
        let cq = made.inspect_err(|_| verbs.destroy_channel(channel))?;
        Ok(Completions { verbs, cq, channel, armed: false })
    }

    pub fn cq(&self) -> *mut ibv_cq {
        self.cq
    }

    /// One batch of what has completed.
    pub fn poll<'a>(&self, room: &'a mut Room) -> Result<&'a [ibv_wc]> {
        self.verbs.poll_cq(self.cq, room)
    }

    /// Readable after the next completion that follows [`Completions::arm`].
    pub fn fd(&self) -> RawFd {
        // SAFETY: destroyed by this value's drop only.
        unsafe { (*self.channel).fd }
    }

    /// Asks for an event. What has completed before is to be looked at afterwards.
    pub fn arm(&mut self) -> Result<()> {
        match std::mem::replace(&mut self.armed, true) {
            true => Ok(()),
            false => self.verbs.req_notify_cq(self.cq),
        }
    }

    /// Takes the events that have come. Others that wait for one must then ask for it again.
    pub fn take_events(&mut self) -> bool {
        let mut any = false;
        while self.verbs.take_cq_event(self.channel) {
            any = true;
        }
        self.armed &= !any;
        any
    }
}

impl Drop for Completions {
    fn drop(&mut self) {
        self.verbs.destroy_cq(self.cq);
        self.verbs.destroy_channel(self.channel);
    }
}
