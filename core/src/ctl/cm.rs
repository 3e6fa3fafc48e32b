//! Messages of the connection manager (librdmacm's front door), on connections with [`super::purpose::CM`].
//!
//! A *channel* is a queue of events in the router and a socket here: for each event queued one [`CmTicket`] is sent
//! on the socket, so that it polls readable; the event itself is fetched by [`CmNextEvent`]. Nothing is lost when a
//! program does not look at its channel, and the router never waits for one. Kinds 0x40..0x7f, events 0x140..0x17f.

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

use super::messages::{Done, Id, RawGid, body, events, requests};

/// Port spaces, numbered as in `rdma_cma.h`.
pub mod cm_space {
    pub const TCP: u32 = 0x0106;
    pub const UDP: u32 = 0x0111;
    /// Connections of any type of queue pair, XRC's too.
    pub const IB: u32 = 0x013f;
    pub const ALL: [u32; 3] = [TCP, UDP, IB];
}

/// [`CmBind::flags`], [`CmResolveAddr::flags`].
pub mod cm_flags {
    /// The address is one of the caller's interfaces (for [`super::CmResolveAddr`]: the destination is). It can only
    /// lead back into the caller's own container, so the router takes the caller's word.
    pub const OWN: u32 = 1;
    /// RDMA_OPTION_ID_REUSEADDR.
    pub const REUSE: u32 = 2;
    /// RDMA_OPTION_ID_AFONLY: an IPv6 wildcard that does not take IPv4.
    pub const AF_ONLY: u32 = 4;
    /// With [`super::CmResolveAddr`]: the source address is one of the caller's interfaces.
    pub const SRC_OWN: u32 = 8;
    /// Every bit that has a meaning.
    pub const ALL: u32 = OWN | REUSE | AF_ONLY | SRC_OWN;
}

/// [`CmAddr::family`].
pub mod cm_family {
    /// No address at all.
    pub const NONE: u16 = 0;
    pub const V4: u16 = 4;
    pub const V6: u16 = 6;
}

/// Why a connection request was turned down: the CM's own numbers, as [`CmNext::status`] reports them.
pub mod cm_reason {
    /// Nobody listens on that port.
    pub const INVALID_SERVICE_ID: u32 = 8;
    /// The listener (or its end) said no.
    pub const CONSUMER_DEFINED: u32 = 28;
    /// The two sides' extended capabilities do not fit (rdma_reject_ece).
    pub const VENDOR_OPTION: u32 = 35;
    /// The same two for datagrams.
    pub const SIDR_UNSUPPORTED: u32 = 1;
    pub const SIDR_REJECT: u32 = 2;
}

/// [`CmNext::kind`]: the numbers of `enum rdma_cm_event_type`, and one more.
pub mod cm_event {
    pub const ADDR_RESOLVED: u32 = 0;
    pub const ADDR_ERROR: u32 = 1;
    pub const ROUTE_RESOLVED: u32 = 2;
    pub const CONNECT_REQUEST: u32 = 4;
    pub const CONNECT_RESPONSE: u32 = 5;
    pub const UNREACHABLE: u32 = 7;
    pub const REJECTED: u32 = 8;
    pub const ESTABLISHED: u32 = 9;
    pub const DISCONNECTED: u32 = 10;
    pub const MULTICAST_JOIN: u32 = 12;
    pub const TIMEWAIT_EXIT: u32 = 15;
    /// The channel's queue is empty.
    pub const NONE: u32 = u32::MAX;
}

/// Private data a message carries at most, by kind; events report exactly these lengths, filled up with zeros.
pub mod cm_data {
    pub const REQUEST: usize = 56;
    pub const REPLY: usize = 196;
    pub const REJECT: usize = 148;
    pub const SIDR_REQUEST: usize = 180;
    pub const SIDR_REPLY: usize = 136;
    /// Room for any of them.
    pub const MAX: usize = 196;
}

/// The consumer's private data.
#[derive(Debug, Clone, Copy, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct CmData {
    pub len: u32,
    pub bytes: [u8; cm_data::MAX],
}

impl Default for CmData {
    fn default() -> Self {
        CmData { len: 0, bytes: [0; cm_data::MAX] }
    }
}

impl CmData {
    /// `bytes` as private data, if they fit into `limit`.
    pub fn new(bytes: &[u8], limit: usize) -> Option<Self> {
        if bytes.len() > limit.min(cm_data::MAX) {
            return None;
        }
        let mut data = CmData { len: bytes.len() as u32, ..Default::default() };
        data.bytes[..bytes.len()].copy_from_slice(bytes);
        Some(data)
    }

    /// The bytes that `len` covers; nothing if it covers more than there are.
    pub fn bytes(&self) -> &[u8] {
        self.bytes.get(..self.len as usize).unwrap_or(&[])
    }
}

body! {
    /// A socket address. IPv4 is written as `::ffff:a.b.c.d`, except the wildcard, which is all zeros in both.
    CmAddr {
        addr: RawGid,
        /// Host byte order.
        port: u16,
        family: u16,
        /// IPv6 scope, carried along for the program.
        scope: u32,
    }
}

body! {
    /// `rdma_conn_param` without its private data. In events the two depths are already seen from the receiver.
    CmParams {
        responder_resources: u8,
        initiator_depth: u8,
        flow_control: u8,
        retry_count: u8,
        rnr_retry_count: u8,
        srq: u8,
        _pad: u16,
        qpn: u32,
        /// Datagrams only.
        qkey: u32,
        /// First packet number the sender uses.
        psn: u32,
        /// `ibv_ece`, for programs that agree on enhancements themselves.
        ece_vendor: u32,
        ece_options: u32,
    }
}

body! {
    /// How many events were taken out of a channel's queue, whose tickets the caller takes out of its socket.
    CmDropped { events: u32, }
}

body! {
    /// The event at the head of a channel's queue.
    CmNext {
        kind: u32,
        /// What it is about; for CONNECT_REQUEST the new id, on the listener's channel.
        id: u32,
        /// CONNECT_REQUEST: the id that listens.
        listener: u32,
        /// 0, a negative errno, or a [`cm_reason`].
        status: i32,
        /// The two ends as `id` sees them.
        local: CmAddr,
        remote: CmAddr,
        /// The peer's GID.
        gid: RawGid,
        params: CmParams,
        data: CmData,
    }
}

requests! {
    /// The reply carries the fd of the channel's socket.
    0x40 CmOpenChannel [0] {} -> Id;
    /// Destroys the ids on it, too.
    0x41 CmCloseChannel [0] { channel: u32, } -> Done;
    0x42 CmCreate [0] { channel: u32, space: u32, } -> Id;
    /// Ends whatever the id was doing, as its death would.
    0x43 CmDestroy [0] { id: u32, } -> CmDropped;
    /// Moves the id and its waiting events to another channel.
    0x44 CmMigrate [0] { id: u32, channel: u32, } -> CmDropped;
    /// Port 0 picks one. The reply says what was bound.
    0x45 CmBind [0] { id: u32, flags: u32, addr: CmAddr, } -> CmAddr;
    0x46 CmListen [0] { id: u32, backlog: u32, } -> CmAddr;
    /// Answered by ADDR_RESOLVED or ADDR_ERROR.
    0x47 CmResolveAddr [0] { id: u32, flags: u32, src: CmAddr, dst: CmAddr, } -> Done;
    /// Answered by ROUTE_RESOLVED.
    0x48 CmResolveRoute [0] { id: u32, _pad: u32, } -> Done;
    /// Answered by CONNECT_RESPONSE (datagrams: ESTABLISHED), REJECTED or UNREACHABLE.
    0x49 CmConnect [0] { id: u32, params: CmParams, data: CmData, } -> Done;
    0x4a CmAccept [0] { id: u32, params: CmParams, data: CmData, } -> Done;
    /// The active side is ready: ESTABLISHED at the passive side.
    0x4b CmEstablish [0] { id: u32, _pad: u32, } -> Done;
    0x4c CmReject [0] { id: u32, reason: u32, data: CmData, } -> Done;
    /// Starts a disconnect, or answers one.
    0x4d CmDisconnect [0] { id: u32, _pad: u32, } -> Done;
    /// The QP saw data before ESTABLISHED (rdma_notify with IBV_EVENT_COMM_EST).
    0x4e CmNotify [0] { id: u32, _pad: u32, } -> Done;
    0x4f CmNextEvent [0] { channel: u32, } -> CmNext;
    /// Answered by MULTICAST_JOIN, whose `gid` is the group's.
    0x50 CmJoin [0] { id: u32, _pad: u32, addr: CmAddr, } -> Done;
}

events! {
    /// One event waits in the channel this comes on.
    0x140 CmTicket { channel: u32, };
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ctl::{MAX_BODY, Request};

    #[test]
    fn the_largest_messages_fit_and_have_no_padding() {
        assert_eq!(size_of::<CmAddr>(), 24);
        assert_eq!(size_of::<CmParams>(), 28);
        assert_eq!(size_of::<CmData>(), 200);
        assert_eq!(size_of::<CmNext>(), 16 + 2 * 24 + 16 + 28 + 200);
        assert!(size_of::<CmNext>() < MAX_BODY);
        assert_eq!(CmNextEvent::KIND, 0x4f);
    }

    #[test]
    fn private_data_keeps_to_its_limit() {
        assert!(CmData::new(&[1; 57], cm_data::REQUEST).is_none());
        assert!(CmData::new(&[1; 200], 1000).is_none());
        let data = CmData::new(&[7; 56], cm_data::REQUEST).unwrap();
        assert_eq!(data.bytes(), [7; 56]);
        assert_eq!(CmData { len: 1000, ..data }.bytes(), [0u8; 0], "a length that lies covers nothing");
    }
}
