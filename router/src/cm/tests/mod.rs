//! The connection manager driven without sockets and with a clock of our own: the world that the tests share.

mod handshake;
mod rules;

use std::collections::HashMap;
use std::time::{Duration, Instant};

use freeflow_core::ctl::RawGid;
use freeflow_core::ctl::cm::*;
use rustix::io::Errno;

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
