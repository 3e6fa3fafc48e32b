//! One socket of any kind: its number, its options, its state behind one lock, and the threads that wait for it.

use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::sync::atomic::{AtomicBool, AtomicI32, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};

use rustix::io::fcntl_dupfd_cloexec;

use super::cm::{Cm, Request};
use super::datagram::Datagram;
use super::options::Options;
use super::stream::socket::Stream;
use super::wait;
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
    pub waiters: Vec<RawFd>,
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
    state: Mutex<State>,
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
        let state = Mutex::new(State { body, options, waiters: Vec::new() });
        let (nonblocking, fd_flags) = (AtomicBool::new(false), AtomicI32::new(0));
        Arc::new(Socket { number: OnceLock::new(), domain, nonblocking, fd_flags, state })
    }

    /// The socket's number, taken when the program first gets it. Not before: librspreload.so of rdma-core 44 looks for
    /// a socket among the program's descriptors from the lowest, and takes a number below its own for another file.
    pub fn number(&self) -> Result<RawFd> {
        if let Some(number) = self.number.get() {
            return Ok(number.as_raw_fd());
        }
        let state = self.lock();
        // SAFETY: open as long as the socket has a body, which it has while its state is locked.
        let fd = unsafe { BorrowedFd::borrow_raw(state.cm()?.fd()) };
        let fresh = fcntl_dupfd_cloexec(fd, 0)?;
        Ok(self.number.get_or_init(|| fresh).as_raw_fd())
    }

    pub fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub fn is_nonblocking(&self) -> bool {
        self.nonblocking.load(Ordering::Relaxed)
    }

    pub fn set_nonblocking(&self, on: bool) {
        self.nonblocking.store(on, Ordering::Relaxed);
    }

    /// Readable when [`Socket::progress`] has something to do.
    pub fn handshake(&self) -> Option<RawFd> {
        self.lock().cm().map(Cm::fd).ok()
    }

    /// Moves a handshake on; true once connected.
    pub fn progress(&self) -> Result<bool> {
        let mut state = self.lock();
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

    pub fn fds(&self, fds: &mut Vec<RawFd>) {
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
