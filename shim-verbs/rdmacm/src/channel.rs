//! `rdma_event_channel`: a socket that is readable while events wait in the router.
//!
//! Owns the descriptor the program polls. One ticket is on the socket for each event; taking it obeys the flags the
//! program has set on the descriptor, as reading the kernel's channel does.

use std::cell::UnsafeCell;
use std::ffi::c_int;
use std::os::fd::{BorrowedFd, IntoRawFd};

use freeflow_core::ctl::Id as Number;
use freeflow_core::ctl::cm::{CmCloseChannel, CmMigrate, CmOpenChannel};
use freeflow_verbs_abi::{rdma_cm_id, rdma_event_channel};
use rustix::net::{RecvFlags, recv};

use crate::edge::{self, Errno, Result};
use crate::id::{Id, field, set_field};
use crate::session::Session;

/// A channel. `public` comes first: the program's pointer is a pointer to this.
#[derive(Debug)]
#[repr(C)]
pub struct Channel {
    public: UnsafeCell<rdma_event_channel>,
    pub session: &'static Session,
    pub number: u32,
}

/// Longest ticket there is room for.
pub const TICKET: usize = 64;

impl Channel {
    /// Opens a channel at the router.
    pub fn open(session: &'static Session) -> Result<*mut rdma_event_channel> {
        let (Number { id: number, .. }, mut fds) = session.call_with_fds(&CmOpenChannel {})?;
        let fd = fds.pop().ok_or(Errno::PROTO)?.into_raw_fd();
        let public = UnsafeCell::new(rdma_event_channel { fd });
        Ok(Box::into_raw(Box::new(Channel { public, session, number })).cast())
    }

    /// The channel behind a program's pointer.
    ///
    /// # Safety
    /// `channel` came from [`Channel::open`] and is not destroyed while the reference is used.
    pub unsafe fn from_raw<'a>(channel: *mut rdma_event_channel) -> &'a Channel {
        // SAFETY: the caller's promise.
        unsafe { &*channel.cast::<Channel>() }
    }

    pub fn public(&self) -> *mut rdma_event_channel {
        self.public.get()
    }

    /// The descriptor in it, which a program may have replaced (dup2) but owns with the channel.
    pub fn fd(&self) -> BorrowedFd<'_> {
        // SAFETY: a live channel; the read is by value.
        let fd = unsafe { (*self.public.get()).fd };
        // SAFETY: open as long as the channel is.
        unsafe { BorrowedFd::borrow_raw(fd) }
    }

    /// Takes one ticket; waits for it unless the descriptor is non-blocking. For channels of our own: programs wait
    /// in [`crate::event::rdma_get_cm_event`].
    pub fn wait(&self) -> Result<()> {
        let mut ticket = [0u8; TICKET];
        match recv(self.fd(), &mut ticket[..], RecvFlags::empty())?.0 {
            0 => Err(Errno::NODEV),
            _ => Ok(()),
        }
    }

    /// Takes out the tickets of `events` that will not be fetched.
    pub fn discard(&self, events: u32) {
        let mut ticket = [0u8; TICKET];
        for _ in 0..events {
            if recv(self.fd(), &mut ticket[..], RecvFlags::DONTWAIT).is_err() {
                return;
            }
        }
    }

    /// Closes a channel.
    ///
    /// # Safety
    /// `channel` came from [`Channel::open`] and is not used afterwards, nor are ids on it.
    pub unsafe fn destroy(channel: *mut rdma_event_channel) {
        // SAFETY: made by Box::into_raw in `open`.
        let this = unsafe { Box::from_raw(channel.cast::<Channel>()) };
        if !this.session.is_dead() {
            // Whatever the router says, the channel is over.
            let _ = this.session.call(&CmCloseChannel { channel: this.number });
        }
        let fd = this.public.into_inner().fd;
        // SAFETY: the channel's own descriptor, closed with it.
        let _ = unsafe { libc::close(fd) };
    }
}

/// Moves an id to `channel`, or to one of its own if that is NULL.
pub fn migrate(id: &Id, channel: *mut rdma_event_channel) -> Result<()> {
    let (was_sync, sync) = (id.state().sync, channel.is_null());
    if was_sync && sync {
        return Err(Errno::INVAL);
    }
    let raw = if sync { Channel::open(id.session)? } else { channel };
    // SAFETY: the program's channel, or the one just opened.
    let target = unsafe { Channel::from_raw(raw) };
    let old = field!(id, channel);
    // SAFETY: the program keeps a channel as long as it has ids on it.
    let source = unsafe { Channel::from_raw(old) };
    let ids = id.session.ids()?;
    match id.session.call(&CmMigrate { id: id.number, channel: target.number }) {
        Ok(dropped) => source.discard(dropped.events),
        Err(errno) => {
            drop(ids);
            if sync {
                // SAFETY: opened above, and no id is on it.
                unsafe { Channel::destroy(raw) };
            }
            return Err(errno);
        }
    }
    set_field!(id, channel = raw);
    id.state().sync = sync;
    drop(ids);
    if was_sync {
        id.drop_event();
        // SAFETY: it was this id's own.
        unsafe { Channel::destroy(old) };
    }
    // What was read from the old channel is acknowledged before the new one is used.
    id.wait_acknowledged();
    Ok(())
}

pub unsafe extern "C" fn rdma_create_event_channel() -> *mut rdma_event_channel {
    edge::pointer(|| Channel::open(Session::current()?))
}

pub unsafe extern "C" fn rdma_destroy_event_channel(channel: *mut rdma_event_channel) {
    edge::nothing(|| {
        if !channel.is_null() {
            // SAFETY: the program's channel, given up by this call.
            unsafe { Channel::destroy(channel) };
        }
        Ok(())
    });
}

pub unsafe extern "C" fn rdma_migrate_id(id: *mut rdma_cm_id, channel: *mut rdma_event_channel) -> c_int {
    // SAFETY: the program's id.
    edge::code(|| migrate(unsafe { Id::from_raw(id) }?, channel))
}
