//! The helper thread: hears the router, and moves stalled send queues on while the program sleeps.
//!
//! It sleeps in poll(2) on the event socket, its own bell, and those of channels with moderated CQs. With stalled queues it wakes at their deadlines, or, when
//! bytes remain to be copied, after [`GRACE`]: a program that polls is faster than that and leaves nothing to do.

use std::os::fd::{AsFd, OwnedFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll};
use rustix::net::RecvFlags;

use crate::ctl::{
    ClientGone, Incoming, PeerFault, PeerGone, PeerLeft, PeerProgress, PeerReady, Socket, SocketError,
    SrqLimit,
};
use crate::error::{Error, Result};

use super::conn::Return;
use super::context::Context;
use super::events::{AsyncEvent, AsyncKind};
use super::fork;
use super::stall::Stall;

/// How long a polling program has the copying to itself.
const GRACE: Duration = Duration::from_millis(1);

/// The helper thread's handle.
#[derive(Debug)]
pub struct Helper {
    shared: Arc<Shared>,
    birth: fork::Birth,
    thread: Mutex<Option<JoinHandle<()>>>,
}

#[derive(Debug)]
struct Shared {
    /// None while there is no router.
    events: Mutex<Option<Arc<Socket>>>,
    bell: OwnedFd,
    stop: AtomicBool,
    /// It looks at stalled queues by itself: no need to ring.
    watching: AtomicBool,
}

impl Helper {
    pub fn new(events: Socket) -> Result<Self> {
        let bell =
            eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK).map_err(Error::system("eventfd"))?;
        fork::neutralize_in_child(bell.as_fd());
        let (events, stop, watching) =
            (Mutex::new(Some(Arc::new(events))), AtomicBool::new(false), AtomicBool::new(false));
        let shared = Shared { events, bell, stop, watching };
        Ok(Helper { shared: Arc::new(shared), birth: fork::Birth::now(), thread: Mutex::new(None) })
    }

    /// Starts the thread, with all signals blocked: they are the program's.
    pub fn start(&self, context: Weak<Context>) -> Result<()> {
        let shared = Arc::clone(&self.shared);
        let (running, started) = std::sync::mpsc::channel();
        let masked = SignalMask::block_all();
        let thread =
            std::thread::Builder::new().name("freeflow".into()).stack_size(256 * 1024).spawn(move || {
                // Its creator waits: a thread that does not run yet blocks all signals, and mem moves nothing.
                let _ = running.send(());
                run(&shared, &context);
            });
        drop(masked);
        let thread = thread.map_err(|e| Error::System {
            what: "start of the helper thread",
            errno: rustix::io::Errno::from_io_error(&e).unwrap_or(rustix::io::Errno::AGAIN),
        })?;
        *self.thread.lock().unwrap_or_else(PoisonError::into_inner) = Some(thread);
        let _ = started.recv();
        Ok(())
    }

    /// A queue stalled: makes sure that the helper watches.
    pub fn watch(&self) {
        if !self.shared.watching.swap(true, Ordering::SeqCst) {
            self.ring();
        }
    }

    /// Has it look around.
    pub(super) fn ring(&self) {
        let _ = rustix::io::write(&self.shared.bell, &1u64.to_ne_bytes());
    }

    /// Ends the thread and waits for it.
    pub fn stop(&self) {
        let thread = self.thread.lock().unwrap_or_else(PoisonError::into_inner).take();
        if let Some(thread) = thread {
            self.join(thread);
        }
        // Not before: the router gives up a client that takes no events, and the thread may have been the last to hold something.
        self.shared.change_events(None);
        fork::forget(self.shared.bell.as_fd());
    }

    fn join(&self, thread: JoinHandle<()>) {
        if self.birth.is_inherited() {
            // The thread is not here, and its handle may name one of this process's own by now.
            std::mem::forget(thread);
            return;
        }
        self.shared.stop.store(true, Ordering::Release);
        self.ring();
        // On the helper itself (it held the last reference) the thread is ending.
        if thread.thread().id() != std::thread::current().id() {
            let _ = thread.join();
        }
    }
}

/// Blocks all signals in this thread until dropped; threads made meanwhile inherit the mask. Faults stay open: a thread
/// that blocks them dies of touching memory that is being moved, so `mem` moves nothing while there is one.
struct SignalMask(libc::sigset_t);

impl SignalMask {
    fn block_all() -> Self {
        // SAFETY: sigset_t is plain data; sigfillset overwrites it.
        let mut all: libc::sigset_t = unsafe { std::mem::zeroed() };
        let mut old = all;
        // SAFETY: a valid sigset_t.
        unsafe { libc::sigfillset(&mut all) };
        for fault in [libc::SIGSEGV, libc::SIGBUS, libc::SIGILL, libc::SIGFPE, libc::SIGTRAP] {
            // SAFETY: a valid sigset_t and signal number.
            unsafe { libc::sigdelset(&mut all, fault) };
        }
        // SAFETY: valid sets; changes only this thread's mask.
        unsafe { libc::pthread_sigmask(libc::SIG_SETMASK, &all, &mut old) };
        SignalMask(old)
    }
}

impl Drop for SignalMask {
    fn drop(&mut self) {
        // SAFETY: the mask that was in force before.
        unsafe { libc::pthread_sigmask(libc::SIG_SETMASK, &self.0, std::ptr::null_mut()) };
    }
}

impl Shared {
    fn events(&self) -> Option<Arc<Socket>> {
        self.events.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    fn change_events(&self, new: Option<Socket>) {
        let mut events = self.events.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(old) = std::mem::replace(&mut *events, new.map(Arc::new)) {
            fork::forget(old.as_fd());
        }
    }
}

/// When to look for a router again: soon after the last one went, and less and less often.
#[derive(Debug, Clone, Copy)]
struct Search {
    next: Instant,
    pause: Duration,
}

/// The first and the longest pause between two looks.
const PAUSES: (Duration, Duration) = (Duration::from_millis(5), Duration::from_millis(250));

impl Search {
    fn begin() -> Self {
        Search { next: Instant::now(), pause: PAUSES.0 }
    }

    fn again(self) -> Self {
        Search { next: Instant::now() + self.pause, pause: PAUSES.1.min(self.pause * 2) }
    }
}

fn run(shared: &Shared, context: &Weak<Context>) {
    let mut timeout = None;
    let mut search = None;
    let mut moderated = Vec::new();
    while !shared.stop.load(Ordering::Acquire) {
        let events = shared.events();
        let (rung, heard) = sleep(shared, events.as_deref(), &moderated, timeout);
        if rung {
            let _ = rustix::io::read(&shared.bell, &mut [0u8; 8]);
        }
        let Some(context) = context.upgrade() else { return };
        if let Some(events) = events.filter(|events| heard && !hear(events, &context)) {
            drop(events);
            shared.change_events(None);
            context.conn.lose_router();
            search = Some(Search::begin());
        }
        search = search.and_then(|search| look_for_router(shared, &context, search));
        timeout = watch(shared, &context, rung);
        let alone = shared.events().is_none();
        if alone && context.stalled.any() {
            // Nobody is there to tell of a receive or of the peer.
            timeout = Some(timeout.map_or(GRACE, |t| t.min(GRACE)));
        }
        if let Some(Search { next, .. }) = search {
            let left = next.saturating_duration_since(Instant::now());
            timeout = Some(timeout.map_or(left, |t| t.min(left)));
        }
        moderated = context.moderated.bells();
        if !moderated.is_empty()
            && let Some(next) = context.moderated.pass_on()
        {
            timeout = Some(timeout.map_or(next, |t| t.min(next)));
        }
    }
}

/// Waits until somebody rings, or for `timeout`. Returns whether that was the helper's own bell, and the router.
fn sleep(
    shared: &Shared,
    events: Option<&Socket>,
    moderated: &[Arc<OwnedFd>],
    timeout: Option<Duration>,
) -> (bool, bool) {
    let mut fds = vec![PollFd::new(&shared.bell, PollFlags::IN)];
    fds.extend(moderated.iter().map(|bell| PollFd::new(&**bell, PollFlags::IN)));
    let first_event = fds.len();
    fds.extend(events.map(|events| PollFd::new(events, PollFlags::IN)));
    let spec = timeout.map(|t| Timespec { tv_sec: t.as_secs() as i64, tv_nsec: t.subsec_nanos().into() });
    let _ = poll(&mut fds, spec.as_ref());
    let rung = !fds[0].revents().is_empty();
    (rung, fds[first_event..].iter().any(|fd| !fd.revents().is_empty()))
}

/// One look, if it is time: existing direct connections go on meanwhile, and whatever needs the router waits or fails.
fn look_for_router(shared: &Shared, context: &Arc<Context>, search: Search) -> Option<Search> {
    if Instant::now() < search.next {
        return Some(search);
    }
    match context.conn.look_for_router() {
        Return::NotYet => Some(search.again()),
        Return::Back { events, lost } => {
            shared.change_events(Some(events));
            context.links.forget();
            context.groups.forget();
            lost.into_iter().filter_map(|qpn| context.qp(qpn)).for_each(|qp| qp.orphan());
            // What peers did meanwhile was told to nobody.
            context.all_qps().iter().for_each(|qp| qp.peer_changed());
            None
        }
        Return::Over => {
            context.events.push(AsyncEvent { kind: AsyncKind::DeviceFatal, cookie: 0 });
            None
        }
    }
}

/// Moves stalled queues on; returns when to look again.
fn watch(shared: &Shared, context: &Arc<Context>, fresh: bool) -> Option<Duration> {
    if context.stalled.take_polled() || fresh {
        return Some(GRACE);
    }
    let seen = context.stalled.generation();
    let now = Instant::now();
    let soonest = context.stalled.progress().into_iter().filter_map(|wait| match wait {
        Stall::None | Stall::Later => None,
        Stall::More => Some(Duration::ZERO),
        Stall::Rnr { deadline } | Stall::Absent { deadline } => {
            Some(deadline?.saturating_duration_since(now))
        }
    });
    let soonest = soonest.min();
    if soonest.is_some_and(|t| t <= GRACE) {
        return soonest;
    }
    // Going to sleep for longer: from now on a queue that stalls has to ring. One that stalled since `seen` did not.
    shared.watching.store(false, Ordering::SeqCst);
    if context.stalled.generation() != seen && !shared.watching.swap(true, Ordering::SeqCst) {
        return Some(GRACE);
    }
    soonest
}

/// Takes the router's events in. False: the router is gone.
fn hear(events: &Socket, context: &Arc<Context>) -> bool {
    loop {
        match events.recv(RecvFlags::DONTWAIT) {
            Ok(event) => act(&event, context),
            Err(SocketError::System(_, rustix::io::Errno::AGAIN)) => return true,
            Err(_) => return false,
        }
    }
}

fn act(event: &Incoming, context: &Arc<Context>) {
    if let Some(PeerReady { qpn }) = event.event() {
        context.qp(qpn).inspect(|qp| qp.peer_changed());
    } else if let Some(PeerProgress { qpn }) = event.event() {
        context.qp(qpn).inspect(|qp| {
            qp.progress(true);
        });
    } else if let Some(PeerLeft { qpn }) = event.event() {
        context.qp(qpn).inspect(|qp| qp.forget_peer());
    } else if let Some(PeerFault { qpn }) = event.event() {
        context.qp(qpn).inspect(|qp| qp.fail(AsyncKind::QpAccessErr));
    } else if let Some(PeerGone { qpn }) = event.event() {
        context.qp(qpn).inspect(|qp| qp.orphan());
    } else if let Some(SrqLimit { srq }) = event.event() {
        context.srq(srq).inspect(|srq| srq.limit_reached());
    } else if let Some(ClientGone { client }) = event.event() {
        context.peers.forget(client);
    }
}
