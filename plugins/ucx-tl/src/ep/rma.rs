//! Put and get: straight to the peer's memory where it is mapped here, else as WRITE and READ.

use std::ffi::{c_uint, c_void};
use std::ptr::copy_nonoverlapping;

use freeflow_core::exec::Target;
use freeflow_core::verbs::{Access, SendOp, Sge};

use super::queue::{PORTION, Start, Then};
use super::{Ep, Mode};
use crate::rkey::Rkey;
use crate::uct::types::{Completion, Iov, PackCallback, Status, UnpackCallback};

const PUT: Access = Access::REMOTE_WRITE;
const GET: Access = Access::REMOTE_READ;

impl Ep {
    /// May an operation on memory be started? They need no room in the FIFO, but keep to the order of what waits.
    #[inline]
    pub fn may_access(&self) -> bool {
        matches!(self.mode.get(), Mode::Direct | Mode::Queued) && self.may_send()
    }

    /// A WRITE of what `fill` puts into a buffer of ours. Its length, or a status.
    #[cold]
    fn write_bounced(&self, addr: u64, rkey: &Rkey, fill: impl FnOnce(*mut u8) -> usize) -> isize {
        if self.qp().send_room() == 0 {
            return Status::NO_RESOURCE.as_len();
        }
        let Some(buffer) = self.iface().buffer() else { return Status::NO_RESOURCE.as_len() };
        let len = fill(buffer.at);
        let status = self.start(Start {
            op: SendOp::Write,
            target: Target::Memory { addr, rkey: rkey.key() },
            sges: &[Sge { addr: buffer.at as u64, length: len as u32, lkey: buffer.lkey }],
            then: Then::Nothing,
            comp: std::ptr::null_mut(),
            bounce: Some(buffer),
            keep: None,
        });
        if status.is_error() { status.as_len() } else { len as isize }
    }

    /// A READ into a buffer of ours, and then `then`.
    #[cold]
    fn read_bounced(&self, addr: u64, rkey: &Rkey, len: usize, then: Then, comp: *mut Completion) -> Status {
        let Some(buffer) = self.iface().buffer() else { return Status::NO_RESOURCE };
        self.start(Start {
            op: SendOp::Read,
            target: Target::Memory { addr, rkey: rkey.key() },
            sges: &[Sge { addr: buffer.at as u64, length: len as u32, lkey: buffer.lkey }],
            then,
            comp,
            bounce: Some(buffer),
            keep: None,
        })
    }

    /// A WRITE or READ of the user's own memory, registered for it if need be.
    #[cold]
    fn post_zcopy(&self, op: SendOp, entry: &Iov, addr: u64, rkey: &Rkey, comp: *mut Completion) -> Status {
        if self.qp().send_room() == 0 {
            return Status::NO_RESOURCE;
        }
        let (at, len) = (entry.buffer as u64, entry.total());
        let Ok(memory) = self.iface().md().register(at, len as u64) else { return Status::IO_ERROR };
        self.start(Start {
            op,
            target: Target::Memory { addr, rkey: rkey.key() },
            sges: &[Sge { addr: at, length: len as u32, lkey: memory.key() }],
            then: Then::Nothing,
            comp,
            bounce: None,
            keep: Some(memory),
        })
    }

    /// One entry of a zcopy call.
    fn zcopy_one(&self, put: bool, entry: &Iov, addr: u64, rkey: &Rkey, comp: *mut Completion) -> Status {
        let len = entry.total();
        let need = if put { PUT } else { GET };
        let Some((there, keep)) = rkey.near_and_kept(self, need, addr, len as u64) else {
            let op = if put { SendOp::Write } else { SendOp::Read };
            return self.post_zcopy(op, entry, addr, rkey, comp);
        };
        let here = entry.buffer.cast::<u8>();
        let (from, to) = if put { (here.cast_const(), there) } else { (there.cast_const(), here) };
        if len > PORTION {
            self.copy_later(from, to, len, comp, keep);
            return Status::INPROGRESS;
        }
        // SAFETY: UCX's buffer of that length, and the peer's range, mapped and checked by near().
        unsafe { copy_nonoverlapping(from, to, len) };
        Status::OK
    }

    /// All of them, one after the other in the peer's memory.
    fn zcopy(&self, put: bool, list: &[Iov], addr: u64, rkey: &Rkey, comp: *mut Completion) -> Status {
        if !self.may_access() {
            return self.obstacle();
        }
        let (mut at, mut under_way) = (addr, 0);
        for (i, entry) in list.iter().enumerate() {
            if entry.total() == 0 {
                continue;
            }
            // All but the last under way are counted in addition: UCX's completion counts one for the call.
            match self.zcopy_one(put, entry, at, rkey, comp) {
                Status::OK => {}
                Status::INPROGRESS => under_way += 1,
                status if i == 0 => return status,
                status => {
                    self.fail(status);
                    return status;
                }
            }
            at += entry.total() as u64;
        }
        if under_way == 0 {
            return Status::OK;
        }
        // SAFETY: null, or UCX's completion; none of them ends before the next progress.
        unsafe { Completion::expect(comp, under_way - 1) };
        Status::INPROGRESS
    }
}

/// Stores of 8 bytes are one store: pollers watch them.
///
/// # Safety
/// Both have `len` bytes.
#[inline]
unsafe fn copy_short(from: *const u8, to: *mut u8, len: usize) {
    if len == 8 {
        // SAFETY: by the caller's promise.
        let word = unsafe { from.cast::<u64>().read_unaligned() };
        // SAFETY: as above.
        unsafe { to.cast::<u64>().write_unaligned(word) };
        return;
    }
    // SAFETY: as above.
    unsafe { copy_nonoverlapping(from, to, len) };
}

/// `ep_put_short`.
pub unsafe extern "C" fn put_short(
    ep: *mut c_void,
    from: *const c_void,
    len: c_uint,
    addr: u64,
    rkey: usize,
) -> Status {
    // SAFETY: an endpoint of ours.
    let ep = unsafe { Ep::from_raw(ep) };
    // SAFETY: a key of ours.
    let rkey = unsafe { Rkey::from_raw(rkey) };
    let (from, len) = (from.cast::<u8>(), len as usize);
    if ep.may_access()
        && let Some(to) = rkey.known(ep, PUT, addr, len as u64)
    {
        // SAFETY: UCX's bytes, and the peer's range, mapped and checked by known().
        unsafe { copy_short(from, to, len) };
        return Status::OK;
    }
    put_short_otherwise(ep, from, len, addr, rkey)
}

/// The first by this key, or one to memory that is not mapped here, or one that may not be started.
#[cold]
fn put_short_otherwise(ep: &Ep, from: *const u8, len: usize, addr: u64, rkey: &Rkey) -> Status {
    if !ep.may_access() {
        return ep.obstacle();
    }
    if len == 0 {
        return Status::OK;
    }
    if let Some(to) = rkey.near(ep, PUT, addr, len as u64) {
        // SAFETY: UCX's bytes, and the peer's range, mapped and checked by near().
        unsafe { copy_short(from, to, len) };
        return Status::OK;
    }
    if len > ep.iface().config.seg_size {
        return Status::INVALID_PARAM;
    }
    let sent = ep.write_bounced(addr, rkey, |to| {
        // SAFETY: UCX's bytes, into a buffer of a segment's size.
        unsafe { copy_nonoverlapping(from, to, len) };
        len
    });
    if sent < 0 { Status(sent as i8) } else { Status::OK }
}

/// `ep_put_bcopy`.
pub unsafe extern "C" fn put_bcopy(
    ep: *mut c_void,
    pack: PackCallback,
    arg: *mut c_void,
    addr: u64,
    rkey: usize,
) -> isize {
    // SAFETY: an endpoint of ours.
    let ep = unsafe { Ep::from_raw(ep) };
    // SAFETY: a key of ours.
    let rkey = unsafe { Rkey::from_raw(rkey) };
    if !ep.may_access() {
        return ep.obstacle().as_len();
    }
    // How much it will be is not known before; the address alone says which memory it is.
    if let Some(to) = rkey.near(ep, PUT, addr, 1) {
        // SAFETY: UCX's function writes no more than the memory behind the key holds.
        return unsafe { pack(to.cast(), arg) } as isize;
    }
    // SAFETY: UCX's function writes at most max_bcopy bytes, for which there is room.
    ep.write_bounced(addr, rkey, |to| unsafe { pack(to.cast(), arg) })
}

/// `ep_put_zcopy`.
pub unsafe extern "C" fn put_zcopy(
    ep: *mut c_void,
    iov: *const Iov,
    count: usize,
    addr: u64,
    rkey: usize,
    comp: *mut Completion,
) -> Status {
    // SAFETY: an endpoint of ours.
    let ep = unsafe { Ep::from_raw(ep) };
    // SAFETY: a key of ours.
    let rkey = unsafe { Rkey::from_raw(rkey) };
    // SAFETY: UCX's list.
    ep.zcopy(true, unsafe { Iov::list(iov, count) }, addr, rkey, comp)
}

/// `ep_get_short`.
pub unsafe extern "C" fn get_short(
    ep: *mut c_void,
    to: *mut c_void,
    len: c_uint,
    addr: u64,
    rkey: usize,
) -> Status {
    // SAFETY: an endpoint of ours.
    let ep = unsafe { Ep::from_raw(ep) };
    // SAFETY: a key of ours.
    let rkey = unsafe { Rkey::from_raw(rkey) };
    let (to, len) = (to.cast::<u8>(), len as usize);
    if !ep.may_access() {
        return ep.obstacle();
    }
    if len == 0 {
        return Status::OK;
    }
    if let Some(from) = rkey.near(ep, GET, addr, len as u64) {
        // SAFETY: the peer's range, mapped and checked by near(), and UCX's buffer.
        unsafe { copy_short(from, to, len) };
        return Status::OK;
    }
    if len > ep.iface().config.seg_size {
        return Status::INVALID_PARAM;
    }
    let status = ep.read_bounced(addr, rkey, len, Then::Copy { to, len }, std::ptr::null_mut());
    // Without a completion: the flush tells.
    if status == Status::INPROGRESS { Status::OK } else { status }
}

/// `ep_get_bcopy`.
pub unsafe extern "C" fn get_bcopy(
    ep: *mut c_void,
    unpack: UnpackCallback,
    arg: *mut c_void,
    len: usize,
    addr: u64,
    rkey: usize,
    comp: *mut Completion,
) -> Status {
    // SAFETY: an endpoint of ours.
    let ep = unsafe { Ep::from_raw(ep) };
    // SAFETY: a key of ours.
    let rkey = unsafe { Rkey::from_raw(rkey) };
    if !ep.may_access() {
        return ep.obstacle();
    }
    if len == 0 {
        return Status::OK;
    }
    if let Some(from) = rkey.near(ep, GET, addr, len as u64) {
        // SAFETY: UCX's function, reading the peer's range, mapped and checked by near().
        unsafe { unpack(arg, from.cast_const().cast(), len) };
        return Status::OK;
    }
    if len > ep.iface().config.seg_size {
        return Status::INVALID_PARAM;
    }
    ep.read_bounced(addr, rkey, len, Then::Unpack { callback: unpack, arg, len }, comp)
}

/// `ep_get_zcopy`.
pub unsafe extern "C" fn get_zcopy(
    ep: *mut c_void,
    iov: *const Iov,
    count: usize,
    addr: u64,
    rkey: usize,
    comp: *mut Completion,
) -> Status {
    // SAFETY: an endpoint of ours.
    let ep = unsafe { Ep::from_raw(ep) };
    // SAFETY: a key of ours.
    let rkey = unsafe { Rkey::from_raw(rkey) };
    // SAFETY: UCX's list.
    ep.zcopy(false, unsafe { Iov::list(iov, count) }, addr, rkey, comp)
}
