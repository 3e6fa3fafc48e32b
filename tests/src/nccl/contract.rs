//! The points of NCCL's contract, one by one, on connections of one process with itself.

use std::ffi::{c_int, c_void};
use std::ptr::null_mut;
use std::time::{Duration, Instant};

use freeflow_nccl_abi::{ptr, result};

use super::memory::{Buffer, Pages};
use super::plugin::{Group, Handle, MAX_MEMBERS, Name, Plugin, Properties};
use super::rank::PATIENCE;
use super::traffic::MAX_GROUPS;
use super::{Outcome, ensure};

type Check = fn(&Plugin) -> Outcome;

/// Name and check of each point.
pub const CHECKS: &[(&str, Check)] = &[
    ("properties are whole and sensible", properties),
    ("a rank connects to itself from one thread", self_connect),
    ("connect waits without blocking", connect_waits),
    ("one listener accepts several", several_accepts),
    ("a handle that leads nowhere is an error", nowhere),
    ("nothing is sent before it is posted", flow_control),
    ("empty messages match", empty),
    ("tags choose inside the oldest group", tags),
    ("requests up to the limit, tested in any order", limits),
    ("a message that is too long", too_long),
    ("memory that is not registered is refused", unregistered),
    ("a registration serves other comms if it is global", global_registration),
    ("a range may be registered twice", registered_twice),
    ("memory mapped anew is registered anew", mapped_anew),
    ("read-only memory can be sent", read_only),
    ("only host memory is taken", host_only),
    ("nothing lands after deregistration", deregistered_receiver),
    ("nothing is read after deregistration", deregistered_sender),
    ("comms close in any state", closes),
    ("a closed peer is an error, not a hang", closed_peer),
];

/// Messages of all kinds, without an allocation in isend, irecv and test. Needs tests/nccl/allocations.c preloaded.
pub fn allocations(plugin: &Plugin) -> Outcome {
    let counted = || super::plugin::allocations().ok_or("nobody counts allocations".to_owned());
    let pair = pair(plugin)?;
    for size in [0, 8, 4096, 1 << 20, 16 << 20] {
        let (from, to) = (Memory::new(plugin, pair.send, size)?, Memory::new(plugin, pair.recv, size)?);
        let message = || -> Outcome {
            let receive = posted(plugin, pair.recv, &to, &[(0, size, 1)])?;
            let send = sent(plugin, pair.send, &from, 0, size, 1)?;
            done(plugin, send)?;
            done(plugin, receive).map(drop)
        };
        (0..3).try_for_each(|_| message())?;
        let before = counted()?;
        (0..100).try_for_each(|_| message())?;
        let count = counted()? - before;
        ensure(count == 0, || format!("{count} allocations for 100 messages of {size} bytes"))?;
        from.end(plugin, pair.send)?;
        to.end(plugin, pair.recv)?;
    }
    pair.close(plugin)
}

/// Runs those whose name contains `filter`; the failures come back.
pub fn run(plugin: &Plugin, filter: &str) -> Vec<String> {
    let mut failures = Vec::new();
    for (name, check) in CHECKS.iter().filter(|(name, _)| name.contains(filter)) {
        match check(plugin) {
            Ok(()) => println!("ok {name} (v{})", plugin.version),
            Err(why) => failures.push(format!("{name} (v{}): {why}", plugin.version)),
        }
    }
    failures
}

// ---- helpers

fn code<T>(what: &str, result: super::plugin::Result<T>) -> Outcome<T> {
    result.map_err(|code| format!("{what}: {code}"))
}

/// Waits until `poll` has something.
fn wait<T>(what: &str, mut poll: impl FnMut() -> Outcome<Option<T>>) -> Outcome<T> {
    let start = Instant::now();
    loop {
        if let Some(got) = poll()? {
            return Ok(got);
        }
        ensure(start.elapsed() < PATIENCE, || format!("waited in vain: {what}"))?;
        std::thread::yield_now();
    }
}

/// Both ends of a connection.
#[derive(Clone, Copy)]
struct Pair {
    send: Handle,
    recv: Handle,
}

fn pair(plugin: &Plugin) -> Outcome<Pair> {
    let (listener, mut name) = code("listen", plugin.listen(0))?;
    let (mut send, mut recv) = (None, None);
    // CUDA before 11.3: the same thread, connect and accept in turn.
    let pair = wait("connection to itself", || {
        if send.is_none() {
            send = code("connect", plugin.connect(0, &mut name))?;
        }
        if recv.is_none() {
            recv = code("accept", plugin.accept(listener))?;
        }
        Ok(send.zip(recv).map(|(send, recv)| Pair { send, recv }))
    })?;
    code("closeListen", plugin.close_listen(listener))?;
    Ok(pair)
}

impl Pair {
    fn close(self, plugin: &Plugin) -> Outcome {
        code("closeSend", plugin.close_send(self.send))?;
        code("closeRecv", plugin.close_recv(self.recv))
    }
}

/// A registered buffer.
struct Memory {
    buffer: Buffer,
    mhandle: Handle,
}

impl Memory {
    fn new(plugin: &Plugin, comm: Handle, len: usize) -> Outcome<Self> {
        let buffer = Buffer::new(len);
        let mhandle = code("regMr", plugin.reg_buffer(comm, &buffer))?;
        Ok(Memory { buffer, mhandle })
    }

    fn end(self, plugin: &Plugin, comm: Handle) -> Outcome {
        code("deregMr", plugin.dereg(comm, self.mhandle))
    }
}

fn irecv(
    plugin: &Plugin,
    comm: Handle,
    memory: &Memory,
    parts: &[(usize, usize, c_int)],
) -> Outcome<Option<Handle>> {
    let data: Vec<*mut c_void> = parts.iter().map(|(at, ..)| memory.buffer.at(*at)).collect();
    let sizes: Vec<usize> = parts.iter().map(|(_, len, _)| *len).collect();
    let tags: Vec<c_int> = parts.iter().map(|(.., tag)| *tag).collect();
    let mhandles = vec![memory.mhandle; parts.len()];
    let group = Group { data: &data, sizes: &sizes, tags: &tags, mhandles: &mhandles };
    code("irecv", plugin.irecv(comm, &group, true))
}

fn posted(
    plugin: &Plugin,
    comm: Handle,
    memory: &Memory,
    parts: &[(usize, usize, c_int)],
) -> Outcome<Handle> {
    irecv(plugin, comm, memory, parts)?.ok_or_else(|| "irecv is busy".into())
}

fn isend(
    plugin: &Plugin,
    comm: Handle,
    memory: &Memory,
    at: usize,
    len: usize,
    tag: c_int,
) -> Outcome<Option<Handle>> {
    code("isend", plugin.isend(comm, memory.buffer.at(at), len, tag, memory.mhandle))
}

fn sent(
    plugin: &Plugin,
    comm: Handle,
    memory: &Memory,
    at: usize,
    len: usize,
    tag: c_int,
) -> Outcome<Handle> {
    wait("isend", || isend(plugin, comm, memory, at, len, tag))
}

/// Waits for a request; the sizes come back.
fn done(plugin: &Plugin, request: Handle) -> Outcome<[c_int; MAX_MEMBERS]> {
    let mut sizes = [-1; MAX_MEMBERS];
    wait("a request", || Ok(code("test", plugin.test(request, Some(&mut sizes)))?.then_some(())))?;
    Ok(sizes)
}

/// A message goes through.
fn works(plugin: &Plugin, pair: Pair) -> Outcome {
    let (from, to) = (Memory::new(plugin, pair.send, 100)?, Memory::new(plugin, pair.recv, 100)?);
    from.buffer.fill(0, 100, 5);
    let receive = posted(plugin, pair.recv, &to, &[(0, 100, 1)])?;
    let send = sent(plugin, pair.send, &from, 0, 100, 1)?;
    ensure(done(plugin, receive)?[0] == 100 && done(plugin, send)?[0] == 100, || "not 100 bytes".into())?;
    to.buffer.check(0, 100, 5)?;
    from.end(plugin, pair.send)?;
    to.end(plugin, pair.recv)
}

// ---- the points

fn properties(plugin: &Plugin) -> Outcome {
    let devices = code("devices", plugin.devices())?;
    ensure(devices > 0, || format!("{devices} devices"))?;
    let all = (0..devices).map(|dev| plugin.properties(dev)).collect::<Result<Vec<Properties>, _>>();
    let all = all.map_err(|code| format!("getProperties: {code} (-1: it left a field as it was)"))?;
    for p in &all {
        const TIB: usize = 1 << 40;
        let int = c_int::MAX as usize;
        let sensible = !p.name.is_empty()
            && p.ptr_support & ptr::HOST != 0
            && (1..=MAX_MEMBERS as c_int).contains(&p.max_recvs)
            && p.max_comms > 0
            && p.latency >= 0.0
            && p.net_device_type == 0
            && (1..=TIB.max(int)).contains(&p.max_p2p_bytes)
            && (1..=TIB.max(int)).contains(&p.max_coll_bytes);
        ensure(sensible, || format!("{p:?}"))?;
        ensure(p.v_props.0 >= 1, || format!("no devices in the virtual one: {p:?}"))?;
    }
    let mut ports: Vec<_> = all.iter().map(|p| (p.guid, p.port)).collect();
    ports.sort_unstable();
    ports.dedup();
    ensure(ports.len() == all.len(), || "two devices have one guid and port".into())?;
    let beyond = plugin.properties(devices);
    ensure(beyond.is_err(), || "there are properties of a device that is not there".into())
}

fn self_connect(plugin: &Plugin) -> Outcome {
    let pair = pair(plugin)?;
    works(plugin, pair)?;
    pair.close(plugin)
}

fn connect_waits(plugin: &Plugin) -> Outcome {
    let (listener, mut name) = code("listen", plugin.listen(0))?;
    ensure(name[64..].iter().all(|byte| *byte == 0), || "the handle is longer than 64 bytes".into())?;
    for _ in 0..500 {
        let early = code("accept", plugin.accept(listener))?;
        ensure(early.is_none(), || "accepted nobody".into())?;
    }
    for _ in 0..500 {
        let early = code("connect", plugin.connect(0, &mut name))?;
        ensure(early.is_none(), || "connected before it was accepted".into())?;
    }
    let (mut send, mut recv) = (None, None);
    let pair = wait("connect after many tries", || {
        recv = match recv {
            None => code("accept", plugin.accept(listener))?,
            some => some,
        };
        send = match send {
            None => code("connect", plugin.connect(0, &mut name))?,
            some => some,
        };
        Ok(send.zip(recv).map(|(send, recv)| Pair { send, recv }))
    })?;
    code("closeListen", plugin.close_listen(listener))?;
    works(plugin, pair)?;
    pair.close(plugin)
}

fn several_accepts(plugin: &Plugin) -> Outcome {
    let (listener, name) = code("listen", plugin.listen(0))?;
    let mut names: [Name; 3] = [name; 3];
    let (mut send, mut recv) = ([None; 3], Vec::new());
    wait("three connections", || {
        for (comm, name) in send.iter_mut().zip(&mut names).filter(|(comm, _)| comm.is_none()) {
            *comm = code("connect", plugin.connect(0, name))?;
        }
        recv.extend(code("accept", plugin.accept(listener))?);
        Ok((recv.len() == 3 && send.iter().all(Option::is_some)).then_some(()))
    })?;
    code("closeListen", plugin.close_listen(listener))?;
    // Which end belongs to which: the one that gets the message.
    let sends: Vec<Handle> = send.into_iter().flatten().collect();
    let memory = Memory::new(plugin, sends[0], 3)?;
    let mut left =
        recv.iter().map(|end| posted(plugin, *end, &memory, &[(0, 1, 0)])).collect::<Outcome<Vec<_>>>()?;
    for comm in &sends {
        let request = sent(plugin, *comm, &memory, 0, 1, 0)?;
        done(plugin, request)?;
        let reached = wait("the message at one of them", || {
            let done = |request: &&Handle| plugin.test(**request, None) == Ok(true);
            Ok(left.iter().find(done).copied())
        })?;
        left.retain(|request| *request != reached);
    }
    memory.end(plugin, sends[0])?;
    sends.into_iter().zip(recv).try_for_each(|(send, recv)| Pair { send, recv }.close(plugin))
}

fn nowhere(plugin: &Plugin) -> Outcome {
    let mut garbage: Name = [0x5a; 128];
    ensure(plugin.connect(0, &mut garbage).is_err(), || "connected to garbage".into())?;
    let (listener, mut name) = code("listen", plugin.listen(0))?;
    code("closeListen", plugin.close_listen(listener))?;
    let start = Instant::now();
    loop {
        match plugin.connect(0, &mut name) {
            Err(result::REMOTE_ERROR | result::SYSTEM_ERROR) => return Ok(()),
            Err(other) => return Err(format!("error {other}")),
            Ok(Some(_)) => return Err("connected to nobody".into()),
            Ok(None) => ensure(start.elapsed() < PATIENCE, || "it hangs".into())?,
        }
    }
}

fn flow_control(plugin: &Plugin) -> Outcome {
    let pair = pair(plugin)?;
    let memory = Memory::new(plugin, pair.send, 8)?;
    for _ in 0..300 {
        let early = isend(plugin, pair.send, &memory, 0, 8, 0)?;
        ensure(early.is_none(), || "sent where nothing is posted".into())?;
    }
    memory.end(plugin, pair.send)?;
    works(plugin, pair)?;
    pair.close(plugin)
}

fn empty(plugin: &Plugin) -> Outcome {
    let pair = pair(plugin)?;
    let memory = Memory::new(plugin, pair.send, 64)?;
    memory.buffer.fill(0, 64, 9);
    for room in [0, 64] {
        let receive = posted(plugin, pair.recv, &memory, &[(0, room, 3)])?;
        let send = sent(plugin, pair.send, &memory, 0, 0, 3)?;
        ensure(done(plugin, receive)?[0] == 0 && done(plugin, send)?[0] == 0, || "not empty".into())?;
    }
    memory.buffer.check(0, 64, 9)?;
    memory.end(plugin, pair.send)?;
    pair.close(plugin)
}

fn tags(plugin: &Plugin) -> Outcome {
    let most = code("getProperties", plugin.properties(0))?.max_recvs as usize;
    if most < 3 {
        return Ok(());
    }
    let pair = pair(plugin)?;
    let (from, to) = (Memory::new(plugin, pair.send, 64)?, Memory::new(plugin, pair.recv, 64)?);
    let receive = posted(plugin, pair.recv, &to, &[(0, 8, 5), (8, 8, 5), (16, 8, 6)])?;
    let later = posted(plugin, pair.recv, &to, &[(24, 8, 9)])?;
    wait("the group", || isend(plugin, pair.send, &from, 0, 1, 6))?;
    for tag in [9, 6, -1] {
        let wrong = isend(plugin, pair.send, &from, 0, 1, tag)?;
        ensure(wrong.is_none(), || format!("tag {tag} matched where it must not"))?;
    }
    sent(plugin, pair.send, &from, 0, 2, 5)?;
    ensure(!code("test", plugin.test(receive, None))?, || "done with one of three missing".into())?;
    sent(plugin, pair.send, &from, 0, 3, 5)?;
    let sizes = done(plugin, receive)?;
    ensure(sizes[..3] == [2, 3, 1], || format!("sizes {:?}", &sizes[..3]))?;
    sent(plugin, pair.send, &from, 0, 4, 9)?;
    ensure(done(plugin, later)?[0] == 4, || "the later group".into())?;
    from.end(plugin, pair.send)?;
    to.end(plugin, pair.recv)?;
    pair.close(plugin)
}

fn limits(plugin: &Plugin) -> Outcome {
    let members = code("getProperties", plugin.properties(0))?.max_recvs as usize;
    // NCCL_NET_MAX_REQUESTS was 8 up to v6.
    let groups = if plugin.version < 7 { 8 } else { MAX_GROUPS };
    let pair = pair(plugin)?;
    let (from, to) = (Memory::new(plugin, pair.send, 4096)?, Memory::new(plugin, pair.recv, 4096)?);
    for round in 0..3 {
        let parts: Vec<(usize, usize, c_int)> = (0..members).map(|m| (8 * m, 8, m as c_int)).collect();
        let mut receives =
            (0..groups).map(|_| posted(plugin, pair.recv, &to, &parts)).collect::<Outcome<Vec<_>>>()?;
        let mut more = Vec::new();
        while let Some(request) = irecv(plugin, pair.recv, &to, &parts)? {
            more.push(request);
            ensure(more.len() < 4096, || "no limit".into())?;
        }
        receives.extend(more);
        let mut sends = Vec::new();
        for _ in 0..receives.len() {
            for m in (0..members).rev() {
                sends.push(sent(plugin, pair.send, &from, 8 * m, m, m as c_int)?);
            }
        }
        // The last first, and without asking for sizes.
        for (i, request) in sends.iter().rev().enumerate() {
            wait("a send", || Ok(code("test", plugin.test(*request, None))?.then_some(())))
                .map_err(|why| format!("round {round}, send {i}: {why}"))?;
        }
        for request in receives.iter().rev() {
            let sizes = done(plugin, *request)?;
            ensure((0..members).all(|m| sizes[m] == m as c_int), || format!("sizes {sizes:?}"))?;
        }
    }
    from.end(plugin, pair.send)?;
    to.end(plugin, pair.recv)?;
    pair.close(plugin)
}

fn too_long(plugin: &Plugin) -> Outcome {
    let truncates = code("getProperties", plugin.properties(0))?.reg_is_global;
    let pair = pair(plugin)?;
    let (from, to) = (Memory::new(plugin, pair.send, 64)?, Memory::new(plugin, pair.recv, 64)?);
    from.buffer.fill(0, 64, 1);
    to.buffer.fill(0, 64, 2);
    let receive = posted(plugin, pair.recv, &to, &[(0, 16, 0)])?;
    let send = wait("isend", || match plugin.isend(pair.send, from.buffer.at(0), 64, 0, from.mhandle) {
        Err(code) => Ok(Some(Err(code))),
        Ok(request) => Ok(request.map(Ok)),
    })?;
    match send {
        Err(code) => {
            ensure(!truncates && code == result::INVALID_USAGE, || {
                format!("error {code} (truncates: {truncates})")
            })?;
            to.buffer.check(0, 64, 2)?;
        }
        Ok(send) => {
            let sizes = (done(plugin, receive)?[0], done(plugin, send)?[0]);
            ensure(truncates && sizes == (16, 16), || format!("sizes {sizes:?} (truncates: {truncates})"))?;
            ensure(to.buffer.check(0, 64, 1).is_err(), || "more arrived than there was room for".into())?;
        }
    }
    from.end(plugin, pair.send)?;
    to.end(plugin, pair.recv)?;
    pair.close(plugin)
}

fn unregistered(plugin: &Plugin) -> Outcome {
    let pair = pair(plugin)?;
    let memory = Memory::new(plugin, pair.recv, 4096)?;
    let other = Buffer::new(8);
    let lists = (&[other.at(0)], &[8], &[0], &[memory.mhandle]);
    let group = Group { data: lists.0, sizes: lists.1, tags: lists.2, mhandles: lists.3 };
    ensure(plugin.irecv(pair.recv, &group, false).is_err(), || "received into it".into())?;
    let none = Group { mhandles: &[Handle(null_mut())], ..group };
    ensure(plugin.irecv(pair.recv, &none, false).is_err(), || "received without a handle".into())?;
    let receive = posted(plugin, pair.recv, &memory, &[(0, 8, 0)])?;
    let refused = wait("isend", || match plugin.isend(pair.send, other.at(0), 8, 0, memory.mhandle) {
        Ok(None) => Ok(None),
        other => Ok(Some(other)),
    })?;
    ensure(refused.is_err(), || "sent from it".into())?;
    // The comm goes on.
    let send = sent(plugin, pair.send, &memory, 100, 8, 0)?;
    done(plugin, send)?;
    done(plugin, receive)?;
    memory.end(plugin, pair.recv)?;
    pair.close(plugin)
}

fn global_registration(plugin: &Plugin) -> Outcome {
    if !code("getProperties", plugin.properties(0))?.reg_is_global {
        return Ok(());
    }
    let (one, two) = (pair(plugin)?, pair(plugin)?);
    let (a, b) = (Memory::new(plugin, one.send, 4096)?, Memory::new(plugin, one.recv, 4096)?);
    for (from, to) in [(&a, &b), (&b, &a)] {
        from.buffer.fill(0, 4096, 11);
        to.buffer.fill(0, 4096, 12);
        let receive = posted(plugin, two.recv, to, &[(0, 4096, 0)])?;
        let send = sent(plugin, two.send, from, 0, 4096, 0)?;
        done(plugin, send)?;
        done(plugin, receive)?;
        to.buffer.check(0, 4096, 11)?;
    }
    a.end(plugin, one.send)?;
    b.end(plugin, one.recv)?;
    one.close(plugin)?;
    two.close(plugin)
}

fn registered_twice(plugin: &Plugin) -> Outcome {
    let pair = pair(plugin)?;
    let memory = Memory::new(plugin, pair.recv, 10_000)?;
    for _ in 0..1000 {
        let again = code("regMr", plugin.reg_buffer(pair.recv, &memory.buffer))?;
        code("deregMr", plugin.dereg(pair.recv, again))?;
    }
    // SAFETY: a part of it, which goes before the whole.
    let part = unsafe { plugin.reg(pair.recv, memory.buffer.at(5000), 100, ptr::HOST) };
    let part = code("regMr", part)?;
    let receive = posted(plugin, pair.recv, &memory, &[(0, 100, 0)])?;
    memory.buffer.fill(200, 100, 3);
    let send = sent(plugin, pair.send, &memory, 200, 100, 0)?;
    done(plugin, send)?;
    done(plugin, receive)?;
    memory.buffer.check(0, 100, 3)?;
    code("deregMr", plugin.dereg(pair.recv, part))?;
    memory.end(plugin, pair.recv)?;
    pair.close(plugin)
}

/// A program unmaps registered memory, maps something else there and registers that, without deregistering before.
fn mapped_anew(plugin: &Plugin) -> Outcome {
    let pair = pair(plugin)?;
    let source = Memory::new(plugin, pair.send, 8192)?;
    let pages = Pages::new(8192);
    // SAFETY: deregistered at the end.
    let old = code("regMr", unsafe { plugin.reg(pair.recv, pages.at(0), 8192, ptr::HOST) })?;
    pages.map_again();
    // SAFETY: as above.
    let new = code("regMr", unsafe { plugin.reg(pair.recv, pages.at(0), 8192, ptr::HOST) })?;
    source.buffer.fill(0, 8192, 21);
    let lists = (&[pages.at(0)], &[8192], &[0], &[new]);
    let group = Group { data: lists.0, sizes: lists.1, tags: lists.2, mhandles: lists.3 };
    let receive = code("irecv", plugin.irecv(pair.recv, &group, false))?.ok_or("irecv is busy")?;
    let send = sent(plugin, pair.send, &source, 0, 8192, 0)?;
    done(plugin, send)?;
    done(plugin, receive)?;
    pages.check(8192, 21)?;
    code("deregMr", plugin.dereg(pair.recv, old))?;
    code("deregMr", plugin.dereg(pair.recv, new))?;
    source.end(plugin, pair.send)?;
    pair.close(plugin)
}

fn read_only(plugin: &Plugin) -> Outcome {
    let pair = pair(plugin)?;
    let to = Memory::new(plugin, pair.recv, 4096)?;
    let pages = Pages::new(4096);
    pages.fill(4096, 31);
    pages.protect();
    // SAFETY: deregistered at the end.
    let mhandle = code("regMr", unsafe { plugin.reg(pair.send, pages.at(0), 4096, ptr::HOST) })?;
    let receive = posted(plugin, pair.recv, &to, &[(0, 4096, 0)])?;
    let send = wait("isend", || code("isend", plugin.isend(pair.send, pages.at(0), 4096, 0, mhandle)))?;
    done(plugin, send)?;
    done(plugin, receive)?;
    to.buffer.check(0, 4096, 31)?;
    code("deregMr", plugin.dereg(pair.send, mhandle))?;
    to.end(plugin, pair.recv)?;
    pair.close(plugin)
}

fn host_only(plugin: &Plugin) -> Outcome {
    let support = code("getProperties", plugin.properties(0))?.ptr_support;
    let pair = pair(plugin)?;
    let buffer = Buffer::new(4096);
    for kind in [ptr::CUDA, ptr::DMABUF].into_iter().filter(|kind| support & kind == 0) {
        // SAFETY: it is not registered.
        let refused = unsafe { plugin.reg(pair.send, buffer.at(0), 4096, kind) };
        ensure(refused.is_err(), || format!("took memory of type {kind}"))?;
    }
    let memory = Memory::new(plugin, pair.recv, 64)?;
    let flush = code("iflush", plugin.iflush(pair.recv, memory.buffer.at(0), 64, memory.mhandle))?;
    flush.map_or(Ok(()), |request| done(plugin, request).map(drop))?;
    memory.end(plugin, pair.recv)?;
    pair.close(plugin)
}

/// A large message, of which a part has been sent when `then` runs; another thread goes on with it.
fn midway(
    plugin: &Plugin,
    then: impl FnOnce(Pair, &mut Option<Memory>, &mut Option<Memory>) -> Outcome,
) -> Outcome {
    const BIG: usize = 96 << 20;
    let pair = pair(plugin)?;
    let mut from = Some(Memory::new(plugin, pair.send, BIG)?);
    let mut to = Some(Memory::new(plugin, pair.recv, BIG)?);
    let receive = posted(plugin, pair.recv, to.as_ref().ok_or("memory")?, &[(0, BIG, 0)])?;
    let send = sent(plugin, pair.send, from.as_ref().ok_or("memory")?, 0, BIG, 0)?;
    let mut tried = 0;
    let outcome = std::thread::scope(|scope| {
        let sender = scope.spawn(|| {
            let start = Instant::now();
            // The other end may see its error first; ours is what this waits for.
            while !matches!(plugin.test(send, None), Err(_) | Ok(true)) {
                tried += 1;
                ensure(start.elapsed() < PATIENCE, || "the sender hangs".into())?;
            }
            Ok(())
        });
        std::thread::sleep(Duration::from_millis(1));
        let acted = then(pair, &mut from, &mut to);
        sender.join().map_err(|_| "the sender panicked".to_owned())?.and(acted)
    });
    // Whatever came of the receive: no hang.
    wait("an end of the receive", || {
        Ok(plugin.test(receive, None).map_or(Some(()), |done| done.then_some(())))
    })?;
    for (memory, comm) in [(from, pair.send), (to, pair.recv)] {
        memory.map_or(Ok(()), |memory| memory.end(plugin, comm))?;
    }
    pair.close(plugin)?;
    outcome
}

fn deregistered_receiver(plugin: &Plugin) -> Outcome {
    midway(plugin, |pair, _, to| {
        let Memory { buffer, mhandle } = to.take().ok_or("memory")?;
        code("deregMr", plugin.dereg(pair.recv, mhandle))?;
        // Ours again: what we write stays.
        buffer.fill(0, buffer.len(), 40);
        std::thread::sleep(Duration::from_millis(50));
        buffer.check(0, buffer.len(), 40).map_err(|why| format!("something landed: {why}"))
    })
}

fn deregistered_sender(plugin: &Plugin) -> Outcome {
    midway(plugin, |pair, from, _| {
        let Memory { buffer, mhandle } = from.take().ok_or("memory")?;
        code("deregMr", plugin.dereg(pair.send, mhandle))?;
        // Unmapped: whoever still reads it dies.
        drop(buffer);
        std::thread::sleep(Duration::from_millis(20));
        Ok(())
    })
}

fn closes(plugin: &Plugin) -> Outcome {
    // A listener that nobody ever called; a connection that was begun and forgotten.
    let (listener, mut name) = code("listen", plugin.listen(0))?;
    for _ in 0..100 {
        code("connect", plugin.connect(0, &mut name))?;
    }
    code("closeListen", plugin.close_listen(listener))?;
    // Receives and sends in flight, either end first.
    for recv_first in [true, false] {
        let pair = pair(plugin)?;
        let (from, to) =
            (Memory::new(plugin, pair.send, 32 << 20)?, Memory::new(plugin, pair.recv, 32 << 20)?);
        for _ in 0..4 {
            posted(plugin, pair.recv, &to, &[(0, 32 << 20, 0)])?;
        }
        for _ in 0..3 {
            sent(plugin, pair.send, &from, 0, 32 << 20, 0)?;
        }
        from.end(plugin, pair.send)?;
        to.end(plugin, pair.recv)?;
        if recv_first {
            code("closeRecv", plugin.close_recv(pair.recv))?;
            code("closeSend", plugin.close_send(pair.send))?;
        } else {
            pair.close(plugin)?;
        }
    }
    // NULL is nothing to close.
    code("closeSend", plugin.close_send(Handle(null_mut())))
}

fn closed_peer(plugin: &Plugin) -> Outcome {
    let is_error = |code| matches!(code, result::REMOTE_ERROR | result::SYSTEM_ERROR);
    // The sender is gone: the receive fails.
    let one = pair(plugin)?;
    let memory = Memory::new(plugin, one.recv, 64)?;
    let receive = posted(plugin, one.recv, &memory, &[(0, 64, 0)])?;
    code("closeSend", plugin.close_send(one.send))?;
    wait("an error of the receive", || match plugin.test(receive, None) {
        Ok(false) => Ok(None),
        Ok(true) => Err("done".into()),
        Err(code) if is_error(code) => Ok(Some(())),
        Err(code) => Err(format!("error {code}")),
    })?;
    ensure(irecv(plugin, one.recv, &memory, &[(0, 64, 0)]).is_err(), || "irecv goes on".into())?;
    memory.end(plugin, one.recv)?;
    code("closeRecv", plugin.close_recv(one.recv))?;
    // The receiver is gone: what has arrived counts, what is sent then fails.
    let two = pair(plugin)?;
    let memory = Memory::new(plugin, two.send, 64)?;
    let receive = posted(plugin, two.recv, &memory, &[(0, 8, 0)])?;
    posted(plugin, two.recv, &memory, &[(0, 8, 0)])?;
    let send = sent(plugin, two.send, &memory, 0, 8, 0)?;
    done(plugin, receive)?;
    code("closeRecv", plugin.close_recv(two.recv))?;
    done(plugin, send)?;
    let start = Instant::now();
    loop {
        ensure(start.elapsed() < PATIENCE, || "the sender hangs".into())?;
        let failed = match plugin.isend(two.send, memory.buffer.at(0), 8, 0, memory.mhandle) {
            Ok(None) => continue,
            Ok(Some(request)) => wait("an error of the send", || match plugin.test(request, None) {
                Ok(false) => Ok(None),
                Ok(true) => Err("sent to nobody".into()),
                Err(code) => Ok(Some(code)),
            })?,
            Err(code) => code,
        };
        ensure(is_error(failed), || format!("error {failed}"))?;
        break;
    }
    memory.end(plugin, two.send)?;
    code("closeSend", plugin.close_send(two.send))
}
