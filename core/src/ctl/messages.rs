//! The messages, one struct each. Layouts are explicit: no padding, little-endian hosts only.

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

/// What every body can do: be read from and written to bytes without interpretation.
pub trait Body: FromBytes + IntoBytes + Immutable + KnownLayout + Copy {}
impl<T: FromBytes + IntoBytes + Immutable + KnownLayout + Copy> Body for T {}

/// A request, the fds it carries and its reply.
pub trait Request: Body {
    const KIND: u16;
    const NAME: &'static str;
    /// Descriptors that come with the request.
    const FDS: usize;
    type Reply: Body;
}

/// An event from the router.
pub trait Event: Body {
    const KIND: u16;
}

/// First 16 bytes of each message.
#[derive(Debug, Clone, Copy, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct Header {
    pub magic: u32,
    pub version: u16,
    pub kind: u16,
    /// 0, or in a reply the errno of the refusal (the body is then empty).
    pub status: i32,
    /// Bytes of body that follow.
    pub len: u32,
}

/// A 128-bit address: an IPv6 one, or `::ffff:a.b.c.d`.
pub type RawGid = [u8; 16];

macro_rules! body {
    ($(#[$m:meta])* $name:ident { $($(#[$fm:meta])* $field:ident: $ty:ty,)* }) => {
        $(#[$m])*
        #[derive(Debug, Clone, Copy, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
        #[repr(C)]
        pub struct $name { $($(#[$fm])* pub $field: $ty,)* }
    };
}
pub(crate) use body;

macro_rules! requests {
    ($($(#[$m:meta])* $kind:literal $name:ident [$fds:literal] { $($(#[$fm:meta])* $field:ident: $ty:ty,)* } -> $reply:ty;)*) => { $(
        $crate::ctl::messages::body! { $(#[$m])* $name { $($(#[$fm])* $field: $ty,)* } }
        impl $crate::ctl::Request for $name {
            const KIND: u16 = $kind;
            const NAME: &'static str = stringify!($name);
            const FDS: usize = $fds;
            type Reply = $reply;
        }
    )* };
}
pub(crate) use requests;

macro_rules! events {
    ($($(#[$m:meta])* $kind:literal $name:ident { $($(#[$fm:meta])* $field:ident: $ty:ty,)* };)*) => { $(
        $crate::ctl::messages::body! { $(#[$m])* $name { $($(#[$fm])* $field: $ty,)* } }
        impl $crate::ctl::Event for $name { const KIND: u16 = $kind; }
    )* };
}
pub(crate) use events;

/// What a connection is for ([`Hello::purpose`]).
pub mod purpose {
    /// A verbs context: owns queues, PDs, MRs.
    pub const VERBS: u32 = 0;
    /// A connection manager (librdmacm): owns cm ids only.
    pub const CM: u32 = 1;
}

body! {
    /// Reply without content.
    Done {}
}

body! {
    /// Quotas and limits of this container; what ibv_query_device reports. A create beyond one fails with ENOMEM.
    Limits {
        max_qp: u32,
        max_cq: u32,
        max_mr: u32,
        max_pd: u32,
        max_qp_wr: u32,
        max_cqe: u32,
        max_srq: u32,
        /// Attachments to multicast groups.
        max_mcast: u32,
        /// Registered bytes.
        max_mr_bytes: u64,
    }
}

body! {
    /// Carries two fds: the event socket, then (VERBS only) the MR table, writable.
    HelloReply {
        version: u16,
        _pad: u16,
        /// This connection's id on this host, never 0, never reused while the router lives (24 bits).
        client: u32,
        vip: RawGid,
        /// Random per router start: a client that sees it change has met another router.
        boot: u64,
        limits: Limits,
        /// What shows a later router that `client` is this process's: see [`Resume`].
        proof: u64,
    }
}

body! {
    /// An object's id, and what shows a later router that it is its asker's: see [`Claim`].
    Id {
        id: u32,
        _pad: u32,
        proof: u64,
    }
}

/// [`Claim::what`]: the kind of number that the next request is to get.
pub mod claim {
    /// A slab, PD, channel or CQ: one space of ids.
    pub const OBJECT: u32 = 0;
    pub const QP: u32 = 1;
    /// A memory region's key: the client's own table holds it, so it needs no proof.
    pub const KEY: u32 = 2;
    /// A shared receive queue's number.
    pub const SRQ: u32 = 3;
}

body! {
    MrReply {
        /// lkey and rkey, as `ring::mr` says; the first byte is never 0.
        key: u32,
    }
}

/// Most keys of one [`LeaseMrs`].
pub const LEASED_KEYS: usize = 16;

body! {
    /// `count` keys, as [`MrReply::key`], each of a memory region that the client may publish when it likes.
    LeaseReply {
        count: u32,
        keys: [u32; LEASED_KEYS],
    }
}

/// [`PeerInfo::state`].
pub mod peer_state {
    /// No such QP, or not connected to the asker: it looks like a dead port.
    pub const ABSENT: u32 = 0;
    /// It can receive; the other fields are valid.
    pub const READY: u32 = 1;
    /// Its container is on another host: requests go to the router ([`super::AttachLink`]), whether the QP is there or not.
    pub const LINK: u32 = 2;
}

/// [`PeerInfo::fds`]: which descriptors the reply carries, in this order. A descriptor is sent once per connection
/// and peer object; the client keeps it until [`ClientGone`].
pub mod peer_fds {
    pub const SLAB: u32 = 1;
    pub const CQ_SLAB: u32 = 2;
    pub const MR_TABLE: u32 = 4;
    pub const PD: u32 = 8;
    pub const BELL: u32 = 16;
    pub const SRQ_SLAB: u32 = 32;
    /// Of the shared receive queue, where it is another than the QP's.
    pub const SRQ_PD: u32 = 64;
}

body! {
    /// Where a peer's QP lives. Offsets are inside router-made slabs and checked by the router at creation.
    PeerInfo {
        state: u32,
        fds: u32,
        /// The owner's connection id.
        client: u32,
        pd: u32,
        slab: u32,
        qp_off: u32,
        rq_off: u32,
        rq_depth: u32,
        rq_sge: u32,
        cq_slab: u32,
        cq_off: u32,
        /// 0: the peer's receive CQ has no channel.
        channel: u32,
        /// Bit of this QP in the CQ's dirty map.
        cq_bit: u32,
        /// 0: it has receives of its own; else the number of the shared receive queue, and where that lives.
        srq: u32,
        srq_pd: u32,
        srq_slab: u32,
        srq_off: u32,
        srq_slots: u32,
        srq_depth: u32,
        /// verbs' ibv_qp_type.
        kind: u32,
    }
}

body! {
    Connected {
        /// `peer_state::LINK` if the peer is on another host, else 0.
        path: u32,
    }
}

body! {
    /// A queue pair of a multicast group.
    Member {
        gid: RawGid,
        qpn: u32,
    }
}

/// Most members of one [`MembersReply`].
pub const MEMBERS: usize = 32;

body! {
    /// Members of a group in the order of their numbers, after [`ListMembers::after`]; there are more if `more` is not 0. The last is
    /// `verbs::MULTICAST_QPN` at the group's own address if other hosts have some: the router sends to those.
    /// `page` not 0: the reply carries a descriptor, to be mapped for reading, with a word that changes whenever the members
    /// of one of the tenant's groups do. `generation` is what it was before the reply was made.
    MembersReply {
        generation: u64,
        page: u32,
        count: u32,
        more: u32,
        _pad: u32,
        members: [Member; MEMBERS],
    }
}

/// Where a process's [`AttachLink`] goes that is of no QP but for all its datagrams to other hosts.
pub const DATAGRAMS: u32 = 0;

requests! {
    /// First on every connection. The reply decides version and identity.
    1 Hello [0] { min_version: u16, max_version: u16, purpose: u32, } -> HelloReply;
    /// Asks for queue memory: reply carries one memfd of `len` bytes (a multiple of 4096), zeroed and touched.
    2 MakeSlab [0] { len: u64, } -> Id;
    /// A protection domain; the fd is its sparse memfd, which the router never maps.
    3 AllocPd [1] {} -> Id;
    4 DeallocPd [0] { pd: u32, } -> Done;
    /// A completion channel; the fd is its bell: a pipe that anybody may open anew.
    5 CreateChannel [1] {} -> Id;
    6 DestroyChannel [0] { channel: u32, } -> Done;
    /// `channel` 0: none. The CQ's shared header is at `off` in `slab`.
    7 CreateCq [0] { channel: u32, slab: u32, off: u32, _pad: u32, } -> Id;
    8 DestroyCq [0] { cq: u32, } -> Done;
    /// Accounts for an MR and allocates its key. The client fills the table's slot itself.
    9 RegMr [0] { pd: u32, access: u32, addr: u64, len: u64, } -> MrReply;
    10 DeregMr [0] { key: u32, _pad: u32, } -> Done;
    /// `kind` is verbs' ibv_qp_type.
    11 CreateQp [0] {
        pd: u32, send_cq: u32, recv_cq: u32, kind: u32, slab: u32, qp_off: u32, rq_off: u32, rq_depth: u32, rq_sge: u32, cq_bit: u32,
        /// 0: none; else its receives come from there, and the slots at `rq_off` are its tickets.
        srq: u32,
        /// Of XRC: the domain, a number of the client's own.
        xrcd: u32,
    } -> Id;
    12 DestroyQp [0] { qpn: u32, } -> Done;
    /// RESET/INIT -> RTR of a connected QP: this QP now belongs to `dest_qpn` at `dgid` (which need not exist yet). For
    /// UD: it can receive from now on (`dest_qpn` and `dgid` are ignored).
    13 Connect [0] { qpn: u32, dest_qpn: u32, dgid: RawGid, traffic_class: u32, } -> Connected;
    /// The QP left RTR/RTS (RESET, ERR): peers that have it are told by [`PeerGone`] or [`PeerLeft`].
    14 Disconnect [0] { qpn: u32, error: u32, } -> Done;
    /// Where is the peer of `qpn`? For connected QPs `dest_qpn` and `dgid` must be those of Connect, and the peer must be
    /// connected to `qpn`. For UD any UD QP of the tenant.
    /// Of an XRC initiator: with the shared receive queue `srqn` of the target's domain; 0 else.
    15 Resolve [0] { qpn: u32, dest_qpn: u32, dgid: RawGid, srqn: u32, _pad: u32, } -> PeerInfo;
    /// Moves bytes between this process's memory and the peer's where the direct path cannot. See [`copy_kind`].
    16 CopyMem [0] { qpn: u32, dest_qpn: u32, dgid: RawGid, kind: u32, key: u32, local: u64, remote: u64, len: u64, } -> Done;
    /// Tells the peer's process something that is not worth a descriptor. See [`ring`].
    17 Ring [0] { qpn: u32, dest_qpn: u32, dgid: RawGid, what: u32, } -> Done;
    /// As many [`RegMr`]s as the quota has plenty for, at least one and at most [`LEASED_KEYS`], each accounted for `len`
    /// bytes. Each ends with a [`DeregMr`].
    18 LeaseMrs [0] { pd: u32, _pad: u32, len: u64, } -> LeaseReply;
    /// Instead of [`Hello`], to a router that has taken the place of the one that gave `client` and `proof`: the same
    /// process goes on under the same id. The fd is its MR table. What it had is said again by ordinary requests,
    /// each after a [`Claim`], and [`Resumed`] ends that. Refused (EACCES, EBUSY), it must begin anew.
    0x20 Resume [1] { min_version: u16, max_version: u16, client: u32, proof: u64, } -> HelloReply;
    /// The object that the next request makes gets this number again; only between Resume and Resumed.
    0x21 Claim [0] { what: u32, id: u32, proof: u64, } -> Done;
    /// [`MakeSlab`] with the memory that an earlier router made.
    0x22 BringSlab [1] { len: u64, } -> Id;
    /// That was all. Who is connected to a process that does not come back hears of it ([`PeerGone`]).
    0x23 Resumed [0] {} -> Done;
    /// The doorbell of this process's submissions (`ring::link`): a CQ header at `off` in `slab`. The reply carries the bell
    /// that wakes the router: a pipe to open anew.
    48 OpenDoorbell [0] { slab: u32, off: u32, } -> Done;
    /// The submission ring of a QP, or of [`DATAGRAMS`]: at `off` in `slab` a header, behind it `depth` slots of `stride`
    /// words. `bit` marks it in the doorbell's dirty map, `send_bit` the QP in that of its send CQ. The ring is empty now.
    49 AttachLink [0] { qpn: u32, slab: u32, off: u32, depth: u32, stride: u32, bit: u32, send_bit: u32, } -> Done;
}

requests! {
    /// A shared receive queue: its header at `off`, its slots at `slots`. For XRC (`xrcd` not 0) with the CQ that its receives
    /// complete on, and its bit there.
    20 CreateSrq [0] {
        pd: u32, slab: u32, off: u32, slots: u32, depth: u32, cq: u32, cq_bit: u32, xrcd: u32,
    } -> Id;
    21 DestroySrq [0] { srq: u32, } -> Done;
    /// The UD queue pair gets datagrams for the multicast group `mgid` of its tenant on this host. EEXIST: it does.
    22 AttachMcast [0] { qpn: u32, _pad: u32, mgid: RawGid, } -> Done;
    23 DetachMcast [0] { qpn: u32, _pad: u32, mgid: RawGid, } -> Done;
    /// Who gets datagrams for `mgid`, as the asker's tenant has it. `page` 0: the asker has no page yet.
    24 ListMembers [0] { mgid: RawGid, after: u32, page: u32, } -> MembersReply;
}

/// [`CopyMem::kind`]: direction, and the right that `key` must grant there. Refusals: EACCES (key, right, PD or bounds; or
/// too many such failures in a short time), EFAULT (the caller's range), EREMOTEIO (the peer's range), ENOTCONN (no such
/// peer), EPERM (the router may not open one of the processes).
pub mod copy_kind {
    /// local -> remote, REMOTE_WRITE.
    pub const WRITE: u32 = 0;
    /// remote -> local, REMOTE_READ.
    pub const READ: u32 = 1;
    /// local -> remote, into a receive buffer: LOCAL_WRITE.
    pub const RECV: u32 = 2;
}

/// [`Ring::what`].
pub mod ring {
    /// A send of the peer waited for a receive: one is there now ([`super::PeerProgress`]).
    pub const PROGRESS: u32 = 0;
    /// Ring the bell of the channel of the peer's receive CQ.
    pub const BELL: u32 = 1;
    /// The peer's QP took part in a protocol violation (access error): it goes to ERR ([`super::PeerFault`]).
    pub const FAULT: u32 = 2;
    /// The shared receive queue of the peer has fallen below its limit ([`super::SrqLimit`]).
    pub const LIMIT: u32 = 3;
}

events! {
    /// The peer of your QP can receive now: a stalled send may resolve again.
    0x101 PeerReady { qpn: u32, };
    /// A receive was posted for the stalled send of your QP.
    0x102 PeerProgress { qpn: u32, };
    /// A request of the peer violated your QP's or MR's access rules: IBV_EVENT_QP_ACCESS_ERR.
    0x103 PeerFault { qpn: u32, };
    /// The process behind the peer of your QP died: IBV_EVENT_QP_FATAL.
    0x104 PeerGone { qpn: u32, };
    /// The peer QP was reset, moved to error or destroyed by its program: forget what Resolve said.
    0x105 PeerLeft { qpn: u32, };
    /// A process is gone: drop its mappings and descriptors.
    0x106 ClientGone { client: u32, };
    /// Your shared receive queue has fallen below its limit: IBV_EVENT_SRQ_LIMIT_REACHED.
    0x107 SrqLimit { srq: u32, };
}
