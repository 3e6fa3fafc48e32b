//! Whatever another router sends: the fuzz target `link_frames`, and the same with random bytes among the tests.
//!
//! One queue pair is connected to one of another host, whose router sends the given bytes as messages behind an honest
//! beginning. Nothing may panic, hang, or change what no right was given to.

use std::io::{Read as _, Write as _};
use std::os::unix::net::UnixStream;

use freeflow_core::ring::Wqe;
use freeflow_core::verbs::{Gid, QpType, SendOp};
use zerocopy::{FromBytes as _, IntoBytes as _};

use super::testing::{FILE, Host, KEY, PAGE, wire};
use super::wire::{CHANNELS, Header, Kind, Opening, VERSION};

const HERE: [u8; 4] = [10, 0, 0, 1];
const THERE: [u8; 4] = [10, 0, 0, 2];
/// The other end's number.
const DEST: u32 = 77;

/// The host under attack, some of whose requests wait for the other side, so that answers have something to be about.
fn victim(kind: QpType) -> Host {
    let mut host = Host::new("h1", HERE, kind);
    host.connect("h2", THERE, DEST);
    for op in [SendOp::Write, SendOp::Read, SendOp::FetchAdd, SendOp::Send] {
        let total = if op.is_atomic() { 8 } else { 64 };
        host.post(&Wqe { op: op as u8, total, timeout: 14, ..Wqe::default() }, PAGE);
    }
    host
}

/// The router of the other host, which says one Hello per channel and opens to the queue pair before it goes astray.
struct Attacker([UnixStream; CHANNELS]);

impl Attacker {
    fn new(host: &mut Host, kind: QpType) -> Self {
        let mut attacker = Attacker::connected(host);
        (0..CHANNELS).for_each(|channel| attacker.greet(channel));
        host.work();
        attacker.open(host.qpn, kind);
        host.work();
        attacker.answer_open();
        host.work();
        attacker
    }

    /// One that has not said anything yet.
    fn connected(host: &mut Host) -> Self {
        for (name, attempt) in std::mem::take(&mut host.engine.to_dial) {
            host.engine.dial_failed(&name, attempt); // it is the attacker who connects
        }
        Attacker(std::array::from_fn(|_| {
            let (stream, theirs) = wire("h2");
            host.engine.accepted(stream);
            theirs
        }))
    }

    fn greet(&mut self, channel: usize) {
        let hello = Header { seq: VERSION, a: 9, ..Header::new(Kind::Hello, 0, channel as u32) };
        self.0[channel].write_all(hello.as_bytes()).expect("room");
    }

    fn open(&mut self, qpn: u32, kind: QpType) {
        let ends = Opening { from: Gid::of(THERE.into()).0, to: Gid::of(HERE.into()).0 };
        let open = Header {
            op: kind.counterpart() as u8,
            len: size_of::<Opening>() as u32 + 1,
            a: 3,
            ..Header::new(Kind::Open, DEST, qpn)
        };
        self.send(&[open.as_bytes(), ends.as_bytes(), b"t"].concat());
    }

    fn send(&mut self, bytes: &[u8]) {
        // A host that takes no more has hung up.
        let _ = self.0[0].write_all(bytes);
    }

    /// What the host has sent.
    fn hear(&mut self) -> Vec<u8> {
        let mut heard = Vec::new();
        let _ = self.0[0].read_to_end(&mut heard); // until it would block
        heard
    }

    /// The host opens, too: its requests may go out.
    fn answer_open(&mut self) {
        for open in messages(&self.hear()).filter(|header| header.kind == Kind::Open as u8) {
            let Header { seq, epoch, from, .. } = open;
            self.send(Header { seq, epoch, ..Header::new(Kind::Opened, DEST, from) }.as_bytes());
        }
    }
}

/// The headers of what the host has sent.
fn messages(mut bytes: &[u8]) -> impl Iterator<Item = Header> {
    std::iter::from_fn(move || {
        let (header, rest) = Header::read_from_prefix(bytes).ok()?;
        bytes = rest.get(header.len as usize..).unwrap_or_default();
        Some(header)
    })
}

/// What the bytes say, addressed so that it is not refused for its numbers alone: most of it then gets further.
fn addressed(bytes: &[u8], qpn: u32) -> Vec<u8> {
    let Ok((header, payload)) = Header::read_from_prefix(bytes) else { return bytes.to_vec() };
    let to = if header.to & 7 == 0 { header.to } else { qpn };
    let from = if header.from & 7 == 0 { header.from } else { DEST };
    let rkey = if header.rkey & 7 == 0 { header.rkey } else { KEY };
    let addr = if header.addr & 7 == 0 { header.addr } else { PAGE + header.addr % (FILE - PAGE) };
    let kind = if header.kind & 0x80 == 0 { header.kind % 18 } else { header.kind };
    // Lengths that are there, but for some.
    let len = if header.len & 7 == 0 { header.len } else { payload.len() as u32 };
    [Header { kind, len, to, from, rkey, addr, ..header }.as_bytes(), payload].concat()
}

/// `bytes` are messages of an attacker, each with a length of two bytes in front, behind one that chooses the type of queue pair.
pub fn frames(bytes: &[u8]) {
    let Some((choice, mut rest)) = bytes.split_first() else { return };
    let kind = if choice & 1 == 0 { QpType::Rc } else { QpType::Uc };
    let mut host = victim(kind);
    let mut attacker = Attacker::new(&mut host, kind);
    while let Some((len, more)) = rest.split_first_chunk::<2>() {
        let len = usize::from(u16::from_le_bytes(*len) % 2048).min(more.len());
        attacker.send(&addressed(&more[..len], host.qpn));
        host.work();
        drop(attacker.hear());
        rest = &more[len..];
    }
    let first = host.memory(0, PAGE as usize);
    assert!(first.iter().all(|byte| *byte == 0), "memory that no key grants was written");
}

/// Messages of honest shape to begin with, for corpora.
#[cfg(test)]
fn sample(kind: Kind, header: Header, payload: &[u8]) -> Vec<u8> {
    let header = Header { kind: kind as u8, len: payload.len() as u32, to: 1, from: 1, ..header };
    let len = (size_of::<Header>() + payload.len()) as u16;
    [&len.to_le_bytes(), header.as_bytes(), payload].concat()
}

#[cfg(test)]
mod tests {
    use super::*;
    use freeflow_core::verbs::Flush;
    use proptest::prelude::*;
    use rustix::event::{PollFd, PollFlags, Timespec, poll};

    fn write(seq: u32, payload: &[u8]) -> Vec<u8> {
        let total = payload.len() as u32;
        let op = SendOp::Write as u8;
        sample(Kind::Request, Header { op, seq, total, rkey: 1, addr: 1, ..Header::default() }, payload)
    }

    /// Sleeps until something comes, as the link's thread does, and takes that.
    fn sleep(host: &mut Host) {
        let mut wait = [PollFd::new(&*host.engine.epoll, PollFlags::IN)];
        let watchdog = Timespec { tv_sec: 30, tv_nsec: 0 };
        assert_ne!(poll(&mut wait, Some(&watchdog)).expect("poll"), 0, "nothing comes");
        host.work();
    }

    fn flush(seq: u32, len: u64) -> Vec<u8> {
        let (op, what) = (SendOp::Flush as u8, Flush::GLOBAL.bits().into());
        let header = Header { op, seq, rkey: 1, addr: 1, a: len, b: what, ..Header::default() };
        sample(Kind::Request, header, &[])
    }

    #[test]
    fn a_flush_is_acknowledged_or_refused() {
        for (len, answer) in [(64, Kind::Ack), (FILE - PAGE, Kind::Nak)] {
            let mut host = victim(QpType::Rc);
            let mut attacker = Attacker::new(&mut host, QpType::Rc);
            attacker.send(&addressed(&flush(0, len)[2..], host.qpn));
            host.work();
            let kinds: Vec<u8> = messages(&attacker.hear()).map(|header| header.kind).collect();
            assert!(kinds.contains(&(answer as u8)), "{len}: {kinds:?}");
        }
    }

    #[test]
    fn an_honest_write_is_placed() {
        let mut host = victim(QpType::Rc);
        let mut attacker = Attacker::new(&mut host, QpType::Rc);
        let message = write(0, b"hello");
        attacker.send(&addressed(&message[2..], host.qpn));
        host.work();
        assert_eq!(host.memory(PAGE + 1, 5), b"hello");
        let kinds: Vec<u8> = messages(&attacker.hear()).map(|header| header.kind).collect();
        assert!(kinds.contains(&(Kind::Ack as u8)) && kinds.contains(&(Kind::Request as u8)), "{kinds:?}");
    }

    /// The side that is dialed may open, and ask, as soon as it was greeted on all channels: the answers to its own greetings come
    /// by each of them in their own time.
    #[test]
    fn a_read_that_comes_before_the_last_channel_is_answered() {
        let mut host = victim(QpType::Rc);
        let mut attacker = Attacker::connected(&mut host);
        attacker.greet(0);
        attacker.open(host.qpn, QpType::Rc);
        let read = Header { op: SendOp::Read as u8, total: 64, rkey: 1, addr: 1, ..Header::default() };
        attacker.send(&addressed(&sample(Kind::Request, read, &[])[2..], host.qpn));
        attacker.greet(1);
        host.work();
        let kinds: Vec<u8> = messages(&attacker.hear()).map(|header| header.kind).collect();
        assert!(kinds.contains(&(Kind::ReadData as u8)), "{kinds:?}");
    }

    #[test]
    fn each_write_is_acknowledged_though_nobody_answers() {
        let mut host = victim(QpType::Rc);
        let mut attacker = Attacker::new(&mut host, QpType::Rc);
        for seq in 0..200 {
            attacker.send(&addressed(&write(seq, b"hello")[2..], host.qpn));
            host.work();
            while !messages(&attacker.hear()).any(|said| said.kind == Kind::Ack as u8 && said.seq == seq + 1)
            {
                sleep(&mut host);
            }
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(400))]

        #[test]
        fn any_bytes_leave_the_host_whole(bytes in proptest::collection::vec(any::<u8>(), 0..1500)) {
            frames(&bytes);
        }

        #[test]
        fn any_change_to_honest_messages_leaves_the_host_whole(
            flips in proptest::collection::vec((0usize..1000, any::<u8>()), 0..8), kind in any::<u8>(),
        ) {
            let answer = |kind, seq| sample(kind, Header { seq, ..Header::default() }, &[]);
            let mut bytes = [
                vec![kind], write(0, b"one"), answer(Kind::Ack, 1), write(1, &[7; 300]), answer(Kind::AtomicResult, 2),
                sample(Kind::ReadData, Header { seq: 1, ..Header::default() }, &[1; 64]), answer(Kind::RnrNak, 3),
                flush(2, 8), answer(Kind::Nak, 3), answer(Kind::Close, 0),
            ].concat();
            for (at, with) in flips {
                let at = at % bytes.len();
                bytes[at] ^= with;
            }
            frames(&bytes);
        }
    }
}
