//! Every interleaving of the protocol of shared receive queues.

use loom::sync::Arc;
use loom::thread;

use super::loom_tests::{breaks, model};
use super::*;
use crate::verbs::Sge;

/// A shared receive queue, and two QPs that use it, with one ticket each.
#[derive(Default)]
struct Queue {
    header: SrqShared,
    slots: Vec<RecvSlot>,
    tickets: [[RecvSlot; 1]; 2],
    qps: [QpShared; 2],
}

impl Queue {
    fn new(depth: usize) -> Arc<Self> {
        let slots = std::iter::repeat_with(RecvSlot::default).take(depth).collect();
        Arc::new(Queue { slots, ..Queue::default() })
    }

    fn ring(&self) -> SrqRing<'_> {
        SrqRing { header: &self.header, slots: RqShared::new(&self.slots) }
    }

    fn tickets(&self, qp: usize) -> RqShared<'_> {
        RqShared::new(&self.tickets[qp])
    }

    /// The number of the receive that a message to QP `qp` was put into.
    fn send(&self, qp: usize) -> Option<u32> {
        let ready = self.ring().claim_connected(self.tickets(qp), &self.qps[qp], 5 + qp as u32);
        let Ready::Claim(claim) = ready else { return None };
        let sges: Vec<Sge> = claim.sges().collect();
        assert!(sges.len() == 1 && sges[0].lkey == 3, "its list was not there");
        claim.complete(&Completion::default(), true);
        Some(sges[0].length)
    }

    fn post(&self, seq: u32) {
        self.ring().post(seq, &[Sge { addr: 1, length: seq, lkey: 3 }]);
    }
}

fn one_receive_goes_to_one_of_two_queue_pairs() {
    let queue = Queue::new(1);
    queue.post(0);
    let other = Arc::clone(&queue);
    let sender = thread::spawn(move || other.send(0));
    let mine = queue.send(1);
    let theirs = sender.join().expect("sender");
    assert!(mine.is_some() ^ theirs.is_some(), "exactly one takes it");
    let taker = queue.ring().taker(0).expect("taken").owner;
    assert_eq!(taker, if mine.is_some() { 6 } else { 5 });
}

/// Whoever does not find number 1 there yet must not take it for a slot in use and pass it over because 2 is there.
fn no_receive_is_passed_over() {
    let queue = Queue::new(4);
    queue.post(0);
    assert_eq!(queue.send(0), Some(0));
    let other = Arc::clone(&queue);
    let sender = thread::spawn(move || other.send(1));
    queue.post(1);
    queue.post(2);
    let first = sender.join().expect("sender");
    assert_eq!(first.or_else(|| queue.send(1)), Some(1), "number 1 is lost");
}

/// A ring that was full is polled while its sender goes to sleep: it sees that, or is told.
fn a_sender_that_waits_for_a_poll_is_told() {
    let queue = Queue::new(2);
    (0..2).for_each(|seq| queue.post(seq));
    assert_eq!(queue.send(0), Some(0));
    let other = Arc::clone(&queue);
    let owner = thread::spawn(move || {
        other.qps[0].polled(1);
        other.qps[0].receive_posted()
    });
    queue.qps[0].wait_for_receive();
    let sent = queue.send(0).is_some();
    let told = owner.join().expect("owner");
    assert!(sent || told, "it would sleep for ever");
}

/// The same of a receive that is posted.
fn a_sender_that_waits_for_a_receive_is_told() {
    let queue = Queue::new(1);
    let other = Arc::clone(&queue);
    let owner = thread::spawn(move || {
        other.post(0);
        other.header.receive_posted()
    });
    queue.header.wait_for_receive();
    let ready = queue.ring().ready();
    let told = owner.join().expect("owner");
    assert!(ready || told, "it would sleep for ever");
}

fn a_limit_is_told_by_somebody() {
    let queue = Queue::new(2);
    queue.post(0);
    let other = Arc::clone(&queue);
    let sender = thread::spawn(move || other.send(0).is_some() && other.header.below());
    queue.header.set_limit(1);
    let owner = queue.header.below();
    let taker = sender.join().expect("sender");
    assert!(owner ^ taker, "told by both or by nobody");
}

/// Whichever way it came: the list of a receive that a datagram takes is there. (No ordering is missed here alone: the
/// checker takes the fence of a taker that advances the head for as good as the release, so either may be lacking.)
fn a_datagram_takes_a_whole_receive() {
    let queue = Queue::new(1);
    queue.tickets(0).post(0, &[]);
    let other = Arc::clone(&queue);
    let sender = thread::spawn(move || {
        let claim = other.ring().claim_datagram(other.tickets(0), &other.qps[0].head, 9)?;
        let lkeys: Vec<u32> = claim.sges().map(|sge| sge.lkey).collect();
        claim.complete(&Completion::default(), true);
        Some(lkeys)
    });
    queue.post(0);
    if let Some(lkeys) = sender.join().expect("sender") {
        assert_eq!(lkeys, [3], "its list was not there");
    }
}

macro_rules! holds {
    ($($name:ident: $protocol:ident;)*) => { $(
        #[test]
        fn $name() {
            model($protocol);
        }
    )* };
}

holds! {
    loom_one_shared_receive_goes_to_one_of_two_queue_pairs: one_receive_goes_to_one_of_two_queue_pairs;
    loom_no_shared_receive_is_passed_over: no_receive_is_passed_over;
    loom_a_sender_that_waits_for_a_poll_is_told: a_sender_that_waits_for_a_poll_is_told;
    loom_a_sender_that_waits_for_a_shared_receive_is_told: a_sender_that_waits_for_a_receive_is_told;
    loom_a_limit_is_told_by_somebody: a_limit_is_told_by_somebody;
    loom_a_datagram_takes_a_whole_shared_receive: a_datagram_takes_a_whole_receive;
}

breaks! {
    loom_without_swaps_two_queue_pairs_take_one_receive:
        one_receive_goes_to_one_of_two_queue_pairs without Swaps, "exactly one takes it";
    loom_without_acquire_a_shared_receive_is_passed_over: no_receive_is_passed_over without Acquire, "is lost";
    loom_without_fences_a_sender_that_waits_for_a_poll_sleeps:
        a_sender_that_waits_for_a_poll_is_told without Fences, "for ever";
    loom_without_fences_a_sender_that_waits_for_a_shared_receive_sleeps:
        a_sender_that_waits_for_a_receive_is_told without Fences, "for ever";
    loom_without_fences_a_limit_is_told_by_nobody: a_limit_is_told_by_somebody without Fences, "told by both or by nobody";
}
