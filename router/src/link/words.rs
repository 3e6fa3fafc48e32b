//! What connection managers of two hosts say to each other, over connections that break: each word is heard once, in order.
//!
//! Nobody above repeats a word, and a connection that ends, or loses against one that crossed it, may take some with it. So they
//! are numbered, kept until the other host says that it heard them, and said again when it is connected anew. The count begins
//! with each start of either router.

use std::collections::VecDeque;

use zerocopy::IntoBytes as _;

use super::requester::Nonsense;
use super::wire::{Header, Kind};

/// Kept at most: containers' quotas bound how many ids there are that could say something.
const KEPT: usize = 1 << 16;

/// Both directions.
#[derive(Debug, Default)]
pub struct Words {
    /// Messages not heard yet; the number of the last is `said`.
    unheard: VecDeque<Vec<u8>>,
    said: u32,
    heard: u32,
}

impl Words {
    /// The message that says it. None: the other host has not answered for so long that no more are kept.
    pub fn say(&mut self, word: &[u8]) -> Option<&[u8]> {
        if self.unheard.len() == KEPT {
            return None;
        }
        self.said = self.said.wrapping_add(1);
        let header = Header { len: word.len() as u32, seq: self.said, ..Header::new(Kind::Cm, 0, 0) };
        self.unheard.push_back([header.as_bytes(), word].concat());
        self.unheard.back().map(Vec::as_slice)
    }

    pub fn are_unheard(&self) -> bool {
        !self.unheard.is_empty()
    }

    /// The messages to send once more.
    pub fn unheard(&self) -> impl Iterator<Item = Vec<u8>> + '_ {
        self.unheard.iter().cloned()
    }

    /// A word of the other host's: is it new?
    pub fn hear(&mut self, seq: u32) -> Result<bool, Nonsense> {
        let ahead = seq.wrapping_sub(self.heard);
        if ahead == 1 {
            self.heard = seq;
        } else if ahead != 0 && ahead <= u32::MAX / 2 {
            return Err(Nonsense); // one between was never said
        }
        Ok(ahead == 1)
    }

    /// The last word that was heard.
    pub fn heard(&self) -> u32 {
        self.heard
    }

    /// The other host has heard everything up to `seq`.
    pub fn were_heard(&mut self, seq: u32) -> Result<(), Nonsense> {
        let left = self.said.wrapping_sub(seq);
        if left > u32::MAX / 2 {
            return Err(Nonsense); // they were never said
        }
        let heard = self.unheard.len().saturating_sub(left as usize);
        self.unheard.drain(..heard);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn seq_of(message: &[u8]) -> u32 {
        Header::parse(message).expect("ours").expect("whole").1.seq
    }

    #[test]
    fn each_word_is_heard_once_whatever_breaks() {
        let (mut here, mut there) = (Words::default(), Words::default());
        let mut heard = Vec::new();
        for round in 0..50u32 {
            (0..7).for_each(|_| _ = here.say(&round.to_le_bytes()).expect("room"));
            // A connection comes, takes some of what is owed, and breaks before or after it is answered.
            for message in here.unheard().take(round as usize % 11).collect::<Vec<_>>() {
                let seq = seq_of(&message);
                if there.hear(seq).expect("in order") {
                    heard.push(seq);
                }
            }
            if round % 3 == 0 {
                here.were_heard(there.heard()).expect("was said");
            }
        }
        for message in here.unheard().collect::<Vec<_>>() {
            if there.hear(seq_of(&message)).expect("in order") {
                heard.push(seq_of(&message));
            }
        }
        here.were_heard(there.heard()).expect("was said");
        assert_eq!(heard, (1..=350).collect::<Vec<u32>>());
        assert_eq!(here.unheard().count(), 0);
    }

    #[test]
    fn what_was_not_said_is_not_believed() {
        let mut words = Words::default();
        words.say(b"a").expect("room");
        assert!(words.were_heard(2).is_err() && words.were_heard(1).is_ok() && words.were_heard(1).is_ok());
        assert!(words.were_heard(0).is_ok() && words.unheard().next().is_none(), "it came late");
        assert!(words.hear(2).is_err());
        assert!(words.hear(1).expect("the next") && !words.hear(1).expect("once more"));
    }
}
