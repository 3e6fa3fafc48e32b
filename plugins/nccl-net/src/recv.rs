//! The receiving comm: irecv and test.

use arrayvec::ArrayVec;
use freeflow_core::verbs::Sge;
use freeflow_nccl_abi::NcclResult;

use crate::device::Device;
use crate::fault::{Fault, Result};
use crate::link::{Link, Socket, Write};
use crate::slots::{Arrivals, Exposed, GROUP, GROUPS, Group, Postings, write};

/// Every so many WRITEs of postings one completion is asked for.
const SIGNALED: u64 = 16;

/// Sizes of a group's messages.
pub type Sizes = ArrayVec<u64, GROUP>;

/// A receive request: one group.
#[derive(Debug, Clone, Copy, Default)]
struct Request {
    /// 0: free.
    len: usize,
    number: u64,
    room: [u64; GROUP],
}

impl Request {
    /// Is all of it there? Then `sizes` are those of its messages.
    #[inline]
    fn arrived(&self, arrivals: &Arrivals, sizes: &mut Sizes) -> Result<bool> {
        for (index, room) in self.room[..self.len].iter().enumerate() {
            match arrivals.read(self.number, index) {
                None => return Ok(false),
                Some(size) if size <= *room => sizes.push(size),
                Some(size) => {
                    return Err(Fault::remote(format!("the peer claims {size} bytes where {room} fit")));
                }
            }
        }
        Ok(true)
    }
}

/// A comm that receives.
#[derive(Debug)]
pub struct Receiver {
    link: Link,
    arrivals: Exposed<Arrivals>,
    /// Groups posted.
    posted: u64,
    requests: [Request; GROUPS],
    failed: Option<NcclResult>,
}

impl Receiver {
    pub fn socket(device: &Device) -> Result<Socket> {
        // More than are in flight: the slots of unsignaled ones are free when a later one's completion is polled.
        Socket::new(device, 4 * GROUPS as u32, (size_of::<Postings>() / GROUPS) as u32)
    }

    pub fn new(link: Link, arrivals: Exposed<Arrivals>) -> Self {
        Receiver { link, arrivals, posted: 0, requests: [Request::default(); GROUPS], failed: None }
    }

    /// A request, or None: too many are in flight.
    pub fn irecv(&mut self, postings: &Group) -> Result<Option<u32>> {
        self.alive()?;
        let (number, index) = (self.posted, self.posted as usize % GROUPS);
        if self.requests[index].len != 0 {
            return Ok(None);
        }
        let posted = self.post(number, postings);
        self.ended(posted)?;
        let request = &mut self.requests[index];
        (request.len, request.number) = (postings.len(), number);
        for (room, posting) in request.room.iter_mut().zip(postings) {
            *room = posting.len;
        }
        self.posted += 1;
        Ok(Some(index as u32))
    }

    fn post(&mut self, number: u64, postings: &Group) -> Result<()> {
        self.arrivals.memory.clear(number, postings.len());
        let written = write(number, postings);
        let from = Sge { addr: written.as_ptr() as u64, length: size_of_val(&*written) as u32, lkey: 0 };
        let done = number.is_multiple_of(SIGNALED).then_some(number);
        let to = self.link.memory(Postings::offset(number));
        self.link.write(&[Write { done, to, from, inline: true }])?;
        if done.is_some() { self.poll() } else { Ok(()) }
    }

    /// The sizes, if the group is complete; the request is then free.
    pub fn test(&mut self, request: u32) -> Result<Option<Sizes>> {
        let index = request as usize;
        if self.requests[index].len == 0 {
            return Err(Fault::usage("test of a request that is done"));
        }
        let mut sizes = Sizes::new();
        let arrived = self.requests[index].arrived(&self.arrivals.memory, &mut sizes);
        if !self.ended(arrived)? {
            return self.wait().map(|()| None);
        }
        self.requests[index].len = 0;
        self.link.progressed();
        Ok(Some(sizes))
    }

    /// Nothing new: postings that are under way go on, and the peer's end is noticed.
    fn wait(&mut self) -> Result<()> {
        self.alive()?;
        let looked = match self.link.idle() {
            Ok(true) => self.poll(),
            Ok(false) => Ok(()),
            Err(fault) => Err(fault),
        };
        self.ended(looked)
    }

    fn poll(&mut self) -> Result<()> {
        self.link.poll("irecv", |_| {})
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
