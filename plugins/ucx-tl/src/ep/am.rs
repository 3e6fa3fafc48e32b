//! Active messages: into the peer's FIFO, or as SENDs.

use std::ffi::{c_uint, c_void};

use freeflow_core::exec::Target;
use freeflow_core::ring::fifo::SLOT_BYTES;
use freeflow_core::verbs::{SendOp, Sge};

use super::queue::{Buffer, Start, Then};
use super::{Ep, Mode};
use crate::iface::Iface;
use crate::uct::types::{AM_IDS, Completion, Iov, PackCallback, Status};
use crate::wire::SEND_HEADER;

/// Bytes of the header that short messages begin with.
const HEADER: usize = 8;

impl Iface {
    /// Longest short message, header included.
    pub fn max_short(&self) -> usize {
        SLOT_BYTES
    }
}

/// Copies UCX's bytes to memory of the peer's or our own.
///
/// # Safety
/// Both have `len` bytes.
#[inline]
unsafe fn copy(from: *const c_void, to: *mut u8, len: usize) {
    // SAFETY: by the caller's promise.
    unsafe { to.copy_from_nonoverlapping(from.cast(), len) };
}

/// Copies a list of UCX's after each other. Returns how many bytes.
///
/// # Safety
/// The list names readable memory; `to` has room for all of it.
unsafe fn gather(list: &[Iov], to: *mut u8) -> usize {
    let mut at = 0;
    for entry in list {
        // SAFETY: by the caller's promise.
        unsafe { copy(entry.buffer, to.wrapping_add(at), entry.total()) };
        at += entry.total();
    }
    at
}

fn total(list: &[Iov]) -> usize {
    list.iter().map(Iov::total).sum()
}

/// A message's id and length, looked at as UCX's own transports do.
fn acceptable(id: u8, len: usize, most: usize) -> bool {
    usize::from(id) < AM_IDS && len <= most
}

impl Ep {
    /// Sends a message that fits into a slot, which `fill` writes.
    #[inline]
    pub(super) fn send_short(&self, id: u8, len: usize, fill: impl FnOnce(*mut u8)) -> Status {
        if self.mode.get() != Mode::Direct || !self.may_send() {
            return self.send_short_otherwise(id, len, fill);
        }
        let mut fifo = self.fifo.borrow_mut();
        let Some(out) = &mut *fifo else { return self.obstacle() };
        let there = out.fifo();
        let Some(slot) = out.sender.slot(there) else { return Status::NO_RESOURCE };
        fill(slot.payload());
        out.window.count(len as u64);
        if out.sender.publish(there, len as u16, id, None) {
            drop(fifo);
            self.wake_peer();
        }
        Status::OK
    }

    #[cold]
    fn send_short_otherwise(&self, id: u8, len: usize, fill: impl FnOnce(*mut u8)) -> Status {
        if self.mode.get() != Mode::Queued || !self.may_send() {
            return self.obstacle();
        }
        let sent = self.send_segment(id, |to| {
            fill(to);
            len
        });
        if sent < 0 { Status(sent as i8) } else { Status::OK }
    }

    /// Sends a message of at most a segment, which `fill` writes. Its length, or a status.
    #[inline]
    fn send_long(&self, id: u8, fill: impl FnOnce(*mut u8) -> usize) -> isize {
        if self.mode.get() == Mode::Queued && self.may_send() {
            return self.send_segment(id, fill);
        }
        if self.mode.get() != Mode::Direct || !self.may_send() {
            return self.obstacle().as_len();
        }
        let mut fifo = self.fifo.borrow_mut();
        let Some(out) = &mut *fifo else { return self.obstacle().as_len() };
        let (there, segment) = (out.fifo(), out.segment as u32);
        let Some((slot, place)) = out.sender.slot_and_place(there, segment) else {
            return Status::NO_RESOURCE.as_len();
        };
        let at = out.pool(place);
        let len = fill(at);
        out.window.count(len as u64);
        // One that turns out short: its bytes are in our cache, and the receiver's next look is at the slot anyway.
        let pooled = (len > SLOT_BYTES).then_some(place);
        if pooled.is_none() {
            // SAFETY: a slot's payload has room for them; they are in the pool, at `at`.
            unsafe { slot.payload().copy_from_nonoverlapping(at, len) };
        }
        if out.sender.publish(there, len as u16, id, pooled) {
            drop(fifo);
            self.wake_peer();
        }
        len as isize
    }

    /// The same as a SEND.
    fn send_segment(&self, id: u8, fill: impl FnOnce(*mut u8) -> usize) -> isize {
        if self.qp().send_room() == 0 {
            return Status::NO_RESOURCE.as_len();
        }
        let Some(buffer) = self.iface().buffer() else { return Status::NO_RESOURCE.as_len() };
        let Buffer { at, lkey, .. } = buffer;
        // SAFETY: a buffer of ours, with room for the header in front of a segment.
        unsafe { at.cast::<u64>().write(u64::from(id)) };
        let len = fill(at.wrapping_add(SEND_HEADER));
        let sge = Sge { addr: at as u64, length: (SEND_HEADER + len) as u32, lkey };
        let status = self.start(Start {
            op: SendOp::Send,
            target: Target::Receive,
            sges: &[sge],
            then: Then::Nothing,
            comp: std::ptr::null_mut(),
            bounce: Some(buffer),
            keep: None,
        });
        if status.is_error() { status.as_len() } else { len as isize }
    }

    /// Longest message that the peer takes.
    fn segment(&self) -> usize {
        let ours = self.iface().config.seg_size;
        self.fifo.borrow().as_ref().map_or(ours, |out| out.segment.min(ours))
    }
}

/// `ep_am_short`.
pub unsafe extern "C" fn short(
    ep: *mut c_void,
    id: u8,
    header: u64,
    payload: *const c_void,
    len: c_uint,
) -> Status {
    // SAFETY: an endpoint of ours.
    let ep = unsafe { Ep::from_raw(ep) };
    let len = len as usize;
    if !acceptable(id, len, SLOT_BYTES - HEADER) {
        return Status::INVALID_PARAM;
    }
    ep.send_short(id, HEADER + len, |to| {
        // SAFETY: a slot's payload is that long, and aligned for a word.
        unsafe { to.cast::<u64>().write(header) };
        // SAFETY: UCX's bytes, and checked to fit behind the header.
        unsafe { copy(payload, to.wrapping_add(HEADER), len) };
    })
}

/// `ep_am_short_iov`.
pub unsafe extern "C" fn short_iov(ep: *mut c_void, id: u8, iov: *const Iov, count: usize) -> Status {
    // SAFETY: an endpoint of ours.
    let ep = unsafe { Ep::from_raw(ep) };
    // SAFETY: UCX's list.
    let list = unsafe { Iov::list(iov, count) };
    let len = total(list);
    if !acceptable(id, len, SLOT_BYTES) {
        return Status::INVALID_PARAM;
    }
    ep.send_short(id, len, |to| {
        // SAFETY: UCX's list, checked to fit into the slot.
        unsafe { gather(list, to) };
    })
}

/// `ep_am_bcopy`.
pub unsafe extern "C" fn bcopy(
    ep: *mut c_void,
    id: u8,
    pack: PackCallback,
    arg: *mut c_void,
    _flags: c_uint,
) -> isize {
    // SAFETY: an endpoint of ours.
    let ep = unsafe { Ep::from_raw(ep) };
    if !acceptable(id, 0, 0) {
        return Status::INVALID_PARAM.as_len();
    }
    // SAFETY: UCX's function writes at most max_bcopy bytes, for which there is room.
    ep.send_long(id, |to| unsafe { pack(to.cast(), arg) })
}

/// `ep_am_zcopy`: one copy, straight from the user's buffers to the peer, and done with it.
pub unsafe extern "C" fn zcopy(
    ep: *mut c_void,
    id: u8,
    header: *const c_void,
    header_len: c_uint,
    iov: *const Iov,
    count: usize,
    _flags: c_uint,
    _comp: *mut Completion,
) -> Status {
    // SAFETY: an endpoint of ours.
    let ep = unsafe { Ep::from_raw(ep) };
    let header_len = header_len as usize;
    // SAFETY: UCX's list.
    let list = unsafe { Iov::list(iov, count) };
    let len = header_len + total(list);
    if !acceptable(id, len, ep.segment()) {
        return Status::INVALID_PARAM;
    }
    let sent = ep.send_long(id, |to| {
        // SAFETY: UCX's header; checked to fit into a segment, with the list behind it.
        unsafe { copy(header, to, header_len) };
        // SAFETY: as above.
        header_len + unsafe { gather(list, to.wrapping_add(header_len)) }
    });
    if sent < 0 { Status(sent as i8) } else { Status::OK }
}
