//! Every interleaving of the shared-memory protocols, and proof that the orderings are needed.
//!
//! Run with `RUSTFLAGS="--cfg loom" cargo test --release -p freeflow-core --lib loom_`.

use loom::sync::Arc;
use loom::thread;

use super::marks::Known;
use super::*;
use crate::sync::weak::{Lack, lack};
use crate::sync::{AtomicU32, Ordering, fence};

/// Preemptions per execution: enough for every two-party race here, few enough for minutes.
const PREEMPTIONS: usize = 3;

/// The same with something missing from atomics or fences: whoever calls this expects a panic.
pub(super) fn model_without(what: Lack, test: fn()) {
    lack(what);
    model(test);
}

pub(super) fn model(test: fn()) {
    let mut builder = loom::model::Builder::new();
    builder.preemption_bound = Some(PREEMPTIONS);
    builder.check(test);
}

/// Slots, hint and header of one receive queue.
#[derive(Default)]
struct Queue {
    slots: Vec<RecvSlot>,
    qp: QpShared,
    cq: CqShared,
}

impl Queue {
    fn new(depth: usize) -> Arc<Self> {
        let slots = std::iter::repeat_with(RecvSlot::default).take(depth).collect();
        Arc::new(Queue { slots, ..Queue::default() })
    }

    fn rq(&self) -> RqShared<'_> {
        RqShared::new(&self.slots)
    }

    fn send(&self, client: u32) -> bool {
        self.fill(client).is_some()
    }

    /// The same; was its store fenced?
    fn fill(&self, client: u32) -> Option<bool> {
        let claim = self.rq().claim(&self.qp.head, client)?;
        claim.write_inline(&[client as u8; 8]);
        let fenced = self.cq.needs_fence();
        claim.complete(&Completion { byte_len: client, ..Completion::default() }, fenced);
        Some(fenced)
    }

    /// Sends to the queue pair that has mark `bit`; was its owner woken?
    fn deliver(&self, bit: Option<u32>) -> bool {
        let fenced = self.fill(1).expect("a receive is posted");
        self.cq.completed_stored(fenced, bit, false) == Ring::Bell
    }

    fn is_filled(&self) -> bool {
        self.rq().take(0, false, false).is_some()
    }

    fn news(&self, known: &mut Known, bit: u32) -> bool {
        let mut found = false;
        self.cq.marks.news(known, |new| found |= new == bit);
        found
    }
}

fn one_receive_goes_to_one_of_two_senders() {
    let queue = Queue::new(1);
    queue.rq().post(0, &[]);
    let other = Arc::clone(&queue);
    let sender = thread::spawn(move || other.send(1));
    let mine = queue.send(2);
    let theirs = sender.join().expect("sender");
    assert!(mine ^ theirs, "exactly one sender wins");
    let Some(Taken::Done(said, payload)) = queue.rq().take(0, false, false) else { panic!("not complete") };
    assert_eq!(said.byte_len, if mine { 2 } else { 1 });
    assert_eq!(payload.read()[7], said.byte_len as u8, "payload and completion are the same sender's");
}

#[test]
fn loom_one_receive_goes_to_one_of_two_senders() {
    model(one_receive_goes_to_one_of_two_senders);
}

fn a_claimed_receive_is_whole() {
    let queue = Queue::new(1);
    let other = Arc::clone(&queue);
    let sender = thread::spawn(move || {
        let claim = other.rq().claim(&other.qp.head, 1)?;
        let sges: Vec<_> = claim.sges().map(|sge| (sge.addr, sge.lkey)).collect();
        claim.complete(&Completion::default(), true);
        Some(sges)
    });
    queue.rq().post(0, &[crate::verbs::Sge { addr: 1, length: 2, lkey: 3 }]);
    if let Some(read) = sender.join().expect("sender") {
        assert_eq!(read, [(1, 3)], "a receive was claimed before its list was there");
    }
}

#[test]
fn loom_a_claimed_receive_is_whole() {
    model(a_claimed_receive_is_whole);
}

fn a_flush_and_a_sender_agree_on_who_has_the_receive() {
    let queue = Queue::new(1);
    queue.rq().post(0, &[]);
    let other = Arc::clone(&queue);
    let sender = thread::spawn(move || other.send(1));
    let mut taken = queue.rq().take(0, true, false);
    let sent = sender.join().expect("sender");
    if taken.is_none() {
        taken = queue.rq().take(0, true, false);
    }
    assert_eq!(sent, matches!(taken, Some(Taken::Done(..))));
}

/// Fills every receive that waits; the owner then has all of `seqs`.
fn fill_and_take(queue: &Queue, seqs: std::ops::Range<u32>) {
    while queue.send(3) {}
    for seq in seqs {
        assert!(queue.rq().take(seq, false, false).is_some(), "receive {seq} is never filled");
    }
}

#[test]
fn loom_a_receive_given_back_is_found_again() {
    model(|| {
        let queue = Queue::new(2);
        (0..2).for_each(|seq| queue.rq().post(seq, &[]));
        let other = Arc::clone(&queue);
        let sender = thread::spawn(move || other.send(1));
        queue.rq().claim(&queue.qp.head, 2).expect("two are posted").release(&queue.qp.head);
        assert!(sender.join().expect("sender"));
        queue.rq().look_back(0, &queue.qp.head);
        fill_and_take(&queue, 0..2);
    });
}

#[test]
fn loom_two_senders_leave_a_hint_that_leads_on() {
    model(|| {
        let queue = Queue::new(2);
        (0..2).for_each(|seq| queue.rq().post(seq, &[]));
        let other = Arc::clone(&queue);
        let sender = thread::spawn(move || other.send(1));
        assert!(queue.send(2) & sender.join().expect("sender"));
        fill_and_take(&queue, 0..2);
        (2..4).for_each(|seq| queue.rq().post(seq, &[]));
        fill_and_take(&queue, 2..4);
    });
}

#[test]
fn loom_a_flush_and_a_sender_agree_on_who_has_the_receive() {
    model(a_flush_and_a_sender_agree_on_who_has_the_receive);
}

/// The owner is the thread that is spawned: loom remembers the last access of a word only, and the sender's own look at it
/// would hide the owner's.
fn a_taken_receive_is_whole() {
    let queue = Queue::new(1);
    queue.rq().post(0, &[]);
    let other = Arc::clone(&queue);
    let owner = thread::spawn(move || match other.rq().take(0, false, false) {
        Some(Taken::Done(said, payload)) => Some((said.byte_len, payload.read()[0])),
        _ => None,
    });
    assert!(queue.send(9));
    if let Some(taken) = owner.join().expect("owner") {
        assert_eq!(taken, (9, 9));
    }
}

#[test]
fn loom_a_taken_receive_is_whole() {
    model(a_taken_receive_is_whole);
}

/// The owner arms and looks again; the sender completes and looks at the arm word.
fn no_wake_up_is_lost() {
    let queue = Queue::new(1);
    queue.rq().post(0, &[]);
    let other = Arc::clone(&queue);
    let sender = thread::spawn(move || other.deliver(None));
    queue.cq.arm(false);
    let seen = queue.rq().take(0, false, false).is_some();
    let rung = sender.join().expect("sender");
    assert!(seen || rung, "the owner would sleep on a completion");
}

/// The same where another thread of the owner's process ends a send, whose fence is the owner's.
fn no_wake_up_is_lost_to_a_send() {
    let queue = Queue::new(1);
    let done = Arc::new(AtomicU32::new(0));
    let (other, ended) = (Arc::clone(&queue), Arc::clone(&done));
    let poster = thread::spawn(move || {
        ended.store(1, Ordering::Release);
        other.cq.completed_here(false) == Ring::Bell
    });
    queue.cq.arm(false);
    let seen = done.load(Ordering::Acquire) == 1;
    let rung = poster.join().expect("poster");
    assert!(seen || rung, "the owner would sleep on a completion");
}

#[test]
fn loom_no_wake_up_is_lost() {
    model(no_wake_up_is_lost);
    model(no_wake_up_is_lost_to_a_send);
}

/// Of a moderated CQ: two senders complete, and the owner ends the wait at any moment. Either the event is made, or it is held
/// back, and the owner was told so.
fn no_moderated_event_is_lost(every: u32) {
    let cq = Arc::new(CqShared::default());
    cq.moderate(Some(every));
    cq.arm(false);
    let senders = [1, 2].map(|_| {
        let other = Arc::clone(&cq);
        thread::spawn(move || other.completed(None, false) == Ring::Bell)
    });
    let ended = cq.release() == Ring::Bell;
    let told = senders.map(|sender| sender.join().expect("sender"));
    assert!(told.contains(&true), "the owner was told nothing");
    assert!(cq.is_rung() || cq.is_held(), "the owner would sleep on completions");
    assert!(cq.is_rung() || !ended && every > 2, "two completions make an event");
}

#[test]
fn loom_no_moderated_event_is_lost() {
    model(|| no_moderated_event_is_lost(2));
    model(|| no_moderated_event_is_lost(3));
}

fn a_waiting_sender_is_told() {
    let queue = Queue::new(1);
    let other = Arc::clone(&queue);
    let owner = thread::spawn(move || {
        other.rq().post(0, &[]);
        other.qp.receive_posted()
    });
    queue.qp.wait_for_receive();
    let found = queue.rq().ready(&queue.qp.head);
    let told = owner.join().expect("owner");
    assert!(found || told, "the sender would wait for ever");
}

#[test]
fn loom_a_waiting_sender_is_told() {
    model(a_waiting_sender_is_told);
}

/// A peer copies while the owner takes the key back.
fn revoked(qp: QpShared, announces_first: bool) {
    let qp = Arc::new(qp);
    let (entry, page) = (Arc::new(MrEntry::default()), Arc::new(AtomicU32::new(0)));
    entry.publish(&MrView { key: 0x10000, ..MrView::default() });
    let (qp2, entry2, page2) = (Arc::clone(&qp), Arc::clone(&entry), Arc::clone(&page));
    let copier = thread::spawn(move || {
        let too_early = !announces_first && entry2.is(0x10000);
        let _in_flight = qp2.enter();
        if too_early || entry2.is(0x10000) {
            page2.store(1, Ordering::Relaxed);
        }
    });
    entry.kill();
    let mut since = None;
    while let Err(word) = qp.quiesced(since) {
        since = Some(word);
        thread::yield_now();
    }
    let at_return = page.load(Ordering::Relaxed);
    copier.join().expect("copier");
    assert_eq!(page.load(Ordering::Relaxed), at_return, "a copy landed after deregistration returned");
}

fn nothing_lands_after_revocation() {
    revoked(QpShared::default(), true);
}

/// An owner that made its header ready has the heavy fence, and spares its peer the other one.
fn nothing_lands_after_revocation_with_one_fence() {
    let qp = QpShared::default();
    qp.reset();
    revoked(qp, true);
}

#[test]
fn loom_nothing_lands_after_revocation() {
    model(nothing_lands_after_revocation);
    model(nothing_lands_after_revocation_with_one_fence);
}

fn something_lands_if_the_key_is_checked_before_announcing() {
    revoked(QpShared::default(), false);
}

#[test]
#[should_panic(expected = "landed after")]
fn loom_something_lands_if_the_key_is_checked_before_announcing() {
    model(something_lands_if_the_key_is_checked_before_announcing);
}

fn an_entry_is_read_whole_or_not_at_all() {
    let entry = Arc::new(MrEntry::default());
    let version =
        |n: u32| MrView { key: n << 24, addr: n.into(), len: n.into(), epoch: n, ..MrView::default() };
    entry.publish(&version(1));
    let other = Arc::clone(&entry);
    let reader = thread::spawn(move || other.read(1 << 24));
    entry.kill();
    entry.publish(&version(2));
    if let Some(view) = reader.join().expect("reader") {
        assert_eq!(view, version(1));
    }
}

#[test]
fn loom_an_entry_is_read_whole_or_not_at_all() {
    model(an_entry_is_read_whole_or_not_at_all);
}

/// What is marked is there, and what is there is marked, for an owner that finds marks by `marked`.
fn a_mark_is_not_lost(mut marked: impl FnMut(&Queue) -> bool) {
    let queue = Queue::new(1);
    queue.rq().post(0, &[]);
    queue.cq.map();
    let other = Arc::clone(&queue);
    let sender = thread::spawn(move || {
        other.deliver(Some(70));
    });
    let mut taken = false;
    let mut look = || {
        if marked(&queue) && !taken {
            taken = queue.is_filled();
            assert!(taken, "the mark came before the completion");
        }
    };
    look();
    sender.join().expect("sender");
    look();
    assert!(taken, "a completed receive without a mark");
    fence(Ordering::SeqCst);
}

fn a_mark_is_not_lost_to_a_drain() {
    a_mark_is_not_lost(|queue| {
        let mut found = false;
        queue.cq.marks.drain(|bit| found |= bit == 70);
        found
    });
}

fn a_mark_is_not_lost_to_a_look() {
    let mut known = Known::default();
    a_mark_is_not_lost(|queue| queue.news(&mut known, 70));
}

#[test]
fn loom_a_mark_is_not_lost() {
    model(a_mark_is_not_lost_to_a_drain);
    model(a_mark_is_not_lost_to_a_look);
}

/// The owner turns to the dirty map while a sender completes: marked, or seen by the scan that follows.
fn nothing_is_missed_by_the_turn_to_marks(sleeps: bool) {
    let queue = Queue::new(1);
    queue.cq.reset(sleeps);
    queue.rq().post(0, &[]);
    let other = Arc::clone(&queue);
    let sender = thread::spawn(move || {
        other.deliver(Some(3));
    });
    queue.cq.map();
    let seen = queue.rq().take(0, false, false).is_some();
    sender.join().expect("sender");
    let mut marked = false;
    queue.cq.marks.drain(|bit| marked |= bit == 3);
    assert!(seen || marked, "a completion that nobody looks for");
}

/// A queue that was silent is to be forgotten while a sender finds its mark standing: seen by the last look, or marked anew.
fn a_mark_that_stood_is_not_lost() {
    let (queue, mut known) = (Queue::new(1), Known::default());
    queue.rq().post(0, &[]);
    queue.cq.map();
    queue.cq.marks.mark(3);
    assert!(queue.news(&mut known, 3));
    let other = Arc::clone(&queue);
    let sender = thread::spawn(move || other.deliver(Some(3)));
    queue.cq.marks.unmark(&mut known, 3);
    let seen = queue.is_filled();
    sender.join().expect("sender");
    assert!(seen || queue.news(&mut known, 3), "a completion that nobody looks for");
}

/// The same where the CQ turns to marks meanwhile, and another sender, of a queue that shares the mark, has made it.
fn nor_one_of_a_sender_without_fence() {
    let (queue, mut known) = (Queue::new(1), Known::default());
    queue.cq.reset(false);
    queue.rq().post(0, &[]);
    let other = Arc::clone(&queue);
    let sender = thread::spawn(move || other.deliver(Some(3)));
    queue.cq.map();
    let mut seen = queue.is_filled();
    queue.cq.marks.mark(3);
    assert!(queue.news(&mut known, 3));
    queue.cq.marks.unmark(&mut known, 3);
    seen |= queue.is_filled();
    sender.join().expect("sender");
    assert!(seen || queue.news(&mut known, 3), "a completion that nobody looks for");
}

/// The last mark of a word is taken away while its neighbour is made: the summary leads to that.
fn a_neighbours_mark_is_found() {
    let (queue, mut known) = (Queue::new(1), Known::default());
    queue.rq().post(0, &[]);
    queue.cq.map();
    queue.cq.marks.mark(3);
    assert!(queue.news(&mut known, 3));
    let other = Arc::clone(&queue);
    let sender = thread::spawn(move || other.deliver(Some(4)));
    queue.cq.marks.unmark(&mut known, 3);
    sender.join().expect("sender");
    assert!(queue.news(&mut known, 4), "a completed receive without a mark");
}

#[test]
fn loom_a_mark_that_stood_is_not_lost() {
    model(a_mark_that_stood_is_not_lost);
    model(nor_one_of_a_sender_without_fence);
    model(a_neighbours_mark_is_found);
}

/// The owner arms and looks at what is marked. Of two senders that share a mark one makes it, and the other finds it standing.
fn no_wake_up_is_lost_beside_a_mark() {
    let queue = Queue::new(1);
    queue.cq.reset(true);
    queue.rq().post(0, &[]);
    queue.cq.map();
    let (one, two) = (Arc::clone(&queue), Arc::clone(&queue));
    let first = thread::spawn(move || one.cq.completed(Some(3), false) == Ring::Bell);
    let second = thread::spawn(move || two.deliver(Some(3)));
    queue.cq.arm(false);
    let seen = queue.news(&mut Known::default(), 3) && queue.is_filled();
    let rung = [first, second].map(|sender| sender.join().expect("sender"));
    assert!(seen || rung.contains(&true), "the owner would sleep on a completion");
}

#[test]
fn loom_no_wake_up_is_lost_beside_a_mark() {
    model(no_wake_up_is_lost_beside_a_mark);
}

fn nothing_is_missed_where_somebody_sleeps() {
    nothing_is_missed_by_the_turn_to_marks(true);
}

fn nothing_is_missed_where_nobody_sleeps() {
    nothing_is_missed_by_the_turn_to_marks(false);
}

#[test]
fn loom_nothing_is_missed_by_the_turn_to_marks() {
    model(nothing_is_missed_where_somebody_sleeps);
    model(nothing_is_missed_where_nobody_sleeps);
}

// ---- each protocol again with something missing: the model checker has to find what breaks ------------------------------

macro_rules! breaks {
    ($($name:ident: $protocol:ident without $what:ident, $message:literal;)*) => { $(
        #[test]
        #[should_panic(expected = $message)]
        fn $name() {
            $crate::ring::loom_tests::model_without($crate::sync::weak::Lack::$what, $protocol);
        }
    )* };
}

pub(super) use breaks;

breaks! {
    loom_without_swaps_two_senders_win: one_receive_goes_to_one_of_two_senders without Swaps, "exactly one sender wins";
    loom_without_swaps_a_flushed_receive_is_filled:
        a_flush_and_a_sender_agree_on_who_has_the_receive without Swaps, "left == right";
    loom_without_release_a_claimed_list_is_torn: a_claimed_receive_is_whole without Release, "claimed before its list";
    loom_without_acquire_a_claimed_list_is_torn: a_claimed_receive_is_whole without Acquire, "claimed before its list";
    loom_without_release_a_taken_receive_is_torn: a_taken_receive_is_whole without Release, "left == right";
    loom_without_acquire_a_taken_receive_is_torn: a_taken_receive_is_whole without Acquire, "left == right";
    loom_without_fences_a_wake_up_is_lost: no_wake_up_is_lost without Fences, "the owner would sleep";
    loom_without_fences_a_wake_up_is_lost_to_a_send:
        no_wake_up_is_lost_to_a_send without Fences, "the owner would sleep";
    loom_without_fences_a_sender_waits_for_ever: a_waiting_sender_is_told without Fences, "would wait for ever";
    loom_without_fences_a_copy_lands_late: nothing_lands_after_revocation without Fences, "landed after";
    loom_without_its_fence_a_copy_lands_late:
        nothing_lands_after_revocation_with_one_fence without Fences, "landed after";
    loom_without_release_a_copy_lands_late: nothing_lands_after_revocation without Release, "landed after";
    loom_without_fences_an_entry_is_torn: an_entry_is_read_whole_or_not_at_all without Fences, "left == right";
    loom_without_fences_a_completion_is_missed: nothing_is_missed_where_somebody_sleeps without Fences, "nobody looks";
    loom_without_its_fence_a_completion_is_missed: nothing_is_missed_where_nobody_sleeps without Fences, "nobody looks";
    loom_without_fences_a_standing_mark_is_lost: a_mark_that_stood_is_not_lost without Fences, "nobody looks";
    loom_without_acquire_a_neighbours_mark_is_lost: a_neighbours_mark_is_found without Acquire, "without a mark";
    loom_without_fences_a_marked_completion_is_slept_on:
        no_wake_up_is_lost_beside_a_mark without Fences, "the owner would sleep";
    loom_without_acquire_a_mark_comes_early: a_mark_is_not_lost_to_a_look without Acquire, "before the completion";
    loom_without_acquire_a_drained_mark_comes_early:
        a_mark_is_not_lost_to_a_drain without AcquireAndFences, "before the completion";
}

/// Two messages through a FIFO of one slot: each arrives whole, and the slot is not written while it is read.
fn a_fifo_hands_over_whole_messages() {
    let ends = Arc::new((FifoShared::default(), [FifoSlot::default()]));
    let theirs = Arc::clone(&ends);
    let sending = thread::spawn(move || {
        let fifo = Fifo { shared: &theirs.0, slots: &theirs.1 };
        let mut sender = FifoSender::new(1, 64);
        let mut sent = 0;
        for value in 1..=2 {
            let Some(slot) = sender.slot(fifo) else { break };
            slot.payload_word().store(value, Ordering::Relaxed);
            let _ = sender.publish(fifo, 8, 0, None);
            sent = value;
        }
        sent
    });
    let fifo = Fifo { shared: &ends.0, slots: &ends.1 };
    let mut receiver = FifoReceiver::default();
    let mut got = 0;
    for _ in 0..2 {
        if let Some((_, slot, _)) = receiver.peek(fifo) {
            got += 1;
            assert_eq!(slot.payload_word().load(Ordering::Relaxed), got, "the payload of another message");
            receiver.consume(fifo);
        }
    }
    assert!(got <= sending.join().expect("sender"));
}

#[test]
fn loom_a_fifo_hands_over_whole_messages() {
    model(a_fifo_hands_over_whole_messages);
}

#[test]
#[should_panic]
fn loom_a_fifo_without_acquire_does_not() {
    model_without(Lack::Acquire, a_fifo_hands_over_whole_messages);
}

#[test]
#[should_panic]
fn loom_a_fifo_without_release_does_not() {
    model_without(Lack::Release, a_fifo_hands_over_whole_messages);
}

/// A receiver that goes to sleep has seen the message, or is rung.
fn nobody_sleeps_on_a_fifo_with_a_message() {
    let ends = Arc::new((FifoShared::default(), [FifoSlot::default()]));
    let theirs = Arc::clone(&ends);
    let sending = thread::spawn(move || {
        let fifo = Fifo { shared: &theirs.0, slots: &theirs.1 };
        FifoSender::new(1, 64).publish(fifo, 0, 0, None)
    });
    let fifo = Fifo { shared: &ends.0, slots: &ends.1 };
    let sleeps = FifoReceiver::default().arm(fifo);
    let rung = sending.join().expect("sender");
    assert!(!sleeps || rung, "asleep beside a message");
}

#[test]
fn loom_nobody_sleeps_on_a_fifo_with_a_message() {
    model(nobody_sleeps_on_a_fifo_with_a_message);
}

#[test]
#[should_panic]
fn loom_without_fences_somebody_sleeps_on_a_fifo() {
    model_without(Lack::Fences, nobody_sleeps_on_a_fifo_with_a_message);
}
