//! The receive queue and the in-flight word between real threads, with plain memory that only their orderings protect:
//! ThreadSanitizer sees a race where one is missing (docs/security.md says how it is run).

use std::cell::UnsafeCell;
use std::sync::Arc;
use std::thread;

use freeflow_core::ring::{Completion, MrEntry, MrView, QpShared, RecvSlot, RqShared, Taken};

const DEPTH: usize = 8;
const MESSAGES: u32 = 20_000;

/// Memory without any protection of its own.
struct Plain(UnsafeCell<u64>);

// SAFETY: the protocols under test say who may touch it when.
unsafe impl Sync for Plain {}

impl Plain {
    fn set(&self, value: u64) {
        // SAFETY: the caller holds the receive, or the key, that this belongs to.
        unsafe { *self.0.get() = value };
    }

    fn get(&self) -> u64 {
        // SAFETY: as above.
        unsafe { *self.0.get() }
    }
}

#[derive(Default)]
struct Queue {
    slots: Vec<RecvSlot>,
    qp: QpShared,
    entry: MrEntry,
    buffers: Vec<Plain>,
}

impl Queue {
    fn new() -> Arc<Self> {
        let slots = std::iter::repeat_with(RecvSlot::default).take(DEPTH).collect();
        let buffers = (0..DEPTH).map(|_| Plain(UnsafeCell::new(0))).collect();
        Arc::new(Queue { slots, buffers, ..Queue::default() })
    }

    fn buffer(&self, seq: u32) -> &Plain {
        &self.buffers[seq as usize % DEPTH]
    }
}

#[test]
fn buffers_change_hands_with_their_receives() {
    let queue = Queue::new();
    let senders: Vec<_> = (1..=2)
        .map(|client| {
            let queue = Arc::clone(&queue);
            thread::spawn(move || {
                for _ in 0..MESSAGES {
                    let claim = loop {
                        match RqShared::new(&queue.slots).claim(&queue.qp.head, client) {
                            Some(claim) => break claim,
                            None => thread::yield_now(),
                        }
                    };
                    let seq = claim.sges().next().expect("one entry").addr as u32;
                    queue.buffer(seq).set(u64::from(client) << 32 | u64::from(seq));
                    claim.complete(&Completion { byte_len: client, ..Completion::default() }, true);
                }
            })
        })
        .collect();
    let rq = RqShared::new(&queue.slots);
    let post = |seq: u32| {
        queue.buffer(seq).set(u64::MAX);
        rq.post(seq, &[freeflow_core::verbs::Sge { addr: u64::from(seq), length: 8, lkey: 1 }]);
    };
    (0..DEPTH as u32).for_each(post);
    let mut per_client = [0; 3];
    for seq in 0..2 * MESSAGES {
        let said = loop {
            match rq.take(seq, false, false) {
                Some(Taken::Done(said, _)) => break said,
                _ => thread::yield_now(),
            }
        };
        assert_eq!(queue.buffer(seq).get(), u64::from(said.byte_len) << 32 | u64::from(seq));
        per_client[said.byte_len as usize] += 1;
        post(seq.wrapping_add(DEPTH as u32));
    }
    senders.into_iter().for_each(|sender| sender.join().expect("sender"));
    assert_eq!(per_client, [0, MESSAGES, MESSAGES]);
}

#[test]
fn memory_is_its_owners_after_revocation() {
    const KEYS: u32 = 2_000;
    let queue = Queue::new();
    let copier = {
        let queue = Arc::clone(&queue);
        thread::spawn(move || {
            let mut landed = 0u32;
            while !queue.entry.is(u32::MAX) {
                let _in_flight = queue.qp.enter();
                for key in 1..=KEYS {
                    if queue.entry.is(key) {
                        queue.buffer(0).set(u64::from(key));
                        landed += 1;
                        break;
                    }
                }
            }
            landed
        })
    };
    for key in 1..=KEYS {
        queue.buffer(0).set(0);
        queue.entry.publish(&MrView { key, ..MrView::default() });
        thread::yield_now();
        queue.entry.kill();
        let mut since = None;
        while let Err(word) = queue.qp.quiesced(since) {
            since = Some(word);
            thread::yield_now();
        }
        let there = queue.buffer(0).get();
        assert!(there == 0 || there == u64::from(key), "{there} landed under key {key}");
    }
    queue.entry.publish(&MrView { key: u32::MAX, ..MrView::default() });
    println!("{} copies landed", copier.join().expect("copier"));
}
