//! What the two ends write into each other's memory.
//!
//! The receiver writes *postings* into the sender's [`Postings`]; the sender writes *arrivals* into the receiver's
//! [`Arrivals`]. Both are rings of [`GROUPS`] groups of up to [`GROUP`] receives. Every 8-byte word carries the number of
//! its lap around the ring, so that a reader knows a word of this lap from an older one, whatever order the bytes of a
//! WRITE arrive in; a word itself is never torn. Whoever owns the memory only reads it, and believes nothing in it.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering, fence};

use arrayvec::ArrayVec;
use freeflow_core::client::{Mr, Pd};
use freeflow_core::shm::prefetch_for_read;
use freeflow_core::verbs::Access;

use crate::fault::Result;

/// Grouped receives in flight: NCCL_NET_MAX_REQUESTS.
pub const GROUPS: usize = freeflow_nccl_abi::MAX_REQUESTS;
/// Receives of a group: what getProperties calls maxRecvs.
pub const GROUP: usize = 8;
/// Words of a posting.
const WORDS: usize = 4;
/// Addresses and sizes are below this.
pub const SPACE: u64 = 1 << 48;

const LAP: u32 = 48;
const VALUE: u64 = SPACE - 1;

/// Lap of a group, never 0: fresh memory belongs to no lap. 65535 laps later a number comes again; by then a whole group of
/// the same size has been written in its place.
fn lap(group: u64) -> u64 {
    ((group / GROUPS as u64) % 0xffff + 1) << LAP
}

fn place(group: u64) -> usize {
    group as usize % GROUPS
}

/// Where one message may go.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Posting {
    pub addr: u64,
    pub len: u64,
    pub rkey: u32,
    pub tag: i32,
}

/// A group as the sender sees it.
pub type Group = ArrayVec<Posting, GROUP>;

/// A group as the receiver writes it.
pub type Written = ArrayVec<[u64; WORDS], GROUP>;

/// The words of group number `group`.
pub fn write(group: u64, postings: &Group) -> Written {
    let lap = lap(group);
    let count = (postings.len() as u64) << 32;
    let words = |p: &Posting| {
        let values = [p.addr, p.len, count | u64::from(p.rkey), u64::from(p.tag as u32)];
        values.map(|value| lap | value & VALUE)
    };
    postings.iter().map(words).collect()
}

/// In the sender's memory, written by the receiver.
#[derive(Debug, Default)]
#[repr(C, align(4096))]
pub struct Postings([[[AtomicU64; WORDS]; GROUP]; GROUPS]);

impl Postings {
    /// Where group number `group` is, from the start.
    pub fn offset(group: u64) -> u64 {
        (place(group) * GROUP * WORDS * 8) as u64
    }

    /// Group number `group` is wanted next. It was written a while ago if the receiver is ahead, by another processor.
    #[inline]
    pub fn expect(&self, group: u64) {
        prefetch_for_read(&self.0[place(group)]);
    }

    /// Reads group number `group`, if all of it is there; else `into` stays empty.
    #[inline]
    pub fn read(&self, group: u64, into: &mut Group) {
        let (slots, lap) = (&self.0[place(group)], lap(group));
        into.clear();
        let Some((first, count)) = posting(&slots[0], lap) else { return };
        into.push(first);
        for words in slots.iter().take(count.min(GROUP)).skip(1) {
            let Some((next, _)) = posting(words, lap) else { return into.clear() };
            into.push(next);
        }
        // Partner: the fence behind the executor's copy. What the receiver did before is seen from here on.
        fence(Ordering::Acquire);
    }
}

/// One posting, and how many its group has.
#[inline]
fn posting(words: &[AtomicU64; WORDS], lap: u64) -> Option<(Posting, usize)> {
    let words = words.each_ref().map(|word| word.load(Ordering::Relaxed));
    if words.iter().any(|word| word & !VALUE != lap) {
        return None;
    }
    let [addr, len, count_rkey, tag] = words.map(|word| word & VALUE);
    Some((Posting { addr, len, rkey: count_rkey as u32, tag: tag as i32 }, (count_rkey >> 32) as usize))
}

/// In the receiver's memory, written by the sender: the size of what came, one word for each receive.
#[derive(Debug, Default)]
#[repr(C, align(4096))]
pub struct Arrivals([[AtomicU64; GROUP]; GROUPS]);

/// The word for `size` bytes in group number `group`.
pub fn arrival(group: u64, size: u64) -> u64 {
    lap(group) | size & VALUE
}

impl Arrivals {
    /// Where the word of receive `index` of group number `group` is, from the start.
    pub fn offset(group: u64, index: usize) -> u64 {
        ((place(group) * GROUP + index) * 8) as u64
    }

    /// The size of what came for receive `index` of group number `group`.
    #[inline]
    pub fn read(&self, group: u64, index: usize) -> Option<u64> {
        // Partner: the fence behind the executor's copy of the data, which came before this word.
        let word = self.0[place(group)][index].load(Ordering::Acquire);
        (word & !VALUE == lap(group)).then_some(word & VALUE)
    }

    /// Before group number `group` of `len` is posted. The first word is written on every lap; the others may still hold
    /// those of any lap before.
    pub fn clear(&self, group: u64, len: usize) {
        for word in &self.0[place(group)][1..len] {
            word.store(0, Ordering::Relaxed);
        }
    }
}

/// Memory of ours that the peer writes. In a box with its page to itself; deregistered before it is freed.
#[derive(Debug)]
pub struct Exposed<T> {
    mr: Arc<Mr>,
    pub memory: Box<T>,
}

impl<T: Default> Exposed<T> {
    pub fn new(pd: &Arc<Pd>) -> Result<Self> {
        let memory = Box::<T>::default();
        let (addr, len) = (std::ptr::from_ref(&*memory) as u64, size_of::<T>() as u64);
        let mr = pd.reg_mr(addr, len, addr, Access::LOCAL_WRITE | Access::REMOTE_WRITE)?;
        Ok(Exposed { mr, memory })
    }

    /// How the peer names it.
    pub fn remote(&self) -> Remote {
        Remote { addr: std::ptr::from_ref(&*self.memory) as u64, rkey: self.mr.key() }
    }
}

/// Memory of the peer's.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Remote {
    pub addr: u64,
    pub rkey: u32,
}

#[cfg(test)]
mod tests {
    use super::*;

    fn land(memory: &Postings, group: u64, written: &Written) {
        let words = memory.0[place(group)].iter().flatten();
        for (word, value) in words.zip(written.iter().flatten()) {
            word.store(*value, Ordering::Relaxed);
        }
    }

    fn read(memory: &Postings, group: u64) -> Option<Group> {
        let mut all = some(1);
        memory.read(group, &mut all);
        (!all.is_empty()).then_some(all)
    }

    fn some(n: usize) -> Group {
        let posting = |i: u64| Posting {
            addr: 0x7fff_ffff_f000 + i,
            len: (1 << 40) + i,
            rkey: !i as u32,
            tag: -(i as i32),
        };
        (0..n as u64).map(posting).collect()
    }

    #[test]
    fn a_group_comes_out_as_it_went_in() {
        let memory = Postings::default();
        for group in 0..3 * GROUPS as u64 {
            let postings = some(1 + group as usize % GROUP);
            assert_eq!(read(&memory, group), None, "not there yet");
            land(&memory, group, &write(group, &postings));
            assert_eq!(read(&memory, group), Some(postings));
            assert_eq!(read(&memory, group + GROUPS as u64), None, "the next lap's is not there");
        }
    }

    #[test]
    fn a_group_of_which_a_word_is_missing_is_not_there() {
        for missing in 0..GROUP * WORDS {
            let memory = Postings::default();
            land(&memory, 5, &write(5, &some(GROUP)));
            memory.0[5][missing / WORDS][missing % WORDS].store(0, Ordering::Relaxed);
            assert_eq!(read(&memory, 5), None);
        }
    }

    #[test]
    fn nonsense_is_at_most_a_full_group() {
        let memory = Postings::default();
        for word in memory.0.iter().flatten().flatten() {
            word.store(lap(0) | VALUE, Ordering::Relaxed);
        }
        assert_eq!(read(&memory, 0).map(|group| group.len()), Some(GROUP));
    }

    #[test]
    fn an_arrival_belongs_to_its_lap() {
        let memory = Arrivals::default();
        memory.0[3][2].store(arrival(3, 77), Ordering::Relaxed);
        assert_eq!(memory.read(3, 2), Some(77));
        assert_eq!(memory.read(3 + GROUPS as u64, 2), None);
        assert_eq!(memory.read(3, 1), None);
        memory.clear(3, GROUP);
        assert_eq!(memory.read(3, 2), None);
        assert_eq!(Arrivals::offset(3, 2), (3 * 8 + 2) * 8);
    }
}
