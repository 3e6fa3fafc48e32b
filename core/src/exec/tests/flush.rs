//! FLUSH: rights, ranges, and that it waits for nothing but its turn.

use super::*;
use crate::ring::mr::domain;

/// In slot 0, which no region has.
const OTHER: u32 = 0x0900_0033;
const RIGHTS: Access = Access::FLUSH_GLOBAL.union(Access::FLUSH_PERSISTENT);

/// A region that grants `access`, of the second half of the peer's memory, and a QP that serves both placements.
fn world(pd: u32, access: Access) -> World {
    let world = World::new();
    let half = LEN as u64 / 2;
    let (iova, addr) = (IOVA + half, PEER_VA + half);
    world.mrs[0].publish(&MrView { key: OTHER, access, pd, iova, addr, len: half, ..MrView::default() });
    world.qp.access.store(RIGHTS.bits(), Ordering::Relaxed);
    world
}

fn flush(world: &mut World, what: Flush, offset: u64, len: u64) -> Outcome {
    let target = Target::Flush { addr: IOVA + LEN as u64 / 2 + offset, rkey: OTHER, len, what };
    world.run(&Request { target, ..request(SendOp::Flush, &[]) })
}

#[test]
fn each_placement_has_its_right_and_each_range_its_region() {
    let half = LEN as u64 / 2;
    let (good, bad) = (done(WcStatus::Success, 0), done(WcStatus::RemAccessErr, 0));
    let cases = [
        (Access::FLUSH_GLOBAL, Flush::GLOBAL, 0, half, good),
        (Access::FLUSH_GLOBAL, Flush::GLOBAL, half, 0, good),
        (Access::FLUSH_GLOBAL, Flush::GLOBAL, 1, half, bad),
        (Access::FLUSH_GLOBAL, Flush::GLOBAL, 8, u64::MAX, bad),
        (Access::FLUSH_GLOBAL, Flush::GLOBAL, half + 1, 0, bad),
        (Access::FLUSH_GLOBAL, Flush::GLOBAL | Flush::REGION, 77 * half, u64::MAX, good),
        (Access::FLUSH_GLOBAL, Flush::PERSISTENT, 0, 8, bad),
        (Access::FLUSH_GLOBAL, Flush::PERSISTENT | Flush::GLOBAL, 0, 8, bad),
        (RIGHTS, Flush::PERSISTENT | Flush::GLOBAL, 0, 8, good),
        (Access::REMOTE | Access::LOCAL_WRITE, Flush::GLOBAL, 0, 8, bad),
        (Access::REMOTE | Access::LOCAL_WRITE, Flush::GLOBAL | Flush::REGION, 0, 8, bad),
    ];
    for pd in [PD, domain::window_of_pd(PD), domain::window_of_qp(PEER_QPN)] {
        for (access, what, offset, len, outcome) in cases {
            let mut world = world(pd, access);
            assert_eq!(
                flush(&mut world, what, offset, len),
                outcome,
                "{pd:#x} {access:?} {what:?} {offset} {len}"
            );
            assert_eq!(world.path.faults, u32::from(outcome != good));
        }
    }
    let mut elsewhere = world(PD + 1, RIGHTS);
    assert_eq!(flush(&mut elsewhere, Flush::GLOBAL | Flush::REGION, 0, 0), bad);
}

#[test]
fn the_queue_pair_serves_each_placement_or_not() {
    for (served, what) in [
        (Access::FLUSH_PERSISTENT, Flush::GLOBAL),
        (Access::FLUSH_GLOBAL, Flush::PERSISTENT),
        (Access::REMOTE, Flush::GLOBAL),
    ] {
        let mut world = world(PD, RIGHTS);
        world.qp.access.store(served.bits(), Ordering::Relaxed);
        assert_eq!(flush(&mut world, what, 0, 8), done(WcStatus::RemInvReqErr, 0));
    }
}

/// Memory that is reached through the router was written when its copies returned.
#[test]
fn it_touches_no_memory() {
    let mut world = world(PD, RIGHTS);
    world.path.far = Some(Err(Errno::ACCESS));
    assert_eq!(flush(&mut world, Flush::GLOBAL, 0, 8), done(WcStatus::Success, 0));
}
