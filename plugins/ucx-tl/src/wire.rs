//! What two ends say to each other: their addresses, and the datagrams by which an endpoint gets its queue pair.
//!
//! An endpoint asks ([`kind::REQUEST`], repeated until answered); the other side makes a queue pair for it, connects that,
//! and answers with where its FIFO is. Both know a connection by the asker's address and token. Leaving is a message
//! of its own, through the FIFO.

use freeflow_core::client::Context;
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

/// Device address: which router. 8 bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct DeviceAddress {
    /// Random per start of the router.
    pub boot: u64,
}

impl DeviceAddress {
    pub fn of(context: &Context) -> Self {
        DeviceAddress { boot: context.boot() }
    }
}

/// Interface address: who answers requests. 28 bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct IfaceAddress {
    pub gid: [u8; 16],
    pub qpn: u32,
    /// [`Context::id`] of its owner.
    pub client: u32,
    /// [`reach`].
    pub reach: u32,
}

impl IfaceAddress {
    /// Do both lead to the same interface?
    pub fn is_same(&self, other: &Self) -> bool {
        (self.gid, self.qpn) == (other.gid, other.qpn)
    }
}

/// [`IfaceAddress::reach`]: which peers an interface is for.
pub mod reach {
    pub const ALL: u32 = 0;
    /// Those of its own host.
    pub const HERE: u32 = 1;
    /// Those of other hosts.
    pub const FAR: u32 = 2;

    /// Two interfaces, on one host or not: are they for each other?
    pub fn agree(ours: u32, theirs: u32, here: bool) -> bool {
        let not = if here { FAR } else { HERE };
        ours != not && theirs != not
    }
}

/// The Q_Key of all our datagrams.
pub const QKEY: u32 = 0x1ff0_ff01;
const MAGIC: u32 = 0x7563_7866;
/// Raised with each change of a datagram, of a key, or of the FIFO's layout.
const VERSION: u16 = 2;

/// [`Datagram::kind`].
pub mod kind {
    /// Make me a partner.
    pub const REQUEST: u16 = 1;
    /// There it is.
    pub const REPLY: u16 = 2;
    /// There is none, for want of room.
    pub const REFUSAL: u16 = 3;
}

/// Any of them.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct Datagram {
    pub magic: u32,
    pub version: u16,
    pub kind: u16,
    /// The asker's name for the connection.
    pub token: u64,
    pub gid: [u8; 16],
    /// The sender's RC queue pair.
    pub qpn: u32,
    /// REPLY: key of the memory with FIFO and pool.
    pub key: u32,
    pub addr: u64,
    /// REPLY: slots of the FIFO, bytes of the pool behind it, longest message.
    pub slots: u32,
    pub pool: u32,
    pub segment: u32,
    pub _pad: u32,
}

impl Datagram {
    pub fn new(kind: u16, token: u64) -> Self {
        Datagram { magic: MAGIC, version: VERSION, kind, token, ..Datagram::default() }
    }

    /// A datagram from whoever: None if it is none of ours.
    pub fn parse(bytes: &[u8]) -> Option<Self> {
        let said = Datagram::read_from_bytes(bytes).ok()?;
        (said.magic == MAGIC && said.version == VERSION).then_some(said)
    }
}

/// Message ids beyond UCX's own: the sender leaves.
pub const BYE: u8 = 0xff;
/// Carry this out on your memory: an [`AtomicRequest`].
pub const ATOMIC: u8 = 0xfe;

/// An atomic that only the memory's owner can carry out.
#[derive(Debug, Clone, Copy, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct AtomicRequest {
    /// `uct_atomic_op_t`, and the operand's bytes: 4 or 8.
    pub op: u32,
    pub size: u32,
    pub value: u64,
    pub compare: u64,
    pub addr: u64,
    pub key: u32,
    /// Where the [`AtomicAnswer`] is to be written, by which key.
    pub answer_key: u32,
    pub answer_addr: u64,
}

/// What comes back, by a WRITE.
#[derive(Debug, Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct AtomicAnswer {
    /// What was there before.
    pub old: u64,
    /// [`answer`]; last, as a WRITE is seen in this order.
    pub verdict: u64,
}

/// [`AtomicAnswer::verdict`].
pub mod answer {
    /// Not there yet.
    pub const NONE: u64 = 0;
    pub const DONE: u64 = 1;
    /// The key does not grant it.
    pub const REFUSED: u64 = 2;
}

/// Bytes in front of an active message that goes as a SEND: its id.
pub const SEND_HEADER: usize = 8;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_fit_into_what_ucx_packs() {
        const { assert!(size_of::<IfaceAddress>() <= 63 && size_of::<DeviceAddress>() <= 31) };
    }

    #[test]
    fn each_peer_has_one_interface() {
        use reach::{ALL, FAR, HERE, agree};
        for here in [true, false] {
            let ways = [HERE, FAR].map(|ours| [HERE, FAR].map(|theirs| agree(ours, theirs, here)));
            assert_eq!(ways, [[here, false], [false, !here]]);
            assert!(agree(ALL, ALL, here));
            assert!(agree(ALL, HERE, here) == here && agree(FAR, ALL, here) != here);
        }
    }

    #[test]
    fn only_our_datagrams_are_understood() {
        let request = Datagram { qpn: 7, ..Datagram::new(kind::REQUEST, 9) };
        assert_eq!(Datagram::parse(request.as_bytes()), Some(request));
        assert_eq!(Datagram::parse(&request.as_bytes()[1..]), None);
        let mut newer = request;
        newer.version += 1;
        assert_eq!(Datagram::parse(newer.as_bytes()), None);
    }

    #[test]
    fn an_atomic_is_a_short_message() {
        const { assert!(size_of::<AtomicRequest>() <= freeflow_core::ring::fifo::SLOT_BYTES) };
    }
}
