//! Random requests in random steps move the same bytes as a loop over bytes. A failure prints its case and seed.

use proptest::prelude::*;

use super::*;

const OPS: [SendOp; 5] = [SendOp::Write, SendOp::WriteImm, SendOp::Send, SendOp::SendImm, SendOp::Read];

/// Up to 16 stretches of a memory of `LEN` bytes.
fn stretches() -> impl Strategy<Value = Vec<(usize, u32)>> {
    let one = (0..LEN).prop_flat_map(|at| (Just(at), prop_oneof![0..9u32, 0..=600u32]));
    let fits = |(at, len): (usize, u32)| (at, len.min((LEN - at) as u32));
    prop::collection::vec(one.prop_map(fits), 0..=16)
}

/// The bytes of the stretches, in order.
fn places(list: &[(usize, u32)]) -> impl Iterator<Item = usize> + '_ {
    list.iter().flat_map(|(at, len)| (*at..).take(*len as usize))
}

proptest! {
    #[test]
    fn bytes_land_where_a_simple_loop_puts_them(
        op in prop::sample::select(&OPS[..]),
        local in stretches(),
        into in stretches(),
        remote in 0..LEN,
        budgets in prop::collection::vec(1..700u64, 1..20),
        window in 1..2000u64,
        far in any::<bool>(),
    ) {
        let mut world = World::new();
        world.fill_own(|i| (i * 7) as u8);
        world.fill_peer(|i| (i * 13 + 5) as u8);
        world.path.window = window;
        world.path.far = far.then_some(Ok(()));
        let (mut own, mut peer) = (world.own_bytes(), world.peer_bytes());
        let sges: Vec<Sge> = local.iter().map(|(at, len)| world.own(*at, *len)).collect();
        let receive: Vec<Sge> = into.iter().map(|(at, len)| world.peers(*at, *len)).collect();
        world.post(&receive);

        // The model.
        let total: usize = places(&local).count();
        let sends = matches!(op, SendOp::Send | SendOp::SendImm);
        let there: Vec<usize> = if sends { places(&into).collect() } else { (remote..LEN).collect() };
        let fits = total <= there.len();
        if fits {
            for (here, there) in places(&local).zip(there) {
                if op == SendOp::Read { own[here] = peer[there] } else { peer[there] = own[here] }
            }
        }

        // The executor.
        let target = if sends { Target::Receive } else { Target::Memory { addr: IOVA + remote as u64, rkey: KEY } };
        let wanted = Request { target, ..request(op, &sges) };
        let mut progress = Progress::default();
        let mut outcome = Outcome::Again;
        for budget in budgets.iter().cycle().take(LEN + 16 * 600) {
            outcome = world.step(&wanted, &mut progress, *budget);
            if outcome != Outcome::Again { break }
        }
        let received = world.received(0, &receive);
        if fits {
            prop_assert_eq!(outcome, done(WcStatus::Success, total as u32));
            prop_assert_eq!(received.map(|said| said.byte_len), op.consumes_receive().then_some(total as u32));
        } else {
            let status = if sends { WcStatus::RemInvReqErr } else { WcStatus::RemAccessErr };
            prop_assert_eq!(outcome, done(status, 0));
        }
        prop_assert!(world.own_bytes() == own && world.peer_bytes() == peer);
        prop_assert!(!world.rq().any_claimed());
    }
}
