//! Connected requests: each opcode, and each way to fail.

use super::*;
use crate::verbs::{WcOpcode, wc_flags};

const OPS: [SendOp; 7] = [
    SendOp::Write,
    SendOp::WriteImm,
    SendOp::Send,
    SendOp::SendImm,
    SendOp::Read,
    SendOp::CompareSwap,
    SendOp::FetchAdd,
];

#[test]
fn each_opcode_moves_bytes_and_takes_a_receive_if_it_should() {
    for op in OPS {
        for len in [0, 8, 40, 41, 4096] {
            let len = if op.is_atomic() { 8 } else { len };
            let mut world = World::new();
            world.fill_own(|i| i as u8 ^ 0x55);
            world.fill_peer(|_| 0);
            let before = world.own_bytes();
            let into = [world.peers(0, 8192)];
            world.post(&into);
            let sges = [world.own(0, len)];
            assert_eq!(world.run(&request(op, &sges)), done(WcStatus::Success, len), "{op:?} {len}");
            let received = world.received(0, &into);
            let (from, to) = if op.writes_locally() {
                (world.peer_bytes(), world.own_bytes())
            } else {
                (before.clone(), world.peer_bytes())
            };
            if !op.is_atomic() {
                assert!(from[..len as usize] == to[..len as usize], "{op:?} {len}");
            }
            assert_eq!(received.is_some(), op.consumes_receive(), "{op:?}");
            if let Some(said) = received {
                let write = op == SendOp::WriteImm;
                let opcode = if write { WcOpcode::RecvRdmaWithImm } else { WcOpcode::Recv };
                assert_eq!((said.status, said.byte_len, said.src_qp), (0, len, QPN), "{op:?}");
                assert_eq!(said.opcode, opcode as u8, "{op:?}");
                assert_eq!(u32::from(said.flags) & wc_flags::WITH_IMM != 0, op.has_imm(), "{op:?}");
                assert_eq!(said.imm, 0x0102_0304);
            }
        }
    }
}

#[test]
fn atomics_return_the_old_value() {
    let mut world = World::new();
    let sges = [world.own(16, 3), world.own(64, 5)];
    let mut run = |op, compare_add, swap| {
        let target = Target::Atomic { addr: IOVA + 8, rkey: KEY, compare_add, swap };
        assert_eq!(world.run(&Request { target, ..request(op, &sges) }), done(WcStatus::Success, 8));
        let (own, peer) = (world.own_bytes(), world.peer_bytes());
        let old = [&own[16..19], &own[64..69]].concat();
        let word = |bytes: &[u8]| u64::from_ne_bytes(bytes.try_into().expect("eight bytes"));
        (word(&old), word(&peer[8..16]))
    };
    assert_eq!(run(SendOp::FetchAdd, 5, 0), (0, 5));
    assert_eq!(run(SendOp::FetchAdd, u64::MAX, 0), (5, 4));
    assert_eq!(run(SendOp::CompareSwap, 9, 1), (4, 4));
    assert_eq!(run(SendOp::CompareSwap, 4, 1), (4, 1));
}

/// A request that fails: how the world differs from one in which it would not, and what comes of it.
struct Failure {
    name: &'static str,
    op: SendOp,
    spoil: fn(&mut World, &mut Request<'_>, &mut Sge),
    outcome: Outcome,
    /// Status of the peer's receive, if it is used up.
    receive: Option<WcStatus>,
    /// The peer is told of a fault.
    fault: bool,
}

const fn failure(
    name: &'static str,
    op: SendOp,
    spoil: fn(&mut World, &mut Request<'_>, &mut Sge),
) -> Failure {
    let outcome = Outcome::Done { status: WcStatus::Success, byte_len: 0 };
    Failure { name, op, spoil, outcome, receive: None, fault: false }
}

impl Failure {
    const fn local(mut self, status: WcStatus) -> Self {
        self.outcome = Outcome::Done { status, byte_len: 0 };
        self
    }

    const fn remote(mut self, status: WcStatus) -> Self {
        self.fault = true;
        self.local(status)
    }

    const fn receive(mut self, ours: WcStatus, theirs: WcStatus) -> Self {
        self.receive = Some(theirs);
        self.local(ours)
    }

    const fn waits(mut self, outcome: Outcome) -> Self {
        self.outcome = outcome;
        self
    }
}

fn rkey(request: &mut Request<'_>, key: u32) {
    match &mut request.target {
        Target::Memory { rkey, .. } | Target::Atomic { rkey, .. } => *rkey = key,
        _ => unreachable!("no rkey"),
    }
}

fn remote(request: &mut Request<'_>, to: u64) {
    match &mut request.target {
        Target::Memory { addr, .. } | Target::Atomic { addr, .. } => *addr = to,
        _ => unreachable!("no address"),
    }
}

use SendOp::{FetchAdd, Read, Send, Write, WriteImm};
use WcStatus::{LocLenErr, LocProtErr, RemAccessErr, RemInvReqErr, RemOpErr};

#[rustfmt::skip]
const FAILURES: &[Failure] = &[
    failure("lkey", Send, |_, _, s| s.lkey ^= 0x1_0000).local(LocProtErr),
    failure("lkey beyond the table", Write, |_, _, s| s.lkey = u32::MAX).local(LocProtErr),
    failure("lkey 0", Write, |_, _, s| s.lkey = 0).local(LocProtErr),
    failure("lkey of another PD", Write, |_, _, s| s.lkey = FOREIGN).local(LocProtErr),
    failure("local bounds", Send, |_, _, s| s.addr += LEN as u64 - 7).local(LocProtErr),
    failure("local wrap", Send, |_, _, s| s.addr = u64::MAX - 3).local(LocProtErr),
    failure("read into read-only", Read, |_, _, s| s.lkey = READ_ONLY).local(LocProtErr),
    failure("atomic into read-only", FetchAdd, |_, _, s| s.lkey = READ_ONLY).local(LocProtErr),
    failure("atomic of 4 bytes", FetchAdd, |_, _, s| s.length = 4).local(LocLenErr),
    failure("atomic of 16 bytes", FetchAdd, |_, _, s| s.length = 16).local(LocLenErr),
    failure("rkey", Write, |_, r, _| rkey(r, KEY ^ 0x1_0000)).remote(RemAccessErr),
    failure("rkey beyond the table", Write, |_, r, _| rkey(r, u32::MAX)).remote(RemAccessErr),
    failure("rkey of another PD", Read, |_, r, _| rkey(r, FOREIGN)).remote(RemAccessErr),
    failure("rkey without the right", Read, |_, r, _| rkey(r, READ_ONLY)).remote(RemAccessErr),
    failure("rkey without the right, with imm", WriteImm, |_, r, _| rkey(r, READ_ONLY)).remote(RemAccessErr),
    failure("atomic without the right", FetchAdd, |_, r, _| rkey(r, READ_ONLY)).remote(RemAccessErr),
    failure("before the MR", Write, |_, r, _| remote(r, IOVA - 1)).remote(RemAccessErr),
    failure("behind the MR", Write, |_, r, _| remote(r, IOVA + LEN as u64 - 7)).remote(RemAccessErr),
    failure("remote wrap", Read, |_, r, _| remote(r, u64::MAX - 3)).remote(RemAccessErr),
    failure("misaligned atomic", FetchAdd, |_, r, _| remote(r, IOVA + 4)).remote(RemInvReqErr),
    failure("QP serves no writes", Write, |w, _, _| w.qp.access.store(0, Ordering::Relaxed)).remote(RemInvReqErr),
    failure("QP serves no atomics", FetchAdd, |w, _, _| w.qp.access.store(6, Ordering::Relaxed)).remote(RemInvReqErr),
    failure("out of reach", Write, |w, _, _| w.path.far = Some(Err(Errno::ACCESS))).remote(RemAccessErr),
    failure("send out of reach", Send, |w, _, s| { w.path.far = Some(Err(Errno::ACCESS)); s.length = 64 }).remote(RemAccessErr),
    failure("atomic out of reach", FetchAdd, |w, _, _| w.path.far = Some(Ok(()))).remote(RemAccessErr),
    failure("longer than the receive", Send, |_, _, s| s.length = 129).receive(RemInvReqErr, LocLenErr),
    failure("receive's lkey", Send, |w, _, _| { let sge = Sge { lkey: 0x99, ..w.peers(0, 128) }; w.rq().post(0, &[sge]) }).receive(RemOpErr, LocProtErr),
    failure("receive read-only", Send, |w, _, _| { let sge = Sge { lkey: READ_ONLY, ..w.peers(0, 128) }; w.rq().post(0, &[sge]) }).receive(RemOpErr, LocProtErr),
    failure("receive beyond the MR", Send, |w, _, _| { let sge = w.peers(LEN - 7, 128); w.rq().post(0, &[sge]) }).receive(RemOpErr, LocProtErr),
    failure("no receive", Send, |w, _, _| w.rq().clear()).waits(Outcome::Rnr),
    failure("no receive for the immediate", WriteImm, |w, _, _| w.rq().clear()).waits(Outcome::Rnr),
    failure("nobody to copy a WRITE", Write, |w, _, _| w.path.far = Some(Err(Errno::AGAIN))).waits(Outcome::Later),
    failure("nobody to copy a READ", Read, |w, _, _| w.path.far = Some(Err(Errno::AGAIN))).waits(Outcome::Later),
    failure("peer in INIT", Send, |w, _, _| w.qp.state.store(1, Ordering::Relaxed)).waits(Outcome::Absent),
    failure("peer in ERR", Write, |w, _, _| w.qp.state.store(6, Ordering::Relaxed)).waits(Outcome::Absent),
    failure("peer's state is nonsense", Write, |w, _, _| w.qp.state.store(77, Ordering::Relaxed)).waits(Outcome::Absent),
    failure("peer serves another", Read, |w, _, _| w.qp.peer_qpn.store(0, Ordering::Relaxed)).waits(Outcome::Absent),
    failure("peer was destroyed", Send, |w, _, _| w.qp.qpn.store(0, Ordering::Relaxed)).waits(Outcome::Absent),
];

#[test]
fn each_failure_has_its_status_and_changes_nothing() {
    for case in FAILURES {
        let mut world = World::new();
        let into = world.peers(0, 128);
        world.post(&[into]);
        let mut sge = world.own(0, 8);
        world.fill_own(|_| 0xee);
        world.fill_peer(|_| 0x11);
        let mut spoiled = request(case.op, &[]);
        (case.spoil)(&mut world, &mut spoiled, &mut sge);
        let got = world.run(&Request { sges: &[sge], ..spoiled });
        assert_eq!(got, case.outcome, "{}", case.name);
        assert_eq!(world.path.faults, u32::from(case.fault), "{}", case.name);
        let received = world.received(0, &[]).map(|said| u32::from(said.status));
        assert_eq!(received, case.receive.map(|status| status as u32), "{}", case.name);
        assert!(world.own_bytes().iter().all(|b| *b == 0xee), "{}", case.name);
        assert!(world.peer_bytes().iter().all(|b| *b == 0x11), "{}", case.name);
        assert!(!world.rq().any_claimed(), "{}", case.name);
        assert_eq!(world.qp.quiesced(None), Ok(()), "{}", case.name);
    }
}

#[test]
fn nothing_needs_no_key() {
    for op in [SendOp::Write, SendOp::Read] {
        let mut world = World::new();
        let sge = Sge { lkey: 0, length: 0, ..world.own(0, 0) };
        let target = Target::Memory { addr: 0, rkey: 0 };
        for sges in [&[][..], &[sge; 16][..]] {
            assert_eq!(world.run(&Request { target, ..request(op, sges) }), done(WcStatus::Success, 0));
        }
    }
}

#[test]
fn inline_data_needs_no_key() {
    let mut world = World::new();
    let bytes = [7u8; 100];
    let sges = [Sge { addr: bytes.as_ptr() as u64, length: 100, lkey: 0 }];
    let inline = Request { flags: SendFlags::INLINE, ..request(SendOp::Write, &sges) };
    assert_eq!(world.run(&inline), done(WcStatus::Success, 100));
    assert_eq!(world.peer_bytes()[..100], bytes);
}

#[test]
fn a_sleeper_is_woken_by_what_it_waits_for() {
    for (solicited_only, solicited, bells) in
        [(false, false, 1), (false, true, 1), (true, false, 0), (true, true, 1)]
    {
        let mut world = World::new();
        let into = world.peers(0, 64);
        world.post(&[into]);
        world.cq.arm(solicited_only);
        let sges = [world.own(0, 8)];
        let flags = if solicited { SendFlags::SOLICITED } else { SendFlags::empty() };
        world.run(&Request { flags, ..request(SendOp::Send, &sges) });
        assert_eq!(world.path.bells, bells, "{solicited_only} {solicited}");
    }
}
