//! Everything that another process can write, filled with anything: control messages, receive slots, headers, MR tables.
//! Readers must answer with an error or a result that is within bounds, and never panic or hang.

use std::io::IoSlice;

use freeflow_core::ctl::*;
use freeflow_core::exec::{
    Env, FarCopy, LocalTable, Peer, PeerMemory, Progress, Reach, Request as Send, Retired, Target, execute,
};
use freeflow_core::ring::{
    Completion, CqShared, MAX_SGE, MrEntry, MrView, QpShared, RecvSlot, RqShared, Taken,
};
use freeflow_core::shm::{Mapping, make_memfd};
use freeflow_core::sync::AtomicU32;
use freeflow_core::verbs::{Access, Flush, Gid, SendFlags, SendOp, Sge};
use proptest::prelude::*;
use rustix::io::Errno;
use rustix::net::{RecvFlags, SendFlags as MsgFlags};
use zerocopy::IntoBytes;

// ---- control messages ---------------------------------------------------------------------------------------------

fn packet() -> impl Strategy<Value = Vec<u8>> {
    let header =
        |magic, version, kind, status, len| Header { magic, version, kind, status, len }.as_bytes().to_vec();
    let magic = prop_oneof![8 => Just(MAGIC), 1 => any::<u32>()];
    let kind = prop_oneof![4 => 0u16..0x120, 1 => any::<u16>()];
    (magic, any::<u16>(), kind, any::<i32>(), any::<i8>(), prop::collection::vec(any::<u8>(), 0..200))
        .prop_map(move |(magic, version, kind, status, off, body)| {
            let len =
                if off % 4 == 0 { body.len() as u32 } else { (body.len() as i32 + i32::from(off)) as u32 };
            [header(magic, version, kind, status, len), body].concat()
        })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2000))]

    #[test]
    fn any_packet_is_read_or_refused(packet in prop_oneof![packet(), prop::collection::vec(any::<u8>(), 1..300)]) {
        let (ours, theirs) = Socket::pair().expect("pair");
        rustix::net::sendmsg(&theirs, &[IoSlice::new(&packet)], &mut Default::default(), MsgFlags::empty()).expect("send");
        let Ok(message) = ours.recv(RecvFlags::DONTWAIT) else { return Ok(()) };
        prop_assert_eq!(message.header.len as usize, packet.len() - size_of::<Header>());
        prop_assert_eq!(message.bytes(), &packet[size_of::<Header>()..]);
        if let Some(PeerGone { qpn }) = message.event() {
            prop_assert_eq!(&packet[size_of::<Header>()..], qpn.as_bytes());
        }
        let fits = message.bytes().len() == size_of::<Resolve>();
        prop_assert_eq!(message.request::<Resolve>().is_ok(), fits);
    }
}

// ---- queues and tables ---------------------------------------------------------------------------------------------

const DEPTH: usize = 8;
const KEYS: usize = 4;
const SLOTS: u64 = 4096;
const CQ: u64 = 1024;
const TABLE: u64 = 8192;
const LEN: usize = 12288;
/// The poster's own buffer; nothing is there, and nothing may look.
const LOCAL: u64 = 0x10_0000;
const LOCAL_LEN: u64 = 0x1_0000;

/// A file that a peer wrote, mapped.
fn scribbled(writes: &[(u16, u64)]) -> Mapping {
    let fd = make_memfd("scribbled", LEN as u64).expect("memfd");
    for (at, word) in writes {
        let at = u64::from(*at) * 8 % LEN as u64;
        rustix::io::pwrite(&fd, &word.to_ne_bytes(), at).expect("write");
    }
    Mapping::new(&fd, 0, LEN, true).expect("mmap")
}

/// Words at which arithmetic breaks, states of slots, and any word.
fn word() -> impl Strategy<Value = u64> {
    let state = (0u64..10, 0u64..20, 0u64..6).prop_map(|(seq, owner, phase)| seq << 32 | owner << 8 | phase);
    let edges =
        prop::sample::select(vec![0, 1, 3, 1 << 16, 0xffff_ffff, 1 << 62, 1 << 63, u64::MAX - 7, u64::MAX]);
    prop_oneof![state, edges, any::<u64>()]
}

/// Mostly an honest peer: a serving QP, posted receives, valid keys; and some writes of a hostile one.
fn writes() -> impl Strategy<Value = Vec<(u16, u64)>> {
    let mut honest: Vec<(u16, u64)> = vec![(0, 3 | 7 << 32), (1, 0xf << 32), (2, 9 << 32)];
    for slot in 0..DEPTH as u64 {
        let at = (SLOTS / 8 + slot * 40) as u16;
        honest.extend([(at, slot << 32 | 1 << 8 | 1), (at + 8, 0x5000), (at + 9, 4096 | 1 << 48)]);
    }
    let entry = (TABLE / 8) as u16;
    honest.extend([
        (entry, 1 << 24 | 0xf << 32),
        (entry + 2, 0x5000),
        (entry + 3, 0x5000),
        (entry + 4, 1 << 20),
    ]);
    prop::collection::vec((0u16..(LEN / 8) as u16, word()), 0..60)
        .prop_map(move |hostile| [honest.clone(), hostile].concat())
}

/// A peer whose bytes are all far; counts what is copied.
struct Watched(u64, Retired);

impl PeerMemory for Watched {
    fn retired(&self) -> &Retired {
        &self.1
    }

    fn reach(&mut self, _: &MrEntry, _: u32, _: u64, len: u64) -> Reach {
        assert!(len > 0);
        Reach::Far(len)
    }

    fn far(&mut self, copy: FarCopy) -> Result<(), Errno> {
        assert!(
            copy.local >= LOCAL && copy.local + copy.len <= LOCAL + LOCAL_LEN,
            "outside of the poster's buffer"
        );
        self.0 += copy.len;
        Ok(())
    }

    fn bell(&mut self) {}

    fn limit(&mut self) {}

    fn is_reliable(&self) -> bool {
        true
    }

    fn fault(&mut self) {}
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2000))]

    #[test]
    fn a_receive_queue_of_any_bytes_is_read_within_bounds(writes in writes(), seq in 0u32..20, flush: bool, orphaned: bool) {
        let map = scribbled(&writes);
        let rq = RqShared::new(map.slice::<RecvSlot>(SLOTS, DEPTH).expect("slots"));
        if let Some(Taken::Done(said, payload)) = rq.take(seq, flush, orphaned) {
            prop_assert!(said.src_qp <= 0xff_ffff);
            payload.read();
        }
        if let Some(claim) = rq.claim(&AtomicU32::new(seq), 5) {
            prop_assert!(claim.sges().count() <= MAX_SGE);
            claim.complete(&Completion::default(), true);
        }
        rq.repair(5);
        let mut dirty = 0;
        map.get::<CqShared>(CQ).expect("header").marks.drain(|_| dirty += 1);
        prop_assert!(dirty <= 4096);
    }

    #[test]
    fn a_request_to_a_peer_of_any_bytes_ends_and_stays_in_its_buffer(
        writes in writes(),
        op in prop::sample::select(vec![
            SendOp::Send, SendOp::SendImm, SendOp::Write, SendOp::WriteImm, SendOp::Read, SendOp::FetchAdd,
            SendOp::Flush,
        ]),
        len in 41u32..LOCAL_LEN as u32,
        addr in prop_oneof![Just(0x5000), word()],
    ) {
        let map = scribbled(&writes);
        let own = MrEntry::default();
        own.publish(&MrView {
            key: 1 << 24,
            access: Access::LOCAL_WRITE,
            pd: 1,
            iova: LOCAL,
            addr: LOCAL,
            len: LOCAL_LEN,
            ..MrView::default()
        });
        let peer = Peer {
            qp: map.get::<QpShared>(0).expect("header"),
            rq: RqShared::new(map.slice(SLOTS, DEPTH).expect("slots")),
            srq: None,
            recv_pd: 0,
            cq: map.get(CQ).expect("header"),
            cq_bit: 1,
            mrs: map.slice(TABLE, KEYS).expect("table"),
            pd: 0,
            qpn: 9,
        };
        let atomic = Target::Atomic { addr, rkey: 1 << 24, compare_add: 1, swap: 2 };
        let target = match op {
            SendOp::Send | SendOp::SendImm => Target::Receive,
            SendOp::FetchAdd => atomic,
            SendOp::Flush => Target::Flush { addr, rkey: 1 << 24, len: u64::from(len), what: Flush::all() },
            _ => Target::Memory { addr, rkey: 1 << 24 },
        };
        let sges = [Sge { addr: LOCAL, length: len, lkey: 1 << 24 }];
        let request = Send { op, flags: SendFlags::empty(), imm: 0, target, srqn: 0, sges: &sges };
        let (mut progress, mut memory) = (Progress::default(), Watched(0, Retired::default()));
        for _ in 0..4 {
            let local = LocalTable::new(std::slice::from_ref(&own), 1);
            let (qpn, client, gid, budget) = (7, 5, Gid::default(), 1 << 14);
            let env = Env { local, peer: Some(peer), memory: &mut memory, qpn, client, gid, budget };
            execute(&request, &mut progress, env);
        }
        prop_assert!(memory.0 <= 4 * u64::from(len));
    }
}
