//! The memory of a client, as the router reaches it: files it reads and writes, never mappings that it looks into.
//!
//! Bytes that were moved are in the memfd of their PD: they go out by sendfile(2), and come in by recv(2) into a mapping of
//! the file that only the kernel touches on the router's behalf. A page that the client punched out of the file costs a
//! page; it cannot fault the router. The one exception is the aligned word of an atomic, which the processor must change
//! itself: its page is populated first by a system call that says when it cannot. The rest is reached through
//! /proc/PID/mem, after key, rights and bounds were checked, because that file ignores page protection.

use std::fs::File;
use std::os::fd::{AsRawFd as _, BorrowedFd, OwnedFd};
use std::os::unix::fs::FileExt as _;
use std::sync::Arc;

use freeflow_core::exec::{FarCopy, PeerMemory, Reach, Retired};
use freeflow_core::ring::{Extent, MR_SLOTS, MrEntry, MrView, mr::slot_of};
use freeflow_core::shm::{PAGE, PdMemoryView, SharedBytes, View};
use freeflow_core::verbs::{Access, QpType, Sge, WcStatus};
use rustix::io::Errno;

use crate::state::{FarDomain, FarQp};

/// Pollers watch the last byte of a WRITE: the last bytes go in last.
const TAIL: usize = 64;
/// Bytes in the router's hands at a time, where it cannot be avoided.
const BOUNCE: usize = 64 << 10;

/// Where bytes are that a key names.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Place {
    /// In the PD's file.
    File(Extent, u64),
    /// At this address of the process.
    Process(u64),
}

/// Bytes on their way out.
#[derive(Debug, Clone)]
pub enum Span {
    File { file: Arc<OwnedFd>, offset: u64, len: usize },
    Bytes(Vec<u8>),
}

/// One process's memory as one PD grants it.
#[derive(Debug)]
pub struct Memory {
    pub mrs: View<MrEntry>,
    pub pd: u32,
    pub file: Arc<OwnedFd>,
    pub windows: PdMemoryView,
    /// /proc/PID/mem
    pub process: Option<Arc<File>>,
}

fn entry_of(mrs: &[MrEntry], key: u32) -> Option<&MrEntry> {
    debug_assert_eq!(mrs.len(), MR_SLOTS);
    mrs.get(slot_of(key))
}

impl Memory {
    /// The region behind `key`, and the owner's address of `[addr, addr+len)` in it, if it grants `need`.
    fn check(&self, key: u32, need: Access, addr: u64, len: u64) -> Option<(MrView, u64)> {
        let entry = entry_of(&self.mrs, key)?;
        let va = entry.check(key, self.pd, need, addr, len);
        let va = va.or_else(|| entry.check_null(key, self.pd, need, len))?;
        Some((entry.read(key)?, va))
    }

    /// The same of an rkey, which may be a memory window's that queue pair `qpn` may use.
    fn check_remote(&self, key: u32, qpn: u32, need: Access, addr: u64, len: u64) -> Option<(MrView, u64)> {
        self.check(key, need, addr, len).or_else(|| {
            let entry = entry_of(&self.mrs, key)?;
            let (va, _) = entry.check_window(key, (self.pd, qpn), need, addr, len)?;
            Some((entry.read(key)?, va))
        })
    }

    /// Calls `each` with consecutive stretches of `[va, va+len)`.
    fn places<E>(
        view: &MrView,
        va: u64,
        len: u64,
        mut each: impl FnMut(Place, u64) -> Result<(), E>,
    ) -> Result<(), E> {
        let mut at = 0;
        while at < len {
            let here = va.wrapping_add(at);
            let extent = view.extents().iter().find(|extent| extent.holds(here, 1));
            let (place, step) = match extent {
                Some(extent) => {
                    let within = here - extent.va;
                    (Place::File(*extent, within), (extent.len - within).min(len - at))
                }
                None => {
                    let next = view.extents().iter().map(|e| e.va).filter(|start| *start > here).min();
                    (Place::Process(here), next.map_or(len - at, |start| (len - at).min(start - here)))
                }
            };
            each(place, step)?;
            at += step;
        }
        Ok(())
    }

    /// Calls `each` with the parts of a list that hold bytes `[offset, offset+len)` of the message.
    fn parts<E>(
        sges: &[Sge],
        offset: u32,
        len: u32,
        mut each: impl FnMut(&Sge, u64, u64) -> Result<(), E>,
    ) -> Result<(), E> {
        let (mut skip, mut left) = (u64::from(offset), u64::from(len));
        for sge in sges {
            let size = u64::from(sge.length);
            if skip >= size {
                skip -= size;
                continue;
            }
            let step = (size - skip).min(left);
            if step == 0 {
                break;
            }
            each(sge, skip, step)?;
            (skip, left) = (0, left - step);
        }
        Ok(())
    }

    /// Do all keys of a list grant `need`?
    pub fn judge(&self, sges: &[Sge], need: Access) -> Result<(), WcStatus> {
        let granted =
            |sge: &Sge| sge.length == 0 || self.check(sge.lkey, need, sge.addr, sge.length.into()).is_some();
        if sges.iter().all(granted) { Ok(()) } else { Err(WcStatus::LocProtErr) }
    }

    /// The bytes `[offset, offset+len)` of a message whose list is `sges`: what is moved by reference if that pays.
    pub fn gather(
        &self,
        sges: &[Sge],
        offset: u32,
        len: u32,
        by_reference: bool,
    ) -> Result<Vec<Span>, WcStatus> {
        let mut spans = Vec::new();
        Self::parts(sges, offset, len, |sge, skip, step| {
            // The whole entry, as a NIC checks it.
            let (view, va) = self
                .check(sge.lkey, Access::empty(), sge.addr, u64::from(sge.length))
                .ok_or(WcStatus::LocProtErr)?;
            self.collect(&view, va.wrapping_add(skip), step, by_reference, &mut spans)
                .map_err(|_| WcStatus::LocProtErr)
        })?;
        Ok(spans)
    }

    fn collect(
        &self,
        view: &MrView,
        va: u64,
        len: u64,
        by_reference: bool,
        spans: &mut Vec<Span>,
    ) -> Result<(), Errno> {
        Self::places(view, va, len, |place, step| {
            let len = usize::try_from(step).map_err(|_| Errno::FAULT)?;
            if let (Place::File(extent, within), true) = (place, by_reference) {
                let offset = extent.offset.checked_add(within).ok_or(Errno::FAULT)?;
                spans.push(Span::File { file: self.file.clone(), offset, len });
                return Ok(());
            }
            if !matches!(spans.last(), Some(Span::Bytes(_))) {
                spans.push(Span::Bytes(Vec::new()));
            }
            let Some(Span::Bytes(bytes)) = spans.last_mut() else { return Err(Errno::FAULT) };
            let start = bytes.len();
            bytes.resize(start + len, 0);
            self.read(place, &mut bytes[start..])
        })
    }

    fn read(&self, place: Place, bytes: &mut [u8]) -> Result<(), Errno> {
        match place {
            Place::File(extent, within) => {
                let offset = extent.offset.checked_add(within).ok_or(Errno::FAULT)?;
                read_file(&self.file, bytes, offset)
            }
            Place::Process(va) => self.process()?.read_exact_at(bytes, va).map_err(|_| Errno::FAULT),
        }
    }

    fn write(&self, place: Place, bytes: &[u8]) -> Result<(), Errno> {
        let body = bytes.len().saturating_sub(TAIL);
        for (from, part) in [(0, &bytes[..body]), (body, &bytes[body..])] {
            if !part.is_empty() {
                self.write_once(place, from as u64, part)?;
            }
        }
        Ok(())
    }

    fn write_once(&self, place: Place, from: u64, bytes: &[u8]) -> Result<(), Errno> {
        match place {
            Place::File(extent, within) => {
                let offset = extent.offset.checked_add(within + from).ok_or(Errno::FAULT)?;
                write_file(&self.file, bytes, offset)
            }
            Place::Process(va) => {
                self.process()?.write_all_at(bytes, va.wrapping_add(from)).map_err(|_| Errno::FAULT)
            }
        }
    }

    fn process(&self) -> Result<&File, Errno> {
        self.process.as_deref().ok_or(Errno::PERM)
    }

    /// Puts bytes of `input` at `place`.
    fn place(&self, place: Place, len: usize, input: &mut Input<'_>) -> Result<(), Errno> {
        let socket = match input {
            Input::Bytes(bytes) => {
                let (now, later) = bytes.split_at_checked(len).ok_or(Errno::INVAL)?;
                *bytes = later;
                return self.write(place, now);
            }
            Input::Socket { fd, .. } => *fd,
        };
        match place {
            Place::File(extent, within) => {
                let map = self.windows.window(&extent)?;
                let offset = (extent.offset % PAGE + within) as usize;
                if map.len() < offset.saturating_add(len) {
                    return Err(Errno::FAULT);
                }
                let body = len.saturating_sub(TAIL);
                for (from, part) in [(0, body), (body, len - body)] {
                    receive(socket, map.base().wrapping_add(offset + from), part, input)?;
                }
                Ok(())
            }
            Place::Process(va) => {
                let mut bounce = vec![0; len.min(BOUNCE)];
                let mut at = 0;
                while at < len {
                    let part = &mut bounce[..BOUNCE.min(len - at)];
                    receive(socket, part.as_mut_ptr(), part.len(), input)?;
                    self.write(Place::Process(va.wrapping_add(at as u64)), part)?;
                    at += part.len();
                }
                Ok(())
            }
        }
    }

    /// Puts bytes that answer a READ or an atomic into the list of the request, `offset` bytes into the message.
    pub fn scatter(
        &self,
        sges: &[Sge],
        offset: u32,
        len: u32,
        input: &mut Input<'_>,
    ) -> Result<(), WcStatus> {
        Self::parts(sges, offset, len, |sge, skip, step| {
            let whole = u64::from(sge.length);
            let (view, va) =
                self.check(sge.lkey, Access::LOCAL_WRITE, sge.addr, whole).ok_or(WcStatus::LocProtErr)?;
            Self::places(&view, va.wrapping_add(skip), step, |place, step| {
                self.place(place, step as usize, input).map_err(|_| WcStatus::LocProtErr)
            })
        })
    }
}

fn read_file(file: &OwnedFd, bytes: &mut [u8], offset: u64) -> Result<(), Errno> {
    // The file is sealed at a size that no read inside an extent of it exceeds, unless the extent is a lie.
    let read = rustix::io::pread(file, &mut *bytes, offset)?;
    if read == bytes.len() { Ok(()) } else { Err(Errno::FAULT) }
}

fn write_file(file: &OwnedFd, bytes: &[u8], offset: u64) -> Result<(), Errno> {
    let written = rustix::io::pwrite(file, bytes, offset)?;
    if written == bytes.len() { Ok(()) } else { Err(Errno::FAULT) }
}

/// Where bytes come from.
#[derive(Debug)]
pub enum Input<'a> {
    Bytes(&'a [u8]),
    /// A socket that has so many bytes at least; `taken` counts those that left it.
    Socket {
        fd: BorrowedFd<'a>,
        left: usize,
        taken: usize,
    },
}

/// Takes `len` bytes off a socket that has them.
fn receive(fd: BorrowedFd<'_>, to: *mut u8, len: usize, input: &mut Input<'_>) -> Result<(), Errno> {
    let Input::Socket { left, taken, .. } = input else { return Err(Errno::INVAL) };
    if len > *left {
        return Err(Errno::INVAL);
    }
    let mut at = 0;
    while at < len {
        // SAFETY: writes at most `len - at` bytes from `to + at` on, which the caller has mapped or owns; where the mapping has
        // no page the call fails.
        let got =
            unsafe { libc::recv(fd.as_raw_fd(), to.wrapping_add(at).cast(), len - at, libc::MSG_DONTWAIT) };
        match got {
            1.. => {
                at += got as usize;
                *left -= got as usize;
                *taken += got as usize;
            }
            0 => return Err(Errno::CONNRESET),
            _ => match std::io::Error::last_os_error().raw_os_error().map(Errno::from_raw_os_error) {
                Some(Errno::INTR) => {}
                other => return Err(other.unwrap_or(Errno::IO)),
            },
        }
    }
    Ok(())
}

/// [`PeerMemory`] of a request from another host.
#[derive(Debug)]
pub struct Inbound<'a, 'i> {
    pub memory: &'a Memory,
    qpn: u32,
    /// What the other end has invalidated.
    retired: &'a Retired,
    /// Where its receives' buffers are.
    pub receives: &'a Memory,
    pub reliable: bool,
    /// Where the payload comes from. None: local addresses are real ones, of this process (datagrams).
    pub input: Option<&'a mut Input<'i>>,
    /// The message's bytes are at these local addresses on; the input is at this one.
    pub at: u64,
    /// READ: what is to go out.
    pub output: Vec<Span>,
    pub by_reference: bool,
    /// The request is for one word, which is wanted itself: the processor changes it at once.
    pub word: bool,
    pub rings: u32,
    pub faults: u32,
    /// The shared receive queue has fallen below its limit.
    pub limits: u32,
    mapping: Option<Arc<freeflow_core::shm::Mapping>>,
}

impl<'a, 'i> Inbound<'a, 'i> {
    pub fn new(
        domain: &'a FarDomain,
        qp: &FarQp,
        retired: &'a Retired,
        input: Option<&'a mut Input<'i>>,
        at: u64,
    ) -> Self {
        let memory = &domain.memory;
        Inbound {
            memory,
            qpn: qp.qpn,
            retired,
            receives: domain.srq.as_ref().map_or(memory, |srq| &srq.memory),
            reliable: qp.kind != QpType::Uc,
            input,
            at,
            output: Vec::new(),
            by_reference: true,
            word: false,
            rings: 0,
            faults: 0,
            limits: 0,
            mapping: None,
        }
    }

    fn find_word(&mut self, key: u32, va: u64) -> Option<SharedBytes> {
        let view = entry_of(&self.memory.mrs, key)?.read(key)?;
        let extent = view.extents().iter().find(|extent| extent.holds(va, 8))?;
        let map = self.memory.windows.window(extent).ok()?;
        let offset = (extent.offset % PAGE + (va - extent.va)) as usize;
        if map.len() < offset + 8 || !offset.is_multiple_of(8) {
            return None;
        }
        let page = map.base().wrapping_add(offset - offset % PAGE as usize);
        // SAFETY: asks the kernel for one page of a mapping that `map` keeps; it fails where touching would fault.
        unsafe { rustix::mm::madvise(page.cast(), PAGE as usize, rustix::mm::Advice::LinuxPopulateWrite) }
            .ok()?;
        // SAFETY: eight bytes inside the mapping, which `self.mapping` keeps alive while the request runs.
        let bytes = unsafe { SharedBytes::new(map.base().wrapping_add(offset), 8) };
        self.mapping = Some(map);
        Some(bytes)
    }

    fn bring(&mut self, memory: &Memory, view: &MrView, va: u64, copy: FarCopy) -> Result<(), Errno> {
        let len = copy.len as usize;
        if let Some(input) = &mut self.input {
            // What the executor asks for must be what comes next.
            if copy.local != self.at {
                return Err(Errno::INVAL);
            }
            self.at += copy.len;
            return Memory::places(view, va, copy.len, |place, step| {
                memory.place(place, step as usize, input)
            });
        }
        // SAFETY: the executor's local list is memory of this process that its caller holds: see `datagram` and `grh`.
        let bytes = unsafe { std::slice::from_raw_parts(copy.local as *const u8, len) };
        let mut input = Input::Bytes(bytes);
        Memory::places(view, va, copy.len, |place, step| memory.place(place, step as usize, &mut input))
    }
}

impl PeerMemory for Inbound<'_, '_> {
    fn reach(&mut self, _: &MrEntry, key: u32, va: u64, len: u64) -> Reach {
        if !self.word {
            return Reach::Far(len);
        }
        self.find_word(key, va).map_or(Reach::Far(len), Reach::Here)
    }

    fn far(&mut self, copy: FarCopy) -> Result<(), Errno> {
        use freeflow_core::ctl::copy_kind;
        let need = match copy.kind {
            copy_kind::WRITE => Access::REMOTE_WRITE,
            copy_kind::READ => Access::REMOTE_READ,
            _ => Access::LOCAL_WRITE,
        };
        let receive = copy.kind == copy_kind::RECV;
        let memory = if receive { self.receives } else { self.memory };
        let found = match receive {
            true => memory.check(copy.key, need, copy.remote, copy.len),
            false => memory.check_remote(copy.key, self.qpn, need, copy.remote, copy.len),
        };
        let (view, va) = found.ok_or(Errno::ACCESS)?;
        if copy.kind == copy_kind::READ {
            let mut output = std::mem::take(&mut self.output);
            let collected = self.memory.collect(&view, va, copy.len, self.by_reference, &mut output);
            self.output = output;
            return collected;
        }
        self.bring(memory, &view, va, copy)
    }

    fn retired(&self) -> &Retired {
        self.retired
    }

    fn is_reliable(&self) -> bool {
        self.reliable
    }

    fn limit(&mut self) {
        self.limits += 1;
    }

    fn bell(&mut self) {
        self.rings += 1;
    }

    fn fault(&mut self) {
        self.faults += 1;
    }
}
