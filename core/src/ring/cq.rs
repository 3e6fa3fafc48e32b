//! A CQ's shared header: may a peer's completion wake somebody, and which receive queues have something.
//!
//! The arm handshake. A sender completes its slot, then looks at `flags`; the owner arms `flags`, then polls again.
//! Both sides put a sequentially consistent fence between store and load, so at least one of them sees the other.
//!
//! Of a moderated CQ only every so many completions wake somebody. Completers count; the first of them rings nevertheless, so
//! that the owner can end the wait after a while (`held`).

use crate::sync::{AtomicU32, AtomicU64, Ordering, asym, fence};

/// Dirty bits; QPs beyond share bits.
pub const DIRTY_BITS: u32 = 64 * 64;

const ARMED: u32 = 1;
const ARMED_SOLICITED: u32 = 2;
/// A peer rang: the channel's owner finds the CQ by this bit.
const RUNG: u32 = 4;
/// Many queues feed this CQ: senders mark the dirty map.
const MAPPED: u32 = 8;
/// Nobody sleeps on this CQ, and its owner has the heavy fences of [`asym`]: completers need none.
const QUIET: u32 = 16;

/// Completers count completions: not each wakes somebody.
const MODERATED: u32 = 32;
/// There are fewer completions than make an event, and the owner was told so.
const HELD: u32 = 64;

/// Shared header of a completion queue.
#[derive(Debug)]
#[repr(C, align(64))]
pub struct CqShared {
    flags: AtomicU32,
    /// Owner: of a moderated CQ, how many completions make an event; 0: no number does.
    every: AtomicU32,
    /// Completers, of a moderated CQ that is armed: completions since its last event.
    counted: AtomicU32,
    _pad: [u32; 13],
    /// One line with the words of the first QPs: completers write both.
    summary: AtomicU64,
    words: [AtomicU64; 64],
}

impl Default for CqShared {
    fn default() -> Self {
        CqShared {
            flags: AtomicU32::new(0),
            every: AtomicU32::new(0),
            counted: AtomicU32::new(0),
            _pad: [0; 13],
            summary: AtomicU64::new(0),
            words: std::array::from_fn(|_| AtomicU64::new(0)),
        }
    }
}

/// What a completion must do after it is visible.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[must_use]
pub enum Ring {
    No,
    /// Write to the bell of the CQ's channel.
    Bell,
}

impl CqShared {
    /// Completer, after the completion is visible: marks queue `bit` and says whether the sleeper must be woken.
    pub fn completed(&self, bit: Option<u32>, solicited: bool) -> Ring {
        // Partner: the fences in arm() and map().
        fence(Ordering::SeqCst);
        self.completed_fenced(bit, solicited)
    }

    /// Does the store before [`CqShared::completed_fenced`] need its fence?
    #[inline]
    pub fn needs_fence(&self) -> bool {
        !asym::works() || self.flags.load(Ordering::Relaxed) & QUIET == 0
    }

    /// The same for a send of the owner's own process, which was marked when it began.
    #[inline]
    pub fn completed_here(&self, solicited: bool) -> Ring {
        // Partner: the heavy fence in arm().
        if asym::works() {
            asym::light();
        } else {
            fence(Ordering::SeqCst);
        }
        self.completed_fenced(None, solicited)
    }

    /// The same right after [`super::Claim::complete`], whose store has the fence behind it, if this CQ needs one.
    #[inline]
    pub fn completed_fenced(&self, bit: Option<u32>, solicited: bool) -> Ring {
        let flags = self.flags.load(Ordering::Relaxed);
        if flags & (MAPPED | ARMED | ARMED_SOLICITED) == 0 {
            return Ring::No;
        }
        if let (Some(bit), true) = (bit, flags & MAPPED != 0) {
            self.mark(bit);
            // Partner: the fences in arm(). Its owner looks for marks next, and we for the arm word. The exchange in mark() is
            // one itself here.
            if cfg!(any(not(target_arch = "x86_64"), loom)) {
                fence(Ordering::SeqCst);
            }
        }
        self.wake(solicited)
    }

    fn wake(&self, solicited: bool) -> Ring {
        let wanted = if solicited { ARMED | ARMED_SOLICITED } else { ARMED };
        let flags = self.flags.load(Ordering::Relaxed);
        if flags & wanted != 0 && flags & MODERATED != 0 && !self.counts_up() {
            return self.hold(wanted);
        }
        self.ring(wanted)
    }

    /// Whoever finds one of `wanted` has the owner woken.
    fn ring(&self, wanted: u32) -> Ring {
        let mut flags = self.flags.load(Ordering::Relaxed);
        while flags & wanted != 0 {
            let rung = (flags & !(ARMED | ARMED_SOLICITED | HELD)) | RUNG;
            match self.flags.compare_exchange_weak(flags, rung, Ordering::AcqRel, Ordering::Relaxed) {
                Ok(_) => return Ring::Bell,
                Err(now) => flags = now,
            }
        }
        Ring::No
    }

    /// Counts a completion: does it make the event?
    #[cold]
    fn counts_up(&self) -> bool {
        let every = self.every.load(Ordering::Relaxed);
        let counted = self.counted.fetch_add(1, Ordering::Relaxed).wrapping_add(1);
        let enough = every != 0 && counted >= every;
        if enough {
            self.counted.store(0, Ordering::Relaxed);
        }
        enough
    }

    /// The first of those that make no event tells the owner, which waits for more for a while.
    #[cold]
    fn hold(&self, wanted: u32) -> Ring {
        let mut flags = self.flags.load(Ordering::Relaxed);
        while flags & wanted != 0 && flags & HELD == 0 {
            match self.flags.compare_exchange_weak(flags, flags | HELD, Ordering::AcqRel, Ordering::Relaxed) {
                Ok(_) => return Ring::Bell,
                Err(now) => flags = now,
            }
        }
        Ring::No
    }

    /// Owner: from now on `every` completions make an event (0: no number does, only [`CqShared::release`]). None: each does.
    pub fn moderate(&self, every: Option<u32>) {
        self.every.store(every.unwrap_or(0), Ordering::Relaxed);
        self.counted.store(0, Ordering::Relaxed);
        if every.is_some() {
            self.flags.fetch_or(MODERATED, Ordering::AcqRel);
        } else {
            self.flags.fetch_and(!MODERATED, Ordering::AcqRel);
        }
    }

    /// Owner: are there completions that have made no event yet, of an armed CQ?
    pub fn is_held(&self) -> bool {
        self.flags.load(Ordering::Acquire) & HELD != 0
    }

    /// Owner: it has waited long enough; what is held makes an event.
    pub fn release(&self) -> Ring {
        if !self.is_held() {
            return Ring::No;
        }
        self.counted.store(0, Ordering::Relaxed);
        self.ring(ARMED | ARMED_SOLICITED)
    }

    /// Owner: the next completion (or solicited one) rings. The caller's program polls again afterwards, as verbs demand.
    pub fn arm(&self, solicited_only: bool) {
        self.flags.fetch_or(if solicited_only { ARMED_SOLICITED } else { ARMED }, Ordering::AcqRel);
        // Partner: the fences in completed() and completed_here().
        asym::heavy_here();
    }

    /// The same of an owner whose completers are all other processes, and say [`CqShared::completed`].
    pub fn arm_for_others(&self) {
        self.flags.fetch_or(ARMED, Ordering::AcqRel);
        // Partner: the fence in completed().
        fence(Ordering::SeqCst);
    }

    /// Owner: it looks by itself now. Who has taken the mark before rings nevertheless.
    pub fn disarm(&self) {
        self.flags.fetch_and(!(ARMED | ARMED_SOLICITED | HELD), Ordering::Relaxed);
    }

    /// Owner: is something marked?
    #[inline]
    pub fn is_dirty(&self) -> bool {
        self.summary.load(Ordering::Relaxed) != 0
    }

    /// Owner: did someone ring since the last call?
    pub fn take_rung(&self) -> bool {
        self.flags.load(Ordering::Relaxed) & RUNG != 0
            && self.flags.fetch_and(!RUNG, Ordering::AcqRel) & RUNG != 0
    }

    /// Owner: is a ring waiting to be taken?
    pub fn is_rung(&self) -> bool {
        self.flags.load(Ordering::Relaxed) & RUNG != 0
    }

    /// Owner: makes the memory of an earlier CQ this one's. `sleeps`: it has a channel to sleep on.
    pub fn reset(&self, sleeps: bool) {
        let quiet = if !sleeps && asym::works() { QUIET } else { 0 };
        self.flags.store(quiet, Ordering::Relaxed);
        self.every.store(0, Ordering::Relaxed);
        self.counted.store(0, Ordering::Relaxed);
        self.summary.store(0, Ordering::Relaxed);
        for word in &self.words {
            word.store(0, Ordering::Relaxed);
        }
    }

    /// Owner: from now on senders mark the dirty map. The caller must scan all queues once afterwards.
    pub fn map(&self) {
        self.flags.fetch_or(MAPPED, Ordering::AcqRel);
        // Partner: the fence of a completer, or of its store. Either it sees the flag or the scan sees the completion.
        asym::heavy();
    }

    /// Completer: queue `bit` has something. Needs no fence: whoever takes the mark sees the completion.
    pub fn mark(&self, bit: u32) {
        let bit = bit % DIRTY_BITS;
        // Release: partner is drain_dirty()'s acquire swap. Word before summary: a drained summary bit has its word.
        let word = &self.words[bit as usize / 64];
        if word.fetch_or(1 << (bit % 64), Ordering::AcqRel) & (1 << (bit % 64)) == 0
            || self.summary.load(Ordering::Relaxed) & (1 << (bit / 64)) == 0
        {
            self.summary.fetch_or(1 << (bit / 64), Ordering::AcqRel);
        }
    }

    /// Owner: calls `each` with every dirty bit, clearing them.
    pub fn drain_dirty(&self, mut each: impl FnMut(u32)) {
        if self.summary.load(Ordering::Relaxed) == 0 {
            return;
        }
        let mut summary = self.summary.swap(0, Ordering::AcqRel);
        while summary != 0 {
            let index = summary.trailing_zeros();
            summary &= summary - 1;
            let mut word = self.words[index as usize].swap(0, Ordering::AcqRel);
            while word != 0 {
                each(index * 64 + word.trailing_zeros());
                word &= word - 1;
            }
        }
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;

    #[test]
    fn one_arm_one_ring() {
        let cq = CqShared::default();
        assert_eq!(cq.completed(Some(1), false), Ring::No);
        cq.arm(false);
        assert_eq!(cq.completed(Some(1), false), Ring::Bell);
        assert_eq!(cq.completed(Some(1), false), Ring::No);
        assert!(cq.take_rung());
        assert!(!cq.take_rung());
    }

    #[test]
    fn solicited_only() {
        let cq = CqShared::default();
        cq.arm(true);
        assert_eq!(cq.completed(None, false), Ring::No);
        assert_eq!(cq.completed(None, true), Ring::Bell);
        cq.arm(false);
        assert_eq!(cq.completed(None, true), Ring::Bell);
    }

    #[test]
    fn so_many_completions_ring_once() {
        let cq = CqShared::default();
        cq.moderate(Some(3));
        assert_eq!(cq.completed(None, false), Ring::No, "nobody waits");
        cq.arm(false);
        for _ in 0..2 {
            assert_eq!(cq.completed(None, false), Ring::Bell, "the first tells the owner");
            assert!(cq.is_held() && !cq.is_rung());
            assert_eq!(cq.completed(None, false), Ring::No);
            assert_eq!(cq.completed(None, false), Ring::Bell);
            assert!(cq.take_rung() && !cq.is_held());
            assert_eq!(cq.completed(None, false), Ring::No, "not armed, not counted");
            cq.arm(false);
        }
        cq.moderate(None);
        assert_eq!(cq.completed(None, false), Ring::Bell);
        assert!(cq.take_rung());
    }

    #[test]
    fn what_is_held_rings_when_the_owner_has_waited() {
        let cq = CqShared::default();
        cq.moderate(Some(0));
        cq.arm(true);
        assert_eq!(cq.release(), Ring::No);
        assert_eq!(cq.completed(None, false), Ring::No, "not what it waits for");
        assert_eq!(cq.completed(None, true), Ring::Bell);
        (0..9).for_each(|_| assert_eq!(cq.completed(None, true), Ring::No));
        assert!(!cq.is_rung());
        assert_eq!(cq.release(), Ring::Bell);
        assert!(cq.take_rung());
        assert_eq!(cq.release(), Ring::No);
    }

    #[test]
    fn dirty_bits_come_out_once() {
        let cq = CqShared::default();
        let _ = cq.completed(Some(5), false);
        cq.map();
        for bit in [3, 64, 4095, 4096 + 3] {
            let _ = cq.completed(Some(bit), false);
        }
        let mut seen = vec![];
        cq.drain_dirty(|b| seen.push(b));
        assert_eq!(seen, [3, 64, 4095]);
        cq.drain_dirty(|_| panic!("already drained"));
    }
}
