//! What the two ends of a stream tell each other in the private data of their handshake: where to write.

use super::super::region::Remote;

const MAGIC: [u8; 4] = *b"FFS1";
/// Length on the wire.
pub const LEN: usize = 24;
/// Bytes of the limits at the start of the control block.
pub const LIMITS: u64 = 16;
/// Bytes of one mapped buffer in it.
pub const MAPPING: u64 = 32;
const RINGS: std::ops::RangeInclusive<u32> = 4096..=1 << 28;

/// One end's memory: a ring for data, and behind it the control block with the limits and the mapped buffers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Hello {
    pub ring: u32,
    /// Receives that are posted, less the one for the end of the stream.
    pub window: u16,
    /// Entries in the table of mapped buffers.
    pub mappings: u16,
    pub memory: Remote,
}

impl Hello {
    pub fn encode(&self) -> [u8; LEN] {
        let mut bytes = [0; LEN];
        bytes[..4].copy_from_slice(&MAGIC);
        bytes[4..6].copy_from_slice(&self.window.to_be_bytes());
        bytes[6..8].copy_from_slice(&self.mappings.to_be_bytes());
        bytes[8..12].copy_from_slice(&self.ring.to_be_bytes());
        bytes[12..16].copy_from_slice(&self.memory.rkey.to_be_bytes());
        bytes[16..].copy_from_slice(&self.memory.addr.to_be_bytes());
        bytes
    }

    /// What a peer said, if it makes sense.
    pub fn decode(bytes: &[u8]) -> Option<Hello> {
        let bytes: &[u8; LEN] = bytes.first_chunk()?;
        let short = |at: usize| u16::from_be_bytes([bytes[at], bytes[at + 1]]);
        let long = |at: usize| u32::from_be_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]]);
        let addr = u64::from(long(16)) << 32 | u64::from(long(20));
        let hello = Hello {
            window: short(4),
            mappings: short(6),
            ring: long(8),
            memory: Remote { rkey: long(12), addr },
        };
        let end = u64::from(hello.ring) + LIMITS + MAPPING * u64::from(hello.mappings);
        let fits = RINGS.contains(&hello.ring) && hello.window >= 4 && addr.checked_add(end).is_some();
        (bytes.starts_with(&MAGIC) && fits).then_some(hello)
    }

    /// Where the limits are.
    pub fn limits(&self) -> Remote {
        self.memory.plus(u64::from(self.ring))
    }

    /// Where a mapped buffer's entry is.
    pub fn mapping(&self, index: u16) -> Remote {
        self.limits().plus(LIMITS + MAPPING * u64::from(index))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_sense_is_understood() {
        let memory = Remote { addr: 0x1234_5678_9abc_d000, rkey: 77 };
        let hello = Hello { ring: 65536, window: 64, mappings: 3, memory };
        let bytes = hello.encode();
        assert_eq!(&bytes[..8], b"FFS1\0\x40\0\x03");
        assert_eq!(Hello::decode(&bytes), Some(hello));
        assert_eq!(Hello::decode(&[&bytes[..], &[0; 32]].concat()), Some(hello), "filled up by the CM");
        assert_eq!(hello.mapping(1).addr, memory.addr + 65536 + 16 + 32);
        assert_eq!(Hello::decode(&bytes[..23]), None);
        for (at, byte) in [(0, b'X'), (8, 0x7f), (10, 0), (5, 3)] {
            let mut wrong = bytes;
            wrong[at] = byte;
            if at == 10 {
                wrong[9] = 0;
            }
            assert_eq!(Hello::decode(&wrong), None, "byte {at}");
        }
        let end = Hello { memory: Remote { addr: u64::MAX - 65536, rkey: 1 }, ..hello };
        assert_eq!(Hello::decode(&end.encode()), None);
    }
}
