//! Waiting for sockets: a short while by looking, then asleep in poll(2).
//!
//! A sleeping thread polls the descriptors of its sockets and a bell of its own. Whoever takes an event out of a socket
//! rings for the other threads that wait for that socket: the event may have been theirs.
//!
//! Waiting for one socket allocates nothing: a call that is left by longjmp(3) while malloc(3) holds its lock would take the
//! program's memory along.

use std::cell::OnceCell;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::sync::Arc;
use std::time::{Duration, Instant};

use libc::{POLLERR, POLLHUP, POLLNVAL};
use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll};
use smallvec::{SmallVec, smallvec};

use super::socket::Socket;
use crate::edge::{Errno, Result};

/// A condition beside poll(2)'s: what was sent has arrived.
pub const FLUSHED: i16 = 1 << 14;

/// How long to look before sleeping: about what waking up costs.
const LOOK: Duration = Duration::from_micros(20);

/// Until when to wait.
#[derive(Debug, Clone, Copy)]
pub enum Deadline {
    Now,
    At(Instant),
    Never,
}

impl Deadline {
    /// As poll(2) counts.
    pub fn millis(timeout: i32) -> Deadline {
        match u64::try_from(timeout) {
            Ok(0) => Deadline::Now,
            Ok(millis) => Deadline::after(Duration::from_millis(millis)),
            Err(_) => Deadline::Never,
        }
    }

    pub fn after(time: Duration) -> Deadline {
        Instant::now().checked_add(time).map_or(Deadline::Never, Deadline::At)
    }

    fn left(self) -> Option<Duration> {
        match self {
            Deadline::Now => Some(Duration::ZERO),
            Deadline::At(when) => Some(when.saturating_duration_since(Instant::now())),
            Deadline::Never => None,
        }
    }

    fn has_passed(self) -> bool {
        self.left() == Some(Duration::ZERO)
    }
}

/// What to wait for: a socket of ours, or any other descriptor.
#[derive(Debug)]
pub struct Entry {
    pub socket: Option<Arc<Socket>>,
    pub fd: RawFd,
    pub events: i16,
    pub revents: i16,
}

/// What wakes a thread. It is shared with the sockets that the thread waits for, as a wait that was left by longjmp(3)
/// never takes it out of them.
pub type Bell = Arc<OwnedFd>;

thread_local! {
    static BELL: OnceCell<Bell> = const { OnceCell::new() };
}

/// Descriptors, without an allocation for those of one socket.
pub type Fds = SmallVec<[RawFd; 4]>;

/// The calling thread's bell.
fn bell() -> Result<Bell> {
    let ours = BELL.try_with(|bell| match bell.get() {
        Some(bell) => Ok(Arc::clone(bell)),
        None => {
            let fresh = Arc::new(eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?);
            Ok(Arc::clone(bell.get_or_init(|| fresh)))
        }
    });
    ours.unwrap_or(Err(Errno::NOTCONN))
}

/// Rings all bells but the caller's own.
pub fn ring(bells: &[Bell]) {
    let own = BELL.try_with(|bell| bell.get().cloned()).ok().flatten();
    let is_own = |bell: &Bell| own.as_ref().is_some_and(|own| Arc::ptr_eq(own, bell));
    for bell in bells.iter().filter(|bell| !is_own(bell)) {
        // A full bell has rung already.
        let _ = rustix::io::write(bell.as_ref(), &1u64.to_ne_bytes());
    }
}

/// Waits until `events` are so for one socket; EAGAIN when the time is over.
pub fn one(socket: &Arc<Socket>, events: i16, deadline: Deadline) -> Result<()> {
    let entry = Entry { socket: Some(Arc::clone(socket)), fd: -1, events, revents: 0 };
    match many(&mut [entry], deadline)? {
        0 => Err(Errno::AGAIN),
        _ => Ok(()),
    }
}

/// poll(2) for sockets and others alike; says how many are ready.
pub fn many(entries: &mut [Entry], deadline: Deadline) -> Result<usize> {
    let look = Instant::now();
    loop {
        let ready = sweep(entries)?;
        if ready > 0 || deadline.has_passed() {
            return Ok(ready);
        }
        if look.elapsed() >= LOOK {
            break;
        }
    }
    let bell = bell()?;
    let sockets: SmallVec<[Arc<Socket>; 1]> =
        entries.iter().filter_map(|entry| entry.socket.clone()).collect();
    let _seats =
        sockets.iter().map(|socket| Seat::take(socket, &bell)).collect::<Result<SmallVec<[_; 1]>>>()?;
    loop {
        sockets.iter().try_for_each(|socket| socket.lock().map(|mut state| state.arm()))?;
        let ready = sweep(entries)?;
        if ready > 0 || deadline.has_passed() {
            return Ok(ready);
        }
        sleep(entries, &bell, deadline)?;
    }
}

/// Looks once, without waiting.
fn sweep(entries: &mut [Entry]) -> Result<usize> {
    for entry in entries.iter_mut() {
        let Some(socket) = &entry.socket else { continue };
        let ready = socket.lock().map(|mut state| {
            state.advance();
            state.ready()
        });
        entry.revents = ready.unwrap_or(POLLERR | POLLHUP) & (entry.events | POLLERR | POLLHUP | POLLNVAL);
    }
    if entries.iter().any(|entry| entry.socket.is_none() && entry.fd >= 0) {
        sweep_others(entries)?;
    }
    Ok(entries.iter().filter(|entry| entry.revents != 0).count())
}

/// A descriptor that is only polled.
fn polled<'a>(fd: RawFd, events: PollFlags) -> PollFd<'a> {
    // SAFETY: not -1; poll(2) says what it thinks of one that is not open.
    PollFd::from_borrowed_fd(unsafe { BorrowedFd::borrow_raw(fd) }, events)
}

fn sweep_others(entries: &mut [Entry]) -> Result<()> {
    let others = || |entry: &&mut Entry| entry.socket.is_none() && entry.fd >= 0;
    let flags = |entry: &Entry| PollFlags::from_bits_retain(entry.events as u16);
    let mut list: Vec<PollFd> =
        entries.iter_mut().filter(others()).map(|entry| polled(entry.fd, flags(entry))).collect();
    poll(&mut list, Some(&Timespec::default()))?;
    for (entry, polled) in entries.iter_mut().filter(others()).zip(&list) {
        entry.revents = polled.revents().bits() as i16;
    }
    Ok(())
}

/// Sleeps until something may have happened.
fn sleep(entries: &[Entry], bell: &Bell, deadline: Deadline) -> Result<()> {
    let mut list: SmallVec<[_; 8]> = smallvec![polled(bell.as_raw_fd(), PollFlags::IN)];
    let mut owners: SmallVec<[_; 8]> = smallvec![None];
    for entry in entries {
        let mut fds = Fds::new();
        match &entry.socket {
            Some(socket) => {
                socket.lock()?.fds(&mut fds);
                list.extend(fds.iter().map(|fd| polled(*fd, PollFlags::IN)));
            }
            None if entry.fd >= 0 => {
                fds.push(entry.fd);
                list.push(polled(entry.fd, PollFlags::from_bits_retain(entry.events as u16)));
            }
            None => {}
        }
        owners.extend(fds.iter().map(|_| entry.socket.as_ref()));
    }
    let left = deadline.left().map(|left| Timespec::try_from(left).map_err(|_| Errno::INVAL)).transpose()?;
    poll(&mut list, left.as_ref())?;
    if !list[0].revents().is_empty() {
        let mut count = [0u8; 8];
        // Another look at the sockets follows anyway.
        let _ = rustix::io::read(list[0].as_fd(), &mut count[..]);
    }
    for (polled, owner) in list.iter().zip(&owners) {
        if let (false, Some(socket)) = (polled.revents().is_empty(), owner) {
            socket.lock()?.woken();
        }
    }
    Ok(())
}

/// A waiter's place at a socket.
struct Seat<'a> {
    socket: &'a Arc<Socket>,
    bell: &'a Bell,
}

impl<'a> Seat<'a> {
    fn take(socket: &'a Arc<Socket>, bell: &'a Bell) -> Result<Self> {
        socket.lock()?.waiters.push(Arc::clone(bell));
        Ok(Seat { socket, bell })
    }
}

impl Drop for Seat<'_> {
    fn drop(&mut self) {
        let Ok(mut state) = self.socket.lock() else { return };
        if let Some(at) = state.waiters.iter().position(|bell| Arc::ptr_eq(bell, self.bell)) {
            state.waiters.swap_remove(at);
        }
    }
}
