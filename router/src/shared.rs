//! The state behind its lock, and what happens when the lock is given back.
//!
//! Owns lock, order and delivery: notices go out under the lock, in order and without waiting; bells after it. It must
//! never know what requests mean.

use std::net::IpAddr;
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use freeflow_core::ctl::{
    ClientGone, PeerFault, PeerGone, PeerLeft, PeerProgress, PeerReady, Socket, SocketError, SrqLimit,
};
use freeflow_core::shm::Bell;

use crate::cluster::{Claim, Home, Membership};
use crate::cm;
use crate::config::Settings;
use crate::directory::Tenant;
use crate::link::Links;
use crate::proof::Proofs;
use crate::random::Random;
use crate::state::{Notice, Outbox, State};

/// Clients of an earlier router are back by then, or do not live any more. They look every quarter of a second.
const RETURN: Duration = Duration::from_secs(5);

/// What all threads of the daemon share.
#[derive(Debug)]
pub struct Shared {
    state: Mutex<State>,
    /// A connection ended, or the last copy on a revoked region did.
    ended: Condvar,
    /// Random per start of the router.
    pub boot: u64,
    started: Instant,
    /// Somebody came back from an earlier router: its peers are waited for.
    awaiting: AtomicBool,
    pub proofs: Proofs,
    pub settings: Arc<Settings>,
    /// The connection manager, once it is started.
    pub cm: OnceLock<cm::Service>,
    /// This host's part in a cluster, once it has joined; never set where it is alone.
    pub cluster: OnceLock<Membership>,
    /// The way to other hosts, where there are some.
    pub links: OnceLock<Links>,
}

impl Shared {
    pub fn new(settings: Settings, proofs: Proofs) -> std::io::Result<Self> {
        let mut random = Random::new()?;
        let boot = u64::from(random.next_u32()?) << 32 | u64::from(random.next_u32()?);
        let settings = Arc::new(settings);
        let state = Mutex::new(State::new(settings.clone(), random));
        Ok(Shared {
            state,
            ended: Condvar::new(),
            boot,
            started: Instant::now(),
            awaiting: AtomicBool::new(false),
            proofs,
            settings,
            cm: OnceLock::new(),
            cluster: OnceLock::new(),
            links: OnceLock::new(),
        })
    }

    /// Is the time over in which clients of an earlier router come back?
    pub fn is_late(&self) -> bool {
        self.started.elapsed() >= RETURN
    }

    /// Gives up, when it is late, those that have not come back by then.
    pub fn await_peers(shared: &Arc<Self>) {
        if shared.awaiting.swap(true, Ordering::Relaxed) {
            return;
        }
        let (left, weak) = (RETURN.saturating_sub(shared.started.elapsed()), Arc::downgrade(shared));
        let wait = move || {
            std::thread::sleep(left);
            weak.upgrade().inspect(|shared| shared.with(State::give_up_missing));
        };
        if let Err(error) = std::thread::Builder::new().name("return".into()).spawn(wait) {
            tracing::warn!("cannot start a thread: peers that died meanwhile are not told of: {error}");
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        // A panic of one session must not take the others along: each operation leaves the tables whole.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Runs `work` under the lock, then delivers what it had to tell.
    pub fn with<T>(&self, work: impl FnOnce(&mut State) -> T) -> T {
        let mut state = self.lock();
        let result = work(&mut state);
        let outbox = deliver(&mut state);
        drop(state);
        if let Some(links) = self.links.get() {
            outbox.groups.iter().for_each(|joining| links.tell_group(joining));
            outbox.unlinked.iter().for_each(|(qpn, died)| links.disconnect(*qpn, *died));
        }
        outbox.bells.iter().for_each(|bell| ring_bell(bell));
        outbox.lines.iter().for_each(|line| tracing::warn!("{line}"));
        result
    }

    /// The directory has changed: queue pairs that were connected to nowhere may find their peers now.
    pub fn look_again(&self) {
        if let Some(cluster) = self.cluster.get() {
            self.with(|state| state.tell_found(|tenant, ip| cluster.hosts.find(tenant, ip).is_some()));
        }
        self.links.get().into_iter().for_each(Links::look_again);
    }

    /// Before queue pairs of a client end: what has completed on them goes to other hosts.
    pub fn take_datagrams(&self, client: u32) {
        self.links.get().into_iter().for_each(|links| links.take_datagrams(client));
    }

    /// The cluster learns that this host has `ip` of `tenant`.
    pub fn publish(&self, tenant: &Tenant, ip: IpAddr, claim: Claim) {
        if let Some(cluster) = self.cluster.get() {
            cluster.publish(&Home { tenant: tenant.clone(), ip }, claim);
        }
    }

    /// And that it has it no longer.
    pub fn withdraw(&self, tenant: &Tenant, ip: IpAddr) {
        if let Some(cluster) = self.cluster.get() {
            cluster.withdraw(&Home { tenant: tenant.clone(), ip });
        }
    }

    /// Says that something ended for which [`Shared::wait_until`] may wait.
    pub fn something_ended(&self) {
        self.ended.notify_all();
    }

    /// Waits until `done` says so; false when it did not within `limit`.
    pub fn wait_until(&self, limit: Duration, mut done: impl FnMut(&mut State) -> bool) -> bool {
        let deadline = Instant::now() + limit;
        let mut state = self.lock();
        while !done(&mut state) {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return false;
            }
            state = self.ended.wait_timeout(state, left).unwrap_or_else(PoisonError::into_inner).0;
        }
        true
    }

    /// Logs something a container's processes can cause at will: not more often than its limiter allows.
    pub fn log(&self, container: u32, message: impl FnOnce() -> String) {
        let passed = self.with(|state| {
            let container = state.containers.get_mut(&container)?;
            container.log.pass(Instant::now()).map(|before| (container.name.clone(), before))
        });
        match passed {
            Some((name, 0)) => tracing::warn!("container {name}: {}", message()),
            Some((name, before)) => {
                tracing::warn!("container {name}: {} ({before} like lines left out)", message())
            }
            None => {}
        }
    }
}

/// Sends all notices; returns what is to be done without the lock.
fn deliver(state: &mut State) -> Outbox {
    for (to, notice) in std::mem::take(&mut state.outbox.notices) {
        let Some(client) = state.clients.get_mut(&to).filter(|c| !c.cut_off) else { continue };
        if let Err(error) = send(&client.event, notice) {
            // Who does not read its events must not hold anybody up.
            client.cut_off = true;
            client.hang_up();
            state
                .outbox
                .lines
                .push(format!("process {} takes no events and is cut off: {error}", client.pid));
        }
    }
    std::mem::take(&mut state.outbox)
}

fn send(socket: &Socket, notice: Notice) -> Result<(), SocketError> {
    match notice {
        Notice::PeerReady { qpn } => socket.send_event(&PeerReady { qpn }),
        Notice::PeerProgress { qpn } => socket.send_event(&PeerProgress { qpn }),
        Notice::PeerFault { qpn } => socket.send_event(&PeerFault { qpn }),
        Notice::PeerGone { qpn } => socket.send_event(&PeerGone { qpn }),
        Notice::PeerLeft { qpn } => socket.send_event(&PeerLeft { qpn }),
        Notice::SrqLimit { srq } => socket.send_event(&SrqLimit { srq }),
        Notice::ClientGone { client } => socket.send_event(&ClientGone { client }),
    }
}

/// Rings a client's bell. Rare enough (deaths, and peers that cannot open it) to open it for each ring.
pub fn ring_bell(given: &OwnedFd) {
    match Bell::open(given) {
        Ok(bell) => bell.ring(),
        Err(errno) => tracing::warn!("a bell cannot be rung: {errno}"),
    }
}
