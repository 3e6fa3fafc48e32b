//! The connection manager's rules, driven without sockets and with a clock of our own.

use std::collections::HashMap;
use std::time::{Duration, Instant};

use freeflow_core::ctl::RawGid;
use freeflow_core::ctl::cm::*;
use rustix::io::Errno;

use super::connect::ANSWER_TIMEOUT;
use super::ends::{DREQ_TIMEOUT, TIME_WAIT};
use super::*;

fn v4(last: u8) -> RawGid {
    std::net::Ipv4Addr::new(10, 1, 0, last).to_ipv6_mapped().octets()
}

fn addr(last: u8, port: u16) -> CmAddr {
    CmAddr { addr: v4(last), port, family: cm_family::V4, scope: 0 }
}

fn any(port: u16) -> CmAddr {
    CmAddr { port, family: cm_family::V4, ..Default::default() }
}

fn localhost(port: u16) -> CmAddr {
    CmAddr { addr: ports::loopback(cm_family::V4), port, family: cm_family::V4, scope: 0 }
}

/// Containers .1 to .9 of every tenant exist.
struct Everybody;

impl Directory for Everybody {
    fn locate(&self, from: &Home, addr: &RawGid) -> Option<Home> {
        (1..10).map(v4).find(|vip| vip == addr).map(|vip| Home { tenant: from.tenant.clone(), vip })
    }
}

/// A manager, its clock, and what its channels' sockets would hold.
struct World {
    manager: Manager,
    now: Instant,
    tickets: HashMap<u32, u32>,
}

/// A client with one channel.
#[derive(Clone, Copy)]
struct Client {
    number: u32,
    channel: u32,
}

fn home(tenant: &str, last: u8) -> Home {
    Home { tenant: tenant.into(), vip: v4(last) }
}

impl World {
    fn new() -> Self {
        World { manager: Manager::new(Box::new(Everybody), 7), now: Instant::now(), tickets: HashMap::new() }
    }

    fn input(&mut self, input: Input) -> Output {
        let output = self.manager.process(input, self.now);
        for channel in &output.tickets {
            *self.tickets.entry(*channel).or_default() += 1;
        }
        for channel in &output.closed {
            self.tickets.remove(channel);
        }
        output
    }

    fn call(&mut self, client: u32, call: impl Into<Call>) -> Result<Answer, Errno> {
        let answer =
            self.input(Input::Call { client, call: call.into() }).answer.expect("a call is answered");
        if let Ok(Answer::Dropped { channel, dropped }) = &answer {
            *self.tickets.entry(*channel).or_default() -= dropped.events;
        }
        answer
    }

    fn join(&mut self, number: u32, tenant: &str, last: u8) -> Client {
        self.input(Input::Join { client: number, home: home(tenant, last) });
        let Ok(Answer::Channel(channel)) = self.call(number, CmOpenChannel {}) else { panic!("no channel") };
        Client { number, channel }
    }

    fn create(&mut self, client: Client, space: u32) -> u32 {
        match self.call(client.number, CmCreate { channel: client.channel, space }) {
            Ok(Answer::Id(id)) => id,
            other => panic!("no id: {other:?}"),
        }
    }

    fn bind(&mut self, client: Client, id: u32, addr: CmAddr, flags: u32) -> Result<u16, Errno> {
        match self.call(client.number, CmBind { id, flags, addr })? {
            Answer::Addr(addr) => Ok(addr.port),
            other => panic!("{other:?}"),
        }
    }

    fn listener(&mut self, client: Client, space: u32, at: CmAddr, backlog: u32) -> u32 {
        let id = self.create(client, space);
        self.bind(client, id, at, 0).unwrap();
        self.call(client.number, CmListen { id, backlog }).unwrap();
        id
    }

    /// The next event of a client's channel, checked against the tickets.
    fn next(&mut self, client: Client) -> CmNext {
        let answer = self.call(client.number, CmNextEvent { channel: client.channel });
        let Ok(Answer::Next { event, .. }) = answer else { panic!("{answer:?}") };
        let tickets = self.tickets.entry(client.channel).or_default();
        assert_eq!(*tickets > 0, event.kind != cm_event::NONE, "tickets and events part");
        *tickets = tickets.saturating_sub(1);
        *event
    }

    fn nothing(&mut self, client: Client) {
        assert_eq!(self.next(client).kind, cm_event::NONE);
    }

    /// An id that has its route to `dst`.
    fn routed(&mut self, client: Client, space: u32, dst: CmAddr) -> u32 {
        let id = self.create(client, space);
        let resolve = CmResolveAddr { id, flags: 0, src: CmAddr::default(), dst };
        self.call(client.number, resolve).unwrap();
        assert_eq!(self.next(client).kind, cm_event::ADDR_RESOLVED);
        self.call(client.number, CmResolveRoute { id, _pad: 0 }).unwrap();
        assert_eq!(self.next(client).kind, cm_event::ROUTE_RESOLVED);
        id
    }

    fn connect(&mut self, client: Client, id: u32) -> Result<Answer, Errno> {
        let params = CmParams { qpn: 5, psn: 77, initiator_depth: 3, responder_resources: 9, ..PARAMS };
        let data = CmData::new(b"knock", cm_data::REQUEST).unwrap();
        self.call(client.number, CmConnect { id, params, data })
    }

    fn accept(&mut self, client: Client, id: u32) -> Result<Answer, Errno> {
        let data = CmData::new(b"come in", cm_data::REPLY).unwrap();
        self.call(client.number, CmAccept { id, params: CmParams { qpn: 6, ..PARAMS }, data })
    }

    /// Two clients with an established connection: (active, passive) ids.
    fn established(&mut self, a: Client, b: Client) -> (u32, u32) {
        self.listener(b, cm_space::TCP, any(7000), 0);
        let active = self.routed(a, cm_space::TCP, addr(2, 7000));
        self.connect(a, active).unwrap();
        let passive = self.next(b).id;
        self.accept(b, passive).unwrap();
        assert_eq!(self.next(a).kind, cm_event::CONNECT_RESPONSE);
        self.call(a.number, CmEstablish { id: active, _pad: 0 }).unwrap();
        assert_eq!(self.next(b).kind, cm_event::ESTABLISHED);
        (active, passive)
    }

    fn pass(&mut self, time: Duration) {
        self.now += time;
        self.input(Input::Tick);
    }
}

const PARAMS: CmParams = CmParams {
    responder_resources: 0,
    initiator_depth: 0,
    flow_control: 0,
    retry_count: 7,
    rnr_retry_count: 7,
    srq: 0,
    _pad: 0,
    qpn: 0,
    qkey: 0,
    psn: 0,
    ece_vendor: 0,
    ece_options: 0,
};

fn pair(world: &mut World) -> (Client, Client) {
    (world.join(1, "t", 1), world.join(2, "t", 2))
}

fn disconnect(id: u32) -> CmDisconnect {
    CmDisconnect { id, _pad: 0 }
}

#[test]
fn a_connection_is_made_and_taken_down() {
    let mut w = World::new();
    let (a, b) = pair(&mut w);
    let listener = w.listener(b, cm_space::TCP, any(7000), 0);
    assert_eq!(w.manager.ports(&home("t", 2)), [7000]);
    let active = w.routed(a, cm_space::TCP, addr(2, 7000));
    w.connect(a, active).unwrap();
    let request = w.next(b);
    assert_eq!((request.kind, request.listener), (cm_event::CONNECT_REQUEST, listener));
    assert_eq!((request.local, request.remote.addr, request.gid), (addr(2, 7000), v4(1), v4(1)));
    assert_eq!((request.params.qpn, request.params.psn), (5, 77));
    assert_eq!((request.params.responder_resources, request.params.initiator_depth), (3, 9));
    assert_eq!(request.data.len as usize, cm_data::REQUEST, "RoCE's length, filled up");
    assert!(request.data.bytes().starts_with(b"knock\0"));
    w.accept(b, request.id).unwrap();
    let response = w.next(a);
    assert_eq!((response.kind, response.id, response.params.qpn), (cm_event::CONNECT_RESPONSE, active, 6));
    assert_eq!((response.gid, response.data.len as usize), (v4(2), cm_data::REPLY));
    w.nothing(b);
    w.call(1, CmEstablish { id: active, _pad: 0 }).unwrap();
    assert_eq!(w.next(b).kind, cm_event::ESTABLISHED);

    w.call(1, disconnect(active)).unwrap();
    w.nothing(a);
    assert_eq!(
        (w.next(b).kind, w.manager.id(active).unwrap().state),
        (cm_event::DISCONNECTED, id::State::DreqSent)
    );
    w.call(2, disconnect(request.id)).unwrap();
    assert_eq!(w.next(a).kind, cm_event::DISCONNECTED);
    w.call(1, disconnect(active)).unwrap();
    w.nothing(a);
    w.pass(TIME_WAIT);
    assert_eq!((w.next(a).kind, w.next(b).kind), (cm_event::TIMEWAIT_EXIT, cm_event::TIMEWAIT_EXIT));
    assert_eq!(w.manager.deadline(), None);
}

#[test]
fn refusals_carry_their_reason() {
    let mut w = World::new();
    let (a, b) = pair(&mut w);
    let id = w.routed(a, cm_space::TCP, addr(2, 7000));
    w.connect(a, id).unwrap();
    let event = w.next(a);
    assert_eq!((event.kind, event.status), (cm_event::REJECTED, 8));
    assert_eq!(w.connect(a, id), Err(Errno::INVAL), "a rejected id does not connect again");

    w.listener(b, cm_space::TCP, any(7000), 0);
    let id = w.routed(a, cm_space::TCP, addr(2, 7000));
    w.connect(a, id).unwrap();
    let passive = w.next(b).id;
    let data = CmData::new(b"no", cm_data::REJECT).unwrap();
    assert_eq!(w.call(2, CmReject { id: passive, reason: 9, data }), Err(Errno::INVAL));
    w.call(2, CmReject { id: passive, reason: 0, data }).unwrap();
    let event = w.next(a);
    assert_eq!((event.kind, event.status, event.data.len), (cm_event::REJECTED, 28, 148));
    assert_eq!(w.accept(b, passive), Err(Errno::INVAL));
}

#[test]
fn a_full_backlog_and_a_destroyed_request_reject() {
    let mut w = World::new();
    let (a, b) = pair(&mut w);
    let listener = w.listener(b, cm_space::TCP, any(7000), 1);
    let ids: Vec<u32> = (0..2).map(|_| w.routed(a, cm_space::TCP, addr(2, 7000))).collect();
    for id in &ids {
        w.connect(a, *id).unwrap();
    }
    let event = w.next(a);
    assert_eq!((event.kind, event.id, event.status), (cm_event::REJECTED, ids[1], 28));
    w.call(2, CmDestroy { id: listener }).unwrap();
    let event = w.next(a);
    assert_eq!((event.kind, event.id, event.status), (cm_event::REJECTED, ids[0], 28));
    w.nothing(b);
    assert!(w.manager.ports(&home("t", 2)).is_empty());
}

#[test]
fn fetched_requests_leave_the_backlog() {
    let mut w = World::new();
    let (a, b) = pair(&mut w);
    w.listener(b, cm_space::TCP, any(7000), 1);
    for _ in 0..3 {
        let id = w.routed(a, cm_space::TCP, addr(2, 7000));
        w.connect(a, id).unwrap();
        assert_eq!(w.next(b).kind, cm_event::CONNECT_REQUEST);
        w.nothing(a);
    }
}

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
fn death_is_told_to_the_other_end() {
    for step in 0..4 {
        let mut w = World::new();
        let (a, b) = pair(&mut w);
        w.listener(b, cm_space::TCP, any(7000), 0);
        let active = w.routed(a, cm_space::TCP, addr(2, 7000));
        w.connect(a, active).unwrap();
        let passive = w.next(b).id;
        if step > 1 {
            w.accept(b, passive).unwrap();
            w.next(a);
        }
        if step > 2 {
            w.call(1, CmEstablish { id: active, _pad: 0 }).unwrap();
            w.next(b);
        }
        let (dead, alive) = if step == 0 { (a, b) } else { (b, a) };
        w.input(Input::Leave { client: dead.number });
        let event = w.next(alive);
        let expected = if step == 3 { cm_event::DISCONNECTED } else { cm_event::REJECTED };
        assert_eq!(event.kind, expected, "step {step}");
        w.nothing(alive);
        if dead.number == b.number {
            assert!(w.manager.ports(&home("t", 2)).is_empty(), "listeners vanish");
        }
        if step == 3 {
            w.call(1, disconnect(active)).unwrap();
            w.pass(TIME_WAIT);
            assert_eq!(w.next(a).kind, cm_event::TIMEWAIT_EXIT);
        }
    }
}

#[test]
fn silence_ends_a_handshake() {
    let mut w = World::new();
    let (a, b) = pair(&mut w);
    w.listener(b, cm_space::TCP, any(7000), 0);
    let active = w.routed(a, cm_space::TCP, addr(2, 7000));
    w.connect(a, active).unwrap();
    let passive = w.next(b).id;
    w.pass(ANSWER_TIMEOUT - Duration::from_millis(1));
    w.nothing(a);
    w.pass(Duration::from_millis(1));
    let event = w.next(a);
    assert_eq!((event.kind, event.status), (cm_event::UNREACHABLE, -Errno::TIMEDOUT.raw_os_error()));
    assert_eq!(w.next(b).kind, cm_event::REJECTED);
    assert_eq!(w.accept(b, passive), Err(Errno::INVAL));
}

#[test]
fn silence_ends_a_disconnect() {
    let mut w = World::new();
    let (a, b) = pair(&mut w);
    let (active, _) = w.established(a, b);
    w.call(1, disconnect(active)).unwrap();
    w.pass(DREQ_TIMEOUT);
    let event = w.next(a);
    assert_eq!((event.kind, event.status), (cm_event::DISCONNECTED, -Errno::TIMEDOUT.raw_os_error()));
}

#[test]
fn data_before_the_word_establishes_once() {
    let mut w = World::new();
    let (a, b) = pair(&mut w);
    w.listener(b, cm_space::TCP, any(7000), 0);
    let active = w.routed(a, cm_space::TCP, addr(2, 7000));
    w.connect(a, active).unwrap();
    let passive = w.next(b).id;
    w.accept(b, passive).unwrap();
    w.call(2, CmNotify { id: passive, _pad: 0 }).unwrap();
    assert_eq!(w.next(b).kind, cm_event::ESTABLISHED);
    w.call(1, CmEstablish { id: active, _pad: 0 }).unwrap();
    w.nothing(b);
}

#[test]
fn datagrams_are_looked_up() {
    let mut w = World::new();
    let (a, b) = pair(&mut w);
    w.listener(b, cm_space::UDP, any(7000), 0);
    let id = w.routed(a, cm_space::UDP, addr(2, 7001));
    w.connect(a, id).unwrap();
    let event = w.next(a);
    assert_eq!((event.kind, event.status), (cm_event::UNREACHABLE, 1));
    let id = w.routed(a, cm_space::UDP, addr(2, 7000));
    w.connect(a, id).unwrap();
    let passive = w.next(b).id;
    let params = CmParams { qpn: 6, qkey: 0x0123_4567, ..PARAMS };
    w.call(2, CmAccept { id: passive, params, data: CmData::default() }).unwrap();
    let event = w.next(a);
    assert_eq!((event.kind, event.params.qpn, event.params.qkey), (cm_event::ESTABLISHED, 6, 0x0123_4567));
    w.call(2, CmDestroy { id: passive }).unwrap();
    w.nothing(a);
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
