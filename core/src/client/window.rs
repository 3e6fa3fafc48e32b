//! A peer's registered memory as this process has it mapped.
//!
//! For doors whose operations are single loads and stores: what [`Qp::post_send`] does for a request, without a queue.
//! Only where the path is direct; elsewhere the caller posts requests.

use std::sync::Arc;

use crate::error::{Error, Result};
use crate::ring::mr::slot_of;
use crate::ring::{Extent, MrEntry, MrView, QpShared};
use crate::shm::{Mapping, PAGE, View};
use crate::sync::Ordering;
use crate::verbs::{Access, QpState};

use super::qp::Qp;

/// `len` bytes of a peer's memory region.
///
/// The key is looked at each time ([`Window::at`]). Stores that follow a look are like a WRITE under way: one that is
/// late when the peer deregisters goes to pages that nobody uses again if the peer retires them.
#[derive(Debug)]
pub struct Window {
    /// The key's entry in the peer's table.
    entry: View<MrEntry>,
    qp: View<QpShared>,
    key: u32,
    access: Access,
    from: u64,
    len: u64,
    /// Where `from` is in the mapping, which holds `len` bytes more.
    offset: usize,
    map: Arc<Mapping>,
}

impl Window {
    /// Where `[addr, addr+len)` (as the peer's requests would name it) is in this process. None: the key is dead, or the
    /// range is not all in the window. The pointer is good while the window lives.
    #[inline]
    pub fn at(&self, addr: u64, len: u64) -> Option<*mut u8> {
        let offset = addr.wrapping_sub(self.from);
        let inside = offset <= self.len && len <= self.len - offset;
        (inside && self.entry[0].is(self.key))
            .then(|| self.map.base().wrapping_add(self.offset + offset as usize))
    }

    /// The peer's key.
    pub fn key(&self) -> u32 {
        self.key
    }

    /// What the key grants; the caller heeds it.
    pub fn access(&self) -> Access {
        self.access
    }

    /// First address in the window, as the peer names it.
    pub fn addr(&self) -> u64 {
        self.from
    }

    pub fn len(&self) -> u64 {
        self.len
    }

    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Keeps the pointers valid after the window is gone.
    pub fn mapping(&self) -> &Arc<Mapping> {
        &self.map
    }

    /// Counts bytes that went to the peer without a request.
    #[inline]
    pub fn count(&self, bytes: u64) {
        QpShared::count(&self.qp[0].rx_bytes, bytes);
    }
}

impl Qp {
    /// The largest stretch of the region behind `rkey` that holds `[addr, addr+len)` in one mapping, if it grants `need`.
    ///
    /// Errors: the peer is not there (yet); the key, the right or the bounds do not hold; or the bytes are not mapped here.
    pub fn window(&self, rkey: u32, need: Access, addr: u64, len: u64) -> Result<Window> {
        let absent = || Error::Disconnected("the peer of this QP is not there".into());
        if self.state() != QpState::Rts {
            return Err(absent());
        }
        self.with_peer(|peer| {
            let access = Access::from_bits_truncate(peer.qp[0].access.load(Ordering::Relaxed));
            let entry = peer.mrs.only(slot_of(rkey)).ok_or_else(absent)?;
            let bad = || Error::BadAddress { addr, len, why: "not what the peer's key grants" };
            let va = entry[0].check(rkey, peer.pd, need, addr, len).filter(|_| access.contains(need));
            let (va, view) = va.zip(entry[0].read(rkey)).ok_or_else(bad)?;
            let unmapped = Error::Unsupported("windows to memory that is not mapped here");
            let extent = view.extents().iter().find(|e| e.holds(va, len)).ok_or(unmapped)?;
            let map = peer.memory.window(extent).map_err(Error::system("mmap of a peer's memory"))?;
            let (low, high) = common(&view, extent).ok_or_else(bad)?;
            Ok(Window {
                entry,
                qp: peer.qp.clone(),
                key: rkey,
                access: view.access,
                from: view.iova.wrapping_add(low - view.addr),
                len: high - low,
                offset: (low - (extent.va - extent.va % PAGE)) as usize,
                map,
            })
        })
        .unwrap_or_else(|| Err(absent()))
    }
}

/// What region and extent have in common, in the owner's addresses. None: a peer wrote nonsense.
fn common(region: &MrView, extent: &Extent) -> Option<(u64, u64)> {
    let end = extent.va.checked_add(extent.len)?.min(region.addr.checked_add(region.len)?);
    let start = extent.va.max(region.addr);
    (start < end).then_some((start, end))
}
