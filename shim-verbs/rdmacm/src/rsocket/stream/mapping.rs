//! Buffers that one side lets the other write into by offset (riomap, riowrite): entries of the table in the control
//! block, four words each.

use crate::rsocket::region::Remote;

/// One entry. No bytes means that the entry is free.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Mapping {
    /// What the writer calls the first byte.
    pub offset: u64,
    pub len: u64,
    pub memory: Remote,
}

impl Mapping {
    pub fn encode(&self) -> [u64; 4] {
        [self.offset, self.len, self.memory.addr, self.memory.rkey.into()]
    }

    /// An entry as the peer wrote it. Whatever it says, only the peer's own memory is meant by it.
    pub fn decode([offset, len, addr, rkey]: [u64; 4]) -> Mapping {
        let whole = offset.checked_add(len).is_some() && addr.checked_add(len).is_some();
        let len = if whole { len } else { 0 };
        Mapping { offset, len, memory: Remote { addr, rkey: rkey as u32 } }
    }
}

/// Where `offset` is in the peer's memory, and how many bytes follow in the same buffer.
pub fn find(entries: impl Iterator<Item = Mapping>, offset: u64) -> Option<(Remote, usize)> {
    let mut fitting = entries.filter(|entry| offset >= entry.offset && offset - entry.offset < entry.len);
    let entry = fitting.next()?;
    let into = offset - entry.offset;
    Some((entry.memory.plus(into), (entry.len - into) as usize))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn offsets_lead_into_their_buffer_or_nowhere() {
        let entry = Mapping { offset: 100, len: 50, memory: Remote { addr: 0x1000, rkey: 9 } };
        let wild = Mapping { offset: u64::MAX - 1, len: 50, ..entry };
        let table = [Mapping::default(), wild, entry].map(|entry| Mapping::decode(entry.encode()));
        let found = |offset| find(table.iter().copied(), offset);
        assert_eq!(found(100), Some((Remote { addr: 0x1000, rkey: 9 }, 50)));
        assert_eq!(found(149), Some((Remote { addr: 0x1000 + 49, rkey: 9 }, 1)));
        assert_eq!((found(99), found(150), found(u64::MAX - 1)), (None, None, None));
    }
}
