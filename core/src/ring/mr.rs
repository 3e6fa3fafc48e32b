//! The table of memory regions. Its owner writes entries; peers, who map it read-only, and the router read them.
//!
//! A key is a random byte, the slot (16 bits), and another byte: random too, or, of a memory window, what its owner chose
//! (ibv_inc_rkey). An entry is valid exactly while its `key` word holds the whole key, so that killing a key is one store,
//! and a stale or guessed key finds nothing.
//!
//! A memory window is an entry like any other that is published when the window is bound and killed when it is not any
//! more. Its *domain* is not a PD but says that it is a window, of a PD or of one queue pair: what looks for a PD (lkeys,
//! and the short way of rkeys) passes it by, and [`MrEntry::check_window`] is asked where an rkey was not found.

use crate::sync::{AtomicU32, AtomicU64, Ordering, fence};
use crate::verbs::Access;

/// Entries of a table.
pub const MR_SLOTS: usize = 1 << 16;
/// Pieces of an MR that live in the PD's memfd. (One for the model checker, which tries every value of every field.)
pub const MAX_EXTENTS: usize = if cfg!(loom) { 1 } else { 3 };

/// `len` bytes at virtual address `va` of the owner are at `offset` in its PD's memfd.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Extent {
    pub va: u64,
    pub len: u64,
    pub offset: u64,
}

impl Extent {
    /// Does it hold all of `[va, va+len)`?
    pub fn holds(&self, va: u64, len: u64) -> bool {
        va >= self.va && va - self.va <= self.len && len <= self.len - (va - self.va)
    }
}

/// One entry, 128 bytes.
#[derive(Debug, Default)]
#[repr(C, align(128))]
pub struct MrEntry {
    key: AtomicU32,
    access: AtomicU32,
    pd: AtomicU32,
    extents: AtomicU32,
    iova: AtomicU64,
    addr: AtomicU64,
    len: AtomicU64,
    extent: [[AtomicU64; 3]; MAX_EXTENTS],
    /// How often the entry was published: tells a window that was bound anew from the one before.
    epoch: AtomicU32,
}

#[cfg(not(loom))]
const _: () = assert!(size_of::<MrEntry>() == 128);

/// An entry, copied out. Hostile until judged: extents are the owner's claim about its own memfd.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct MrView {
    pub key: u32,
    pub access: Access,
    /// Its PD, or one of [`domain`]'s.
    pub pd: u32,
    /// The address remote operations name.
    pub iova: u64,
    /// The owner's virtual address of `iova`.
    pub addr: u64,
    pub len: u64,
    pub extents: [Extent; MAX_EXTENTS],
    pub extent_count: u32,
    /// Of a published entry: see [`MrEntry`].
    pub epoch: u32,
}

/// What stands in an entry's PD where it is no region of one. PDs have smaller numbers.
pub mod domain {
    const WINDOW: u32 = 1 << 31;
    const QP: u32 = 1 << 30;

    /// The null region of `pd`: its `addr` is where what is received goes, its `iova` where what is sent comes from.
    pub fn null_of_pd(pd: u32) -> u32 {
        QP | pd
    }

    /// A memory window for the queue pairs of `pd` (type 1).
    pub fn window_of_pd(pd: u32) -> u32 {
        WINDOW | pd
    }

    /// One for queue pair `qpn` (type 2).
    pub fn window_of_qp(qpn: u32) -> u32 {
        WINDOW | QP | qpn
    }
}

impl MrView {
    /// The owner's virtual address of `[iova, iova+len)`, if the MR holds all of it.
    #[inline(always)]
    pub fn translate(&self, iova: u64, len: u64) -> Option<u64> {
        let from = iova.checked_sub(self.iova)?;
        (from <= self.len && len <= self.len - from).then(|| self.addr.wrapping_add(from))
    }

    /// The valid extents.
    pub fn extents(&self) -> &[Extent] {
        &self.extents[..(self.extent_count as usize).min(MAX_EXTENTS)]
    }
}

/// Slot of a key.
#[inline(always)]
pub fn slot_of(key: u32) -> usize {
    (key >> 8) as usize & (MR_SLOTS - 1)
}

/// The key of a slot: `random` is its first byte and its last.
pub fn key_of(slot: u16, random: u16) -> u32 {
    let [first, last] = random.to_be_bytes();
    u32::from(first) << 24 | u32::from(slot) << 8 | u32::from(last)
}

/// Do two keys differ in nothing but what the owner of a memory window may choose?
pub fn same_window(a: u32, b: u32) -> bool {
    a >> 8 == b >> 8
}

impl MrEntry {
    /// Owner: makes the key valid.
    pub fn publish(&self, view: &MrView) {
        // Partner: the acquire fence in read(). No reader that still sees the old key sees a new field.
        fence(Ordering::Release);
        self.access.store(view.access.bits(), Ordering::Relaxed);
        self.pd.store(view.pd, Ordering::Relaxed);
        self.iova.store(view.iova, Ordering::Relaxed);
        self.addr.store(view.addr, Ordering::Relaxed);
        self.len.store(view.len, Ordering::Relaxed);
        self.extents.store(view.extent_count, Ordering::Relaxed);
        self.epoch.store(self.epoch.load(Ordering::Relaxed).wrapping_add(1), Ordering::Relaxed);
        for (words, extent) in self.extent.iter().zip(&view.extents) {
            words[0].store(extent.va, Ordering::Relaxed);
            words[1].store(extent.len, Ordering::Relaxed);
            words[2].store(extent.offset, Ordering::Relaxed);
        }
        // Release: partner is read()'s first acquire load.
        self.key.store(view.key, Ordering::Release);
    }

    /// Owner: kills the key. In-flight copies are waited for with [`super::QpShared::quiesced`].
    pub fn kill(&self) {
        self.key.store(0, Ordering::SeqCst);
    }

    /// How often it was published; of a key that was found valid.
    #[inline(always)]
    pub fn epoch(&self) -> u32 {
        self.epoch.load(Ordering::Relaxed)
    }

    /// Is `key` valid at this moment?
    pub fn is(&self, key: u32) -> bool {
        self.key.load(Ordering::Acquire) == key && key != 0
    }

    /// May `key` of protection domain `pd` be used for `[iova, iova+len)` with all rights of `need`? Returns the owner's
    /// virtual address of `iova`.
    #[inline(always)]
    pub fn check(&self, key: u32, pd: u32, need: Access, iova: u64, len: u64) -> Option<u64> {
        if !self.is(key) {
            return None;
        }
        let access = Access::from_bits_truncate(self.access.load(Ordering::Relaxed));
        let allowed = self.pd.load(Ordering::Relaxed) == pd && access.contains(need);
        let bounds = MrView {
            iova: self.iova.load(Ordering::Relaxed),
            addr: self.addr.load(Ordering::Relaxed),
            len: self.len.load(Ordering::Relaxed),
            ..MrView::default()
        };
        fence(Ordering::Acquire);
        if allowed && self.is(key) { bounds.translate(iova, len) } else { None }
    }

    /// Where `len` bytes under the lkey of `pd`'s null region are, whatever their address.
    #[cold]
    pub fn check_null(&self, key: u32, pd: u32, need: Access, len: u64) -> Option<u64> {
        let view = self.read(key)?;
        let place = if need.contains(Access::LOCAL_WRITE) { view.addr } else { view.iova };
        (view.pd == domain::null_of_pd(pd) && len <= view.len).then_some(place)
    }

    /// The same of a memory window that queue pair `qpn` of `pd` may use; with the binding it has.
    #[cold]
    pub fn check_window(
        &self,
        key: u32,
        (pd, qpn): (u32, u32),
        need: Access,
        iova: u64,
        len: u64,
    ) -> Option<(u64, u32)> {
        let view = self.read(key)?;
        let granted = [domain::window_of_pd(pd), domain::window_of_qp(qpn)].contains(&view.pd);
        let va = view.translate(iova, len)?;
        (granted && view.access.contains(need)).then_some((va, view.epoch))
    }

    /// Copies the entry out if it is `key`'s.
    pub fn read(&self, key: u32) -> Option<MrView> {
        if !self.is(key) {
            return None;
        }
        let view = MrView {
            key,
            access: Access::from_bits_truncate(self.access.load(Ordering::Relaxed)),
            pd: self.pd.load(Ordering::Relaxed),
            iova: self.iova.load(Ordering::Relaxed),
            addr: self.addr.load(Ordering::Relaxed),
            len: self.len.load(Ordering::Relaxed),
            extent_count: self.extents.load(Ordering::Relaxed),
            epoch: self.epoch.load(Ordering::Relaxed),
            extents: std::array::from_fn(|i| Extent {
                va: self.extent[i][0].load(Ordering::Relaxed),
                len: self.extent[i][1].load(Ordering::Relaxed),
                offset: self.extent[i][2].load(Ordering::Relaxed),
            }),
        };
        // The fields above are one version's if the key did not change meanwhile (keys are never used twice in a row).
        fence(Ordering::Acquire);
        self.is(key).then_some(view)
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;

    #[test]
    fn a_key_is_valid_between_publish_and_kill() {
        let entry = MrEntry::default();
        let view = MrView { key: 0x1234_0001, len: 10, iova: 100, addr: 5000, epoch: 1, ..MrView::default() };
        assert_eq!(entry.read(0), None);
        entry.publish(&view);
        assert_eq!(entry.read(0x1234_0001), Some(view));
        assert_eq!(entry.read(0x1235_0001), None);
        entry.kill();
        assert_eq!(entry.read(0x1234_0001), None);
    }

    #[test]
    fn a_key_is_made_of_its_slot_and_two_random_bytes() {
        assert_eq!(key_of(0x1234, 0xabcd), 0xab12_34cd);
        assert_eq!(slot_of(0xab12_34cd), 0x1234);
        assert!(same_window(0xab12_34cd, 0xab12_34ff) && !same_window(0xab12_34cd, 0xab12_35cd));
    }

    #[test]
    fn a_window_is_its_domains_and_no_pds() {
        let (entry, key, read) = (MrEntry::default(), key_of(1, 0x0707), Access::REMOTE_READ);
        let view = MrView { key, access: read, len: 10, iova: 100, addr: 5000, ..MrView::default() };
        entry.publish(&MrView { pd: domain::window_of_pd(3), ..view });
        assert_eq!(entry.check(key, 3, read, 100, 10), None, "no lkey");
        assert_eq!(entry.check_window(key, (3, 9), read, 101, 9), Some((5001, 1)));
        assert_eq!(entry.check_window(key, (4, 9), read, 101, 9), None);
        assert_eq!(entry.check_window(key, (3, 9), read, 101, 10), None);
        assert_eq!(entry.check_window(key, (3, 9), read | Access::REMOTE_WRITE, 101, 1), None);
        entry.publish(&MrView { pd: domain::window_of_qp(9), ..view });
        assert_eq!(entry.check_window(key, (3, 9), read, 100, 0), Some((5000, 2)));
        assert_eq!(entry.check_window(key, (3, 8), read, 100, 0), None);
    }

    #[test]
    fn bounds() {
        let view = MrView { len: 10, iova: 100, addr: 5000, ..MrView::default() };
        assert_eq!(view.translate(100, 10), Some(5000));
        assert_eq!(view.translate(110, 0), Some(5010));
        assert_eq!(view.translate(101, 10), None);
        assert_eq!(view.translate(99, 1), None);
        assert_eq!(view.translate(105, u64::MAX), None);
        let extent = Extent { va: 4096, len: 4096, offset: 0 };
        assert!(extent.holds(4096, 4096) && extent.holds(8192, 0));
        assert!(!extent.holds(4096, 4097) && !extent.holds(4095, 1) && !extent.holds(8191, u64::MAX));
    }
}
