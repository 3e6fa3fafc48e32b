//! Submissions: the requests that a process hands to its router, because their peers are on other hosts.
//!
//! One ring per queue pair, written by its process and read by the router, in memory the router made. The router says how
//! far it got in one word, because requests end in order. That there is something in some ring, and whether the router
//! must be woken for it, is a [`super::CqShared`] in which the router is the owner and the process the completer: a
//! *doorbell*, one per process.
//!
//! | word   | written by | partner                                                              |
//! |--------|------------|----------------------------------------------------------------------|
//! | `tail` | process    | release after the slots; the router's acquire before it copies them    |
//! | `done` | router     | release after everything a request changed; the process's acquire      |

use zerocopy::{FromBytes, Immutable, IntoBytes};

use crate::sync::{AtomicU32, AtomicU64, Ordering};
use crate::verbs::Sge;

use super::MAX_SGE;

/// A request as it travels to the router. Hostile until judged.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable)]
#[repr(C)]
pub struct Wqe {
    /// A `verbs::SendOp`.
    pub op: u8,
    /// `verbs::SendFlags`, and [`Wqe::QUIET`].
    pub flags: u8,
    /// Entries of the list; 0 if the payload follows instead.
    pub sges: u8,
    /// The QP's attributes of these names.
    pub timeout: u8,
    pub retry_cnt: u8,
    pub rnr_retry: u8,
    /// Datagrams.
    pub traffic_class: u8,
    pub hop_limit: u8,
    pub imm: u32,
    /// Bytes of the payload.
    pub total: u32,
    pub addr: u64,
    pub rkey: u32,
    /// Datagrams: the sender's QPN.
    pub source: u32,
    pub compare_add: u64,
    pub swap: u64,
    pub dgid: [u8; 16],
    /// Datagrams: the receiving QP. XRC: the shared receive queue.
    pub dest_qpn: u32,
    pub qkey: u32,
}

impl Wqe {
    /// Its success is nothing to wake a sleeper for: no completion is wanted.
    pub const QUIET: u8 = 0x80;
}

const WQE_WORDS: usize = size_of::<Wqe>() / 8;

/// Words of a slot that has room for `sges` entries, or `inline` bytes of payload.
pub const fn slot_words(sges: usize, inline: usize) -> usize {
    let (list, bytes) = (sges * 2, inline.div_ceil(8));
    WQE_WORDS + if list > bytes { list } else { bytes }
}

/// How far both sides are; a cache line each.
#[derive(Debug, Default)]
#[repr(C, align(64))]
pub struct LinkHeader {
    tail: AtomicU32,
    _pad0: [u32; 15],
    /// Requests that ended well, and `WcStatus << 32` once the next one did not.
    done: AtomicU64,
    _pad1: [u64; 7],
}

/// A word of a slot.
#[derive(Debug, Default)]
#[repr(transparent)]
pub struct LinkWord(AtomicU64);

#[cfg(not(loom))]
const _: () = assert!(size_of::<LinkHeader>() == 128 && size_of::<Wqe>() == 72 && size_of::<LinkWord>() == 8);

/// What the router says of a queue pair's requests.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LinkDone {
    /// So many ended well.
    pub count: u32,
    /// A `WcStatus`: how the next one ended; 0 if it did not.
    pub status: u32,
}

impl LinkHeader {
    /// Process: makes the memory of an earlier queue this one's. The router does not know it yet.
    pub fn reset(&self) {
        self.tail.store(0, Ordering::Relaxed);
        self.done.store(0, Ordering::Relaxed);
    }

    /// Process: what has changed since `seen`, if anything.
    pub fn poll(&self, seen: LinkDone) -> Option<LinkDone> {
        let word = self.done.load(Ordering::Acquire);
        let now = LinkDone { count: word as u32, status: (word >> 32) as u32 };
        (now != seen).then_some(now)
    }

    /// Router: so many requests ended well, and how the next one did.
    pub fn finish(&self, done: LinkDone) {
        self.done.store(u64::from(done.count) | u64::from(done.status) << 32, Ordering::Release);
    }
}

/// A submission ring, wherever it is mapped.
#[derive(Debug, Clone, Copy)]
pub struct Submissions<'a> {
    header: &'a LinkHeader,
    words: &'a [LinkWord],
    stride: usize,
}

impl<'a> Submissions<'a> {
    /// `words` is a power of two of slots of `stride` words. None: it is not.
    pub fn new(header: &'a LinkHeader, words: &'a [LinkWord], stride: usize) -> Option<Self> {
        let whole = stride >= WQE_WORDS && words.len().is_multiple_of(stride);
        let depth = words.len().checked_div(stride)?;
        (whole && depth.is_power_of_two()).then_some(Submissions { header, words, stride })
    }

    pub fn depth(&self) -> u32 {
        (self.words.len() / self.stride) as u32
    }

    fn slot(&self, seq: u32) -> &'a [LinkWord] {
        let at = seq as usize & (self.depth() as usize - 1);
        &self.words[at * self.stride..][..self.stride]
    }

    /// Process: writes request `seq`, of which the router knows nothing until [`Submissions::publish`].
    pub fn write(&self, seq: u32, wqe: &Wqe, sges: &[Sge]) {
        let (head, list) = self.slot(seq).split_at(WQE_WORDS);
        store(head, wqe.as_bytes());
        for (words, sge) in list.chunks_exact(2).zip(sges) {
            words[0].0.store(sge.addr, Ordering::Relaxed);
            words[1].0.store(u64::from(sge.length) | u64::from(sge.lkey) << 32, Ordering::Relaxed);
        }
    }

    /// Process: the payload of request `seq`, instead of a list; as many bytes as fit.
    pub fn write_payload(&self, seq: u32, bytes: &[u8]) {
        store(&self.slot(seq)[WQE_WORDS..], bytes);
    }

    /// Process: how many bytes [`Submissions::write_payload`] takes.
    pub fn room(&self) -> usize {
        (self.stride - WQE_WORDS) * 8
    }

    /// Process: all requests before `tail` may be taken.
    pub fn publish(&self, tail: u32) {
        self.header.tail.store(tail, Ordering::Release);
    }

    /// Router: how many requests there are from `next` on. None: more than the ring holds, which is nonsense.
    pub fn waiting(&self, next: u32) -> Option<u32> {
        let count = self.header.tail.load(Ordering::Acquire).wrapping_sub(next);
        (count <= self.depth()).then_some(count)
    }

    /// Router: copies request `seq` out. `payload` gets the bytes that come without a list; None: they cannot be there.
    pub fn take(&self, seq: u32, sges: &mut [Sge; MAX_SGE], payload: &mut Vec<u8>) -> Option<(Wqe, usize)> {
        let (head, rest) = self.slot(seq).split_at(WQE_WORDS);
        let mut words = [0u64; WQE_WORDS];
        words.iter_mut().zip(head).for_each(|(to, from)| *to = from.0.load(Ordering::Relaxed));
        let wqe = Wqe::read_from_bytes(words.as_bytes()).ok()?;
        payload.clear();
        let count = usize::from(wqe.sges);
        if count == 0 {
            let len = wqe.total as usize;
            let words = rest.get(..len.div_ceil(8))?;
            words.iter().for_each(|word| payload.extend(word.0.load(Ordering::Relaxed).to_ne_bytes()));
            payload.truncate(len);
            return Some((wqe, 0));
        }
        let list = rest.get(..count * 2).filter(|_| count <= MAX_SGE)?;
        for (sge, words) in sges.iter_mut().zip(list.chunks_exact(2)) {
            let len_lkey = words[1].0.load(Ordering::Relaxed);
            *sge = Sge {
                addr: words[0].0.load(Ordering::Relaxed),
                length: len_lkey as u32,
                lkey: (len_lkey >> 32) as u32,
            };
        }
        Some((wqe, count))
    }

    pub fn header(&self) -> &'a LinkHeader {
        self.header
    }
}

/// Stores bytes into words, the last one filled up with zeros.
fn store(words: &[LinkWord], bytes: &[u8]) {
    for (word, chunk) in words.iter().zip(bytes.chunks(8)) {
        let mut padded = [0; 8];
        padded[..chunk.len()].copy_from_slice(chunk);
        word.0.store(u64::from_ne_bytes(padded), Ordering::Relaxed);
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;

    fn words(n: usize) -> Vec<LinkWord> {
        std::iter::repeat_with(LinkWord::default).take(n).collect()
    }

    #[test]
    fn requests_come_out_as_they_went_in() {
        let stride = slot_words(2, 100);
        let (header, words) = (LinkHeader::default(), words(4 * stride));
        let ring = Submissions::new(&header, &words, stride).expect("fits");
        let sge = |n| Sge { addr: n, length: n as u32 + 1, lkey: !(n as u32) };
        let (mut list, mut payload) = ([Sge::default(); MAX_SGE], Vec::new());
        assert_eq!(ring.waiting(0), Some(0));
        let wqe = Wqe { op: 2, sges: 2, imm: 7, total: 9, addr: u64::MAX, dgid: [3; 16], ..Wqe::default() };
        ring.write(5, &wqe, &[sge(1), sge(2)]);
        ring.publish(6);
        assert_eq!((ring.waiting(5), ring.waiting(1), ring.waiting(0)), (Some(1), None, None));
        assert_eq!(ring.take(5, &mut list, &mut payload), Some((wqe, 2)));
        assert_eq!((list[0], list[1], payload.len()), (sge(1), sge(2), 0));
        let wqe = Wqe { sges: 0, total: 13, ..wqe };
        ring.write(6, &wqe, &[]);
        ring.write_payload(6, b"thirteen byte");
        assert_eq!(ring.take(6, &mut list, &mut payload), Some((wqe, 0)));
        assert_eq!(payload, b"thirteen byte");
    }

    #[test]
    fn nonsense_is_noticed() {
        let stride = slot_words(2, 0);
        let (header, words) = (LinkHeader::default(), words(2 * stride));
        let ring = Submissions::new(&header, &words, stride).expect("fits");
        let (mut list, mut payload) = ([Sge::default(); MAX_SGE], Vec::new());
        for wqe in [Wqe { sges: 3, ..Wqe::default() }, Wqe { sges: 255, ..Wqe::default() }] {
            ring.write(0, &wqe, &[]);
            assert_eq!(ring.take(0, &mut list, &mut payload), None, "{wqe:?}");
        }
        for total in [33, u32::MAX] {
            ring.write(0, &Wqe { total, ..Wqe::default() }, &[]);
            assert_eq!(ring.take(0, &mut list, &mut payload), None, "{total}");
        }
        assert!(Submissions::new(&header, &words, 1).is_none());
        assert!(Submissions::new(&header, &words[1..], stride).is_none());
        assert!(Submissions::new(&header, &words[..0], stride).is_none());
        assert!(Submissions::new(&header, &words, 0).is_none());
    }

    #[test]
    fn what_is_done_is_seen_once() {
        let header = LinkHeader::default();
        let none = LinkDone { count: 0, status: 0 };
        assert_eq!(header.poll(none), None);
        let failed = LinkDone { count: 3, status: 10 };
        header.finish(failed);
        assert_eq!(header.poll(none), Some(failed));
        assert_eq!(header.poll(failed), None);
    }
}
