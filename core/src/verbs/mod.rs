//! The vocabulary of verbs: numbers as in <infiniband/verbs.h>, so that the doors need no tables of their own.

mod attr;
pub mod device;
mod states;

pub use attr::{AhAttr, QpAttr, QpAttrMask, QpCaps};
pub use states::{Transition, transition};

use bitflags::bitflags;

/// Device limits that no quota changes.
pub mod limits {
    /// Scatter/gather entries per request.
    pub const SGE: u32 = 16;
    /// Inline bytes per send.
    pub const INLINE: u32 = 1024;
    /// Path MTU, and so the longest UD message.
    pub const MTU: u32 = 4096;
    /// Longest RC message.
    pub const MESSAGE: u64 = 1 << 31;
    /// Outstanding reads and atomics per QP.
    pub const RD_ATOMIC: u8 = 128;
    /// Bytes of global routing header before a UD payload.
    pub const GRH: u32 = 40;
}

/// One scatter/gather entry; `ibv_sge`'s layout.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
#[repr(C)]
pub struct Sge {
    pub addr: u64,
    pub length: u32,
    pub lkey: u32,
}

/// A work completion; `ibv_wc`'s layout.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
#[repr(C)]
pub struct Wc {
    pub wr_id: u64,
    pub status: u32,
    pub opcode: u32,
    pub vendor_err: u32,
    pub byte_len: u32,
    /// Big endian, as sent.
    pub imm_data: u32,
    pub qp_num: u32,
    pub src_qp: u32,
    pub wc_flags: u32,
    pub pkey_index: u16,
    pub slid: u16,
    pub sl: u8,
    pub dlid_path_bits: u8,
}

/// What a datagram's `sl` says on Ethernet: which header is in front of it. mlx5 has it so, and UCX (up to 1.18) believes it of
/// every NIC.
pub mod wc_sl {
    pub const IPV6: u8 = 0b1001;
    pub const IPV4: u8 = 0b1010;
}

/// `ibv_wc_flags`.
pub mod wc_flags {
    pub const GRH: u32 = 1;
    pub const WITH_IMM: u32 = 2;
    /// The message invalidated a memory window, whose key is where the immediate would be.
    pub const WITH_INV: u32 = 8;
}

/// A 128-bit global identifier.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Gid(pub [u8; 16]);

/// The number that datagrams to a multicast group are sent to.
pub const MULTICAST_QPN: u32 = 0xff_ffff;

/// Unicast LIDs.
const LIDS: std::ops::RangeInclusive<u16> = 1..=0xbfff;

impl Gid {
    /// The GID of an address: `::ffff:a.b.c.d` or the IPv6 address itself.
    pub fn of(ip: std::net::IpAddr) -> Self {
        Gid(match ip {
            std::net::IpAddr::V4(v4) => v4.to_ipv6_mapped().octets(),
            std::net::IpAddr::V6(v6) => v6.octets(),
        })
    }

    /// The address of a GID.
    pub fn ip(self) -> std::net::IpAddr {
        std::net::IpAddr::V6(self.0.into()).to_canonical()
    }

    /// The NIC's EUI-64, which no vendor gave: the last eight bytes, marked as locally administered (never zero).
    pub fn guid(self) -> [u8; 8] {
        let mut bytes = [0; 8];
        bytes.copy_from_slice(&self.0[8..]);
        bytes[0] |= 2;
        bytes
    }

    /// The other GID of a NIC with this IPv4 address: IPv6's link-local one, made of its EUI-64, as every NIC has it.
    pub fn link_local(self) -> Option<Self> {
        let mut gid = Gid([0xfe, 0x80, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]);
        gid.0[8..].copy_from_slice(&self.guid());
        self.ip().is_ipv4().then_some(gid)
    }

    /// The GID that connections are made by: of a link-local one the IPv4 address behind it.
    pub fn canonical(self) -> Self {
        match self.0 {
            [0xfe, 0x80, 0, 0, 0, 0, 0, 0, 2, 0, 0xff, 0xff, a, b, c, d] => Gid::of([a, b, c, d].into()),
            _ => self,
        }
    }

    /// The NIC's table of GIDs: programs find one of either family first, and an empty entry, as on every NIC, last.
    pub fn table(self) -> [Option<Self>; 3] {
        [Some(self), self.link_local(), None]
    }

    /// Is it a multicast group's: an IPv6 multicast address, or an IPv4 one?
    pub fn is_multicast(self) -> bool {
        self.ip().is_multicast()
    }

    /// The local identifier of this GID: its last 16 bits, if they are in the unicast range (IBA 4.1.3), else 0, which is none.
    /// Programs that know only LIDs reach the vIPs of their own /16 this way, with no table anywhere.
    pub fn lid(self) -> u16 {
        let last = u16::from_be_bytes([self.0[14], self.0[15]]);
        if LIDS.contains(&last) { last } else { 0 }
    }

    /// The GID that a LID names, seen from this one.
    pub fn neighbour(self, lid: u16) -> Option<Self> {
        let mut gid = self;
        gid.0[14..].copy_from_slice(&lid.to_be_bytes());
        LIDS.contains(&lid).then_some(gid)
    }
}

bitflags! {
    /// `ibv_access_flags`.
    #[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
    pub struct Access: u32 {
        const LOCAL_WRITE = 1;
        const REMOTE_WRITE = 1 << 1;
        const REMOTE_READ = 1 << 2;
        const REMOTE_ATOMIC = 1 << 3;
        const MW_BIND = 1 << 4;
        const ZERO_BASED = 1 << 5;
        const ON_DEMAND = 1 << 6;
        const HUGETLB = 1 << 7;
        /// A peer may ask when what it wrote is visible.
        const FLUSH_GLOBAL = 1 << 8;
        /// The same of persistence, which no memory here has: no region grants it.
        const FLUSH_PERSISTENT = 1 << 9;
    }

    /// What a FLUSH asks for (IBA annex A19): `ibv_placement_type`, and with `REGION` `ibv_selectivity_level`'s IBV_FLUSH_MR.
    #[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
    pub struct Flush: u8 {
        const GLOBAL = 1;
        const PERSISTENT = 2;
        const REGION = 4;
    }

    /// `ibv_send_flags`.
    #[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
    pub struct SendFlags: u32 {
        const FENCE = 1;
        const SIGNALED = 2;
        const SOLICITED = 4;
        const INLINE = 8;
        const IP_CSUM = 16;
    }
}

impl Access {
    /// Everything that lets a peer in.
    pub const REMOTE: Access = Access::REMOTE_WRITE.union(Access::REMOTE_READ).union(Access::REMOTE_ATOMIC);
    /// What a memory window may grant.
    pub const WINDOW: Access = Access::REMOTE.union(Access::FLUSH_GLOBAL);
}

impl Flush {
    /// The rights that the placements need.
    pub fn rights(self) -> Access {
        let of = |placement, right| if self.contains(placement) { right } else { Access::empty() };
        of(Flush::GLOBAL, Access::FLUSH_GLOBAL) | of(Flush::PERSISTENT, Access::FLUSH_PERSISTENT)
    }
}

macro_rules! numbered {
    ($(#[$m:meta])* $name:ident : $repr:ty { $($(#[$vm:meta])* $variant:ident = $value:literal,)* }) => {
        $(#[$m])*
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
        #[repr($repr)]
        pub enum $name { $($(#[$vm])* $variant = $value,)* }
        impl TryFrom<u32> for $name {
            type Error = u32;
            fn try_from(value: u32) -> Result<Self, u32> {
                match value { $($value => Ok($name::$variant),)* other => Err(other) }
            }
        }
    };
}

numbered! {
    /// `ibv_qp_type`.
    QpType: u32 {
        Rc = 2, Uc = 3, Ud = 4,
        /// XRC's initiator: it sends, and names the shared receive queue of each request.
        XrcSend = 9,
        /// XRC's target: it receives for the shared receive queues of its domain.
        XrcRecv = 10,
    }
}

numbered! {
    /// `ibv_mw_type`.
    MwType: u32 { One = 1, Two = 2, }
}

impl QpType {
    /// The type of QP this one connects to.
    pub fn counterpart(self) -> Self {
        match self {
            QpType::XrcSend => QpType::XrcRecv,
            QpType::XrcRecv => QpType::XrcSend,
            other => other,
        }
    }
}

numbered! {
    /// `ibv_qp_state`.
    QpState: u32 { Reset = 0, Init = 1, Rtr = 2, Rts = 3, Sqd = 4, Sqe = 5, Err = 6, }
}

impl QpState {
    /// States in which a QP serves incoming requests.
    pub fn receives(self) -> bool {
        matches!(self, QpState::Rtr | QpState::Rts | QpState::Sqd | QpState::Sqe)
    }
}

numbered! {
    /// `ibv_wr_opcode`.
    SendOp: u32 {
        Write = 0, WriteImm = 1, Send = 2, SendImm = 3, Read = 4, CompareSwap = 5, FetchAdd = 6,
        /// A memory window's key ends.
        LocalInv = 7,
        /// A memory window's key begins.
        BindMw = 8,
        /// A SEND that ends the key of a memory window of the receiver's.
        SendInv = 9,
        /// Nothing: it ends when what was written before is visible.
        Flush = 14,
        /// Eight bytes that appear at once.
        AtomicWrite = 15,
    }
}

impl SendOp {
    /// The opcode of the poster's completion.
    pub fn completion(self) -> WcOpcode {
        match self {
            SendOp::Write | SendOp::WriteImm => WcOpcode::RdmaWrite,
            SendOp::Send | SendOp::SendImm | SendOp::SendInv => WcOpcode::Send,
            SendOp::Read => WcOpcode::RdmaRead,
            SendOp::CompareSwap => WcOpcode::CompSwap,
            SendOp::FetchAdd => WcOpcode::FetchAdd,
            SendOp::LocalInv => WcOpcode::LocalInv,
            SendOp::BindMw => WcOpcode::BindMw,
            SendOp::Flush => WcOpcode::Flush,
            SendOp::AtomicWrite => WcOpcode::AtomicWrite,
        }
    }

    pub fn has_imm(self) -> bool {
        matches!(self, SendOp::WriteImm | SendOp::SendImm)
    }

    /// Does it take a receive at the other end?
    pub fn consumes_receive(self) -> bool {
        self.is_send() || self == SendOp::WriteImm
    }

    /// Is it a message for a receive?
    pub fn is_send(self) -> bool {
        matches!(self, SendOp::Send | SendOp::SendImm | SendOp::SendInv)
    }

    pub fn is_atomic(self) -> bool {
        matches!(self, SendOp::CompareSwap | SendOp::FetchAdd)
    }

    /// Does it change one aligned word of eight bytes, at once?
    pub fn is_word(self) -> bool {
        self == SendOp::AtomicWrite || self.is_atomic()
    }

    /// Does it end by what the other end says, and not by having been sent?
    pub fn needs_answer(self) -> bool {
        self.writes_locally() || matches!(self, SendOp::AtomicWrite | SendOp::Flush)
    }

    /// Does the poster's own memory get written?
    pub fn writes_locally(self) -> bool {
        self == SendOp::Read || self.is_atomic()
    }
}

numbered! {
    /// `ibv_wc_opcode`.
    WcOpcode: u32 {
        Send = 0, RdmaWrite = 1, RdmaRead = 2, CompSwap = 3, FetchAdd = 4, BindMw = 5, LocalInv = 6, Flush = 8, AtomicWrite = 9, Recv = 128, RecvRdmaWithImm = 129,
    }
}

numbered! {
    /// `ibv_wc_status`.
    WcStatus: u32 {
        Success = 0, LocLenErr = 1, LocQpOpErr = 2, LocEecOpErr = 3, LocProtErr = 4, WrFlushErr = 5, MwBindErr = 6,
        BadRespErr = 7, LocAccessErr = 8, RemInvReqErr = 9, RemAccessErr = 10, RemOpErr = 11, RetryExcErr = 12,
        RnrRetryExcErr = 13, LocRddViolErr = 14, RemInvRdReqErr = 15, RemAbortErr = 16, InvEecnErr = 17,
        InvEecStateErr = 18, FatalErr = 19, RespTimeoutErr = 20, GeneralErr = 21,
    }
}

/// min_rnr_timer's encoding (IB spec vol. 1, table 45), in microseconds.
pub fn rnr_timer_us(encoded: u32) -> u64 {
    const HUNDREDTHS_OF_MS: [u64; 32] = [
        65536, 1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024, 1536, 2048,
        3072, 4096, 6144, 8192, 12288, 16384, 24576, 32768, 49152,
    ];
    HUNDREDTHS_OF_MS[encoded as usize & 31] * 10
}

/// The `timeout` attribute's encoding: 4.096 us * 2^timeout; 0 is for ever.
pub fn ack_timeout_us(encoded: u32) -> Option<u64> {
    let encoded = encoded & 31;
    (encoded != 0).then(|| (4096u64 << encoded) / 1000)
}

/// Traffic class, flow label and hop limit never matter here: what a UD receiver finds in its 40 GRH bytes. For an IPv4
/// pair the last 20 bytes are an IPv4 header (RoCE v2, annex A17), else an IPv6-like header.
pub fn grh(src: Gid, dst: Gid, payload: u32, traffic_class: u8, hop_limit: u8) -> [u8; limits::GRH as usize] {
    use std::net::IpAddr::V4;
    let mut bytes = [0u8; limits::GRH as usize];
    if let (V4(s), V4(d)) = (src.ip(), dst.ip()) {
        let ip = &mut bytes[20..];
        ip[0] = 0x45;
        ip[1] = traffic_class;
        ip[2..4].copy_from_slice(&((payload + 20).min(0xffff) as u16).to_be_bytes());
        ip[8] = hop_limit;
        ip[9] = 17; // UDP
        ip[12..16].copy_from_slice(&s.octets());
        ip[16..20].copy_from_slice(&d.octets());
        let sum = ip.chunks_exact(2).map(|c| u32::from(u16::from_be_bytes([c[0], c[1]]))).sum::<u32>();
        let folded = (sum & 0xffff) + (sum >> 16);
        let checksum = !(((folded & 0xffff) + (folded >> 16)) as u16);
        ip[10..12].copy_from_slice(&checksum.to_be_bytes());
    } else {
        bytes[0] = 0x60 | traffic_class >> 4;
        bytes[1] = traffic_class << 4;
        bytes[4..6].copy_from_slice(&(payload.min(0xffff) as u16).to_be_bytes());
        bytes[6] = 17;
        bytes[7] = hop_limit;
        bytes[8..24].copy_from_slice(&src.0);
        bytes[24..40].copy_from_slice(&dst.0);
    }
    bytes
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn timers() {
        assert_eq!(rnr_timer_us(1), 10);
        assert_eq!(rnr_timer_us(12), 640);
        assert_eq!(rnr_timer_us(0), 655_360);
        assert_eq!(ack_timeout_us(0), None);
        assert_eq!(ack_timeout_us(14), Some(67_108));
    }

    #[test]
    fn a_link_local_gid_is_an_ipv4_address_by_another_name() {
        let gid = Gid::of([10, 9, 8, 7].into());
        let other = gid.link_local().expect("IPv4");
        assert_eq!(other.ip().to_string(), "fe80::200:ffff:a09:807");
        assert_eq!((other.canonical(), gid.canonical()), (gid, gid));
        let six = Gid::of("fd00::1".parse::<std::net::IpAddr>().expect("address"));
        assert_eq!((six.link_local(), six.canonical()), (None, six));
    }

    #[test]
    fn a_lid_names_a_neighbour() {
        let gid = |c, d| Gid::of(std::net::IpAddr::from([10, 0, c, d]));
        assert_eq!(gid(1, 2).neighbour(gid(3, 4).lid()), Some(gid(3, 4)));
        assert_eq!((gid(0, 0).lid(), gid(0xc0, 0).lid(), gid(0xff, 0xff).lid()), (0, 0, 0));
        assert_eq!((gid(1, 2).neighbour(0), gid(1, 2).neighbour(0xc000)), (None, None));
    }

    #[test]
    fn grh_of_an_ipv4_pair_is_an_ipv4_header() {
        let gid = |d| Gid::of(std::net::IpAddr::from([10, 0, 0, d]));
        let bytes = grh(gid(1), gid(2), 100, 0, 64);
        assert_eq!(bytes[..20], [0; 20]);
        assert_eq!(bytes[20], 0x45);
        assert_eq!(bytes[32..36], [10, 0, 0, 1]);
        let sum: u32 = bytes[20..].chunks_exact(2).map(|c| u32::from(u16::from_be_bytes([c[0], c[1]]))).sum();
        assert_eq!((sum & 0xffff) + (sum >> 16), 0xffff, "checksum verifies");
    }
}
