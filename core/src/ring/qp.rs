//! A QP's shared header: what its peer needs to know, and the few words its peer writes.

use crate::sync::{AtomicU32, AtomicU64, Ordering, asym, fence, store_fenced};

/// Shared header of a queue pair, one cache line per writer and rhythm.
#[derive(Debug, Default)]
#[repr(C, align(64))]
pub struct QpShared {
    /// Line 0, owner: a `verbs::QpState`.
    pub state: AtomicU32,
    /// QPN this QP is connected to; 0 for UD.
    pub peer_qpn: AtomicU32,
    /// UD.
    pub qkey: AtomicU32,
    /// The QP's own access flags: what remote operations it serves.
    pub access: AtomicU32,
    /// Encoded min_rnr_timer.
    pub rnr_timer: AtomicU32,
    /// Its own number: the memory of a destroyed QP becomes another QP's, and a late sender must notice.
    pub qpn: AtomicU32,
    /// Not 0: the owner's [`QpShared::quiesced`] has the heavy fence of [`asym`].
    asym: AtomicU32,
    /// With a shared receive queue: tickets polled, told a few at a time.
    pub taken: AtomicU32,
    _pad0: [u32; 8],
    /// Line 1, sender: sequence number of the next receive to claim.
    pub head: AtomicU32,
    _pad1: u32,
    /// Odd while the peer copies ([`InFlight`]).
    in_flight: AtomicU64,
    /// Bytes the peer placed here.
    pub rx_bytes: AtomicU64,
    _pad2: [u64; 5],
    /// Line 2, sender, seldom: a send waits for a receive.
    rnr_waiting: AtomicU32,
    _pad3: [u32; 15],
    /// Line 3, owner: counters for `freeflow ps`.
    pub tx_bytes: AtomicU64,
    pub errors: AtomicU64,
    _pad4: [u64; 6],
}

#[cfg(not(loom))]
const _: () = assert!(size_of::<QpShared>() == 256);

impl QpShared {
    /// Owner: makes the memory of an earlier QP this one's. `head` belongs to the receive queue.
    pub fn reset(&self) {
        for word in [
            &self.state,
            &self.peer_qpn,
            &self.qkey,
            &self.access,
            &self.rnr_timer,
            &self.qpn,
            &self.taken,
            &self.rnr_waiting,
        ] {
            word.store(0, Ordering::Relaxed);
        }
        for word in [&self.in_flight, &self.rx_bytes, &self.tx_bytes, &self.errors] {
            word.store(0, Ordering::Relaxed);
        }
        self.asym.store(u32::from(asym::works()), Ordering::Relaxed);
    }

    /// Sender: a send found no receive. The caller looks once more afterwards: one may have been posted meanwhile, and
    /// nobody would tell.
    pub fn wait_for_receive(&self) {
        self.rnr_waiting.store(1, Ordering::Relaxed);
        // Partner: the fence in RqShared::post(). Either the re-check sees the receive or the owner sees the flag.
        fence(Ordering::SeqCst);
    }

    /// Owner, after posting a receive: must the waiting sender be told? The fence is the one behind RqShared::post's store.
    pub fn receive_posted(&self) -> bool {
        self.rnr_waiting.load(Ordering::Relaxed) != 0 && self.rnr_waiting.swap(0, Ordering::AcqRel) != 0
    }

    /// Owner: every ticket before `number` is polled. A sender that found the ring full and waits is told next.
    pub fn polled(&self, number: u32) {
        // Release: partner is the acquire load in SrqRing::claim_connected(); the ticket was read before.
        self.taken.store(number, Ordering::Release);
        // Partner: the fence in wait_for_receive().
        fence(Ordering::SeqCst);
    }

    /// Peer: announces a copy; the key check comes after.
    #[inline(always)]
    pub fn enter(&self) -> InFlight<'_> {
        let word = self.in_flight.load(Ordering::Relaxed) | 1;
        // Partner: the fence in quiesced(). Either the owner sees the copy or the copier sees the dead key.
        if asym::works() && self.asym.load(Ordering::Relaxed) != 0 {
            self.in_flight.store(word, Ordering::Relaxed);
            asym::light();
        } else {
            store_fenced(&self.in_flight, word);
        }
        InFlight { word: &self.in_flight, value: word }
    }

    /// Owner, after killing a key: has every copy that may have seen it ended? `since` is what the first call returned.
    pub fn quiesced(&self, since: Option<u64>) -> std::result::Result<(), u64> {
        if since.is_none() {
            asym::heavy(); // copies that begin from now on see what the caller has changed
        }
        let now = self.in_flight.load(Ordering::Acquire);
        if now & 1 == 0 || since.is_some_and(|then| then != now) { Ok(()) } else { Err(now) }
    }

    /// Owner: the peer is dead, and the copy it was in the middle of with it.
    pub fn end_copy(&self) {
        let word = self.in_flight.load(Ordering::Relaxed);
        if word & 1 == 1 {
            self.in_flight.store(word.wrapping_add(1), Ordering::Relaxed);
        }
    }

    /// Owner: adds to one of its own counters (single writer).
    pub fn count(counter: &AtomicU64, by: u64) {
        counter.store(counter.load(Ordering::Relaxed).wrapping_add(by), Ordering::Relaxed);
    }
}

/// A copy in progress; ends when dropped.
#[derive(Debug)]
pub struct InFlight<'a> {
    word: &'a AtomicU64,
    value: u64,
}

impl Drop for InFlight<'_> {
    fn drop(&mut self) {
        // Release: the copy's stores come before. Partner: quiesced()'s acquire load.
        self.word.store(self.value.wrapping_add(1), Ordering::Release);
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;

    #[test]
    fn quiescing_waits_for_the_copy_that_was_running() {
        let qp = QpShared::default();
        assert_eq!(qp.quiesced(None), Ok(()));
        let copy = qp.enter();
        let since = qp.quiesced(None).expect_err("running");
        assert_eq!(qp.quiesced(Some(since)), Err(since));
        drop(copy);
        let _next = qp.enter();
        assert_eq!(qp.quiesced(Some(since)), Ok(()), "a later copy saw the dead key");
    }

    #[test]
    fn a_dead_peers_copy_is_not_waited_for() {
        let qp = QpShared::default();
        std::mem::forget(qp.enter());
        assert!(qp.quiesced(None).is_err());
        qp.end_copy();
        assert_eq!(qp.quiesced(None), Ok(()));
        drop(qp.enter());
        assert_eq!(qp.quiesced(None), Ok(()));
    }

    #[test]
    fn rnr_flag_is_taken_once() {
        let qp = QpShared::default();
        assert!(!qp.receive_posted());
        qp.wait_for_receive();
        assert!(qp.receive_posted());
        assert!(!qp.receive_posted());
    }
}
