//! The dirty map: which of many queues have something.
//!
//! A completer marks its queue; the owner looks at queues that are marked. A mark stands until the owner has found its queue silent
//! for a while, and meanwhile costs each side a look at a line that nobody writes: taking one and making it anew moves the line there
//! and back, which costs more than the message. Before a queue is forgotten its mark is taken away and the queue looked at once more.
//! Both sides have a sequentially consistent fence between their store (the completion, the mark's end) and their look (at the
//! mark, at the queue), so at least one of them sees the other.

use crate::sync::{AtomicU64, Ordering, fence_behind_swap};

/// Queues beyond share marks.
pub const DIRTY_BITS: u32 = 64 * 64;

/// The marks of a CQ's queues.
#[derive(Debug)]
#[repr(C)]
pub struct Marks {
    /// One line with the words of the first queues: completers write both.
    summary: AtomicU64,
    words: [AtomicU64; 64],
}

/// Marks that the owner knows of and has left standing.
#[derive(Debug)]
pub struct Known([u64; 64]);

impl Known {
    /// If mark `bit` stands, it is news again.
    pub fn forget(&mut self, bit: u32) {
        let (index, mask) = place(bit);
        self.0[index] &= !mask;
    }
}

impl Default for Known {
    fn default() -> Self {
        Known([0; 64])
    }
}

impl Default for Marks {
    fn default() -> Self {
        Marks { summary: AtomicU64::new(0), words: std::array::from_fn(|_| AtomicU64::new(0)) }
    }
}

/// Index of its word, and its place there; the word's place in the summary is `1 << index`.
fn place(bit: u32) -> (usize, u64) {
    let bit = bit % DIRTY_BITS;
    (bit as usize / 64, 1 << (bit % 64))
}

fn each_bit(mut word: u64, mut each: impl FnMut(u32)) {
    while word != 0 {
        each(word.trailing_zeros());
        word &= word - 1;
    }
}

impl Marks {
    /// Completer: queue `bit` has something. Needs no fence: whoever takes the mark away sees the completion.
    pub fn mark(&self, bit: u32) {
        let (index, mask) = place(bit);
        // Release: partners are the acquires of news(), unmark() and drain(). Word before summary: what is drained from the
        // summary has its word.
        if self.words[index].fetch_or(mask, Ordering::AcqRel) & mask == 0
            || self.summary.load(Ordering::Relaxed) & (1 << index) == 0
        {
            self.summary.fetch_or(1 << index, Ordering::AcqRel);
        }
    }

    /// The same behind a sequentially consistent fence, whose partner is the owner's in unmark() and drain(): a mark that stands
    /// is left alone.
    #[inline]
    pub fn mark_fenced(&self, bit: u32) {
        let (index, mask) = place(bit);
        // Acquire: the caller looks at the arm word next.
        if self.words[index].load(Ordering::Acquire) & mask == 0
            || self.summary.load(Ordering::Acquire) & (1 << index) == 0
        {
            self.mark(bit);
        }
    }

    /// Owner: is something marked?
    #[inline]
    pub fn any(&self) -> bool {
        self.summary.load(Ordering::Relaxed) != 0
    }

    /// Owner: calls `each` with the marks that it does not know of, and leaves them standing. From now on it looks at their queues
    /// without being told, until [`Marks::unmark`].
    #[inline]
    pub fn news(&self, known: &mut Known, mut each: impl FnMut(u32)) {
        each_bit(self.summary.load(Ordering::Acquire), |index| {
            let known = &mut known.0[index as usize];
            let new = self.words[index as usize].load(Ordering::Acquire) & !*known;
            *known |= new;
            each_bit(new, |bit| each(index * 64 + bit));
        });
    }

    /// Owner: takes one mark away. It looks at the mark's queues once more afterwards.
    pub fn unmark(&self, known: &mut Known, bit: u32) {
        let (index, mask) = place(bit);
        known.forget(bit);
        if self.words[index].fetch_and(!mask, Ordering::AcqRel) & !mask == 0 {
            self.summary.fetch_and(!(1 << index), Ordering::AcqRel);
            // A completer that found the summary's mark standing made its own before: seen here.
            if self.words[index].load(Ordering::Acquire) != 0 {
                self.summary.fetch_or(1 << index, Ordering::AcqRel);
            }
        }
        // Partner: the fence behind the completion.
        fence_behind_swap();
    }

    /// Owner: calls `each` with every mark, taking them away.
    pub fn drain(&self, mut each: impl FnMut(u32)) {
        if !self.any() {
            return;
        }
        each_bit(self.summary.swap(0, Ordering::AcqRel), |index| {
            let word = self.words[index as usize].swap(0, Ordering::AcqRel);
            // Partner: the fence behind the completion.
            fence_behind_swap();
            each_bit(word, |bit| each(index * 64 + bit));
        });
    }

    /// Owner: nothing is marked.
    pub fn reset(&self) {
        self.summary.store(0, Ordering::Relaxed);
        for word in &self.words {
            word.store(0, Ordering::Relaxed);
        }
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;

    fn news(marks: &Marks, known: &mut Known) -> Vec<u32> {
        let mut seen = vec![];
        marks.news(known, |bit| seen.push(bit));
        seen
    }

    #[test]
    fn marks_are_drained_once() {
        let marks = Marks::default();
        [3, 64, 4095, 4096 + 3].into_iter().for_each(|bit| marks.mark(bit));
        let mut seen = vec![];
        marks.drain(|bit| seen.push(bit));
        assert_eq!(seen, [3, 64, 4095]);
        marks.drain(|_| panic!("already drained"));
    }

    #[test]
    fn a_mark_stands_until_it_is_taken_away() {
        let (marks, mut known) = (Marks::default(), Known::default());
        [3, 4, 64].into_iter().for_each(|bit| marks.mark_fenced(bit));
        assert_eq!(news(&marks, &mut known), [3, 4, 64]);
        marks.mark_fenced(4);
        assert_eq!(news(&marks, &mut known), [], "known");
        marks.unmark(&mut known, 4);
        assert_eq!(news(&marks, &mut known), []);
        marks.mark_fenced(4096 + 4);
        assert_eq!(news(&marks, &mut known), [4]);
        [3, 64, 4].into_iter().for_each(|bit| marks.unmark(&mut known, bit));
        assert!(!marks.any());
        marks.mark(64);
        assert_eq!(news(&marks, &mut known), [64]);
    }
}
