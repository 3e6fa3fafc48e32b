//! The thread that answers while the program is busy: it takes connection requests for listeners, as a kernel would,
//! and tells who asks where a datagram socket is.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd, RawFd};
use std::sync::{Arc, Mutex, PoisonError, Weak};

use rustix::event::{EventfdFlags, PollFd, PollFlags, eventfd, poll};

use super::socket::{Body, Socket};
use crate::edge::{Errno, Result};

#[derive(Debug)]
struct Shared {
    served: Mutex<Vec<Weak<Socket>>>,
    /// Rung when the list or a socket's descriptors have changed.
    bell: OwnedFd,
}

/// The running thread; it ends when this is dropped.
#[derive(Debug)]
pub struct Service(Arc<Shared>);

impl Service {
    pub fn start() -> Result<Service> {
        let bell = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
        let shared = Arc::new(Shared { served: Mutex::default(), bell });
        let weak = Arc::downgrade(&shared);
        let thread = without_signals(|| {
            std::thread::Builder::new().name("ff-rsocket".into()).spawn(move || run(&weak))
        });
        thread.map_err(|_| Errno::AGAIN)?;
        Ok(Service(shared))
    }

    /// Serves `socket` from now on, as long as it is there.
    pub fn add(&self, socket: &Arc<Socket>) {
        let mut served = self.0.served.lock().unwrap_or_else(PoisonError::into_inner);
        served.retain(|socket| socket.strong_count() > 0);
        served.push(Arc::downgrade(socket));
        drop(served);
        self.look();
    }

    /// Has the thread look at its sockets again.
    pub fn look(&self) {
        // A full bell has rung already.
        let _ = rustix::io::write(&self.0.bell, &1u64.to_ne_bytes());
    }
}

impl Drop for Service {
    fn drop(&mut self) {
        self.look();
    }
}

/// Runs `start` with all signals blocked: the program's handlers run in its own threads.
fn without_signals<T>(start: impl FnOnce() -> T) -> T {
    let mut all = std::mem::MaybeUninit::<libc::sigset_t>::uninit();
    let mut before = std::mem::MaybeUninit::<libc::sigset_t>::uninit();
    // SAFETY: a set to fill in.
    unsafe { libc::sigfillset(all.as_mut_ptr()) };
    for fault in [libc::SIGSEGV, libc::SIGBUS, libc::SIGFPE, libc::SIGILL] {
        // SAFETY: the set just filled in. Faults must reach their handlers.
        unsafe { libc::sigdelset(all.as_mut_ptr(), fault) };
    }
    // SAFETY: two sets, one filled in, one to fill in.
    unsafe { libc::pthread_sigmask(libc::SIG_SETMASK, all.as_ptr(), before.as_mut_ptr()) };
    let result = start();
    // SAFETY: the set filled in above.
    unsafe { libc::pthread_sigmask(libc::SIG_SETMASK, before.as_ptr(), std::ptr::null_mut()) };
    result
}

fn run(shared: &Weak<Shared>) {
    while let Some(shared) = shared.upgrade() {
        let sockets: Vec<Arc<Socket>> = {
            let served = shared.served.lock().unwrap_or_else(PoisonError::into_inner);
            served.iter().filter_map(Weak::upgrade).collect()
        };
        sockets.iter().for_each(serve);
        let fds = descriptors(&sockets);
        // So that a socket that is closed meanwhile goes at once.
        drop(sockets);
        sleep(&shared, &fds);
    }
}

fn serve(socket: &Arc<Socket>) {
    // The service's own thread is in no call that could have been left.
    let Ok(mut state) = socket.lock() else { return };
    let options = state.options.clone();
    let any = match &mut state.body {
        Body::Stream(stream) => {
            stream.serve(|request, hello| Socket::answer(socket.domain, &options, request, hello))
        }
        Body::Datagram(datagram) => datagram.serve(),
        Body::Closed => false,
    };
    state.tell(any);
}

fn descriptors(sockets: &[Arc<Socket>]) -> Vec<RawFd> {
    let mut fds = Vec::new();
    for socket in sockets {
        let Ok(state) = socket.lock() else { continue };
        match &state.body {
            Body::Stream(stream) => stream.served(&mut fds),
            Body::Datagram(datagram) => fds.push(datagram.cm().fd()),
            Body::Closed => {}
        }
    }
    fds
}

/// Sleeps until a descriptor is readable, or the bell rings.
fn sleep(shared: &Shared, fds: &[RawFd]) {
    // SAFETY: not -1; one that was closed meanwhile, or is another file by now, only costs another look.
    let others = fds.iter().map(|fd| unsafe { BorrowedFd::borrow_raw(*fd) });
    let mut list: Vec<PollFd> = std::iter::once(shared.bell.as_fd())
        .chain(others)
        .map(|fd| PollFd::from_borrowed_fd(fd, PollFlags::IN))
        .collect();
    // A failure costs another look, too.
    let _ = poll(&mut list, None);
    let mut count = [0u8; 8];
    let _ = rustix::io::read(&shared.bell, &mut count[..]);
}
