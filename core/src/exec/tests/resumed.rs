//! Requests that take several calls, and what may happen between two of them.

use super::*;
use crate::ring::Claim;

/// A send that has filled half of receive 0.
fn half_sent(world: &mut World) -> (Vec<Sge>, Progress) {
    world.fill_own(|i| i as u8);
    let into = world.peers(0, 4096);
    world.post(&[into]);
    world.post(&[into]);
    let sges = vec![world.own(0, 4096)];
    let mut progress = Progress::default();
    assert_eq!(world.step(&request(SendOp::Send, &sges), &mut progress, 2048), Outcome::Again);
    assert_eq!(progress, Progress { moved: 2048, claim: Some((0, 1)) });
    (sges, progress)
}

fn is_posted(world: &World, seq: u32) -> bool {
    world.rq().claim(&world.qp.head, CLIENT).is_some_and(|claim| claim.suspend().0 == seq)
}

fn leave(world: &mut World, progress: &mut Progress) {
    let World { qp, cq, slots, mrs, path, .. } = world;
    let peer = Peer {
        qp,
        rq: RqShared::new(slots),
        srq: None,
        recv_pd: PD,
        cq,
        cq_bit: 0,
        mrs,
        pd: PD,
        qpn: PEER_QPN,
    };
    abandon(progress, peer, path, QPN, CLIENT);
}

#[test]
fn it_goes_on_where_it_was() {
    let mut world = World::new();
    let (sges, mut progress) = half_sent(&mut world);
    assert_eq!(world.step(&request(SendOp::Send, &sges), &mut progress, 2048), done(WcStatus::Success, 4096));
    assert!(world.received(0, &[]).is_some_and(|said| said.byte_len == 4096));
    assert_eq!(world.own_bytes()[..4096], world.peer_bytes()[..4096]);
}

#[test]
fn a_receive_that_the_peer_took_back_is_not_touched() {
    let mut world = World::new();
    let (sges, mut progress) = half_sent(&mut world);
    world.rq().clear();
    world.qp.head.store(0, Ordering::Relaxed);
    let into = world.peers(0, 4096);
    world.rq().post(0, &[into]);
    world.fill_peer(|_| 0);
    let mut again = || world.step(&request(SendOp::Send, &sges), &mut progress, 2048);
    assert_eq!((again(), again()), (Outcome::Again, done(WcStatus::Success, 4096)), "from the start");
    assert_eq!(world.own_bytes()[..4096], world.peer_bytes()[..4096]);
}

#[test]
fn it_waits_for_a_peer_that_is_away() {
    let mut world = World::new();
    let (sges, mut progress) = half_sent(&mut world);
    let before = progress;
    world.qp.state.store(QpState::Err as u32, Ordering::Relaxed);
    assert_eq!(world.step(&request(SendOp::Send, &sges), &mut progress, 2048), Outcome::Absent);
    assert_eq!(progress, before);
}

#[test]
fn its_receive_is_given_back_when_it_fails() {
    let mut world = World::new();
    let (sges, mut progress) = half_sent(&mut world);
    world.cq.arm(false);
    world.own_mrs[1].kill();
    let failed = world.step(&request(SendOp::Send, &sges), &mut progress, 2048);
    assert_eq!(failed, done(WcStatus::LocProtErr, 0));
    assert!(is_posted(&world, 0));
    assert_eq!(world.path.bells, 1, "the owner may have passed over it in a flush");

    let mut world = World::new();
    let (sges, mut progress) = half_sent(&mut world);
    world.path.far = Some(Err(Errno::FAULT));
    let failed = world.step(&request(SendOp::Send, &sges), &mut progress, 2048);
    assert_eq!(failed, done(WcStatus::RemAccessErr, 0));
    assert!(is_posted(&world, 0));
}

#[test]
fn its_receive_is_given_back_when_it_is_given_up() {
    let mut world = World::new();
    let (_, mut progress) = half_sent(&mut world);
    leave(&mut world, &mut progress);
    assert_eq!(progress.claim, None);
    assert!(is_posted(&world, 0));
}

/// The peer was reset and serves another QP of this process, whose claim looks the same.
#[test]
fn another_senders_receive_is_not_given_back() {
    let mut world = World::new();
    let (_, mut progress) = half_sent(&mut world);
    world.qp.peer_qpn.store(QPN + 1, Ordering::Relaxed);
    leave(&mut world, &mut progress);
    assert!(world.rq().any_claimed());
}

/// A peer that rewrites its list while it is being filled gets its own completion wrong, and nothing else.
#[test]
fn a_list_that_shrinks_is_an_error() {
    let mut world = World::new();
    let (sges, mut progress) = half_sent(&mut world);
    let short = world.peers(0, 16);
    world.rq().post(0, &[short]);
    world.qp.head.store(0, Ordering::Relaxed);
    assert_eq!(world.rq().claim(&world.qp.head, CLIENT).map(Claim::suspend), progress.claim);
    let failed = world.step(&request(SendOp::Send, &sges), &mut progress, 2048);
    assert_eq!(failed, done(WcStatus::RemInvReqErr, 0));
    assert!(world.received(0, &[]).is_some_and(|said| said.status == WcStatus::LocLenErr as u8));
}
