//! A connected stream: queue pair, completion queue, and the two pieces of memory bytes pass through.
//!
//! Data goes from the program through the staging buffer (or inline) by RDMA WRITE into the peer's ring, the last write
//! of a message with the immediate that says what it is. Owns the verbs objects and the order of what is posted; how
//! much may be sent is `window`'s business. Every function returns at once: who waits is above.

use std::collections::VecDeque;
use std::ffi::c_void;
use std::mem::MaybeUninit;
use std::os::fd::RawFd;

use freeflow_verbs_abi::*;

use super::hello::{Hello, LIMITS, MAPPING};
use super::mapping::{self, Mapping};
use super::window::{Inbox, Limits, MAX_DATA, Nonsense, Outbox, Word};
use crate::edge::{Errno, Result};
use crate::id::{Id, field};
use crate::queues;
use crate::rsocket::completions::{BATCH, Completions, Room};
use crate::rsocket::region::{Region, Registered, Remote};
use crate::verbs::{Verbs, verbs};

/// Bytes per message at most: small enough that the receiver reads one while the next is written.
const CHUNK: usize = 64 << 10;
/// Places in the send queue that data leaves free: a credit, an entry of the table, the end.
const SPARE: usize = 3;
/// The receive for the end of the stream.
const FOR_FIN: u32 = 1;

/// What a connection is made with.
#[derive(Debug, Clone, Copy)]
pub struct Sizes {
    pub ring: u32,
    pub staging: u32,
    pub sends: u16,
    pub receives: u16,
    pub inline: u16,
    pub mappings: u16,
}

/// Which queue a completion is of: after an error its opcode says nothing.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u64)]
enum Queue {
    Send,
    Receive,
}

/// One end of a stream.
#[derive(Debug)]
pub struct Conn {
    verbs: &'static Verbs,
    id: *const Id,
    qp: *mut ibv_qp,
    done: Completions,
    sizes: Sizes,
    /// Ring and control block: the peer writes here.
    ring: Region,
    staging: Region,
    /// Bytes that went into the staging buffer, and those that are on their way no more.
    staged: u64,
    landed: u64,
    /// Staging bytes of each request in the send queue.
    flights: VecDeque<u32>,
    inbox: Inbox,
    /// The peer, once it is known.
    peer: Option<(Hello, Outbox)>,
    /// Buffers of the program's that the peer may write to, by their place in its table.
    mapped: Vec<Option<Mapped>>,
    /// How the stream ended, on either side.
    pub fin_sent: bool,
    pub fin_received: bool,
    pub broken: Option<Errno>,
}

// SAFETY: the objects belong to this value alone, and libibverbs' may be used by any thread.
unsafe impl Send for Conn {}

/// Where the bytes of a request are.
#[derive(Debug, Clone, Copy)]
struct Piece {
    addr: u64,
    lkey: u32,
    len: u32,
}

impl Conn {
    /// Makes the queue pair of `id`, able to receive as soon as the CM connects it.
    pub fn open(id: &Id, sizes: Sizes) -> Result<Conn> {
        let verbs = verbs()?;
        let pd = id.session.device.rsocket_pd()?;
        let control = (LIMITS + MAPPING * u64::from(sizes.mappings)) as usize;
        let remote = IBV_ACCESS_LOCAL_WRITE | IBV_ACCESS_REMOTE_WRITE;
        let ring = Region::new(verbs, pd, sizes.ring as usize + control, remote)?;
        let staging = Region::new(verbs, pd, sizes.staging as usize, 0)?;
        let completions = u32::from(sizes.sends) + u32::from(sizes.receives) + FOR_FIN;
        let done = Completions::open(verbs, id, completions)?;
        let mut conn = Conn {
            verbs,
            id,
            qp: std::ptr::null_mut(),
            done,
            sizes,
            ring,
            staging,
            staged: 0,
            landed: 0,
            flights: VecDeque::new(),
            inbox: Inbox::new(sizes.ring, sizes.receives),
            peer: None,
            mapped: Vec::new(),
            fin_sent: false,
            fin_received: false,
            broken: None,
        };
        conn.open_qp(id, pd)?;
        Ok(conn)
    }

    fn open_qp(&mut self, id: &Id, pd: *mut ibv_pd) -> Result<()> {
        let receives = u32::from(self.sizes.receives) + FOR_FIN;
        let cap = ibv_qp_cap {
            max_send_wr: self.sizes.sends.into(),
            max_recv_wr: receives,
            max_send_sge: 1,
            max_recv_sge: 1,
            max_inline_data: self.sizes.inline.into(),
        };
        let mut attr = ibv_qp_init_attr {
            qp_context: std::ptr::null_mut(),
            send_cq: self.done.cq(),
            recv_cq: self.done.cq(),
            srq: std::ptr::null_mut(),
            cap,
            qp_type: IBV_QPT_RC,
            sq_sig_all: 1,
        };
        queues::create_qp(id, pd, &mut attr)?;
        self.qp = field!(id, qp);
        self.post_receives(receives as usize)
    }

    /// What the peer must know.
    pub fn hello(&self) -> Hello {
        let Sizes { ring, receives: window, mappings, .. } = self.sizes;
        Hello { ring, window, mappings, memory: self.ring.remote() }
    }

    /// The peer said hello.
    pub fn meet(&mut self, peer: Hello) {
        self.peer = Some((peer, Outbox::new(peer.ring, peer.window)));
    }

    /// Posts receives again: they have no bytes, messages only consume them.
    fn post_receives(&self, count: usize) -> Result<()> {
        let one = ibv_recv_wr {
            wr_id: Queue::Receive as u64,
            next: std::ptr::null_mut(),
            sg_list: std::ptr::null_mut(),
            num_sge: 0,
        };
        let mut chain = [one; BATCH];
        for i in 1..BATCH {
            chain[i - 1].next = &raw mut chain[i];
        }
        let mut left = count;
        while left > 0 {
            let now = left.min(BATCH);
            let rest = std::mem::replace(&mut chain[now - 1].next, std::ptr::null_mut());
            self.verbs.post_recv(self.qp, &mut chain[0])?;
            chain[now - 1].next = rest;
            left -= now;
        }
        Ok(())
    }

    // ---- sending

    /// Places left in the send queue.
    fn slots(&self) -> usize {
        usize::from(self.sizes.sends) - self.flights.len()
    }

    /// Bytes that could be sent at once, if only a few at a time.
    fn room(&self) -> usize {
        let Some((_, outbox)) = &self.peer else { return 0 };
        let staging = u64::from(self.sizes.staging) - (self.staged - self.landed);
        match self.fin_sent || self.broken.is_some() || self.slots() < SPARE + 2 {
            true => 0,
            false => outbox.room().min(staging as usize),
        }
    }

    pub fn is_writable(&self) -> bool {
        self.broken.is_some() || self.fin_sent || self.room() > 0
    }

    /// Sends what goes of the program's bytes; says how many that were.
    ///
    /// # Safety
    /// `from` points to `len` readable bytes.
    pub unsafe fn send(&mut self, from: *const u8, len: usize) -> Result<usize> {
        let mut sent = 0;
        while sent < len {
            // SAFETY: inside the caller's bytes.
            match unsafe { self.send_message(from.wrapping_add(sent), len - sent) }? {
                0 => break,
                more => sent += more,
            }
        }
        Ok(sent)
    }

    /// One message.
    ///
    /// # Safety
    /// As for [`Conn::send`].
    unsafe fn send_message(&mut self, from: *const u8, len: usize) -> Result<usize> {
        let room = self.room();
        let Some((peer, outbox)) = &mut self.peer else { return Ok(0) };
        let staging = u64::from(self.sizes.staging);
        let start = self.staged % staging;
        let mut len = len.min(room).min(CHUNK).min(MAX_DATA as usize);
        let inline = len <= usize::from(self.sizes.inline);
        if !inline {
            len = len.min((staging - start) as usize);
        }
        if len == 0 {
            return Ok(0);
        }
        let (place, run) = outbox.place();
        outbox.send(len);
        let memory = peer.memory;
        let mut piece = Piece { addr: from.addr() as u64, lkey: 0, len: len as u32 };
        if !inline {
            // SAFETY: the caller's promise.
            unsafe { self.staging.fill(start, from, len) };
            let addr = self.staging.remote().addr + start;
            piece = Piece { addr, lkey: self.staging.lkey(), ..piece };
            self.staged += len as u64;
        }
        let word = Some(Word::Data(len as u32));
        let held = if inline { 0 } else { len as u32 };
        if len > run {
            let head = Piece { len: run as u32, ..piece };
            self.write(head, memory.plus(place), None, inline, 0)?;
            let tail = Piece { addr: piece.addr + run as u64, len: (len - run) as u32, ..piece };
            self.write(tail, memory, word, inline, held)?;
        } else {
            self.write(piece, memory.plus(place), word, inline, held)?;
        }
        Ok(len)
    }

    /// Posts one RDMA WRITE.
    fn write(&mut self, from: Piece, to: Remote, word: Option<Word>, inline: bool, held: u32) -> Result<()> {
        let mut sge = ibv_sge { addr: from.addr, length: from.len, lkey: from.lkey };
        // SAFETY: pointers, integers and unions of them, for all of which zero is valid.
        let mut wr: ibv_send_wr = unsafe { std::mem::zeroed() };
        wr.wr_id = Queue::Send as u64;
        wr.sg_list = &mut sge;
        wr.num_sge = i32::from(from.len > 0);
        wr.opcode = if word.is_some() { IBV_WR_RDMA_WRITE_WITH_IMM } else { IBV_WR_RDMA_WRITE };
        wr.send_flags = if inline { IBV_SEND_INLINE } else { 0 };
        wr.__bindgen_anon_1.imm_data = word.map_or(0, |word| word.encode().to_be());
        wr.wr.rdma.remote_addr = to.addr;
        wr.wr.rdma.rkey = to.rkey;
        match self.verbs.post_send(self.qp, &mut wr) {
            Ok(()) => self.flights.push_back(held),
            Err(errno) => {
                self.break_off(Errno::CONNRESET);
                return Err(errno);
            }
        }
        Ok(())
    }

    /// Tells the peer that nothing more comes, once.
    pub fn finish(&mut self) -> Result<()> {
        if self.fin_sent || self.broken.is_some() {
            return Ok(());
        }
        let Some((peer, _)) = &self.peer else { return Err(Errno::NOTCONN) };
        let to = peer.memory;
        self.fin_sent = true;
        self.write(Piece { addr: 0, lkey: 0, len: 0 }, to, Some(Word::Fin), false, 0)
    }

    /// Whether everything that was sent has arrived, or never will.
    pub fn is_flushed(&self) -> bool {
        self.flights.is_empty() || self.broken.is_some()
    }

    /// Tells the peer how far this side is, if it should know and may be told.
    fn credit(&mut self) -> Result<()> {
        let slots = self.slots();
        let Some((peer, outbox)) = &mut self.peer else { return Ok(()) };
        if !self.inbox.owes() || !outbox.has_message() || slots < 2 || self.broken.is_some() {
            return Ok(());
        }
        outbox.send_control();
        let Limits { bytes, messages } = self.inbox.tell();
        let block = [bytes, messages];
        let to = peer.limits();
        self.write(piece(&block), to, Some(Word::Credit), true, 0)
    }

    // ---- mapped buffers

    /// Lets the peer write to `len` bytes at `buf`, which it calls `offset`. `NOBUFS` if its table is full.
    ///
    /// # Safety
    /// The bytes stay the program's until they are unmapped.
    pub unsafe fn map(&mut self, buf: *mut c_void, len: usize, access: u32, offset: u64) -> Result<()> {
        let Some((peer, _)) = &self.peer else { return Err(Errno::NOTCONN) };
        let most = usize::from(peer.mappings);
        let free = self.mapped.iter().position(Option::is_none).unwrap_or(self.mapped.len());
        if free >= most {
            return Err(Errno::NOMEM);
        }
        let memory = Registered::new(self.verbs, self.id().session.device.rsocket_pd()?, buf, len, access)?;
        let mapping = Mapping { offset, len: len as u64, memory: memory.remote() };
        self.announce(free as u16, &mapping)?;
        let entry = Some(Mapped { buf: buf.addr(), len, _memory: memory });
        match self.mapped.get_mut(free) {
            Some(place) => *place = entry,
            None => self.mapped.push(entry),
        }
        Ok(())
    }

    /// Takes that back.
    pub fn unmap(&mut self, buf: *mut c_void, len: usize) -> Result<()> {
        let is_it = |entry: &Option<Mapped>| {
            entry.as_ref().is_some_and(|entry| entry.buf == buf.addr() && entry.len == len)
        };
        let index = self.mapped.iter().position(is_it).ok_or(Errno::INVAL)?;
        // A peer that is gone needs no word.
        if self.broken.is_none() {
            self.announce(index as u16, &Mapping::default())?;
        }
        self.mapped[index] = None;
        Ok(())
    }

    fn announce(&mut self, index: u16, mapping: &Mapping) -> Result<()> {
        let slots = self.slots();
        let Some((peer, outbox)) = &mut self.peer else { return Err(Errno::NOTCONN) };
        if outbox.room() == 0 || slots < 2 || self.broken.is_some() {
            return Err(self.broken.unwrap_or(Errno::AGAIN));
        }
        outbox.send_control();
        let to = peer.mapping(index);
        self.write(piece(&mapping.encode()), to, Some(Word::Mapping(index.into())), true, 0)
    }

    /// The peer's buffer that has `offset`.
    pub fn mapped(&self, offset: u64) -> Option<(Remote, usize)> {
        let table = u64::from(self.sizes.ring) + LIMITS;
        let entries = (0..u64::from(self.sizes.mappings)).map(|index| {
            let at = table + MAPPING * index;
            Mapping::decode([0, 8, 16, 24].map(|word| self.ring.word(at + word)))
        });
        mapping::find(entries, offset)
    }

    /// Writes the program's bytes into a mapped buffer of the peer's, as many as go now.
    ///
    /// # Safety
    /// `from` points to `len` readable bytes.
    pub unsafe fn write_mapped(&mut self, from: *const u8, len: usize, to: Remote) -> Result<usize> {
        let staging = u64::from(self.sizes.staging);
        let (start, free) = (self.staged % staging, staging - (self.staged - self.landed));
        if let Some(errno) = self.broken {
            return Err(errno);
        }
        let len = len.min(CHUNK).min(free as usize).min((staging - start) as usize);
        if len == 0 || self.slots() < SPARE + 1 {
            return Ok(0);
        }
        // SAFETY: the caller's promise.
        unsafe { self.staging.fill(start, from, len) };
        let addr = self.staging.remote().addr + start;
        self.staged += len as u64;
        let piece = Piece { addr, lkey: self.staging.lkey(), len: len as u32 };
        self.write(piece, to, None, false, len as u32)?;
        Ok(len)
    }

    // ---- receiving

    pub fn unread(&self) -> usize {
        self.inbox.unread()
    }

    pub fn is_readable(&self) -> bool {
        self.inbox.unread() > 0 || self.fin_received || self.broken.is_some()
    }

    /// Gives the program bytes that have arrived; they stay if it only peeks.
    ///
    /// # Safety
    /// `to` points to `len` writable bytes.
    pub unsafe fn receive(&mut self, to: *mut u8, len: usize, peek: bool) -> Result<usize> {
        let len = len.min(self.inbox.unread());
        let (place, run) = self.inbox.place();
        let first = len.min(run);
        // SAFETY: the caller's promise.
        unsafe { self.ring.take(place, to, first) };
        if first < len {
            // SAFETY: inside the caller's bytes.
            unsafe { self.ring.take(0, to.wrapping_add(first), len - first) };
        }
        if !peek {
            self.inbox.consume(len);
            self.credit()?;
        }
        Ok(len)
    }

    // ---- completions

    /// Takes what has completed; says whether anything had.
    pub fn pump(&mut self) -> bool {
        let mut any = false;
        let mut room = [const { MaybeUninit::uninit() }; BATCH];
        while let got @ 1.. = self.pump_batch(&mut room) {
            any = true;
            if got < BATCH {
                break;
            }
        }
        if any && self.credit().is_err() {
            self.break_off(Errno::CONNRESET);
        }
        any
    }

    fn pump_batch(&mut self, room: &mut Room) -> usize {
        let Ok(done) = self.done.poll(room) else {
            self.break_off(Errno::CONNRESET);
            return 0;
        };
        let again = done.iter().filter(|wc| self.completed(wc)).count();
        if again > 0 && self.broken.is_none() && self.post_receives(again).is_err() {
            self.break_off(Errno::CONNRESET);
        }
        done.len()
    }

    /// Judges one completion; says whether a receive is to be posted for it.
    fn completed(&mut self, wc: &ibv_wc) -> bool {
        let receive = wc.wr_id == Queue::Receive as u64;
        if wc.status != IBV_WC_SUCCESS {
            // Flushed: the peer hung up, or died. Anything else is about something this side sent.
            let flushed = wc.status == IBV_WC_WR_FLUSH_ERR;
            self.break_off(if flushed { Errno::PIPE } else { Errno::CONNRESET });
            return false;
        }
        if !receive {
            self.landed += u64::from(self.flights.pop_front().unwrap_or_default());
            return false;
        }
        // SAFETY: both members are integers.
        let imm = u32::from_be(unsafe { wc.__bindgen_anon_1.imm_data });
        let told = match Word::decode(imm) {
            Some(word) => self.told(word),
            None => Err(Nonsense),
        };
        if told.is_err() {
            self.break_off(Errno::PROTO);
        }
        told.is_ok()
    }

    fn told(&mut self, word: Word) -> std::result::Result<(), Nonsense> {
        if self.fin_received && matches!(word, Word::Data(_) | Word::Fin) {
            return Err(Nonsense);
        }
        self.inbox.arrived(word)?;
        match word {
            Word::Credit => {
                let at = u64::from(self.sizes.ring);
                let limits = Limits { bytes: self.ring.word(at), messages: self.ring.word(at + 8) };
                self.peer.as_mut().map_or(Err(Nonsense), |(_, outbox)| outbox.raise(limits))?;
            }
            Word::Fin => self.fin_received = true,
            Word::Data(_) | Word::Mapping(_) => {}
        }
        Ok(())
    }

    /// The connection is of no use any more; what has arrived can still be read.
    pub fn break_off(&mut self, errno: Errno) {
        self.broken.get_or_insert(errno);
    }

    // ---- waiting

    pub fn fd(&self) -> RawFd {
        self.done.fd()
    }

    /// Asks for an event; says whether something has completed meanwhile.
    pub fn arm(&mut self) -> bool {
        if self.done.arm().is_err() {
            self.break_off(Errno::CONNRESET);
        }
        self.pump()
    }

    /// The descriptor became readable; says whether anything is new.
    pub fn woken(&mut self) -> bool {
        let any = self.done.take_events();
        self.pump() || any
    }

    fn id(&self) -> &Id {
        // SAFETY: the id outlives its connection.
        unsafe { &*self.id }
    }
}

/// A buffer that the peer may write to.
#[derive(Debug)]
struct Mapped {
    buf: usize,
    len: usize,
    _memory: Registered,
}

/// Inline bytes.
fn piece<T>(of: &[T]) -> Piece {
    Piece { addr: of.as_ptr().addr() as u64, lkey: 0, len: size_of_val(of) as u32 }
}

impl Drop for Conn {
    fn drop(&mut self) {
        // Before the memory and the completions that it uses.
        let _ = queues::destroy_qp(self.id());
    }
}
