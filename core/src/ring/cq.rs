//! A CQ's shared header: may a peer's completion wake somebody, and which receive queues have something.
//!
//! The arm handshake. A sender completes its slot, then looks at `flags`; the owner arms `flags`, then polls again.
//! Both sides put a sequentially consistent fence between store and load, so at least one of them sees the other.
//!
//! Of a moderated CQ only every so many completions wake somebody. Completers count; the first of them rings nevertheless, so
//! that the owner can end the wait after a while (`held`).

use crate::sync::{AtomicU32, Ordering, asym, fence, fence_behind_swap};

use super::marks::Marks;

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
    /// Of the queues that feed this CQ, while there are many.
    pub marks: Marks,
}

impl Default for CqShared {
    fn default() -> Self {
        CqShared {
            flags: AtomicU32::new(0),
            every: AtomicU32::new(0),
            counted: AtomicU32::new(0),
            _pad: [0; 13],
            marks: Marks::default(),
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
        self.completed_stored(true, bit, solicited)
    }

    /// Does the store before [`CqShared::completed_stored`] need a fence? Marks do, too: see [`super::marks`].
    #[inline]
    pub fn needs_fence(&self) -> bool {
        !asym::works() || self.flags.load(Ordering::Relaxed) & (QUIET | MAPPED) != QUIET
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
        self.completed_stored(true, None, solicited)
    }

    /// The same right after [`super::Claim::complete`], whose store is `fenced` if this CQ needed that.
    #[inline]
    pub fn completed_stored(&self, fenced: bool, bit: Option<u32>, solicited: bool) -> Ring {
        let flags = self.flags.load(Ordering::Relaxed);
        if flags & (MAPPED | ARMED | ARMED_SOLICITED) == 0 {
            return Ring::No;
        }
        if let (Some(bit), true) = (bit, flags & MAPPED != 0) {
            // Mapped meanwhile, maybe, and without a fence only a mark of one's own making is sure.
            if fenced {
                self.marks.mark_fenced(bit);
            } else {
                self.marks.mark(bit);
            }
            // Partner: the fences in arm(). Its owner looks for marks next, and we for the arm word.
            fence_behind_swap();
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
        self.marks.reset();
    }

    /// Owner: from now on senders mark the dirty map. The caller must scan all queues once afterwards.
    pub fn map(&self) {
        self.flags.fetch_or(MAPPED, Ordering::AcqRel);
        // Partner: the fence of a completer, or of its store. Either it sees the flag or the scan sees the completion.
        asym::heavy();
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
    fn nothing_is_marked_before_the_map_is_asked_for() {
        let cq = CqShared::default();
        let _ = cq.completed(Some(5), false);
        assert!(!cq.marks.any());
        cq.map();
        let _ = cq.completed(Some(5), false);
        assert!(cq.marks.any());
    }
}
