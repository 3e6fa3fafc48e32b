//! Memory windows: keys over a part of a region, for a PD or for one queue pair.

use super::*;
use crate::ring::mr::{domain, key_of};
use crate::verbs::wc_flags;

/// In slot 0, which no region has.
const WINDOW: u32 = 0x0900_0033;

fn bind(world: &World, domain: u32, access: Access) {
    let (iova, addr, len) = (IOVA + 64, PEER_VA + 64, 128);
    let view = MrView { key: WINDOW, access, pd: domain, iova, addr, len, ..MrView::default() };
    world.mrs[0].publish(&view);
}

fn access(world: &mut World, op: SendOp, offset: u64, len: u32) -> Outcome {
    let target = Target::Memory { addr: IOVA + offset, rkey: WINDOW };
    let sges = [world.own(0, len)];
    world.run(&Request { target, ..request(op, &sges) })
}

fn send_inv(world: &mut World, key: u32) -> Outcome {
    let sges = [world.own(0, 8)];
    world.run(&Request { imm: key, ..request(SendOp::SendInv, &sges) })
}

#[test]
fn a_window_opens_its_part_to_whom_it_is_for() {
    let all = Access::REMOTE;
    assert_eq!(key_of(0, 0x0933), WINDOW);
    for domain in [domain::window_of_pd(PD), domain::window_of_qp(PEER_QPN)] {
        let mut world = World::new();
        world.fill_own(|_| 7);
        bind(&world, domain, all);
        assert_eq!(access(&mut world, SendOp::Write, 64, 128), done(WcStatus::Success, 128));
        assert_eq!(world.peer_bytes().iter().filter(|byte| **byte == 7).count(), 128);
        assert_eq!(access(&mut world, SendOp::Read, 100, 92), done(WcStatus::Success, 92));
        for (offset, len) in [(63, 2), (191, 2), (0, 8), (64, 129)] {
            assert_eq!(access(&mut world, SendOp::Write, offset, len), done(WcStatus::RemAccessErr, 0));
        }
    }
    for other in [domain::window_of_pd(PD + 1), domain::window_of_qp(PEER_QPN + 1)] {
        let mut world = World::new();
        bind(&world, other, all);
        assert_eq!(access(&mut world, SendOp::Write, 64, 8), done(WcStatus::RemAccessErr, 0));
        assert_eq!(world.path.faults, 1);
    }
}

#[test]
fn a_windows_rights_and_end_are_its_own() {
    let mut world = World::new();
    bind(&world, domain::window_of_pd(PD), Access::REMOTE_READ);
    assert_eq!(access(&mut world, SendOp::Read, 64, 8), done(WcStatus::Success, 8));
    assert_eq!(access(&mut world, SendOp::Write, 64, 8), done(WcStatus::RemAccessErr, 0));
    world.mrs[0].kill();
    assert_eq!(access(&mut world, SendOp::Read, 64, 8), done(WcStatus::RemAccessErr, 0));
}

#[test]
fn a_window_is_no_buffer() {
    let mut world = World::new();
    bind(&world, domain::window_of_pd(PD), Access::REMOTE | Access::LOCAL_WRITE);
    let into = Sge { lkey: WINDOW, ..world.peers(64, 100) };
    world.post(&[into]);
    let sges = [world.own(0, 100)];
    assert_eq!(world.run(&request(SendOp::Send, &sges)), done(WcStatus::RemOpErr, 0));
}

#[test]
fn who_invalidated_a_key_uses_it_no_more() {
    let mut world = World::new();
    bind(&world, domain::window_of_qp(PEER_QPN), Access::REMOTE);
    let into = world.peers(1000, 8);
    world.post(&[into]);
    assert_eq!(send_inv(&mut world, WINDOW), done(WcStatus::Success, 8));
    let said = world.received(0, &[into]).expect("received");
    assert_eq!((said.imm, u32::from(said.flags) & 0xf), (WINDOW, wc_flags::WITH_INV));
    // The owner has not heard of it: the entry lives.
    assert!(world.mrs[0].is(WINDOW));
    assert_eq!(access(&mut world, SendOp::Write, 64, 8), done(WcStatus::RemAccessErr, 0));
    world.post(&[into]);
    assert_eq!(send_inv(&mut world, WINDOW), done(WcStatus::RemAccessErr, 0), "it is invalid already");
    world.mrs[0].kill();
    bind(&world, domain::window_of_qp(PEER_QPN), Access::REMOTE);
    assert_eq!(access(&mut world, SendOp::Write, 64, 8), done(WcStatus::Success, 8), "bound anew");
}

#[test]
fn only_a_window_of_the_receiver_itself_is_invalidated() {
    for (domain, key) in [
        (domain::window_of_pd(PD), WINDOW),
        (domain::window_of_qp(PEER_QPN + 1), WINDOW),
        (domain::window_of_qp(PEER_QPN), WINDOW ^ 1),
        (domain::window_of_qp(PEER_QPN), KEY),
    ] {
        let mut world = World::new();
        bind(&world, domain, Access::REMOTE);
        world.post(&[world.peers(1000, 8)]);
        assert_eq!(send_inv(&mut world, key), done(WcStatus::RemAccessErr, 0));
        assert!(world.received(0, &[]).is_none() && !world.rq().any_claimed(), "the receive still waits");
        assert_eq!(world.path.faults, 1);
    }
}

#[test]
fn the_posters_own_keys_are_not_the_executors_business() {
    let mut world = World::new();
    for target in
        [Target::Invalidate { rkey: WINDOW }, Target::Bind { rkey: WINDOW, mr: KEY, addr: 0, len: 8 }]
    {
        assert_eq!(
            world.run(&Request { target, ..request(SendOp::BindMw, &[]) }),
            done(WcStatus::LocQpOpErr, 0)
        );
    }
}
