//! Every interleaving of a process that submits and its router, and proof that the orderings are needed.

use loom::sync::Arc;
use loom::thread;

use super::link::{LinkHeader, LinkWord, slot_words};
use super::loom_tests::{breaks, model};
use super::{CqShared, LinkDone, MAX_SGE, Ring, Submissions, Wqe};
use crate::sync::{AtomicU32, Ordering};
use crate::verbs::Sge;

const STRIDE: usize = slot_words(0, 8);

/// One slot of a submission ring, its doorbell, and a word that the router changes for the process.
struct Queue {
    header: LinkHeader,
    words: Vec<LinkWord>,
    doorbell: CqShared,
    page: AtomicU32,
}

impl Queue {
    fn new() -> Arc<Self> {
        let words = std::iter::repeat_with(LinkWord::default).take(STRIDE).collect();
        let (header, doorbell, page) = Default::default();
        Arc::new(Queue { header, words, doorbell, page })
    }

    fn ring(&self) -> Submissions<'_> {
        Submissions::new(&self.header, &self.words, STRIDE).expect("one slot")
    }

    /// Process.
    fn submit(&self) {
        self.ring().write(0, &Wqe { total: 8, addr: 7, ..Wqe::default() }, &[]);
        self.ring().write_payload(0, b"8 bytes.");
        self.ring().publish(1);
    }

    /// Router: the address and the payload.
    fn take(&self) -> Option<(u64, Vec<u8>)> {
        (self.ring().waiting(0)? == 1).then(|| {
            let (mut list, mut payload) = ([Sge::default(); MAX_SGE], Vec::new());
            let (wqe, _) = self.ring().take(0, &mut list, &mut payload).expect("a request");
            (wqe.addr, payload)
        })
    }
}

fn a_submission_is_whole() {
    let queue = Queue::new();
    let other = Arc::clone(&queue);
    let router = thread::spawn(move || other.take());
    queue.submit();
    if let Some(taken) = router.join().expect("router") {
        assert_eq!(taken, (7, b"8 bytes.".to_vec()), "a request was taken before it was there");
    }
}

fn what_is_done_is_there() {
    let queue = Queue::new();
    let other = Arc::clone(&queue);
    let process = thread::spawn(move || {
        let done = other.header.poll(LinkDone { count: 0, status: 0 });
        done.map(|done| (done.count, other.page.load(Ordering::Relaxed)))
    });
    queue.page.store(5, Ordering::Relaxed);
    queue.header.finish(LinkDone { count: 1, status: 0 });
    if let Some(seen) = process.join().expect("process") {
        assert_eq!(seen, (1, 5), "done before it was");
    }
}

/// The router arms its doorbell and looks again; the process submits and looks at the arm word.
fn no_submission_is_slept_on() {
    let queue = Queue::new();
    queue.doorbell.map();
    let other = Arc::clone(&queue);
    let process = thread::spawn(move || {
        other.submit();
        other.doorbell.completed(Some(3), false) == Ring::Bell
    });
    queue.doorbell.arm_for_others();
    let mut marked = false;
    queue.doorbell.marks.drain(|bit| marked |= bit == 3);
    assert!(!marked || queue.take().is_some(), "a mark before its request");
    let rung = process.join().expect("process");
    assert!(marked || rung, "the router would sleep on a request");
}

/// It wakes by itself, looks, and sleeps again.
fn nor_after_a_look_without_sleep() {
    let queue = Queue::new();
    queue.doorbell.map();
    queue.doorbell.arm_for_others();
    let other = Arc::clone(&queue);
    let process = thread::spawn(move || {
        other.submit();
        other.doorbell.completed(Some(3), false) == Ring::Bell
    });
    let mut marked = false;
    queue.doorbell.disarm();
    queue.doorbell.marks.drain(|bit| marked |= bit == 3);
    queue.doorbell.arm_for_others();
    queue.doorbell.marks.drain(|bit| marked |= bit == 3);
    let rung = process.join().expect("process");
    assert!(marked || rung, "the router would sleep on a request");
}

#[test]
fn loom_submissions() {
    model(a_submission_is_whole);
    model(what_is_done_is_there);
    model(no_submission_is_slept_on);
    model(nor_after_a_look_without_sleep);
}

breaks! {
    loom_without_release_a_submission_is_torn: a_submission_is_whole without Release, "before it was there";
    loom_without_acquire_a_submission_is_torn: a_submission_is_whole without Acquire, "before it was there";
    loom_without_release_done_comes_early: what_is_done_is_there without Release, "done before it was";
    loom_without_acquire_done_comes_early: what_is_done_is_there without Acquire, "done before it was";
    loom_without_fences_a_submission_is_slept_on: no_submission_is_slept_on without Fences, "would sleep";
}
