//! The handle that names a listener. NCCL carries it to the connecting rank in a buffer of 128 bytes, of which old versions
//! and other users copy only 64.

use freeflow_core::verbs::Gid;

/// Bytes used.
pub const LEN: usize = 64;

/// First bytes: a handle of another plugin, or of another release's protocol, is refused by name.
const MAGIC: [u8; 8] = *b"ffnccl\x00\x01";

/// A listener's name.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Handle {
    /// Address of its container.
    pub vip: Gid,
    pub port: u16,
    /// Of this listener alone: its port may be another's by the time somebody connects.
    pub nonce: u64,
}

/// The connecting side's own number for a connection that is being made; it lives in the caller's buffer between calls.
const TOKEN: std::ops::Range<usize> = 40..48;

impl Handle {
    pub fn encode(&self) -> [u8; LEN] {
        let mut bytes = [0; LEN];
        bytes[..8].copy_from_slice(&MAGIC);
        bytes[8..24].copy_from_slice(&self.vip.0);
        bytes[24..26].copy_from_slice(&self.port.to_le_bytes());
        bytes[32..40].copy_from_slice(&self.nonce.to_le_bytes());
        bytes
    }

    /// None: it is no handle of ours.
    pub fn decode(bytes: &[u8; LEN]) -> Option<Self> {
        let vip = bytes[8..24].try_into().ok()?;
        let port = u16::from_le_bytes(bytes[24..26].try_into().ok()?);
        let nonce = u64::from_le_bytes(bytes[32..40].try_into().ok()?);
        bytes.starts_with(&MAGIC).then_some(Handle { vip: Gid(vip), port, nonce })
    }
}

/// 0: none yet.
pub fn token(bytes: &[u8; LEN]) -> u64 {
    bytes[TOKEN].try_into().map_or(0, u64::from_le_bytes)
}

pub fn set_token(bytes: &mut [u8; LEN], token: u64) {
    bytes[TOKEN].copy_from_slice(&token.to_le_bytes());
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_handle_survives_its_journey() {
        let handle = Handle { vip: Gid::of([10, 9, 0, 1].into()), port: 40_000, nonce: 7 << 60 };
        let mut bytes = handle.encode();
        assert_eq!((Handle::decode(&bytes), token(&bytes)), (Some(handle), 0));
        set_token(&mut bytes, 99);
        assert_eq!((Handle::decode(&bytes), token(&bytes)), (Some(handle), 99));
        bytes[0] ^= 1;
        assert_eq!(Handle::decode(&bytes), None);
    }
}
