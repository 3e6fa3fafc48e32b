//! The connection to the router, one per process.
//!
//! Owns the RPC socket, the table of ids that events are matched with, and what a fork does to both: the child closes
//! its copies and marks the session dead, so that ids of the parent fail in the child with ENODEV and the parent's
//! connection ends with the parent. The child's own first call makes a session of its own.

use std::collections::HashMap;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::sync::atomic::{AtomicBool, AtomicPtr, AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

use freeflow_core::client::socket_candidates;
use freeflow_core::ctl::{Hello, RawGid, Request, Socket, SocketError, VERSION, purpose};

use rustix::event::{PollFd, PollFlags, Timespec, poll};

use crate::device::Device;
use crate::edge::{Errno, Result};
use crate::id::Id;

/// This process's session. A session is never freed: ids point to it.
static CURRENT: AtomicPtr<Session> = AtomicPtr::new(std::ptr::null_mut());

/// Ids by the router's number.
#[derive(Debug, Default)]
pub struct Ids(HashMap<u32, *const Id>);

// SAFETY: the pointers are only followed under the rules of `Id`, which is `Sync`.
unsafe impl Send for Ids {}

impl Ids {
    pub fn insert(&mut self, number: u32, id: *const Id) {
        self.0.insert(number, id);
    }

    pub fn remove(&mut self, number: u32) {
        self.0.remove(&number);
    }

    /// The id of that number. It stays valid while this table is locked, and as long as one of its events is
    /// counted as reported and not acknowledged.
    pub fn get(&self, number: u32) -> Option<&Id> {
        // SAFETY: ids are removed from the table, under its lock, before they are freed.
        self.0.get(&number).map(|id| unsafe { &**id })
    }
}

/// A connection to the router.
#[derive(Debug)]
pub struct Session {
    rpc: Mutex<Socket>,
    /// The connection's general event socket; the cm has its channels instead. Open as long as the connection.
    _events: OwnedFd,
    /// For the fork handler: the descriptors above.
    fds: [RawFd; 2],
    dead: AtomicBool,
    ids: Mutex<Ids>,
    /// The container's own GID.
    pub gid: RawGid,
    pub device: Device,
    random: AtomicU64,
}

impl Session {
    /// The process's session, connected at first use, and again when another router has taken the first one's place.
    pub fn current() -> Result<&'static Session> {
        let current = CURRENT.load(Ordering::Acquire);
        // SAFETY: NULL or a session; those are never freed.
        if let Some(session) = unsafe { current.as_ref() }.filter(|session| !session.has_hung_up()) {
            return Ok(session);
        }
        let fresh = Box::into_raw(Box::new(Session::connect()?));
        // Pairs with the Acquire above: whoever sees the pointer sees the session.
        match CURRENT.compare_exchange(current, fresh, Ordering::AcqRel, Ordering::Acquire) {
            // SAFETY: sessions are never freed once they are current.
            Ok(_) => Ok(unsafe { &*fresh }),
            Err(winner) => {
                // SAFETY: made by Box::into_raw above and seen by nobody else.
                drop(unsafe { Box::from_raw(fresh) });
                // SAFETY: sessions are never freed once they are current.
                Ok(unsafe { &*winner })
            }
        }
    }

    fn connect() -> Result<Session> {
        let socket = socket_candidates().iter().find_map(|path| Socket::connect(path).ok());
        let socket = socket.ok_or(Errno::NODEV)?;
        let hello = Hello { min_version: VERSION, max_version: VERSION, purpose: purpose::CM };
        let (reply, mut fds) = socket.call(&hello, &[]).map_err(|_| Errno::NODEV)?;
        if fds.is_empty() {
            return Err(Errno::PROTO);
        }
        let events = fds.swap_remove(0);
        let fds = [socket.as_fd().as_raw_fd(), events.as_raw_fd()];
        Ok(Session {
            rpc: Mutex::new(socket),
            _events: events,
            fds,
            dead: AtomicBool::new(false),
            ids: Mutex::default(),
            gid: reply.vip,
            device: Device::default(),
            random: AtomicU64::new(reply.boot ^ (u64::from(reply.client) << 40)),
        })
    }

    /// Whether this is a parent's session, seen from a forked child.
    pub fn is_dead(&self) -> bool {
        self.dead.load(Ordering::Relaxed)
    }

    /// The descriptor of the connection, for waiting on its end.
    pub fn connection(&self) -> RawFd {
        self.fds[0]
    }

    /// Whether the router has closed the connection.
    pub fn has_hung_up(&self) -> bool {
        // SAFETY: open as long as the session is not dead, and sessions are never freed.
        let rpc = unsafe { BorrowedFd::borrow_raw(self.fds[0]) };
        let mut polled = [PollFd::from_borrowed_fd(rpc, PollFlags::empty())];
        self.is_dead() || poll(&mut polled, Some(&Timespec::default())).is_ok_and(|ready| ready > 0)
    }

    pub fn alive(&self) -> Result<()> {
        if self.is_dead() { Err(Errno::NODEV) } else { Ok(()) }
    }

    /// Sends a request and waits for its reply.
    pub fn call<T: Request>(&self, request: &T) -> Result<T::Reply> {
        self.call_with_fds(request).map(|(reply, _)| reply)
    }

    pub fn call_with_fds<T: Request>(&self, request: &T) -> Result<(T::Reply, Vec<OwnedFd>)> {
        self.alive()?;
        let rpc = self.rpc.lock().unwrap_or_else(PoisonError::into_inner);
        rpc.call(request, &[]).map_err(|error| match error {
            SocketError::Refused(errno) => errno,
            SocketError::System(_, errno) => errno,
            SocketError::Closed | SocketError::Malformed(_) => Errno::IO,
        })
    }

    /// The table of ids. Locked before the RPC socket where both are needed.
    pub fn ids(&self) -> Result<MutexGuard<'_, Ids>> {
        self.alive()?;
        Ok(self.ids.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// A first packet number. It need not be secret; two connections in a row should differ.
    pub fn packet_number(&self) -> u32 {
        // The step of splitmix64; each caller gets its own.
        let n = self.random.fetch_add(0x9e37_79b9_7f4a_7c15, Ordering::Relaxed);
        ((n ^ (n >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9) >> 40) as u32
    }
}

/// Runs in a forked child, before anything else of it: only atomics and close(2).
unsafe extern "C" fn forked() {
    crate::rsocket::forget();
    let parents = CURRENT.swap(std::ptr::null_mut(), Ordering::AcqRel);
    if parents.is_null() {
        return;
    }
    // SAFETY: sessions are never freed.
    let session = unsafe { &*parents };
    session.dead.store(true, Ordering::Relaxed);
    for fd in session.fds {
        // SAFETY: the child's copy of a descriptor that only this dead session uses; it is never dropped.
        let _ = unsafe { libc::close(fd) };
    }
}

extern "C" fn register() {
    // SAFETY: `forked` is async-signal-safe and stays mapped (-z nodelete).
    let _ = unsafe { libc::pthread_atfork(None, None, Some(forked)) };
}

/// Called by the loader, when no other thread can fork yet.
#[used]
// SAFETY: .init_array holds pointers to functions that may ignore their arguments; `register` is one.
#[unsafe(link_section = ".init_array")]
static REGISTER: extern "C" fn() = register;
