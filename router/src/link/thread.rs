//! The threads of the link: one that does the work, one that listens, and one for as long as a host is dialed.

use std::net::{TcpListener, TcpStream};
use std::os::fd::{AsFd as _, OwnedFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, Weak};
use std::thread::JoinHandle;
use std::time::Duration;

use freeflow_core::ring::CqShared;
use freeflow_core::shm::{View, make_bell};
use freeflow_core::verbs::Gid;
use rustix::event::{EventfdFlags, Timespec, epoll, eventfd};

use super::engine::{Engine, Own, Token};
use super::priority;
use super::wire::CHANNELS;
use crate::directory::Tenant;
use crate::listener::{Stop, accept_loop};
use crate::shared::Shared;
use crate::state::{FarQp, FarRing, Joining};

/// How long a host may take to answer a connection.
const DIAL: Duration = Duration::from_secs(2);
/// How long other hosts may take to hear of a member of a group before it is told that it is one.
const LEARN: Duration = Duration::from_secs(1);

#[derive(Debug)]
struct Inner {
    engine: Mutex<Engine>,
    /// [`Engine::learned`]
    learned: Condvar,
    epoll: Arc<OwnedFd>,
    wake: OwnedFd,
    ended: AtomicBool,
    shared: Weak<Shared>,
}

/// The link of this host to all others.
#[derive(Debug)]
pub struct Links {
    inner: Arc<Inner>,
    stop: Arc<Stop>,
    threads: Vec<JoinHandle<()>>,
}

impl Inner {
    fn lock(&self) -> MutexGuard<'_, Engine> {
        self.engine.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn wake(&self) {
        // Its counter cannot overflow, and if it were full it would wake.
        let _ = rustix::io::write(&self.wake, &1u64.to_ne_bytes());
    }

    /// Changes something from another thread, and has the worker look at what follows from it.
    fn change<T>(&self, work: impl FnOnce(&mut Engine) -> T) -> T {
        let result = work(&mut self.lock());
        self.wake();
        result
    }
}

impl Links {
    /// Takes other routers' connections from `listener` as the host `name`, and starts to work.
    pub fn start(shared: &Arc<Shared>, name: &str, listener: TcpListener) -> std::io::Result<Self> {
        let epoll = Arc::new(epoll::create(epoll::CreateFlags::CLOEXEC)?);
        let wake = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
        epoll::add(&*epoll, &wake, Token::Wake.data(), epoll::EventFlags::IN)?;
        let own = Own { name: name.into(), boot: shared.boot };
        let engine = Engine::new(Arc::downgrade(shared), epoll.clone(), own)?;
        let inner = Arc::new(Inner {
            engine: Mutex::new(engine),
            learned: Condvar::new(),
            epoll,
            wake,
            ended: AtomicBool::new(false),
            shared: Arc::downgrade(shared),
        });
        listener.set_nonblocking(true)?;
        let stop = Arc::new(Stop::new()?);
        let (worker, taker, stopped) = (inner.clone(), inner.clone(), stop.clone());
        let work = std::thread::Builder::new().name("link".into()).spawn(move || run(&worker))?;
        let take = std::thread::Builder::new().name("link-listen".into()).spawn(move || {
            accept_loop(&listener.into(), &stopped, |fd| welcome(&taker, fd));
        })?;
        Ok(Links { inner, stop, threads: vec![work, take] })
    }

    /// A queue pair is connected to one on `host`.
    pub fn connect(&self, qp: FarQp, host: Arc<str>) {
        self.inner.change(|engine| engine.connect(qp, host));
    }

    /// It is not any more; when this returns the link uses nothing of it.
    pub fn disconnect(&self, qpn: u32, died: bool) {
        self.inner.change(|engine| engine.disconnect(qpn, died));
    }

    /// A process will submit requests. Returns what wakes us for it.
    pub fn open_doorbell(
        &self,
        client: u32,
        home: (Tenant, Gid),
        doorbell: View<CqShared>,
    ) -> rustix::io::Result<OwnedFd> {
        let (heard, given) = make_bell()?;
        self.inner.change(|engine| engine.open_doorbell(client, home, doorbell, heard))?;
        Ok(given)
    }

    pub fn attach(&self, client: u32, qpn: u32, ring: FarRing, bit: u32, send_bit: u32) -> bool {
        self.inner.change(|engine| engine.attach(client, qpn, ring, bit, send_bit))
    }

    /// Takes the datagrams that a process has submitted. They have completed, so they must not end with their queue pair.
    pub fn take_datagrams(&self, client: u32) {
        self.inner.change(|engine| engine.send_datagrams(client, engine.now()));
    }

    /// An (XRC) shared receive queue is no more; when this returns the link uses nothing of it.
    pub fn forget_queue(&self, srqn: u32) {
        self.inner.lock().forget_queue(srqn);
    }

    /// A client is gone.
    pub fn leave(&self, client: u32) {
        self.inner.change(|engine| engine.leave(client));
    }

    /// A connection manager's message for another host's.
    pub fn send_cm(&self, host: &Arc<str>, bytes: &[u8]) {
        self.inner.change(|engine| engine.send_cm(host, bytes));
    }

    /// A container of this host has joined or left a multicast group.
    pub fn tell_group(&self, joining: &Joining) {
        self.inner.change(|engine| engine.tell_group(joining));
    }

    /// The directory has changed.
    pub fn look_again(&self) {
        self.inner.change(Engine::tell_groups);
    }

    /// Waits until all hosts that can be reached have heard of what was told of groups before, for a second at most.
    pub fn wait_until_known(&self) {
        let engine = self.inner.lock();
        let waited = self.inner.learned.wait_timeout_while(engine, LEARN, |engine| !engine.all_know());
        // Who does not know it yet will, and until then loses datagrams.
        drop(waited.unwrap_or_else(PoisonError::into_inner));
    }

    /// A container is on another host than before.
    pub fn moved(&self, tenant: &str, gid: Gid, to: &str) {
        self.inner.change(|engine| engine.moved(tenant, gid, to));
    }
}

impl Drop for Links {
    fn drop(&mut self) {
        self.inner.ended.store(true, Ordering::Release);
        self.stop.set();
        self.inner.wake();
        for thread in self.threads.drain(..) {
            // A panic in it was printed where it happened.
            let _ = thread.join();
        }
    }
}

/// Another router connected: its handshake has a thread of its own.
fn welcome(inner: &Arc<Inner>, fd: OwnedFd) {
    let inner = inner.clone();
    let meet = move || {
        let Some(shared) = inner.shared.upgrade() else { return };
        let Some(cluster) = shared.cluster.get() else { return };
        match cluster.security.accept(TcpStream::from(fd)) {
            Ok(stream) => inner.change(|engine| engine.accepted(stream)),
            Err(error) => tracing::warn!("a router that connected: {error}"),
        }
    };
    if let Err(error) = std::thread::Builder::new().name("link-accept".into()).spawn(meet) {
        tracing::warn!("cannot start a thread for a handshake: {error}");
    }
}

/// Dials a host on a thread of its own.
fn dial(inner: &Arc<Inner>, host: Arc<str>, attempt: u32) {
    let (dialer, name) = (inner.clone(), host.clone());
    let work = move || {
        if let Err(why) = (0..CHANNELS).try_for_each(|channel| dial_channel(&dialer, &name, attempt, channel))
            && dialer.change(|engine| engine.dial_failed(&name, attempt))
        {
            tracing::warn!("host {name} cannot be reached: {why}; it is tried again each second");
        }
    };
    if let Err(error) = std::thread::Builder::new().name("link-dial".into()).spawn(work) {
        tracing::warn!("cannot start a thread to reach host {host}: {error}");
        inner.lock().dial_failed(&host, attempt);
    }
}

fn dial_channel(inner: &Inner, host: &Arc<str>, attempt: u32, channel: usize) -> Result<(), String> {
    let shared = inner.shared.upgrade().ok_or("the router stops")?;
    let cluster = shared.cluster.get().ok_or("this host is in no cluster")?;
    let known = cluster.hosts.by_name(host).ok_or("the directory does not have it")?;
    let tcp = cluster.dial(known.addr, DIAL).map_err(|e| format!("{}: {e}", known.addr))?;
    let stream = cluster.security.connect(tcp, host).map_err(|e| e.to_string())?;
    inner.change(|engine| engine.dialed(stream, host, attempt, channel));
    Ok(())
}

/// The worker.
fn run(inner: &Arc<Inner>) {
    if let Err(error) = priority::be_prompt() {
        tracing::debug!("the link's thread has no priority over programs that poll: {error}");
    }
    let mut events = Vec::with_capacity(64);
    while !inner.ended.load(Ordering::Acquire) {
        let timeout = work(inner, &mut events);
        let spec = Timespec { tv_sec: timeout.as_secs() as i64, tv_nsec: timeout.subsec_nanos().into() };
        events.clear();
        if let Err(errno) =
            epoll::wait(&*inner.epoll, rustix::buffer::spare_capacity(&mut events), Some(&spec))
            && errno != rustix::io::Errno::INTR
        {
            tracing::error!("epoll_wait: {errno}");
            return;
        }
    }
}

/// Does what events ask for; returns how long to wait for others.
fn work(inner: &Arc<Inner>, events: &mut Vec<epoll::Event>) -> Duration {
    let mut engine = inner.lock();
    for event in events.drain(..) {
        let token = Token::of(event.data);
        if token == Token::Wake {
            let _ = rustix::io::read(inner.wake.as_fd(), &mut [0u8; 8]);
        }
        engine.note(token, event.flags);
    }
    // What follows from a turn is looked at before new events are asked for.
    let more = engine.turn() && engine.turn();
    let hosts = std::mem::take(&mut engine.to_dial);
    let (cm, gone) = (std::mem::take(&mut engine.cm_inbox), std::mem::take(&mut engine.hosts_gone));
    let idle = !more && engine.arm();
    let patience = if idle { engine.patience() } else { Duration::ZERO };
    let learned = std::mem::take(&mut engine.learned);
    drop(engine);
    if learned {
        inner.learned.notify_all();
    }
    if let Some(manager) = inner.shared.upgrade().as_ref().and_then(|shared| shared.cm.get()) {
        // Its lock comes before ours.
        gone.into_iter().for_each(|host| manager.host_gone(host));
        cm.into_iter().for_each(|(host, bytes)| manager.far(host, bytes));
    }
    hosts.into_iter().for_each(|(host, attempt)| dial(inner, host, attempt));
    patience
}
