//! An open device: one connection to the router and everything made over it.

use std::collections::HashMap;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::{Arc, Mutex, PoisonError, Weak};

use crate::ctl::{Limits, purpose};
use crate::error::{Error, Result};
use crate::ring::{MR_SLOTS, MrEntry};
use crate::shm::{Mapping, View, seal_for_owner};
use crate::sync::asym;
use crate::verbs::Gid;

use super::conn::{Conn, Opened};
use super::events::{AsyncEvent, AsyncQueue};
use super::fork;
use super::helper::Helper;
use super::link::Links;
use super::mcast::Groups;
use super::moderation::ModeratedChannels;
use super::mw::Windows;
use super::peers::Peers;
use super::qp::Qp;
use super::slab::Slabs;
use super::srq::Srq;
use super::stall::Stalled;

/// What is known of the device without opening it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DeviceInfo {
    pub vip: Gid,
}

/// The device, if a router answers.
pub fn available() -> Result<DeviceInfo> {
    let opened = Conn::open(purpose::CM)?;
    fork::forget(opened.events.as_fd());
    Ok(DeviceInfo { vip: Gid(opened.conn.hello.vip) })
}

/// An open device.
#[derive(Debug)]
pub struct Context {
    pub(super) conn: Conn,
    pub(super) slabs: Slabs,
    pub(super) peers: Peers,
    pub(super) mrs: View<MrEntry>,
    pub(super) qps: Mutex<HashMap<u32, Weak<Qp>>>,
    pub(super) srqs: Mutex<HashMap<u32, Weak<Srq>>>,
    pub(super) stalled: Stalled,
    pub(super) links: Links,
    pub(super) groups: Groups,
    pub(super) windows: Windows,
    pub(super) moderated: ModeratedChannels,
    pub(super) events: AsyncQueue,
    pub(super) helper: Helper,
}

impl Context {
    /// Connects to the router and starts the helper thread.
    pub fn open() -> Result<Arc<Context>> {
        asym::register();
        let Opened { conn, events, mut fds } = Conn::open(purpose::VERBS)?;
        let table = fds.next().ok_or_else(|| Error::Disconnected("no MR table came with Hello".into()))?;
        let map = Mapping::new(&table, 0, MR_SLOTS * size_of::<MrEntry>(), true);
        let map = map.map_err(Error::system("mmap of the MR table"))?;
        // Peers get it for reading. Linux before 5.1 does not know the seal: there, a peer that is root can write it.
        let _ = seal_for_owner(&table);
        conn.keep_table(table);
        let table = Arc::new(map);
        table.dont_fork();
        let mrs = View::new(table, 0, MR_SLOTS).ok_or(Error::Invalid("MR table size"))?;
        let context = Arc::new(Context {
            conn,
            slabs: Slabs::default(),
            peers: Peers::default(),
            mrs,
            qps: Mutex::default(),
            srqs: Mutex::default(),
            stalled: Stalled::default(),
            links: Links::default(),
            groups: Groups::default(),
            windows: Windows::default(),
            moderated: ModeratedChannels::default(),
            events: AsyncQueue::new()?,
            helper: Helper::new(events)?,
        });
        context.helper.start(Arc::downgrade(&context))?;
        Ok(context)
    }

    /// Quotas and limits of this container.
    pub fn limits(&self) -> &Limits {
        &self.conn.hello.limits
    }

    /// The GID: this container's address.
    pub fn gid(&self) -> Gid {
        Gid(self.conn.hello.vip)
    }

    /// A number that is this context's on this host while the router lives.
    pub fn id(&self) -> u32 {
        self.conn.hello.client
    }

    /// Is there a router that would tell of a peer's death?
    pub fn has_router(&self) -> bool {
        self.conn.is_up()
    }

    /// Random per start of the router: contexts with the same are on one host.
    pub fn boot(&self) -> u64 {
        self.conn.hello.boot
    }

    /// Readable while an asynchronous event waits.
    pub fn async_fd(&self) -> BorrowedFd<'_> {
        self.events.as_fd()
    }

    /// Waits for the next asynchronous event.
    pub fn next_async_event(&self) -> Result<AsyncEvent> {
        self.events.next()
    }

    /// Ends the helper thread and waits for it: afterwards nobody holds what the caller has let go of, not even for a moment.
    /// For who is to have no thread left when it is done; the others leave it to the last reference. Everything made on
    /// the context is gone by then, or waits for good.
    pub fn close(&self) {
        self.helper.stop();
    }

    pub(super) fn qp(&self, qpn: u32) -> Option<Arc<Qp>> {
        self.qps.lock().unwrap_or_else(PoisonError::into_inner).get(&qpn)?.upgrade()
    }

    pub(super) fn srq(&self, number: u32) -> Option<Arc<Srq>> {
        self.srqs.lock().unwrap_or_else(PoisonError::into_inner).get(&number)?.upgrade()
    }

    pub(super) fn all_qps(&self) -> Vec<Arc<Qp>> {
        self.qps.lock().unwrap_or_else(PoisonError::into_inner).values().filter_map(Weak::upgrade).collect()
    }
}

impl Drop for Context {
    fn drop(&mut self) {
        self.helper.stop();
    }
}
