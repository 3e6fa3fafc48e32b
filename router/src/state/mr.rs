//! A client's memory regions: keys, what they cover by the router's own record, and copies in progress.

use std::collections::{HashMap, VecDeque};

use freeflow_core::ring::MR_SLOTS;
use freeflow_core::ring::mr::{key_of, same_window, slot_of};

use crate::refusal::{Refusal, Result};

/// The router's record of a memory region, or of a memory window (of no length).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Mr {
    pub key: u32,
    pub pd: u32,
    pub len: u64,
    /// Copies the router makes into or out of it at this moment.
    pub copies: u32,
    /// Deregistration began: no further copy may start.
    pub revoked: bool,
}

/// Keys of one client. A slot is used again as late as possible and always with another first byte. The last byte is for
/// the client's own table to tell: that of a window is its owner's to choose.
#[derive(Debug, Default)]
pub struct Mrs {
    by_slot: HashMap<u16, Mr>,
    fresh: usize,
    /// With the first byte of the key it had.
    freed: VecDeque<(u16, u8)>,
}

impl Mrs {
    /// The key that a region had under an earlier router.
    pub fn adopt(&mut self, key: u32, mr: Mr) -> Result<u32> {
        let slot = slot_of(key) as u16;
        if first_byte(key) == 0 {
            return Err(Refusal::Invalid("a key that no router gives"));
        }
        if self.by_slot.contains_key(&slot) {
            return Err(Refusal::Busy { what: "slot of key", id: key, by: "memory region" });
        }
        self.freed.retain(|(freed, _)| *freed != slot);
        self.by_slot.insert(slot, Mr { key, ..mr });
        Ok(key)
    }

    /// A key that is not in use; `random` gives its upper half.
    pub fn allocate(&mut self, mr: Mr, mut random: impl FnMut() -> Result<u32>) -> Result<u32> {
        while self.fresh < MR_SLOTS && self.by_slot.contains_key(&(self.fresh as u16)) {
            self.fresh += 1; // adopted
        }
        let (slot, last) = if self.fresh < MR_SLOTS {
            (self.fresh as u16, 0)
        } else {
            *self.freed.front().ok_or(Refusal::Exhausted("slots in the table of memory regions"))?
        };
        let random = loop {
            let random = random()? as u16;
            let [first, _] = random.to_be_bytes();
            if first != 0 && first != last {
                break random;
            }
        };
        if self.fresh < MR_SLOTS {
            self.fresh += 1;
        } else {
            self.freed.pop_front();
        }
        let key = key_of(slot, random);
        self.by_slot.insert(slot, Mr { key, ..mr });
        Ok(key)
    }

    pub fn get(&self, key: u32) -> Option<&Mr> {
        self.by_slot.get(&(slot_of(key) as u16)).filter(|mr| same_window(mr.key, key))
    }

    pub fn get_mut(&mut self, key: u32) -> Option<&mut Mr> {
        self.by_slot.get_mut(&(slot_of(key) as u16)).filter(|mr| same_window(mr.key, key))
    }

    pub fn remove(&mut self, key: u32) -> Option<Mr> {
        self.get(key)?;
        let slot = slot_of(key) as u16;
        let mr = self.by_slot.remove(&slot)?;
        if usize::from(slot) < self.fresh {
            self.freed.push_back((slot, first_byte(key)));
        }
        Some(mr)
    }

    pub fn iter(&self) -> impl Iterator<Item = &Mr> {
        self.by_slot.values()
    }

    pub fn len(&self) -> usize {
        self.by_slot.len()
    }
}

fn first_byte(key: u32) -> u8 {
    (key >> 24) as u8
}

#[cfg(test)]
mod tests {
    use super::*;

    fn mr() -> Mr {
        Mr { key: 0, pd: 1, len: 10, copies: 0, revoked: false }
    }

    #[test]
    fn a_key_names_one_registration() {
        let mut mrs = Mrs::default();
        let mut n = 0u32;
        let mut random = || {
            n += 1;
            Ok(((n / 2) << 8) | 0x77) // 0 first: never the first byte of a key
        };
        let key = mrs.allocate(mr(), &mut random).expect("room");
        assert_eq!(key, 0x100_0077);
        assert!(
            mrs.get(key).is_some() && mrs.get(key ^ 0x300_0000).is_none() && mrs.get(key ^ 0x100).is_none()
        );
        assert!(mrs.get(key ^ 1).is_some(), "the owner's part");
        assert!(mrs.remove(key).is_some() && mrs.get(key).is_none() && mrs.remove(key).is_none());
        assert_eq!(slot_of(mrs.allocate(mr(), &mut random).expect("room")), 1, "not the slot just freed");
    }

    #[test]
    fn a_full_table_reuses_the_oldest_slot_with_a_new_random_part() {
        let mut mrs = Mrs::default();
        let keys: Vec<_> = (0..MR_SLOTS).map(|_| mrs.allocate(mr(), || Ok(0x701)).expect("room")).collect();
        mrs.allocate(mr(), || Ok(0x801)).expect_err("full");
        for slot in [500, 3, 9] {
            mrs.remove(keys[slot]).expect("live");
        }
        let mut numbers = [0x702, 0x01, 0x903, 0x904].into_iter();
        let again = mrs.allocate(mr(), || Ok(numbers.next().expect("numbers"))).expect("a freed slot");
        assert_eq!(again, key_of(500, 0x903), "neither 0 nor the last first byte of that slot");
        assert_eq!(mrs.len(), MR_SLOTS - 2);
    }
}
