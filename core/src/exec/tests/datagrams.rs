//! Datagrams: whole or not at all, and never an error for the sender's peer.

use super::*;
use crate::verbs::{limits, wc_flags};

const GRH: usize = limits::GRH as usize;

fn dest() -> UdDest {
    UdDest { qpn: PEER_QPN, qkey: QKEY, ..UdDest::default() }
}

fn send(world: &mut World, dest: UdDest, sges: &[Sge]) -> Outcome {
    world.run(&Request { target: Target::Datagram(dest), ..request(SendOp::SendImm, sges) })
}

#[test]
fn a_datagram_lies_behind_its_header() {
    for len in [0, 1, 100, limits::MTU] {
        let mut world = World::new();
        world.fill_own(|i| i as u8 | 1);
        let into = [world.peers(0, 20), world.peers(1000, 30), world.peers(2000, 4096)];
        world.post(&into);
        let sges = [world.own(0, len)];
        assert_eq!(send(&mut world, dest(), &sges), done(WcStatus::Success, len));
        let said = world.received(0, &into).expect("received");
        assert_eq!((said.status, said.byte_len, said.src_qp), (0, len + limits::GRH, QPN));
        assert_eq!(u32::from(said.flags) & 3, wc_flags::GRH | wc_flags::WITH_IMM);
        let peer = world.peer_bytes();
        let all = [&peer[..20], &peer[1000..1030], &peer[2000..6096]].concat();
        assert_eq!(all[GRH..][..len as usize], world.own_bytes()[..len as usize]);
        assert!(all[GRH + len as usize..].iter().all(|b| *b == 0), "nothing behind it");
    }
}

#[test]
fn a_datagram_nobody_can_take_is_lost_and_leaves_the_receive() {
    type Spoil = fn(&mut World, &mut UdDest);
    let cases: [(&str, Spoil); 7] = [
        ("qkey", |_, to| to.qkey ^= 1),
        ("qpn", |_, to| to.qpn ^= 1),
        ("state", |world, _| world.qp.state.store(QpState::Init as u32, Ordering::Relaxed)),
        ("too small for the header", |world, _| world.rq().post(0, &[world.peers(0, 39)])),
        ("too small", |world, _| world.rq().post(0, &[world.peers(0, 47)])),
        ("bad lkey", |world, _| world.rq().post(0, &[Sge { lkey: 0, ..world.peers(0, 48) }])),
        ("out of reach", |world, _| world.path.far = Some(Err(Errno::FAULT))),
    ];
    for (name, spoil) in cases {
        let mut world = World::new();
        let into = world.peers(0, 48);
        world.post(&[into]);
        let mut to = dest();
        spoil(&mut world, &mut to);
        let sges = [world.own(0, 8)];
        assert_eq!(send(&mut world, to, &sges), done(WcStatus::Success, 8), "{name}");
        assert!(world.received(0, &[]).is_none() && !world.rq().any_claimed(), "{name}");
        assert!(world.rq().claim(&world.qp.head, CLIENT).is_some(), "{name}: the receive still waits");
        assert_eq!(world.path.faults, 0, "{name}");
    }
}

#[test]
fn the_senders_own_mistakes_are_told() {
    let mut world = World::new();
    let long = [world.own(0, limits::MTU + 1)];
    assert_eq!(send(&mut world, dest(), &long), done(WcStatus::LocLenErr, 0));
    let alien = [Sge { lkey: FOREIGN, ..world.own(0, 8) }];
    assert_eq!(send(&mut world, dest(), &alien), done(WcStatus::LocProtErr, 0));
}

#[test]
fn no_receive_is_no_error() {
    let mut world = World::new();
    let sges = [world.own(0, 8)];
    assert_eq!(send(&mut world, dest(), &sges), done(WcStatus::Success, 8));
}
