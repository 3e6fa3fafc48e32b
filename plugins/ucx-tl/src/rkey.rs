//! Remote keys: what UCX carries from a memory's owner to its peers, and what a peer makes of it.

use std::cell::RefCell;
use std::ffi::{c_int, c_void};
use std::rc::Rc;
use std::sync::{Arc, OnceLock};

use freeflow_core::client::{Context, Mr, Window};
use freeflow_core::shm::Mapping;
use freeflow_core::verbs::Access;

use crate::ep::{Ep, neighbours};
use crate::uct::types::Status;

/// A key on its way.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
#[repr(C)]
pub struct Packed {
    gid: [u8; 16],
    client: u32,
    key: u32,
    addr: u64,
    len: u64,
    /// 1: others may carry out atomics on it, 0: only its owner.
    atomics: u64,
}

impl Packed {
    pub fn new(context: &Context, mr: &Mr) -> Self {
        let (gid, client, atomics) = (context.gid().0, context.id(), mr.is_movable().into());
        Packed { gid, client, key: mr.key(), addr: mr.addr(), len: mr.len(), atomics }
    }
}

/// A `uct_rkey_t`: the key, and the owner's memory as the endpoint that used it last has it mapped.
pub struct Rkey {
    packed: Packed,
    near: RefCell<Option<Near>>,
    /// All of the memory, once somebody asked for a pointer into it: that is good as long as the key.
    lent: OnceLock<Window>,
}

struct Near {
    /// [`Ep::serial`].
    ep: u64,
    window: Rc<Window>,
}

impl Rkey {
    /// # Safety
    /// `rkey` came from [`unpack`] and is not released.
    pub unsafe fn from_raw<'a>(rkey: usize) -> &'a Rkey {
        // SAFETY: by the caller's promise.
        unsafe { &*(rkey as *const Rkey) }
    }

    pub fn key(&self) -> u32 {
        self.packed.key
    }

    /// Or does only the owner carry out atomics on it?
    pub fn allows_atomics(&self) -> bool {
        self.packed.atomics == 1
    }

    /// Where `[addr, addr+len)` of the peer is in this process, if it is mapped here, the key lives and grants `need`.
    #[inline]
    pub fn near(&self, ep: &Ep, need: Access, addr: u64, len: u64) -> Option<*mut u8> {
        self.known(ep, need, addr, len).or_else(|| self.look(ep, need, addr, len))
    }

    /// The same, if the key's last use says so.
    #[inline(always)]
    pub fn known(&self, ep: &Ep, need: Access, addr: u64, len: u64) -> Option<*mut u8> {
        let near = self.near.borrow();
        let Near { ep: last, window } = near.as_ref()?;
        if *last != ep.serial || !window.access().contains(need) {
            return None;
        }
        let at = window.at(addr, len)?;
        window.count(len);
        Some(at)
    }

    /// The same, and what keeps the pointer good after the call.
    pub fn near_and_kept(
        &self,
        ep: &Ep,
        need: Access,
        addr: u64,
        len: u64,
    ) -> Option<(*mut u8, Arc<Mapping>)> {
        let at = self.near(ep, need, addr, len)?;
        let near = self.near.borrow();
        near.as_ref().map(|near| (at, Arc::clone(near.window.mapping())))
    }

    #[cold]
    fn look(&self, ep: &Ep, need: Access, addr: u64, len: u64) -> Option<*mut u8> {
        let window = ep.window(self.packed.key, need, addr, len)?;
        let at = window.at(addr, len);
        window.count(len);
        *self.near.borrow_mut() = Some(Near { ep: ep.serial, window });
        at
    }

    /// A pointer to `addr` that is good as long as the key: if all of the memory is mapped here, by any endpoint to its owner.
    fn pointer(&self, addr: u64) -> Result<*mut u8, Status> {
        let Packed { gid, client, key, addr: from, len, .. } = self.packed;
        let window = match self.lent.get() {
            Some(window) => window,
            None => {
                let need = Access::REMOTE_READ | Access::REMOTE_WRITE;
                let all = neighbours::find(gid, client, |qp| qp.window(key, need, from, len).ok());
                let all = all.ok_or(Status::UNREACHABLE)?;
                self.lent.get_or_init(|| all)
            }
        };
        window.at(addr, 0).ok_or(Status::INVALID_ADDR)
    }
}

/// `rkey_unpack`.
pub unsafe extern "C" fn unpack(
    _component: *mut c_void,
    buffer: *const Packed,
    rkey: *mut usize,
    handle: *mut *mut c_void,
) -> Status {
    // SAFETY: UCX's buffer of rkey_packed_size bytes, of no alignment.
    let packed = unsafe { buffer.read_unaligned() };
    let unpacked = Box::new(Rkey { packed, near: RefCell::new(None), lent: OnceLock::new() });
    // SAFETY: UCX's places for the results.
    unsafe { rkey.write(Box::into_raw(unpacked) as usize) };
    // SAFETY: as above.
    unsafe { handle.write(std::ptr::null_mut()) };
    Status::OK
}

/// `rkey_unpack` of 1.19 and later.
pub unsafe extern "C" fn unpack_with_params(
    component: *mut c_void,
    buffer: *const Packed,
    _params: *const c_void,
    rkey: *mut usize,
    handle: *mut *mut c_void,
) -> Status {
    // SAFETY: UCX's own arguments.
    unsafe { unpack(component, buffer, rkey, handle) }
}

/// `rkey_ptr`, of any thread.
pub unsafe extern "C" fn ptr(
    _component: *mut c_void,
    rkey: usize,
    _handle: *mut c_void,
    addr: u64,
    local: *mut *mut c_void,
) -> Status {
    // SAFETY: UCX calls it on a key of ours.
    match unsafe { Rkey::from_raw(rkey) }.pointer(addr) {
        Ok(at) => {
            // SAFETY: UCX's place for the result.
            unsafe { local.write(at.cast()) };
            Status::OK
        }
        Err(status) => status,
    }
}

/// `rkey_release`.
pub unsafe extern "C" fn release(_component: *mut c_void, rkey: usize, _handle: *mut c_void) -> Status {
    // SAFETY: from unpack(), released once.
    drop(unsafe { Box::from_raw(rkey as *mut Rkey) });
    Status::OK
}

/// `rkey_compare`: any order, as long as it is one.
pub unsafe extern "C" fn compare(
    _component: *mut c_void,
    a: usize,
    b: usize,
    _params: *const c_void,
    result: *mut c_int,
) -> Status {
    // SAFETY: UCX calls it on keys of ours.
    let a = unsafe { Rkey::from_raw(a) };
    // SAFETY: as above.
    let b = unsafe { Rkey::from_raw(b) };
    // SAFETY: UCX's place for the result.
    unsafe { result.write(a.packed.cmp(&b.packed) as c_int) };
    Status::OK
}
