//! Mutated messages thrown at one session: each is answered or ends that connection, and another session goes on.

mod support;

use std::io::IoSlice;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use freeflow_core::ctl::*;
use freeflow_core::shm::make_memfd;
use freeflow_core::verbs::QpType;
use freeflow_router::config::Settings;
use rustix::net::{RecvFlags, SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};
use support::*;
use zerocopy::IntoBytes;

/// Messages, unless FF_TEST_MESSAGES says otherwise.
const ROUNDS: u32 = 2000;

/// A replayable source of numbers (xorshift).
struct Dice(u64);

impl Dice {
    fn roll(&mut self, sides: usize) -> usize {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 >> 16) as usize % sides
    }
}

fn seed() -> u64 {
    let given = std::env::var("FF_TEST_SEED").ok().and_then(|text| text.parse().ok());
    let seed = given.unwrap_or_else(|| u64::from(std::process::id()) * 0x9e37_79b9 + 1);
    println!("replay with FF_TEST_SEED={seed}");
    seed
}

fn packet<T: Request>(request: &T) -> Vec<u8> {
    let body = request.as_bytes();
    let header = Header { magic: MAGIC, version: VERSION, kind: T::KIND, status: 0, len: body.len() as u32 };
    [header.as_bytes(), body].concat()
}

/// One well-formed packet of each kind, naming live objects of the attacker and of its victim.
fn corpus(attacker: &Client, own: TestQp, victim: &Client, other: TestQp) -> Vec<Vec<u8>> {
    let dgid = victim.gid();
    let (qpn, dest_qpn) = (own.qpn, other.qpn);
    let create = CreateQp {
        pd: own.pd,
        send_cq: own.cq,
        recv_cq: own.cq,
        kind: QpType::Ud as u32,
        slab: own.slab,
        qp_off: QP_OFF,
        rq_off: RQ_OFF,
        rq_depth: 16,
        rq_sge: 1,
        cq_bit: 0,
        srq: 0,
        xrcd: 0,
    };
    let key = attacker.ask(&RegMr { pd: own.pd, access: 7, addr: 0, len: 64 }).key;
    vec![
        packet(&hello(purpose::VERBS)),
        packet(&MakeSlab { len: 4096 }),
        packet(&AllocPd {}),
        packet(&DeallocPd { pd: own.pd }),
        packet(&DeallocPd { pd: other.pd }),
        packet(&CreateChannel {}),
        packet(&DestroyChannel { channel: other.channel }),
        packet(&CreateCq { channel: own.channel, slab: own.slab, off: CQ_OFF, _pad: 0 }),
        packet(&DestroyCq { cq: other.cq }),
        packet(&RegMr { pd: own.pd, access: 7, addr: 4096, len: 4096 }),
        packet(&DeregMr { key, _pad: 0 }),
        packet(&create),
        packet(&CreateQp { slab: other.slab, ..create }),
        packet(&DestroyQp { qpn: dest_qpn }),
        packet(&DestroyQp { qpn }),
        packet(&Connect { qpn, dest_qpn, dgid, traffic_class: 0 }),
        packet(&Connect { qpn: dest_qpn, dest_qpn: qpn, dgid, traffic_class: 0 }),
        packet(&Disconnect { qpn: dest_qpn, error: 1 }),
        packet(&Resolve { qpn, dest_qpn, dgid, srqn: 0, _pad: 0 }),
        packet(&CopyMem { qpn, dest_qpn, dgid, kind: copy_kind::WRITE, key, local: 0, remote: 0, len: 64 }),
        packet(&Ring { qpn, dest_qpn, dgid, what: ring::FAULT }),
    ]
}

/// Changes a few things: single bytes, interesting words, length, kind, or nothing.
fn mutate(dice: &mut Dice, packet: &mut Vec<u8>) {
    const WORDS: [u32; 8] = [0, 1, 63, 0xff_ffff, 0x7fff_ffff, 0x8000_0000, u32::MAX - 63, u32::MAX];
    const BODY: usize = size_of::<Header>();
    for _ in 0..dice.roll(4) {
        match dice.roll(8) {
            0 => packet.truncate(dice.roll(packet.len() + 1)),
            1 => packet.extend(std::iter::repeat_n(0xa5, dice.roll(5000))),
            2 if packet.len() > 6 => packet[6] = dice.roll(256) as u8, // kind
            3 if !packet.is_empty() => {
                let at = dice.roll(packet.len());
                packet[at] ^= 1 << dice.roll(8);
            }
            _ if packet.len() >= BODY + 4 => {
                let at = BODY + dice.roll((packet.len() - BODY) / 4) * 4;
                packet[at..at + 4].copy_from_slice(&WORDS[dice.roll(WORDS.len())].to_ne_bytes());
            }
            _ => {}
        }
    }
}

fn throw(socket: &Socket, packet: &[u8], fds: &[BorrowedFd<'_>]) -> bool {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_FDS))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    if !fds.is_empty() {
        control.push(SendAncillaryMessage::ScmRights(fds));
    }
    sendmsg(socket, &[IoSlice::new(packet)], &mut control, SendFlags::NOSIGNAL).is_ok()
}

/// The watched pair can still do what it always could.
fn still_fine(((a, qa), (b, qb)): &((Client, TestQp), (Client, TestQp))) {
    assert_eq!(a.resolve(*qa, *qb, b.gid()).0.state, peer_state::READY);
    // No bytes: the attacker inside shares the quota and may have used it up.
    let key = b.ask(&RegMr { pd: qb.pd, access: 0, addr: 0, len: 0 }).key;
    b.ask(&DeregMr { key, _pad: 0 });
    a.no_event();
    b.no_event();
}

#[test]
fn mutated_messages_hurt_their_sender_only() {
    let settings = Settings { max_slab_bytes: 16 << 20, ..Settings::default() };
    let rig = Rig::with(settings);
    let pair = connected(&rig, QpType::Rc);
    // One attacker from outside, one in the victims' own container.
    let outside = rig.container("evil", [10, 66, 0, 1], "evil").socket;
    let inside = rig.socket();
    let mut dice = Dice(seed());
    let descriptors: Vec<OwnedFd> = vec![
        make_memfd("bait", 4096).expect("memfd"),
        std::fs::File::open("/dev/zero").expect("zero").into(),
        pair.0.0.channel().1,
    ];
    let mut attackers = [&outside, &inside].map(|path| (path, Client::at(path), Vec::new()));
    let (mut ended, mut answered) = (0, 0);
    let rounds =
        std::env::var("FF_TEST_MESSAGES").map_or(ROUNDS, |n| n.parse().expect("a number of messages"));
    for round in 0..rounds {
        let (path, client, packets) = &mut attackers[dice.roll(2)];
        if packets.is_empty() {
            let own = client.qp(QpType::Ud);
            *packets = corpus(client, own, &pair.1.0, pair.1.1);
        }
        let mut packet = packets[dice.roll(packets.len())].clone();
        mutate(&mut dice, &mut packet);
        let count = [0, 0, 1, 1, 2, 8][dice.roll(6)];
        let fds: Vec<_> = (0..count).map(|_| descriptors[dice.roll(3)].as_fd()).collect();
        let alive = throw(&client.socket, &packet, &fds)
            && match client.socket.recv(RecvFlags::empty()) {
                Ok(_) => true,
                Err(SocketError::Closed) => false,
                Err(other) => panic!("round {round}: neither answered nor ended: {other}"),
            };
        answered += u32::from(alive);
        if !alive {
            ended += 1;
            *client = Client::at(path);
            packets.clear();
        }
        if round % 64 == 0 {
            still_fine(&pair);
        }
    }
    still_fine(&pair);
    println!("{answered} answered, {ended} connections ended");
    assert!(answered > rounds / 10 && ended > rounds / 10, "mutations are too tame or too wild");
}
