//! One socket of any kind: its number, its options, its state behind one lock, and the threads that wait for it.

use std::ops::{Deref, DerefMut};
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::sync::atomic::{AtomicBool, AtomicI32, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::Duration;

use rustix::io::fcntl_dupfd_cloexec;
use smallvec::SmallVec;

use super::cm::{Cm, Request};
use super::datagram::Datagram;
use super::options::Options;
use super::stream::socket::Stream;
use super::wait::{self, Bell, Fds};
use crate::edge::{Errno, Result};

/// What kind of socket, and how far it is.
#[derive(Debug)]
pub enum Body {
    Stream(Stream),
    Datagram(Datagram),
    /// Closed under a thread that still used it.
    Closed,
}

#[derive(Debug)]
pub struct State {
    pub body: Body,
    pub options: Options,
    /// Bells of the threads that sleep until something happens here.
    pub waiters: SmallVec<[Bell; 2]>,
}

/// A socket.
#[derive(Debug)]
pub struct Socket {
    /// Holds the socket's number, so that no other file of the process gets it.
    number: OnceLock<OwnedFd>,
    /// AF_INET or AF_INET6.
    pub domain: i32,
    nonblocking: AtomicBool,
    /// FD_CLOEXEC, kept for the program: no socket survives an exec.
    pub fd_flags: AtomicI32,
    turn: Turn,
    state: Mutex<State>,
}

/// A socket's state, locked. The mutex is let go before the turn.
pub struct Locked<'a> {
    state: MutexGuard<'a, State>,
    _turn: TurnTaken<'a>,
}

impl Deref for Locked<'_> {
    type Target = State;

    fn deref(&self) -> &State {
        &self.state
    }
}

impl DerefMut for Locked<'_> {
    fn deref_mut(&mut self) -> &mut State {
        &mut self.state
    }
}

/// Whose turn it is: the thread that has the state locked, or is about to, 0 for none. One word says both, so that a thread
/// which is interrupted anywhere in between knows itself again.
#[derive(Debug, Default)]
struct Turn(AtomicUsize);

struct TurnTaken<'a>(&'a Turn);

impl Turn {
    /// Yields this often before it sleeps between two looks: a socket is locked for as long as a copy takes.
    const YIELDS: u32 = 1_000;
    const PAUSE: Duration = Duration::from_millis(1);

    fn take(&self) -> Result<TurnTaken<'_>> {
        let me = this_thread();
        let mut tries = 0;
        // Pairs with the Release of the turn's end.
        while let Err(other) = self.0.compare_exchange(0, me, Ordering::Acquire, Ordering::Relaxed) {
            if other == me {
                return Err(Errno::IO);
            }
            tries += 1;
            if tries < Self::YIELDS { std::thread::yield_now() } else { std::thread::sleep(Self::PAUSE) }
        }
        Ok(TurnTaken(self))
    }
}

impl Drop for TurnTaken<'_> {
    fn drop(&mut self) {
        self.0.0.store(0, Ordering::Release);
    }
}

/// Different for each thread that runs, and not 0.
fn this_thread() -> usize {
    thread_local!(static HERE: u8 = const { 0 });
    HERE.with(|here| std::ptr::from_ref(here).addr())
}

impl Socket {
    pub fn stream(domain: i32) -> Result<Arc<Socket>> {
        let options = Options::default();
        let stream = Stream::create(options.sizes())?;
        Ok(Socket::new(domain, options, Body::Stream(stream)))
    }

    pub fn datagram(domain: i32) -> Result<Arc<Socket>> {
        let options = Options::default();
        let datagram = Datagram::create()?;
        Ok(Socket::new(domain, options, Body::Datagram(datagram)))
    }

    /// A socket for a connection request to one with these options.
    pub fn answer(domain: i32, options: &Options, request: Request, hello: &[u8]) -> Result<Arc<Socket>> {
        let stream = Stream::answer(request, hello, options.sizes())?;
        Ok(Socket::new(domain, options.clone(), Body::Stream(stream)))
    }

    fn new(domain: i32, options: Options, body: Body) -> Arc<Socket> {
        let state = Mutex::new(State { body, options, waiters: SmallVec::new() });
        let (nonblocking, fd_flags) = (AtomicBool::new(false), AtomicI32::new(0));
        let turn = Turn::default();
        Arc::new(Socket { number: OnceLock::new(), domain, nonblocking, fd_flags, turn, state })
    }

    /// The socket's number, taken when the program first gets it. Not before: librspreload.so of rdma-core 44 looks for
    /// a socket among the program's descriptors from the lowest, and takes a number below its own for another file.
    pub fn number(&self) -> Result<RawFd> {
        if let Some(number) = self.number.get() {
            return Ok(number.as_raw_fd());
        }
        let state = self.lock()?;
        // SAFETY: open as long as the socket has a body, which it has while its state is locked.
        let fd = unsafe { BorrowedFd::borrow_raw(state.cm()?.fd()) };
        let fresh = fcntl_dupfd_cloexec(fd, 0)?;
        Ok(self.number.get_or_init(|| fresh).as_raw_fd())
    }

    /// Locks the state. EIO if this thread has it locked: a signal handler came in between and calls again, or has left
    /// the first call for good by longjmp(3). The state is in the middle of something then, and is not touched any more.
    pub fn lock(&self) -> Result<Locked<'_>> {
        let turn = self.turn.take()?;
        let state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        Ok(Locked { state, _turn: turn })
    }

    pub fn is_nonblocking(&self) -> bool {
        self.nonblocking.load(Ordering::Relaxed)
    }

    pub fn set_nonblocking(&self, on: bool) {
        self.nonblocking.store(on, Ordering::Relaxed);
    }

    /// Readable when [`Socket::progress`] has something to do.
    pub fn handshake(&self) -> Option<RawFd> {
        self.lock().ok()?.cm().map(Cm::fd).ok()
    }

    /// Moves a handshake on; true once connected.
    pub fn progress(&self) -> Result<bool> {
        let mut state = self.lock()?;
        let stream = state.stream()?;
        stream.progress();
        stream.outcome()
    }
}

impl State {
    pub fn stream(&mut self) -> Result<&mut Stream> {
        match &mut self.body {
            Body::Stream(stream) => Ok(stream),
            Body::Datagram(_) => Err(Errno::OPNOTSUPP),
            Body::Closed => Err(Errno::BADF),
        }
    }

    pub fn cm(&self) -> Result<&Cm> {
        match &self.body {
            Body::Stream(stream) => Ok(stream.cm()),
            Body::Datagram(datagram) => Ok(datagram.cm()),
            Body::Closed => Err(Errno::BADF),
        }
    }

    /// Takes what has happened; other threads that wait for this socket are told to look.
    pub fn advance(&mut self) {
        let any = match &mut self.body {
            Body::Stream(stream) => stream.advance(),
            Body::Datagram(datagram) => datagram.advance(),
            Body::Closed => false,
        };
        self.tell(any);
    }

    /// Makes the descriptors readable with the next thing that happens.
    pub fn arm(&mut self) {
        let any = match &mut self.body {
            Body::Stream(stream) => stream.arm(),
            Body::Datagram(datagram) => datagram.arm(),
            Body::Closed => false,
        };
        self.tell(any);
    }

    pub fn fds(&self, fds: &mut Fds) {
        match &self.body {
            Body::Stream(stream) => stream.fds(fds),
            Body::Datagram(datagram) => datagram.fds(fds),
            Body::Closed => {}
        }
    }

    /// One of them became readable.
    pub fn woken(&mut self) {
        let any = match &mut self.body {
            Body::Stream(stream) => stream.woken(),
            Body::Datagram(datagram) => datagram.woken(),
            Body::Closed => false,
        };
        self.tell(any);
    }

    pub fn ready(&self) -> i16 {
        match &self.body {
            Body::Stream(stream) => stream.ready(),
            Body::Datagram(datagram) => datagram.ready(),
            Body::Closed => libc::POLLNVAL,
        }
    }

    /// Wakes whoever else waits, if something happened.
    pub fn tell(&self, happened: bool) {
        if happened && !self.waiters.is_empty() {
            wait::ring(&self.waiters);
        }
    }
}
