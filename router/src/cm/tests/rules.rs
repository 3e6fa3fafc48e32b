//! Ownership, addresses, ports, limits, and nonsense.

use super::*;

#[test]
fn another_tenants_listener_is_not_found() {
    let mut w = World::new();
    let (a, b) = (w.join(1, "red", 1), w.join(2, "blue", 2));
    w.listener(b, cm_space::TCP, any(7000), 0);
    let id = w.routed(a, cm_space::TCP, addr(2, 7000));
    w.connect(a, id).unwrap();
    assert_eq!(w.next(a).status, 8);
    w.nothing(b);
}

#[test]
fn ids_and_channels_are_their_owners() {
    let mut w = World::new();
    let (a, b) = pair(&mut w);
    let id = w.listener(b, cm_space::TCP, any(7000), 0);
    assert_eq!(w.call(1, CmDestroy { id }), Err(Errno::NOENT));
    assert_eq!(w.call(1, CmMigrate { id, channel: a.channel }), Err(Errno::NOENT));
    assert_eq!(w.call(1, CmNextEvent { channel: b.channel }), Err(Errno::NOENT));
    assert_eq!(w.call(1, CmCreate { channel: b.channel, space: cm_space::TCP }), Err(Errno::NOENT));
    assert_eq!(w.call(1, CmCloseChannel { channel: b.channel }), Err(Errno::NOENT));
    let mine = w.create(a, cm_space::TCP);
    assert_eq!(w.call(1, CmMigrate { id: mine, channel: b.channel }), Err(Errno::NOENT));
    assert_eq!(w.call(9, CmOpenChannel {}), Err(Errno::NOTCONN));
}

#[test]
fn malformed_requests_change_nothing() {
    let mut w = World::new();
    let (a, b) = pair(&mut w);
    w.listener(b, cm_space::TCP, any(7000), 0);
    let id = w.routed(a, cm_space::TCP, addr(2, 7000));
    let long = CmData { len: 57, ..Default::default() };
    assert_eq!(w.call(1, CmConnect { id, params: PARAMS, data: long }), Err(Errno::INVAL));
    let wild = CmData { len: u32::MAX, ..Default::default() };
    assert_eq!(w.call(1, CmConnect { id, params: PARAMS, data: wild }), Err(Errno::INVAL));
    let params = CmParams { qpn: 1 << 24, ..PARAMS };
    assert_eq!(w.call(1, CmConnect { id, params, data: CmData::default() }), Err(Errno::INVAL));
    w.nothing(b);
    w.connect(a, id).unwrap();
    assert_eq!(w.next(b).kind, cm_event::CONNECT_REQUEST);
    let fresh = w.create(a, cm_space::TCP);
    let odd = CmAddr { family: 10, ..any(0) };
    assert_eq!(w.bind(a, fresh, odd, 0), Err(Errno::AFNOSUPPORT));
    assert_eq!(w.bind(a, fresh, any(0), 1 << 31), Err(Errno::INVAL));
    assert_eq!(w.call(1, disconnect(fresh)), Err(Errno::INVAL));
    assert_eq!(w.call(1, CmCreate { channel: a.channel, space: 3 }), Err(Errno::PROTONOSUPPORT));
}

#[test]
fn ports_follow_the_rules_of_sockets() {
    let mut w = World::new();
    let (a, b) = pair(&mut w);
    let ids: Vec<u32> = (0..6).map(|_| w.create(a, cm_space::TCP)).collect();
    assert_eq!(w.bind(a, ids[0], addr(2, 80), 0), Err(Errno::ADDRNOTAVAIL), "another container's");
    w.bind(a, ids[0], addr(1, 80), 0).unwrap();
    assert_eq!(w.bind(a, ids[1], any(80), 0), Err(Errno::ADDRINUSE));
    w.bind(a, ids[1], localhost(80), 0).unwrap();
    let reuse = cm_flags::REUSE;
    w.bind(a, ids[2], any(81), reuse).unwrap();
    w.bind(a, ids[3], any(81), reuse).unwrap();
    assert_eq!(
        w.call(1, CmListen { id: ids[2], backlog: 1 }),
        Err(Errno::ADDRINUSE),
        "a port shared that way"
    );
    let picked = w.bind(a, ids[4], any(0), 0).unwrap();
    assert!(picked >= 32768);
    assert_ne!(w.bind(a, ids[5], any(0), 0).unwrap(), picked);
    w.call(1, CmDestroy { id: ids[0] }).unwrap();
    let again = w.create(a, cm_space::TCP);
    w.bind(a, again, addr(1, 80), 0).unwrap();
    let theirs = w.create(b, cm_space::TCP);
    w.bind(b, theirs, any(80), 0).expect("each container has its own ports");
    let own = w.create(b, cm_space::TCP);
    w.bind(b, own, addr(77, 90), cm_flags::OWN).expect("an interface of the container");
}

#[test]
fn loopback_leads_home_and_nowhere_else() {
    let mut w = World::new();
    let (a, b) = pair(&mut w);
    w.listener(a, cm_space::TCP, any(7000), 0);
    let id = w.routed(b, cm_space::TCP, localhost(7000));
    w.connect(b, id).unwrap();
    assert_eq!(w.next(b).status, 8, "b's own loopback has no listener");
    let id = w.routed(a, cm_space::TCP, localhost(7000));
    w.connect(a, id).unwrap();
    let request = w.next(a);
    assert_eq!((request.kind, request.local), (cm_event::CONNECT_REQUEST, localhost(7000)));
    assert_eq!(request.gid, v4(1));
}

#[test]
fn an_unknown_address_is_an_event_and_can_be_tried_again() {
    let mut w = World::new();
    let (a, _) = pair(&mut w);
    let id = w.create(a, cm_space::TCP);
    let resolve = CmResolveAddr { id, flags: 0, src: CmAddr::default(), dst: addr(99, 1) };
    w.call(1, resolve).unwrap();
    let event = w.next(a);
    assert_eq!((event.kind, event.status), (cm_event::ADDR_ERROR, -Errno::HOSTUNREACH.raw_os_error()));
    assert_eq!(w.call(1, CmResolveRoute { id, _pad: 0 }), Err(Errno::INVAL));
    w.call(1, CmResolveAddr { dst: addr(2, 1), ..resolve }).unwrap();
    assert_eq!(w.next(a).kind, cm_event::ADDR_RESOLVED);
    assert_eq!(w.call(1, resolve), Err(Errno::INVAL));
}

#[test]
fn a_moved_listener_takes_its_requests_along() {
    let mut w = World::new();
    let (a, b) = pair(&mut w);
    let listener = w.listener(b, cm_space::TCP, any(7000), 0);
    let active = w.routed(a, cm_space::TCP, addr(2, 7000));
    w.connect(a, active).unwrap();
    w.call(1, CmDestroy { id: active }).unwrap();
    let Ok(Answer::Channel(channel)) = w.call(2, CmOpenChannel {}) else { panic!() };
    w.call(2, CmMigrate { id: listener, channel }).unwrap();
    w.nothing(b);
    let moved = Client { channel, ..b };
    assert_eq!(w.next(moved).kind, cm_event::CONNECT_REQUEST);
    assert_eq!(w.next(moved).kind, cm_event::REJECTED, "the asker did not wait");
    w.nothing(moved);
}

#[test]
fn a_channel_nobody_reads_refuses_more() {
    let mut w = World::new();
    let (a, _) = pair(&mut w);
    let id = w.create(a, cm_space::TCP);
    let resolve = CmResolveAddr { id, flags: 0, src: CmAddr::default(), dst: addr(99, 1) };
    let answers = (0..manager::MAX_WAITING + 1).map(|_| w.call(1, resolve)).filter(Result::is_err).count();
    assert_eq!(answers, 1);
}

/// Random calls on few ids: no panic, tickets match events, and everything is gone when the clients are.
#[test]
fn nonsense_keeps_the_books_straight() {
    for seed in 1..60u64 {
        let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15);
        let mut random = move |below: u32| {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            ((state >> 33) % u64::from(below)) as u32
        };
        let mut w = World::new();
        let clients = [w.join(1, "t", 1), w.join(2, "t", 2), w.join(3, "u", 2)];
        let (mut last, spaces) = (0u32, [cm_space::TCP, cm_space::UDP]);
        for _ in 0..2_000 {
            let client = clients[random(3) as usize];
            // Mostly ids of late, which are still there.
            let id = last.saturating_sub(random(25));
            let (port, host) = (7000 + random(3) as u16, 1 + random(3) as u8);
            let call: Call = match random(14) {
                0 | 1 => CmCreate { channel: client.channel, space: spaces[random(2) as usize] }.into(),
                2 => CmDestroy { id }.into(),
                3 => CmBind { id, flags: random(16), addr: any(port) }.into(),
                4 => CmListen { id, backlog: random(3) }.into(),
                5 | 6 => CmResolveAddr { id, flags: 0, src: CmAddr::default(), dst: addr(host, port) }.into(),
                7 => CmResolveRoute { id, _pad: 0 }.into(),
                8 => CmConnect { id, params: PARAMS, data: CmData::default() }.into(),
                9 => CmAccept { id, params: PARAMS, data: CmData::default() }.into(),
                10 => CmEstablish { id, _pad: 0 }.into(),
                11 => CmReject { id, reason: 0, data: CmData::default() }.into(),
                12 => disconnect(id).into(),
                _ => CmNotify { id, _pad: 0 }.into(),
            };
            if let Ok(Answer::Id(id)) = w.call(client.number, call) {
                last = id;
            }
            if random(4) == 0 {
                w.next(client);
            }
            if random(50) == 0 {
                w.pass(Duration::from_secs(u64::from(random(40))));
            }
        }
        for client in clients {
            while w.next(client).kind != cm_event::NONE {}
            w.input(Input::Leave { client: client.number });
        }
        assert_eq!(format!("{:?}", w.manager), "Manager { clients: 0, ids: 0 }", "seed {seed}");
        assert!(w.manager.ports.is_empty(), "seed {seed}");
        assert_eq!(w.manager.deadline(), None, "seed {seed}");
    }
}

#[test]
fn a_container_shares_its_limits() {
    let mut w = World::new();
    let (a, b) = (w.join(1, "t", 1), w.join(2, "t", 1));
    let opened = |w: &mut World, client: Client| w.call(client.number, CmOpenChannel {}).is_ok();
    let more = (0..manager::MAX_CHANNELS).filter(|n| opened(&mut w, if n % 2 == 0 { a } else { b })).count();
    assert_eq!(more, manager::MAX_CHANNELS - 2, "the two that were there count");
    assert_eq!(w.call(2, CmOpenChannel {}), Err(Errno::MFILE));
    let other = w.join(3, "t", 2);
    assert!(opened(&mut w, other), "another container has its own");
    w.input(Input::Leave { client: 1 });
    assert!(opened(&mut w, b));
}
