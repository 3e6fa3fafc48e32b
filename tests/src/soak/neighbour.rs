//! A hostile neighbour: connects to its peers as a client of the library would, and then does to everything it was given
//! what the kernel lets it. It speaks the router's protocol itself and takes the orders of `soak/worker.c`.

use std::collections::HashMap;
use std::io::BufRead;
use std::net::Ipv6Addr;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::time::{Duration, Instant};

use freeflow_core::client::socket_candidates;
use freeflow_core::ctl::*;
use freeflow_core::ring::{CqShared, Extent, MAX_SGE, MR_SLOTS, MrEntry, QpShared, RecvSlot};
use freeflow_core::shm::{make_bell, make_memfd};
use freeflow_core::verbs::QpType;
use rustix::fs::{FallocateFlags, Mode, OFlags, SealFlags};
use rustix::io::Errno;
use rustix::net::RecvFlags;

use super::Result;
use super::dice::Dice;

const SLAB: u64 = 64 << 10;
const CQ_OFF: u64 = 0;
const QP_OFF: u64 = 4096;
const RQ_OFF: u64 = 8192;
const DEPTH: u64 = 16;
/// The registered range it speaks of. Nothing of its own is there.
const ADDR: u64 = 0x7000_0000_0000;
const LEN: u64 = 1 << 20;
const EVERY_ACCESS: u32 = 0xf;
const RTS: u32 = 3;

/// Words at which arithmetic breaks.
const EDGES: [u64; 20] = [
    0,
    1,
    2,
    4,
    39,
    40,
    41,
    63,
    64,
    4095,
    4096,
    LEN,
    1 << 31,
    0xffff_ffff,
    1 << 32,
    1 << 40,
    1 << 62,
    1 << 63,
    u64::MAX - 4095,
    u64::MAX,
];

/// What is at an offset of a shared file.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
enum Field {
    Qp,
    Slots(u64),
    Cq,
    Entry,
    Bytes,
}

/// A file it may write to.
#[derive(Debug)]
struct Target {
    fd: OwnedFd,
    len: u64,
    fields: Vec<(u64, Field)>,
}

impl Target {
    fn new(fd: OwnedFd) -> Result<Self> {
        let len = rustix::fs::fstat(&fd).map_err(|e| format!("fstat: {e}"))?.st_size as u64;
        Ok(Target { fd, len, fields: vec![(0, Field::Bytes)] })
    }

    fn knows(&mut self, at: u64, field: Field) {
        if !self.fields.contains(&(at, field)) {
            self.fields.push((at, field));
        }
    }

    fn read(&self, at: u64) -> u64 {
        let mut word = [0; 8];
        // Past the end it reads 0.
        let _ = rustix::io::pread(&self.fd, &mut word, at);
        u64::from_ne_bytes(word)
    }

    fn write(&self, at: u64, bytes: &[u8]) {
        // A descriptor it may not write to, or past the end: tried all the same.
        let _ = rustix::io::pwrite(&self.fd, bytes, at);
    }
}

#[derive(Debug)]
struct Qp {
    qpn: u32,
    peer_qpn: u32,
    peer: RawGid,
    peer_key: u32,
    pd: u32,
    key: u32,
    /// Its own slab and PD in `Neighbour::targets`.
    slab: usize,
}

pub struct Neighbour {
    dice: Dice,
    socket: Socket,
    hello: HelloReply,
    /// Its MR table, which peers read.
    table: usize,
    targets: Vec<Target>,
    /// Slabs of peers that it has already.
    slabs: HashMap<u32, usize>,
    /// Descriptors that cannot be written to like a file.
    others: Vec<OwnedFd>,
    qps: HashMap<usize, Qp>,
    events: Socket,
}

fn wrong(what: &str) -> impl Fn(SocketError) -> String {
    move |error| format!("{what}: {error}")
}

impl Neighbour {
    pub fn new(seed: u64) -> Result<Self> {
        let path = socket_candidates().remove(0);
        let socket = Socket::connect(&path).map_err(|e| format!("{}: {e}", path.display()))?;
        let hello = Hello { min_version: VERSION, max_version: VERSION, purpose: purpose::VERBS };
        let (hello, fds) = socket.call(&hello, &[]).map_err(wrong("hello"))?;
        let mut fds = fds.into_iter();
        let (Some(events), Some(table)) = (fds.next(), fds.next()) else {
            return Err("hello lacks fds".into());
        };
        Ok(Neighbour {
            dice: Dice::new(seed),
            socket,
            hello,
            table: 0,
            targets: vec![Target::new(table)?],
            slabs: HashMap::new(),
            others: Vec::new(),
            qps: HashMap::new(),
            events: Socket::new(events),
        })
    }

    fn ask<T: Request>(&self, request: &T) -> Result<T::Reply> {
        self.socket.call(request, &[]).map(|(reply, _)| reply).map_err(wrong(T::NAME))
    }

    fn make(&mut self, slot: usize) -> Result<String> {
        let (slab, fds) = self.socket.call(&MakeSlab { len: SLAB }, &[]).map_err(wrong("MakeSlab"))?;
        let slab_at = self.target(fds.into_iter().next().ok_or("no slab")?)?;
        for (at, field) in [(CQ_OFF, Field::Cq), (QP_OFF, Field::Qp), (RQ_OFF, Field::Slots(DEPTH))] {
            self.targets[slab_at].knows(at, field);
        }
        // Sometimes shorter than its MR says.
        let len = *self.dice.pick(&[LEN, LEN, 4096, 1 << 50]);
        let memory = make_memfd("hostile-pd", len).map_err(|e| format!("memfd: {e}"))?;
        let pd = self.socket.call(&AllocPd {}, &[memory.as_fd()]).map_err(wrong("AllocPd"))?.0.id;
        self.target(memory)?;
        let (heard, bell) = make_bell().map_err(|e| format!("bell: {e}"))?;
        let channel =
            self.socket.call(&CreateChannel {}, &[bell.as_fd()]).map_err(wrong("CreateChannel"))?.0.id;
        self.others.extend([heard, bell]);
        let cq = self.ask(&CreateCq { channel, slab: slab.id, off: CQ_OFF as u32, _pad: 0 })?.id;
        let create = CreateQp {
            pd,
            send_cq: cq,
            recv_cq: cq,
            kind: QpType::Rc as u32,
            slab: slab.id,
            qp_off: QP_OFF as u32,
            rq_off: RQ_OFF as u32,
            rq_depth: DEPTH as u32,
            rq_sge: 1,
            cq_bit: 0,
            srq: 0,
            xrcd: 0,
        };
        let qpn = self.ask(&create)?.id;
        let key = self.ask(&RegMr { pd, access: EVERY_ACCESS, addr: ADDR, len: LEN })?.key;
        let qp = Qp { qpn, peer_qpn: 0, peer: RawGid::default(), peer_key: 0, pd, key, slab: slab_at };
        self.targets[self.table].knows(entry_at(key), Field::Entry);
        self.behave(&qp);
        self.qps.insert(slot, qp);
        let gid = Ipv6Addr::from(self.hello.vip);
        Ok(format!("made {slot} {qpn} {key} {ADDR} {gid}"))
    }

    fn target(&mut self, fd: OwnedFd) -> Result<usize> {
        self.targets.push(Target::new(fd)?);
        Ok(self.targets.len() - 1)
    }

    /// Lays out what an honest peer would: a QP that serves, receives that wait, a valid MR.
    fn behave(&self, qp: &Qp) {
        let slab = &self.targets[qp.slab];
        for (at, word) in [(0, RTS), (4, qp.peer_qpn), (8, 0), (12, EVERY_ACCESS), (16, 1), (20, qp.qpn)] {
            slab.write(QP_OFF + at, &word.to_ne_bytes());
        }
        slab.write(QP_OFF + 64, &0u32.to_ne_bytes());
        for seq in 0..DEPTH {
            let at = RQ_OFF + seq * size_of::<RecvSlot>() as u64;
            slab.write(at + 64, &(ADDR + seq * 16384).to_ne_bytes());
            slab.write(at + 72, &(16384 | u64::from(qp.key) << 32).to_ne_bytes());
            slab.write(at, &(seq << 32 | 1 << 8 | 1).to_ne_bytes());
        }
        let extent = Extent { va: ADDR, len: LEN, offset: 0 };
        let mut entry = Vec::new();
        for word in [qp.key, EVERY_ACCESS, qp.pd, 1] {
            entry.extend(word.to_ne_bytes());
        }
        for word in [ADDR, ADDR, LEN, extent.va, extent.len, extent.offset] {
            entry.extend(word.to_ne_bytes());
        }
        self.targets[self.table].write(entry_at(qp.key), &entry);
    }

    fn join(&mut self, slot: usize, peer_qpn: u32, peer_key: u32, peer: RawGid) -> Result<()> {
        let qp = self.qps.get_mut(&slot).ok_or("no such slot")?;
        (qp.peer_qpn, qp.peer, qp.peer_key) = (peer_qpn, peer, peer_key);
        let qpn = qp.qpn;
        self.behave(&self.qps[&slot]);
        self.ask(&Connect { qpn, dest_qpn: peer_qpn, dgid: peer, traffic_class: 0 })?;
        let resolve = Resolve { qpn, dest_qpn: peer_qpn, dgid: peer, srqn: 0, _pad: 0 };
        let (info, fds) = self.socket.call(&resolve, &[]).map_err(wrong("Resolve"))?;
        if info.state != peer_state::READY {
            return Err("the peer is not there".into());
        }
        let mut fds = fds.into_iter();
        let mut next = |bit| if info.fds & bit != 0 { fds.next() } else { None };
        let given = [(next(peer_fds::SLAB), info.slab), (next(peer_fds::CQ_SLAB), info.cq_slab)];
        let rest = [next(peer_fds::MR_TABLE), next(peer_fds::PD)];
        self.others.extend(next(peer_fds::BELL));
        for (fd, id) in given {
            if let Some(fd) = fd {
                let at = self.target(fd)?;
                self.slabs.insert(id, at);
            }
        }
        for fd in rest.into_iter().flatten() {
            self.target(fd)?;
        }
        let slab = &mut self.targets[self.slabs[&info.slab]];
        slab.knows(info.qp_off.into(), Field::Qp);
        slab.knows(info.rq_off.into(), Field::Slots(info.rq_depth.into()));
        self.targets[self.slabs[&info.cq_slab]].knows(info.cq_off.into(), Field::Cq);
        Ok(())
    }

    /// Its worst, for a while: `pace` deeds in a row (0: no pause at all). Returns how many deeds.
    fn scribble(&mut self, time: Duration, pace: u64) -> Result<u64> {
        let (deadline, mut deeds) = (Instant::now() + time, 0);
        while Instant::now() < deadline {
            if pace > 0 {
                std::thread::sleep(Duration::from_micros(100));
            }
            for _ in 0..if pace == 0 { 64 } else { pace } {
                match self.dice.roll(256) {
                    0 => self.abuse_descriptors()?,
                    1 => self.punch(),
                    2 => self.pester(),
                    // So that its peers get somewhere.
                    3..12 => self.qps.values().for_each(|qp| self.behave(qp)),
                    12..40 => self.lie(),
                    _ => self.scrawl(),
                }
                deeds += 1;
            }
        }
        Ok(deeds)
    }

    /// Writes one field of one file.
    fn scrawl(&mut self) {
        let target = &self.targets[self.dice.roll(self.targets.len() as u64) as usize];
        let (at, field) = *self.dice.pick(&target.fields);
        let (offset, word) = match field {
            Field::Qp => (self.dice.roll(size_of::<QpShared>() as u64 / 4) * 4, value(&mut self.dice)),
            Field::Cq => (self.dice.roll(size_of::<CqShared>() as u64 / 8) * 8, value(&mut self.dice)),
            Field::Entry => (4 + self.dice.roll(31) * 4, value(&mut self.dice)),
            Field::Slots(depth) => {
                let slot = self.dice.roll(depth.max(1)) * size_of::<RecvSlot>() as u64;
                let word = self.dice.roll(8 + 2 * MAX_SGE as u64) * 8;
                let old = target.read(at + slot);
                let state = (old & !0xff).wrapping_add(self.dice.roll(3) << 32) | self.dice.roll(6);
                (slot + word, if word == 0 { state } else { value(&mut self.dice) })
            }
            Field::Bytes => (self.dice.roll(target.len.min(LEN)), value(&mut self.dice)),
        };
        let wide = !matches!(field, Field::Qp | Field::Entry) || self.dice.roll(2) == 0;
        let bytes = word.to_ne_bytes();
        target.write(at + offset, if wide { &bytes } else { &bytes[..4] });
    }

    /// Completes a receive of a peer with nonsense that is well-formed.
    fn lie(&mut self) {
        let slots = self.slabs.values().flat_map(|at| {
            let fields = &self.targets[*at].fields;
            fields.iter().filter_map(|(off, field)| match field {
                Field::Slots(depth) => Some((*at, *off, *depth)),
                _ => None,
            })
        });
        let slots: Vec<_> = slots.collect();
        if slots.is_empty() {
            return;
        }
        let (target, off, depth) = *self.dice.pick(&slots);
        let at = off + self.dice.roll(depth) * size_of::<RecvSlot>() as u64;
        let target = &self.targets[target];
        let status = *self.dice.pick(&[0, 0, 0, 0, 5, 12, 23, 255]);
        let opcode = *self.dice.pick(&[128, 129, 0, 1, 255]);
        let flags = *self.dice.pick(&[0x80, 0x82, 0, 2, 0x20, 0xa0, 0xff, 1]);
        let len = value(&mut self.dice) & 0xffff_ffff;
        target.write(at + 8, &(len | self.dice.word() << 32).to_ne_bytes());
        target.write(at + 16, &(status << 24 | opcode << 32 | flags << 40 | 7u64).to_ne_bytes());
        let done = target.read(at) & !0xff | 3;
        target.write(at, &done.to_ne_bytes());
    }

    /// Flags, seals, sizes: of descriptors that others hold too. Says it if something worked that must not.
    fn abuse_descriptors(&mut self) -> Result<()> {
        for fd in &self.others {
            let blocking =
                rustix::fs::fcntl_getfl(fd).map_err(|e| format!("flags: {e}"))? & !OFlags::NONBLOCK;
            let _ = rustix::fs::fcntl_setfl(fd, blocking | OFlags::NONBLOCK);
            while rustix::io::write(fd, &[0xff; 4096]).is_ok() {}
            let _ = rustix::fs::fcntl_setfl(fd, blocking | OFlags::DIRECT | OFlags::ASYNC);
        }
        for target in &self.targets {
            for seal in [SealFlags::WRITE, SealFlags::FUTURE_WRITE] {
                let own = rustix::fs::fcntl_add_seals(&target.fd, seal);
                if own != Err(Errno::PERM) && own != Err(Errno::BUSY) && target.len != TABLE {
                    return Err(format!("a file of {} bytes could be sealed: {own:?}", target.len));
                }
            }
            if rustix::fs::ftruncate(&target.fd, 4095).is_ok() {
                return Err(format!("a file of {} bytes could be truncated", target.len));
            }
            let path = format!("/proc/self/fd/{}", target.fd.as_raw_fd());
            let writable = rustix::fs::fcntl_getfl(&target.fd).is_ok_and(|f| f.contains(OFlags::RDWR));
            let again = rustix::fs::open(path, OFlags::RDWR | OFlags::CLOEXEC, Mode::empty());
            if let (false, Ok(again)) = (writable, again)
                && rustix::io::pwrite(again, &[0xff; 64], 0).is_ok()
            {
                return Err("a peer's MR table could be written".into());
            }
        }
        Ok(())
    }

    fn punch(&mut self) {
        let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        let target = &self.targets[self.dice.roll(self.targets.len() as u64) as usize];
        let _ =
            rustix::fs::fallocate(&target.fd, flags, self.dice.roll(16) * 4096, 4096 << self.dice.roll(16));
    }

    /// Well-formed requests of bad taste: stale and guessed keys, other people's QPs, faults, disconnects.
    fn pester(&mut self) {
        let Some(qp) = self.qps.values().next() else { return };
        let (qpn, dest_qpn, dgid) = (qp.qpn, qp.peer_qpn, qp.peer);
        let key = *self.dice.pick(&[qp.peer_key, qp.peer_key.wrapping_add(1 << 16), qp.key, 1 << 16]);
        let copy = CopyMem {
            qpn,
            dest_qpn,
            dgid,
            kind: self.dice.roll(4) as u32,
            key,
            local: value(&mut self.dice),
            remote: value(&mut self.dice),
            len: value(&mut self.dice),
        };
        // Refused, or of no use to it: only what it does to others matters.
        let _ = self.ask(&copy);
        let _ = match self.dice.roll(8) {
            0 => self.ask(&freeflow_core::ctl::Ring { qpn, dest_qpn, dgid, what: ring::FAULT }),
            1 => self.ask(&Disconnect { qpn, error: 1 }),
            2 => self.ask(&Connect { qpn, dest_qpn, dgid, traffic_class: 0 }).map(|_| Done {}),
            3 => self.ask(&DestroyQp { qpn: dest_qpn }),
            even => self.ask(&freeflow_core::ctl::Ring { qpn, dest_qpn, dgid, what: even as u32 & 1 }),
        };
    }

    fn break_up(&mut self, slot: usize) -> Result<()> {
        let qp = self.qps.remove(&slot).ok_or("no such slot")?;
        self.ask(&DestroyQp { qpn: qp.qpn })?;
        self.ask(&DeregMr { key: qp.key, _pad: 0 })?;
        Ok(())
    }

    /// Obeys one order and returns what to say.
    fn obey(&mut self, order: &str) -> Result<Option<String>> {
        // Who takes no events is cut off, and is of no use here then.
        while self.events.recv(RecvFlags::DONTWAIT).is_ok() {}
        let words: Vec<&str> = order.split_whitespace().collect();
        let number = |at: usize| -> Result<u64> {
            words.get(at).and_then(|word| word.parse().ok()).ok_or_else(|| format!("order {order}"))
        };
        let slot = number(1).unwrap_or_default() as usize;
        match words.first().copied() {
            Some("make") => self.make(slot).map(Some),
            Some("join") => {
                let gid: Ipv6Addr = words.get(5).and_then(|w| w.parse().ok()).ok_or("no gid")?;
                self.join(slot, number(2)? as u32, number(3)? as u32, gid.octets())?;
                Ok(Some(format!("joined {slot}")))
            }
            Some("scribble") => {
                let deeds = self.scribble(Duration::from_millis(number(1)?), number(2)?)?;
                Ok(Some(format!("scribbled {deeds}")))
            }
            Some("break") => self.break_up(slot).map(|()| Some(format!("broken {slot}"))),
            Some("go") => Ok(None),
            Some("quit") => std::process::exit(0),
            _ => Err(format!("order {order}")),
        }
    }
}

const TABLE: u64 = (MR_SLOTS * size_of::<MrEntry>()) as u64;

fn entry_at(key: u32) -> u64 {
    (freeflow_core::ring::mr::slot_of(key) * size_of::<MrEntry>()) as u64
}

fn value(dice: &mut Dice) -> u64 {
    match dice.roll(4) {
        0 => dice.word(),
        1 => dice.roll(16),
        2 => ADDR.wrapping_add(*dice.pick(&EDGES)),
        _ => *dice.pick(&EDGES),
    }
}

/// The program: orders on standard input, answers on standard output.
pub fn main(seed: u64) -> Result<()> {
    let mut neighbour = Neighbour::new(seed)?;
    println!("ready");
    for order in std::io::stdin().lock().lines() {
        let order = order.map_err(|e| format!("orders: {e}"))?;
        if let Some(answer) = neighbour.obey(&order)? {
            println!("{answer}");
        }
    }
    Ok(())
}
