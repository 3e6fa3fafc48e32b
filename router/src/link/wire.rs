//! What travels between routers: headers of 72 bytes, each followed by `len` bytes of payload.
//!
//! Everything is little-endian at fixed offsets. What comes in is another host's word: sizes and kinds are judged here, the
//! rest by whoever acts on it. It must never know sockets or queue pairs.

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

/// Version of the protocol; a hello of another one ends the connection.
pub const VERSION: u32 = 6;
/// Connections per pair of hosts: small operations have one of their own, so that they wait behind no large one.
pub const CHANNELS: usize = 2;
/// Channel of small operations, and of everything that is not data.
pub const PROMPT: usize = 0;
/// Channel of large operations.
pub const BULK: usize = 1;
/// Most payload of one message: what other large operations may have to wait for. Each message has its price: system calls at
/// both ends, and an acknowledgement of TCP's that may have to wake the sender.
pub const FRAGMENT: u32 = 1 << 20;
/// Payload of messages that are not data, at most.
pub const CONTROL: u32 = 4096 + 512;

macro_rules! kinds {
    ($($(#[$m:meta])* $name:ident = $value:literal up_to $limit:expr;)*) => {
        /// What a message is.
        #[derive(Debug, Clone, Copy, PartialEq, Eq)]
        #[repr(u8)]
        pub enum Kind { $($(#[$m])* $name = $value,)* }

        impl Kind {
            /// The kind and the longest payload it may have.
            fn of(value: u8) -> Option<(Kind, u32)> {
                match value { $($value => Some((Kind::$name, $limit)),)* _ => None }
            }
        }
    };
}

kinds! {
    /// First on each connection, both ways. `seq`: version; `to`: channel; `a`: random per start of the router;
    /// `b`: the attempt that the connection is of, as the side that dials counts them.
    Hello = 1 up_to 0;
    /// QP `from` is connected to QP `to`; payload [`Opening`] and the tenant. `seq`: the oldest request that may come;
    /// `epoch`: that of requests from now on; `a`: random per connection of the QP.
    Open = 2 up_to 256;
    /// `to`'s Open was heard and agrees: `seq` is the request expected next.
    Opened = 3 up_to 0;
    /// There is no QP `from` that is connected to `to`.
    Absent = 4 up_to 0;
    /// QP `from` left; `status` 1: its process died.
    Close = 5 up_to 0;
    /// A piece of request `seq`: `len` of `total` bytes from `offset` on (WRITE, SEND), or all of it (READ, atomics).
    Request = 6 up_to FRAGMENT;
    /// All requests before `seq` were carried out.
    Ack = 7 up_to 0;
    /// Request `seq` failed with `status`; all before were carried out, none after will be.
    Nak = 8 up_to 0;
    /// Request `seq` of `epoch` found no receive: again after the time that `imm` encodes.
    RnrNak = 9 up_to 0;
    /// `len` bytes of the answer to READ `seq`, from `offset` on.
    ReadData = 10 up_to FRAGMENT;
    /// The answer to atomic `seq`: `a`.
    AtomicResult = 11 up_to 0;
    /// A datagram: payload [`Addresses`], the tenant, the bytes.
    Datagram = 12 up_to CONTROL;
    /// Are you there?
    Ping = 13 up_to 0;
    Pong = 14 up_to 0;
    /// Connection manager: payload is its own business. `seq`: one more than that of the one before.
    Cm = 15 up_to CONTROL;
    /// A container is in a multicast group, or not ([`membership`] in `status`): payload [`Opening`], from its address to the
    /// group's, and the tenant.
    Member = 16 up_to 256;
    /// All `Member`s up to `seq` were heard.
    Known = 17 up_to 0;
    /// All `Cm`s up to `seq` were heard.
    CmHeard = 18 up_to 0;
}

/// The first bytes of each message.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct Header {
    pub kind: u8,
    /// A `verbs::SendOp`; of an Open, a `verbs::QpType`.
    pub op: u8,
    /// [`flags`]
    pub flags: u8,
    /// A `verbs::WcStatus`.
    pub status: u8,
    /// Bytes that follow.
    pub len: u32,
    /// QP at the receiver.
    pub to: u32,
    /// QP at the sender.
    pub from: u32,
    pub seq: u32,
    pub epoch: u32,
    pub imm: u32,
    pub rkey: u32,
    pub total: u32,
    pub offset: u32,
    pub addr: u64,
    pub a: u64,
    pub b: u64,
    /// XRC: the shared receive queue that the request is for.
    pub srqn: u32,
    pub _pad: u32,
}

pub const HEADER: usize = size_of::<Header>();
const _: () = assert!(HEADER == 72);

/// [`Header::flags`]
pub mod flags {
    /// Of a request or datagram: it wakes who sleeps for solicited ones.
    pub const SOLICITED: u8 = 1;
    /// Of an RnrNak: there are receives, only nobody polls; no retry is counted.
    pub const BUSY: u8 = 2;
}

/// `status` of a `Member`.
pub mod membership {
    pub const OUT: u8 = 0;
    pub const IN: u8 = 1;
    /// Nobody is in any group: what was said before is over.
    pub const NONE: u8 = 2;
}

/// Who opens to whom; the tenant's name follows.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct Opening {
    pub from: [u8; 16],
    pub to: [u8; 16],
}

/// Who sends a datagram to whom; the tenant's name follows, then the payload.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct Addresses {
    pub from: [u8; 16],
    pub to: [u8; 16],
    pub qkey: u32,
    pub traffic_class: u8,
    pub hop_limit: u8,
    pub tenant: u8,
    pub _pad: u8,
}

/// Why a connection is ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Malformed {
    #[error("a message of unknown kind {0}")]
    Kind(u8),
    #[error("a message of kind {kind} with {len} bytes of payload")]
    Length { kind: u8, len: u32 },
    #[error("{0}")]
    Content(&'static str),
}

impl Header {
    pub fn new(kind: Kind, from: u32, to: u32) -> Self {
        Header { kind: kind as u8, from, to, ..Header::default() }
    }

    /// Reads a header; `bytes` begins with one.
    pub fn parse(bytes: &[u8]) -> Result<Option<(Kind, Header)>, Malformed> {
        let Ok((header, _)) = Header::read_from_prefix(bytes) else { return Ok(None) };
        let (kind, limit) = Kind::of(header.kind).ok_or(Malformed::Kind(header.kind))?;
        if header.len > limit {
            return Err(Malformed::Length { kind: header.kind, len: header.len });
        }
        Ok(Some((kind, header)))
    }
}

/// Splits a payload into its fixed head, the name of a tenant, and the rest. `name` finds the name's length in the head.
pub fn split<H: FromBytes + Copy>(
    bytes: &[u8],
    name: impl FnOnce(&H, &[u8]) -> usize,
) -> Result<(H, &str, &[u8]), Malformed> {
    let short = Malformed::Content("a payload that is too short");
    let (head, rest) = H::read_from_prefix(bytes).map_err(|_| short)?;
    let (tenant, rest) = rest.split_at_checked(name(&head, rest)).ok_or(short)?;
    let tenant =
        std::str::from_utf8(tenant).map_err(|_| Malformed::Content("a tenant's name is not text"))?;
    Ok((head, tenant, rest))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn a_header_is_these_bytes() {
        let header = Header {
            op: 2,
            flags: 3,
            status: 4,
            len: 5,
            seq: 0x0102_0304,
            epoch: 8,
            imm: 9,
            rkey: 10,
            total: 11,
            offset: 12,
            addr: 13,
            a: 14,
            b: 15,
            srqn: 16,
            ..Header::new(Kind::Request, 7, 6)
        };
        let mut bytes = vec![6, 2, 3, 4, 5, 0, 0, 0, 6, 0, 0, 0, 7, 0, 0, 0, 4, 3, 2, 1, 8, 0, 0, 0];
        bytes.extend([9u32, 10, 11, 12].iter().flat_map(|n| n.to_le_bytes()));
        bytes.extend([13u64, 14, 15, 16].iter().flat_map(|n| n.to_le_bytes()));
        assert_eq!(header.as_bytes(), bytes);
        assert_eq!(Header::parse(&bytes), Ok(Some((Kind::Request, header))));
        assert_eq!(Header::parse(&bytes[..71]), Ok(None));
    }

    #[test]
    fn lengths_belong_to_kinds() {
        let parse = |header: Header| Header::parse(header.as_bytes());
        let long = Header { len: FRAGMENT + 1, ..Header::new(Kind::Request, 0, 0) };
        assert_eq!(parse(long), Err(Malformed::Length { kind: 6, len: FRAGMENT + 1 }));
        assert!(parse(Header { len: 1, ..Header::new(Kind::Ack, 0, 0) }).is_err());
        assert_eq!(parse(Header { kind: 99, ..Header::default() }), Err(Malformed::Kind(99)));
    }

    proptest! {
        #[test]
        fn any_bytes_are_a_message_or_refused(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
            if let Ok(Some((kind, header))) = Header::parse(&bytes) {
                prop_assert_eq!(kind as u8, header.kind);
                prop_assert!(header.len <= FRAGMENT);
            }
            let _ = split::<Opening>(&bytes, |_, rest| rest.len());
            if let Ok((head, tenant, rest)) = split::<Addresses>(&bytes, |head, _| head.tenant.into()) {
                prop_assert_eq!(tenant.len(), usize::from(head.tenant));
                prop_assert_eq!(size_of::<Addresses>() + tenant.len() + rest.len(), bytes.len());
            }
        }
    }
}
