//! The address of a UD message's sender, read from the 40 bytes in front of its payload.
//!
//! RoCE v2 puts an IPv6 header there, or 20 unused bytes and an IPv4 header. The bytes are a peer's: nothing is believed
//! but what is checked.

use crate::guard::{EINVAL, Errno, Result};
use freeflow_verbs_abi::{ibv_ah_attr, ibv_gid, ibv_global_route};

pub const GRH_LEN: usize = 40;
const PROTO_UDP: u8 = 17;
const NEXT_HEADER_IB: u8 = 0x1b;

/// What a reply needs to know.
#[derive(Debug, PartialEq, Eq)]
pub struct Sender {
    pub source: [u8; 16],
    /// The address it was sent to: one of ours, or the header is nonsense.
    pub destination: [u8; 16],
    pub hop_limit: u8,
    pub traffic_class: u8,
    pub flow_label: u32,
}

impl Sender {
    pub fn parse(grh: &[u8; GRH_LEN]) -> Result<Self> {
        let v6 = grh[0] >> 4 == 6;
        let v4 = grh[20] >> 4 == 4 && (!v6 || is_ipv4_header(grh));
        match (v4, v6) {
            (true, _) => Self::parse_v4(grh),
            (false, true) => Self::parse_v6(grh),
            (false, false) => Err(Errno(libc::EPROTONOSUPPORT)),
        }
    }

    fn parse_v4(grh: &[u8; GRH_LEN]) -> Result<Self> {
        if (224..240).contains(&grh[36]) {
            return Err(EINVAL); // multicast: not an address of ours
        }
        Ok(Self {
            source: mapped([grh[32], grh[33], grh[34], grh[35]]),
            destination: mapped([grh[36], grh[37], grh[38], grh[39]]),
            hop_limit: grh[28],
            traffic_class: grh[21],
            flow_label: word(grh) & 0xf_ffff,
        })
    }

    fn parse_v6(grh: &[u8; GRH_LEN]) -> Result<Self> {
        if grh[24] == 0xff {
            return Err(EINVAL); // multicast
        }
        if grh[6] != PROTO_UDP && grh[6] != NEXT_HEADER_IB {
            return Err(Errno(libc::EPROTONOSUPPORT));
        }
        let mut sender = Self {
            source: [0; 16],
            destination: [0; 16],
            hop_limit: grh[7],
            traffic_class: (word(grh) >> 20) as u8,
            flow_label: word(grh) & 0xf_ffff,
        };
        sender.source.copy_from_slice(&grh[8..24]);
        sender.destination.copy_from_slice(&grh[24..40]);
        Ok(sender)
    }

    /// Attributes of an address handle that leads back.
    pub fn route(&self, sgid_index: u8) -> ibv_global_route {
        ibv_global_route {
            dgid: ibv_gid { raw: self.source },
            flow_label: self.flow_label,
            sgid_index,
            hop_limit: self.hop_limit,
            traffic_class: self.traffic_class,
        }
    }
}

fn word(grh: &[u8; GRH_LEN]) -> u32 {
    u32::from_be_bytes([grh[0], grh[1], grh[2], grh[3]])
}

fn mapped(v4: [u8; 4]) -> [u8; 16] {
    std::net::Ipv4Addr::from(v4).to_ipv6_mapped().octets()
}

/// Both versions could be read: it is IPv4 if header length and checksum say so.
fn is_ipv4_header(grh: &[u8; GRH_LEN]) -> bool {
    let sum: u32 = grh[20..].chunks_exact(2).map(|w| u32::from(u16::from_be_bytes([w[0], w[1]]))).sum();
    grh[20] & 0xf == 5 && (sum & 0xffff) + (sum >> 16) == 0xffff
}

/// An attribute structure with every byte zero, as `memset` leaves it.
pub fn zeroed_ah_attr() -> ibv_ah_attr {
    ibv_ah_attr {
        grh: ibv_global_route {
            dgid: ibv_gid { raw: [0; 16] },
            flow_label: 0,
            sgid_index: 0,
            hop_limit: 0,
            traffic_class: 0,
        },
        dlid: 0,
        sl: 0,
        src_path_bits: 0,
        static_rate: 0,
        is_global: 0,
        port_num: 0,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SOURCE: [u8; 4] = [10, 1, 0, 7];
    const OURS: [u8; 4] = [10, 1, 0, 8];

    fn ipv4() -> [u8; GRH_LEN] {
        let mut grh = [0u8; GRH_LEN];
        grh[20] = 0x45;
        grh[21] = 0x20;
        grh[28] = 63;
        grh[29] = PROTO_UDP;
        grh[32..36].copy_from_slice(&SOURCE);
        grh[36..40].copy_from_slice(&OURS);
        let sum: u32 = grh[20..].chunks_exact(2).map(|w| u32::from(u16::from_be_bytes([w[0], w[1]]))).sum();
        let check = !(((sum & 0xffff) + (sum >> 16)) as u16);
        grh[30..32].copy_from_slice(&check.to_be_bytes());
        grh
    }

    fn ipv6() -> [u8; GRH_LEN] {
        let mut grh = [0u8; GRH_LEN];
        grh[..4].copy_from_slice(&[0x6a, 0xb1, 0x23, 0x45]);
        grh[6] = PROTO_UDP;
        grh[7] = 64;
        grh[8..24].copy_from_slice(&[0xfd; 16]);
        grh[24..40].copy_from_slice(&[0xfc; 16]);
        grh
    }

    #[test]
    fn an_ipv4_header_gives_mapped_addresses() {
        let sender = Sender::parse(&ipv4()).expect("valid");
        assert_eq!(sender.source, mapped(SOURCE));
        assert_eq!(sender.destination, mapped(OURS));
        assert_eq!((sender.hop_limit, sender.traffic_class), (63, 0x20));
    }

    #[test]
    fn an_ipv6_header_gives_its_addresses_class_and_label() {
        let sender = Sender::parse(&ipv6()).expect("valid");
        assert_eq!((sender.source, sender.destination), ([0xfd; 16], [0xfc; 16]));
        assert_eq!((sender.hop_limit, sender.traffic_class, sender.flow_label), (64, 0xab, 0x12345));
    }

    #[test]
    fn a_checksum_decides_between_the_two() {
        let mut grh = ipv4();
        grh[0] = 0x60;
        grh[6] = PROTO_UDP;
        assert_eq!(Sender::parse(&grh).expect("valid").source, mapped(SOURCE));
        grh[30] ^= 1;
        let as_ipv6 = Sender::parse(&grh).expect("valid");
        assert_eq!(as_ipv6.source, grh[8..24], "with a wrong checksum");
    }

    #[test]
    fn nonsense_and_multicast_are_refused() {
        assert_eq!(Sender::parse(&[0; GRH_LEN]), Err(Errno(libc::EPROTONOSUPPORT)));
        let mut grh = ipv4();
        grh[36] = 224;
        assert_eq!(Sender::parse(&grh), Err(EINVAL));
        let mut grh = ipv6();
        grh[24] = 0xff;
        assert_eq!(Sender::parse(&grh), Err(EINVAL));
        let mut grh = ipv6();
        grh[6] = 6;
        assert_eq!(Sender::parse(&grh), Err(Errno(libc::EPROTONOSUPPORT)));
    }
}
