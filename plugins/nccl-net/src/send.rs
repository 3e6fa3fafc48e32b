//! The sending comm: isend and test.

use arrayvec::ArrayVec;
use freeflow_core::verbs::Sge;
use freeflow_nccl_abi::NcclResult;

use crate::device::{Device, MAX_BYTES, Style};
use crate::fault::{Fault, Result};
use crate::link::{Link, Socket, Write};
use crate::region::Region;
use crate::slots::{Arrivals, Exposed, GROUP, GROUPS, Group, Posting, Postings, Remote, arrival};

/// Sends in flight.
pub const REQUESTS: usize = GROUPS * GROUP;

/// A send request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    Free,
    Under { size: u64 },
    Done { size: u64 },
}

/// The oldest group that has receives left.
#[derive(Debug)]
struct Head {
    number: u64,
    postings: Group,
    /// A bit for each receive that has been sent to.
    taken: u8,
}

/// A comm that sends.
#[derive(Debug)]
pub struct Sender {
    link: Link,
    postings: Exposed<Postings>,
    head: Head,
    requests: [State; REQUESTS],
    free: ArrayVec<u16, REQUESTS>,
    style: Style,
    failed: Option<NcclResult>,
}

impl Sender {
    pub fn socket(device: &Device) -> Result<Socket> {
        // A WRITE of the data and one of its arrival.
        Socket::new(device, 2 * REQUESTS as u32, 8)
    }

    pub fn new(link: Link, postings: Exposed<Postings>, style: Style) -> Self {
        Sender {
            link,
            postings,
            head: Head { number: 0, postings: Group::new(), taken: 0 },
            requests: [State::Free; REQUESTS],
            free: (0..REQUESTS as u16).rev().collect(),
            style,
            failed: None,
        }
    }

    /// A request, or None: the receiver has not posted yet, or too much is in flight.
    pub fn isend(
        &mut self,
        addr: u64,
        size: usize,
        tag: i32,
        region: Option<&Region>,
    ) -> Result<Option<u32>> {
        self.alive()?;
        if size > MAX_BYTES {
            return Err(Fault::usage(format!("isend of {size} bytes: at most {MAX_BYTES} (maxP2pBytes)")));
        }
        if self.free.is_empty() {
            return Ok(None);
        }
        let Some((index, posting)) = self.head.find(&self.postings.memory, tag) else {
            let waits = self.wait();
            return self.ended(waits).map(|()| None);
        };
        let size = self.fitting(size as u64, posting.len)?;
        let key = match region {
            _ if size == 0 => 0,
            Some(region) => region.key(addr, size).ok_or_else(|| outside(addr, size))?,
            None => return Err(Fault::usage("isend without a memory handle")),
        };
        let to = Remote { addr: posting.addr, rkey: posting.rkey };
        let sent = self.send(Sge { addr, length: size as u32, lkey: key }, to, index);
        self.ended(sent).map(Some)
    }

    /// What can be sent into a receive of `room` bytes.
    fn fitting(&self, size: u64, room: u64) -> Result<u64> {
        if size > room && !self.style.truncates {
            return Err(Fault::usage(format!(
                "isend of {size} bytes where the receiver has room for {room}"
            )));
        }
        Ok(size.min(room))
    }

    fn send(&mut self, from: Sge, to: Remote, index: usize) -> Result<u32> {
        let size = u64::from(from.length);
        let Some(request) = self.free.pop() else { return Err(Fault::internal("no request left")) };
        self.requests[usize::from(request)] = State::Under { size };
        let group = self.head.take(index, &self.postings.memory);
        let word = arrival(group, size);
        let arrival = Write {
            done: Some(u64::from(request)),
            to: self.link.memory(Arrivals::offset(group, index)),
            from: Sge { addr: std::ptr::from_ref(&word) as u64, length: 8, lkey: 0 },
            inline: true,
        };
        if size > 0 {
            let data = Write { done: None, to, from, inline: false };
            self.link.write(&[data, arrival])?;
        } else {
            self.link.write(&[arrival])?;
        }
        self.link.progressed();
        Ok(u32::from(request))
    }

    /// The size, if the request is done; it is then free.
    pub fn test(&mut self, request: u32) -> Result<Option<u64>> {
        let index = request as usize;
        if let State::Under { .. } = self.requests[index] {
            self.alive()?;
            let polled = self.poll();
            self.ended(polled)?;
        }
        match self.requests[index] {
            State::Done { size } => {
                self.requests[index] = State::Free;
                self.free.push(request as u16);
                self.link.progressed();
                Ok(Some(size))
            }
            State::Under { .. } => {
                let idle = self.link.idle();
                self.ended(idle).map(|_| None)
            }
            State::Free => Err(Fault::usage("test of a request that is done")),
        }
    }

    fn poll(&mut self) -> Result<()> {
        let requests = &mut self.requests;
        self.link.poll("isend", |done| {
            if let Some(state) = requests.get_mut(done as usize)
                && let State::Under { size } = *state
            {
                *state = State::Done { size };
            }
        })
    }

    /// Nothing is posted: what is under way goes on, and the peer's end is noticed.
    #[cold]
    fn wait(&mut self) -> Result<()> {
        if self.link.idle()? { self.poll() } else { Ok(()) }
    }

    fn alive(&self) -> Result<()> {
        self.failed.map_or(Ok(()), |code| Err(Fault::again(code)))
    }

    /// An error is the comm's last word.
    #[inline]
    fn ended<T>(&mut self, result: Result<T>) -> Result<T> {
        result.inspect_err(|fault| {
            self.failed = Some(fault.code);
            self.link.hang_up();
        })
    }
}

impl Head {
    /// The first free receive with that tag in the oldest group.
    #[inline]
    fn find(&mut self, memory: &Postings, tag: i32) -> Option<(usize, Posting)> {
        if self.postings.is_empty() {
            memory.read(self.number, &mut self.postings);
        }
        let fits = |(index, posting): &(usize, &Posting)| self.taken & 1 << index == 0 && posting.tag == tag;
        self.postings.iter().enumerate().find(fits).map(|(index, posting)| (index, *posting))
    }

    /// Uses a receive up; returns its group's number.
    fn take(&mut self, index: usize, memory: &Postings) -> u64 {
        let group = self.number;
        self.taken |= 1 << index;
        if self.taken.count_ones() as usize == self.postings.len() {
            self.number += 1;
            self.taken = 0;
            self.postings.clear();
            memory.expect(self.number);
        }
        group
    }
}

#[cold]
fn outside(addr: u64, size: u64) -> Fault {
    Fault::usage(format!("isend of {size} bytes at {addr:#x}: not inside the registered memory"))
}
