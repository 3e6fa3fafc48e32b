//! One connection to another router: bytes in, bytes out, without ever waiting.
//!
//! Large payloads do not pass through here where nothing is between socket and bytes: they are received straight into
//! place and sent straight from their pages. With TLS they pass through once. It must never know what messages mean.

use std::collections::VecDeque;
use std::io::{self, Read as _, Write as _};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;

use rustix::io::Errno;
use rustix::net::SendFlags;
use zerocopy::IntoBytes as _;

use super::memory::{Input, Span};
use super::wire::{HEADER, Header, Kind, Malformed};
use crate::cluster::Stream;

/// Payloads up to this length are handled when they are whole.
pub const WHOLE: u32 = 8192;
/// Bytes read at a time. A large payload's first bytes come with its header, and are copied once more than the rest.
const CHUNK: usize = 64 << 10;
const BULK_CHUNK: usize = WHOLE as usize + HEADER;

/// Why a connection ends.
#[derive(Debug, thiserror::Error)]
pub enum End {
    #[error("the other router hung up")]
    Closed,
    #[error(transparent)]
    Io(#[from] io::Error),
    #[error(transparent)]
    Malformed(#[from] Malformed),
}

impl From<Errno> for End {
    fn from(errno: Errno) -> Self {
        End::Io(errno.into())
    }
}

#[derive(Debug)]
enum Item {
    Bytes { bytes: Vec<u8>, sent: usize },
    File { file: Arc<OwnedFd>, offset: u64, left: usize },
}

/// A message, or a part of a large one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Incoming {
    /// All of its payload is here.
    Whole(Kind, Header),
    /// Its next `len` bytes, `at` bytes into the payload, can be taken.
    Part { kind: Kind, header: Header, at: u32, len: u32 },
}

#[derive(Debug)]
pub struct Conn {
    stream: Stream,
    pub host: Arc<str>,
    /// 0 or 1, once the other side has said which.
    pub channel: Option<usize>,
    /// This side began it, by that attempt.
    pub dialed: Option<u32>,
    pub readable: bool,
    pub writable: bool,
    input: Vec<u8>,
    /// The unread part of `input`.
    from: usize,
    to: usize,
    /// A large message under way, and how many bytes of its payload were taken.
    partial: Option<(Kind, Header, u32)>,
    output: VecDeque<Item>,
    waiting: usize,
    scratch: Vec<u8>,
}

impl Conn {
    pub fn new(stream: Stream, host: Arc<str>, dialed: Option<u32>, channel: Option<usize>) -> Self {
        Conn {
            stream,
            host,
            channel,
            dialed,
            readable: true,
            writable: true,
            input: vec![0; CHUNK],
            from: 0,
            to: 0,
            partial: None,
            output: VecDeque::new(),
            waiting: 0,
            scratch: Vec::new(),
        }
    }

    // ---- in

    /// Reads what is there, up to a chunk. False: nothing is.
    fn fill(&mut self) -> Result<bool, End> {
        if self.from > 0 {
            self.input.copy_within(self.from..self.to, 0);
            (self.from, self.to) = (0, self.to - self.from);
        }
        let bulk = self.channel == Some(1) && self.stream.as_plain().is_some();
        let limit = if bulk { BULK_CHUNK.max(self.to + HEADER) } else { CHUNK }.min(CHUNK);
        if !self.readable {
            return Ok(false);
        }
        loop {
            return match self.stream.read(&mut self.input[self.to..limit]) {
                Ok(0) => Err(End::Closed),
                Ok(n) => {
                    self.to += n;
                    // A socket that gave less than it could has no more, and epoll will tell of new bytes.
                    self.readable = self.to == limit || self.stream.as_plain().is_none();
                    Ok(true)
                }
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => {
                    self.readable = false;
                    Ok(false)
                }
                Err(e) if e.kind() == io::ErrorKind::Interrupted => continue,
                Err(e) => Err(e.into()),
            };
        }
    }

    fn buffered(&self) -> &[u8] {
        &self.input[self.from..self.to]
    }

    /// The next thing to handle; None when there is nothing more for now. [`Conn::input`] has its bytes, [`Conn::consumed`]
    /// ends it.
    pub fn next(&mut self) -> Result<Option<Incoming>, End> {
        loop {
            if let Some((kind, header, at)) = self.partial {
                let left = header.len - at;
                let here = u32::try_from(self.to - self.from).unwrap_or(u32::MAX);
                let len = if here > 0 { here } else { self.in_socket()? };
                if len > 0 {
                    return Ok(Some(Incoming::Part { kind, header, at, len: len.min(left) }));
                }
            } else if let Some((kind, header)) = Header::parse(self.buffered())? {
                if header.len > WHOLE {
                    self.from += HEADER;
                    self.partial = Some((kind, header, 0));
                    continue;
                }
                if self.to - self.from >= HEADER + header.len as usize {
                    self.from += HEADER;
                    return Ok(Some(Incoming::Whole(kind, header)));
                }
            }
            if !self.fill()? {
                return Ok(None);
            }
        }
    }

    /// Bytes that the socket can give at once, where nothing is between.
    fn in_socket(&self) -> Result<u32, End> {
        let Some(fd) = self.stream.as_plain() else { return Ok(0) };
        Ok(u32::try_from(rustix::io::ioctl_fionread(fd)?).unwrap_or(u32::MAX))
    }

    /// The bytes of the present message or part, `len` of them.
    pub fn input(&self, len: u32) -> Input<'_> {
        let len = len as usize;
        match (self.buffered(), self.stream.as_plain()) {
            ([], Some(fd)) if len > 0 => Input::Socket { fd, left: len, taken: 0 },
            (bytes, _) => Input::Bytes(&bytes[..len.min(bytes.len())]),
        }
    }

    /// A whole message's payload.
    pub fn payload(&self, len: u32) -> &[u8] {
        &self.buffered()[..len as usize]
    }

    /// The present message or part is done; of its `len` bytes the socket gave `taken` already.
    pub fn consumed(&mut self, len: u32, taken: Option<usize>) -> Result<(), End> {
        match taken {
            None => self.from += len as usize,
            Some(taken) => self.discard(len as usize - taken)?,
        }
        if let Some((_, header, at)) = &mut self.partial {
            *at += len;
            if *at == header.len {
                self.partial = None;
            }
        }
        Ok(())
    }

    /// Takes bytes off the socket that nobody wants.
    fn discard(&mut self, mut len: usize) -> Result<(), End> {
        self.scratch.resize(CHUNK, 0);
        while len > 0 {
            match self.stream.read(&mut self.scratch[..len.min(CHUNK)]) {
                Ok(0) => return Err(End::Closed),
                Ok(n) => len -= n,
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) => return Err(e.into()),
            }
        }
        Ok(())
    }

    // ---- out

    /// May more be put in line, of which so much may wait?
    pub fn has_room(&self, most: usize) -> bool {
        self.waiting < most
    }

    pub fn is_drained(&self) -> bool {
        self.output.is_empty() && !self.stream.wants_write()
    }

    /// Puts a message in line; `header.len` is what `payload` adds up to.
    pub fn send(&mut self, header: &Header, payload: Vec<Span>) {
        self.bytes(header.as_bytes());
        for span in payload {
            match span {
                Span::Bytes(bytes) => self.bytes(&bytes),
                Span::File { file, offset, len } => {
                    self.waiting += len;
                    self.output.push_back(Item::File { file, offset, left: len });
                }
            }
        }
    }

    pub fn send_bytes(&mut self, header: &Header, payload: &[u8]) {
        self.bytes(header.as_bytes());
        self.bytes(payload);
    }

    /// A message that is complete.
    pub fn send_raw(&mut self, message: &[u8]) {
        self.bytes(message);
    }

    fn bytes(&mut self, new: &[u8]) {
        self.waiting += new.len();
        if let Some(Item::Bytes { bytes, .. }) = self.output.back_mut() {
            bytes.extend_from_slice(new);
        } else {
            self.output.push_back(Item::Bytes { bytes: new.to_vec(), sent: 0 });
        }
    }

    /// Gives the socket what it takes.
    pub fn flush(&mut self) -> Result<(), End> {
        if !self.writable {
            return Ok(());
        }
        while let Some(item) = self.output.pop_front() {
            let more = !self.output.is_empty();
            match self.push(item, more) {
                Ok(None) => {}
                Ok(Some(rest)) => self.output.push_front(rest),
                Err((_, End::Io(e))) if e.kind() == io::ErrorKind::Interrupted => {}
                Err((rest, End::Io(e))) if e.kind() == io::ErrorKind::WouldBlock => {
                    self.output.push_front(rest);
                    self.writable = false;
                    return Ok(());
                }
                Err((_, end)) => return Err(end),
            }
        }
        match self.stream.flush() {
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => self.writable = false,
            other => other?,
        }
        Ok(())
    }

    /// Sends the beginning of an item; returns what is left of it.
    fn push(&mut self, item: Item, more: bool) -> Result<Option<Item>, (Item, End)> {
        match item {
            Item::Bytes { bytes, sent } => match self.write(&bytes[sent..], more) {
                Ok(n) => {
                    self.waiting -= n;
                    let sent = sent + n;
                    Ok((sent < bytes.len()).then_some(Item::Bytes { bytes, sent }))
                }
                Err(e) => Err((Item::Bytes { bytes, sent }, e.into())),
            },
            Item::File { file, offset, left } => match self.write_file(&file, offset, left) {
                Ok(n) => {
                    self.waiting -= n;
                    let (offset, left) = (offset + n as u64, left - n);
                    Ok((left > 0).then_some(Item::File { file, offset, left }))
                }
                Err(e) => Err((Item::File { file, offset, left }, e.into())),
            },
        }
    }

    fn write(&mut self, bytes: &[u8], more: bool) -> io::Result<usize> {
        let Some(fd) = self.stream.as_plain() else { return self.stream.write(bytes) };
        let flags = if more { SendFlags::MORE } else { SendFlags::empty() };
        Ok(rustix::net::send(fd, bytes, flags | SendFlags::NOSIGNAL | SendFlags::DONTWAIT)?)
    }

    fn write_file(&mut self, file: &OwnedFd, offset: u64, left: usize) -> io::Result<usize> {
        if let Some(fd) = self.stream.as_plain() {
            let mut at = offset;
            let sent = rustix::fs::sendfile(fd, file, Some(&mut at), left)?;
            if sent > 0 {
                return Ok(sent);
            }
            // Behind the end of the file, where an owner that lies may lead: nothing is there.
            return self.write(&vec![0; left.min(CHUNK)], false);
        }
        self.scratch.resize(CHUNK, 0);
        let part = left.min(CHUNK);
        let read = rustix::io::pread(file, &mut self.scratch[..part], offset)?;
        self.scratch[read..part].fill(0);
        let scratch = std::mem::take(&mut self.scratch);
        let written = self.stream.write(&scratch[..part]);
        self.scratch = scratch;
        written
    }
}

impl AsFd for Conn {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.stream.as_fd()
    }
}
