//! Every interleaving of the shared-memory protocols, and proof that the orderings are needed.
//!
//! Run with `RUSTFLAGS="--cfg loom" cargo test --release -p freeflow-core --lib loom_`.

use loom::sync::Arc;
use loom::sync::atomic::{AtomicU32, Ordering, fence};
use loom::thread;

use super::*;

/// Preemptions per execution: enough for every two-party race here, few enough for minutes.
const PREEMPTIONS: usize = 3;

fn model(test: impl Fn() + Sync + Send + 'static) {
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
        self.send_with(client, |claim, said| claim.complete(said))
    }

    fn send_with(&self, client: u32, complete: fn(Claim<'_>, &Completion)) -> bool {
        let Some(claim) = self.rq().claim(&self.qp.head, client) else { return false };
        claim.write_inline(&[client as u8; 8]);
        complete(claim, &Completion { byte_len: client, ..Completion::default() });
        true
    }
}

#[test]
fn loom_one_receive_goes_to_one_of_two_senders() {
    model(|| {
        let queue = Queue::new(1);
        queue.rq().post(0, &[]);
        let other = Arc::clone(&queue);
        let sender = thread::spawn(move || other.send(1));
        let mine = queue.send(2);
        let theirs = sender.join().expect("sender");
        assert!(mine ^ theirs, "exactly one sender wins");
        let Some(Taken::Done(said, payload)) = queue.rq().take(0, false, false) else {
            panic!("not complete")
        };
        assert_eq!(said.byte_len, if mine { 2 } else { 1 });
        assert_eq!(payload.read()[7], said.byte_len as u8, "payload and completion are the same sender's");
    });
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
    model(|| {
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
    });
}

#[test]
fn loom_a_taken_receive_is_whole() {
    model(|| {
        let queue = Queue::new(1);
        let other = Arc::clone(&queue);
        let sender = thread::spawn(move || other.send(9));
        queue.rq().post(0, &[crate::verbs::Sge { addr: 1, length: 2, lkey: 3 }]);
        let taken = queue.rq().take(0, false, false);
        if let Some(Taken::Done(said, payload)) = &taken {
            assert_eq!((said.byte_len, payload.read()[0]), (9, 9));
        }
        assert!(sender.join().expect("sender") || taken.is_none(), "taken, but never sent");
    });
}

/// The owner arms and looks again; the sender completes and looks at the arm word. Returns (seen, rung).
fn arm_against_completion(complete: fn(Claim<'_>, &Completion)) -> (bool, bool) {
    let queue = Queue::new(1);
    queue.rq().post(0, &[]);
    let other = Arc::clone(&queue);
    let sender = thread::spawn(move || {
        assert!(other.send_with(1, complete));
        other.cq.completed_fenced(None, false) == Ring::Bell
    });
    queue.cq.arm(false);
    let seen = queue.rq().take(0, false, false).is_some();
    (seen, sender.join().expect("sender"))
}

#[test]
fn loom_no_wake_up_is_lost() {
    model(|| {
        let (seen, rung) = arm_against_completion(|claim, said| claim.complete(said));
        assert!(seen || rung, "the owner would sleep on a completion");
    });
}

#[test]
#[should_panic(expected = "the owner would sleep")]
fn loom_a_wake_up_is_lost_without_the_fence() {
    model(|| {
        let (seen, rung) = arm_against_completion(|claim, said| claim.complete_without_fence(said));
        assert!(seen || rung, "the owner would sleep on a completion");
    });
}

#[test]
fn loom_a_waiting_sender_is_told() {
    model(|| {
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
    });
}

#[test]
fn loom_nothing_lands_after_revocation() {
    model(|| {
        let qp = Arc::new(QpShared::default());
        let (entry, page) = (Arc::new(MrEntry::default()), Arc::new(AtomicU32::new(0)));
        entry.publish(&MrView { key: 0x10000, ..MrView::default() });
        let (qp2, entry2, page2) = (Arc::clone(&qp), Arc::clone(&entry), Arc::clone(&page));
        let copier = thread::spawn(move || {
            let _in_flight = qp2.enter();
            if entry2.is(0x10000) {
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
    });
}

#[test]
#[should_panic(expected = "landed after")]
fn loom_something_lands_if_the_key_is_checked_before_announcing() {
    model(|| {
        let qp = Arc::new(QpShared::default());
        let (entry, page) = (Arc::new(MrEntry::default()), Arc::new(AtomicU32::new(0)));
        entry.publish(&MrView { key: 0x10000, ..MrView::default() });
        let (qp2, entry2, page2) = (Arc::clone(&qp), Arc::clone(&entry), Arc::clone(&page));
        let copier = thread::spawn(move || {
            let valid = entry2.is(0x10000);
            let _in_flight = qp2.enter();
            if valid {
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
    });
}

#[test]
fn loom_an_entry_is_read_whole_or_not_at_all() {
    model(|| {
        let entry = Arc::new(MrEntry::default());
        let version =
            |n: u32| MrView { key: n << 16, addr: u64::from(n), len: u64::from(n), ..MrView::default() };
        entry.publish(&version(1));
        let other = Arc::clone(&entry);
        let reader = thread::spawn(move || other.read(1 << 16));
        entry.kill();
        entry.publish(&version(2));
        if let Some(view) = reader.join().expect("reader") {
            assert_eq!(view, version(1));
        }
    });
}

#[test]
fn loom_a_mark_is_not_lost_to_a_drain() {
    model(|| {
        let queue = Queue::new(1);
        queue.rq().post(0, &[]);
        queue.cq.map();
        let other = Arc::clone(&queue);
        let sender = thread::spawn(move || {
            assert!(other.send(1));
            let _ = other.cq.completed_fenced(Some(70), false);
        });
        let mut taken = false;
        let mut look = || {
            let mut dirty = false;
            queue.cq.drain_dirty(|bit| dirty |= bit == 70);
            if dirty && !taken {
                taken = queue.rq().take(0, false, false).is_some();
                assert!(taken, "the mark came before the completion");
            }
        };
        look();
        sender.join().expect("sender");
        look();
        assert!(taken, "a completed receive without a mark");
        fence(Ordering::SeqCst);
    });
}
