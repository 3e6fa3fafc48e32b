//! Completion channels: a descriptor that becomes readable when an armed CQ has something.
//!
//! The program's descriptor is a private epoll around the bell's own end; peers only ever hold the other one, so nothing
//! they do to it (filling it, changing its flags) reaches the program's descriptor beyond a spurious wake. Once one of its CQs is
//! moderated the helper thread hears the bell instead, and the epoll is around what the helper rings (`moderation`).

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::{Arc, Mutex, OnceLock, PoisonError, Weak};
use std::time::Instant;

use rustix::event::{EventfdFlags, PollFd, PollFlags, epoll, eventfd, poll};
use rustix::fs::{OFlags, fcntl_getfl};
use rustix::io::Errno;

use crate::ctl::{CreateChannel, DestroyChannel};
use crate::error::{Error, Result};
use crate::shm::{Bell, hush, make_bell};

use super::context::Context;
use super::cq::Cq;
use super::stall::Stall;

/// A completion channel.
#[derive(Debug)]
pub struct Channel {
    pub(super) id: u32,
    pub(super) context: Arc<Context>,
    /// The end that is waited on; nobody else has it.
    heard: Arc<OwnedFd>,
    bell: Bell,
    epoll: OwnedFd,
    /// With a moderated CQ: an eventfd that the helper makes readable when an event is due.
    due: OnceLock<OwnedFd>,
    cqs: Mutex<Vec<Weak<Cq>>>,
}

impl Context {
    /// ibv_create_comp_channel(3).
    pub fn create_channel(self: &Arc<Self>) -> Result<Arc<Channel>> {
        let (heard, given) = make_bell().map_err(Error::system("pipe"))?;
        let bell = Bell::open(&given).map_err(Error::system("open of a pipe in /proc/self/fd"))?;
        let epoll = epoll::create(epoll::CreateFlags::CLOEXEC).map_err(Error::system("epoll_create"))?;
        epoll::add(&epoll, &heard, epoll::EventData::new_u64(0), epoll::EventFlags::IN)
            .map_err(Error::system("epoll_ctl"))?;
        let id = self.conn.call(&CreateChannel {}, &[given.as_fd()])?.0.id;
        let (context, heard) = (Arc::clone(self), Arc::new(heard));
        let (due, cqs) = (OnceLock::new(), Mutex::default());
        Ok(Arc::new(Channel { id, context, heard, bell, epoll, due, cqs }))
    }
}

impl Channel {
    /// What the program polls.
    pub fn fd(&self) -> BorrowedFd<'_> {
        self.epoll.as_fd()
    }

    pub(super) fn attach(&self, cq: Weak<Cq>) {
        self.cqs.lock().unwrap_or_else(PoisonError::into_inner).push(cq);
    }

    pub(super) fn detach(&self, cq: &Cq) {
        let mut cqs = self.cqs.lock().unwrap_or_else(PoisonError::into_inner);
        cqs.retain(|weak| !std::ptr::eq(weak.as_ptr(), cq));
        drop(cqs);
        // Its untaken event goes with it; what others rang stays.
        self.hush();
        if self.live().iter().any(|other| other.is_rung()) {
            self.ring();
        }
    }

    pub(super) fn ring(&self) {
        self.bell.ring();
    }

    /// Empties what the program polls.
    fn hush(&self) {
        match self.due.get() {
            Some(due) => _ = rustix::io::read(due, &mut [0u8; 8]),
            None => hush(&self.heard),
        }
    }

    /// One of its CQs is moderated: from now on the helper hears the bell, and the program what is due.
    pub(super) fn moderate(self: &Arc<Self>) -> Result<()> {
        // Once, whoever else calls; and none of them returns before it is done.
        let _cqs = self.cqs.lock().unwrap_or_else(PoisonError::into_inner);
        if self.due.get().is_some() {
            return Ok(());
        }
        let due = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK);
        let due = due.map_err(Error::system("eventfd"))?;
        epoll::add(&self.epoll, &due, epoll::EventData::new_u64(0), epoll::EventFlags::IN)
            .map_err(Error::system("epoll_ctl"))?;
        let _ = self.due.set(due);
        epoll::delete(&self.epoll, &self.heard).map_err(Error::system("epoll_ctl"))?;
        self.context.moderated.add(&self.heard, Arc::downgrade(self));
        self.context.helper.ring();
        Ok(())
    }

    /// Helper: passes on what is due at `now`; returns when the next event will be that is held back.
    pub(super) fn pass_on(&self, now: Instant) -> Option<Instant> {
        let due = self.due.get()?;
        hush(&self.heard);
        let cqs = self.live();
        let next = cqs.iter().filter_map(|cq| cq.release_held(now)).min();
        if cqs.iter().any(|cq| cq.is_rung()) {
            let _ = rustix::io::write(due, &1u64.to_ne_bytes());
        }
        next
    }

    /// ibv_get_cq_event(3): waits for a CQ that rang and returns its cookie. EAGAIN if the program made the descriptor
    /// non-blocking.
    pub fn next_event(&self) -> Result<u64> {
        loop {
            // Emptied before looking: a ring after the look fills it again.
            self.hush();
            if let Some(cookie) = self.take_rung() {
                return Ok(cookie);
            }
            if self.context.stalled.progress().contains(&Stall::More) {
                continue; // a large copy of this process is on its way: finish it here instead of sleeping
            }
            let flags = fcntl_getfl(&self.epoll).map_err(Error::system("fcntl of the channel"))?;
            if flags.contains(OFlags::NONBLOCK) {
                return Err(Error::System { what: "no completion event", errno: Errno::AGAIN });
            }
            let mut fds = [PollFd::new(&self.epoll, PollFlags::IN)];
            poll(&mut fds, None).map_err(Error::system("poll of the channel"))?;
        }
    }

    fn live(&self) -> Vec<Arc<Cq>> {
        let cqs = self.cqs.lock().unwrap_or_else(PoisonError::into_inner);
        cqs.iter().filter_map(Weak::upgrade).collect()
    }

    /// One CQ that rang. If more did, the bell is rung for the next call.
    fn take_rung(&self) -> Option<u64> {
        let cqs = self.live();
        let index = cqs.iter().position(|cq| cq.take_rung())?;
        if cqs[index + 1..].iter().any(|cq| cq.is_rung()) {
            self.ring();
        }
        Some(cqs[index].cookie())
    }
}

impl Drop for Channel {
    fn drop(&mut self) {
        let _ = self.context.conn.ask(&DestroyChannel { channel: self.id });
        if self.due.get().is_some() {
            self.context.helper.ring(); // it listens to the bell
        }
    }
}
