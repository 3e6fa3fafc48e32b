//! Device memory: host memory of this process that programs reach by copies and by zero-based regions only, as if it were
//! on the NIC.

use crate::context::Context;
use crate::convert;
use crate::guard::{self, EINVAL, ENOMEM, Errno, Result};
use crate::mr;
use crate::object::{Object, Users, next_handle};
use crate::pd::Pd;
use freeflow_verbs_abi::*;
use std::ffi::{c_int, c_uint, c_void};
use std::ptr;
use std::sync::Arc;

/// The largest piece.
pub const MAX: u64 = 1 << 20;
/// Of offsets and lengths, as mlx5 has it.
const ALIGN: u64 = 4;
const PAGE_SHIFT: u32 = 12;

/// Pages of its own, so that registering them moves nothing else.
#[derive(Debug)]
pub struct Memory {
    base: *mut u8,
    len: usize,
}

// SAFETY: plain memory; programs order their own accesses, as with any memory they register.
unsafe impl Send for Memory {}
// SAFETY: as above.
unsafe impl Sync for Memory {}

impl Memory {
    fn new(len: usize) -> Result<Self> {
        let protection = libc::PROT_READ | libc::PROT_WRITE;
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
        // SAFETY: a new mapping at a place of the kernel's choice.
        let base = unsafe { libc::mmap(ptr::null_mut(), len, protection, flags, -1, 0) };
        if base == libc::MAP_FAILED { Err(ENOMEM) } else { Ok(Self { base: base.cast(), len }) }
    }

    /// The address of `[offset, offset+length)`.
    fn at(&self, offset: u64, length: u64) -> Result<*mut u8> {
        let inside = offset.checked_add(length).is_some_and(|end| end <= self.len as u64);
        if inside { Ok(self.base.wrapping_add(offset as usize)) } else { Err(EINVAL) }
    }

    /// The same for a copy.
    fn piece(&self, offset: u64, length: usize) -> Result<*mut u8> {
        let aligned = offset.is_multiple_of(ALIGN) && (length as u64).is_multiple_of(ALIGN);
        if aligned { self.at(offset, length as u64) } else { Err(EINVAL) }
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        // SAFETY: the mapping `new` made; regions in it hold a reference.
        unsafe { libc::munmap(self.base.cast(), self.len) };
    }
}

pub struct Rust {
    pub memory: Arc<Memory>,
    users: Users,
}

pub type Dm = Object<ibv_dm, Rust>;

/// The C side of a piece.
pub fn create(context: *mut ibv_context, memory: Arc<Memory>, handle: u32) -> *mut ibv_dm {
    let c = ibv_dm {
        context,
        memcpy_to_dm: Some(copy_to),
        memcpy_from_dm: Some(copy_from),
        comp_mask: IBV_DM_MASK_HANDLE,
        handle,
    };
    Dm::alloc(c, Rust { memory, users: Users::default() })
}

/// Behind the inline ibv_alloc_dm. A forked child may do it too: no router is asked before a region is registered.
pub unsafe extern "C" fn alloc(context: *mut ibv_context, attr: *mut ibv_alloc_dm_attr) -> *mut ibv_dm {
    guard::pointer(|| {
        // SAFETY: the program passes its attributes.
        let attr = unsafe { &*attr };
        if attr.comp_mask != 0 || attr.length == 0 || attr.log_align_req > PAGE_SHIFT {
            return Err(EINVAL);
        }
        if attr.length as u64 > MAX {
            return Err(ENOMEM);
        }
        let memory = Arc::new(Memory::new(attr.length)?);
        let handle = next_handle();
        // SAFETY: called through a live context.
        unsafe { Context::of_ibv(context) }.rust.exports.offer_dm(handle, &memory);
        Ok(create(context, memory, handle))
    })
}

pub unsafe extern "C" fn free(dm: *mut ibv_dm) -> c_int {
    guard::code(|| {
        // SAFETY: called with a live piece.
        unsafe { Dm::of(dm) }.rust.users.check_none()?;
        // SAFETY: the live C structure, copied.
        let c = unsafe { dm.read() };
        // SAFETY: device memory keeps its context alive.
        unsafe { Context::of_ibv(c.context) }.rust.exports.withdraw_dm(c.handle);
        // SAFETY: the C API forbids any use after this.
        unsafe { Dm::free(dm) };
        Ok(())
    })
}

unsafe extern "C" fn copy_to(dm: *mut ibv_dm, offset: u64, from: *const c_void, length: usize) -> c_int {
    guard::code(|| {
        // SAFETY: called through a live piece.
        let to = unsafe { Dm::of(dm) }.rust.memory.piece(offset, length)?;
        // SAFETY: the program passes as many readable bytes; ours are in bounds.
        unsafe { ptr::copy(from.cast::<u8>(), to, length) };
        Ok(())
    })
}

unsafe extern "C" fn copy_from(to: *mut c_void, dm: *mut ibv_dm, offset: u64, length: usize) -> c_int {
    guard::code(|| {
        // SAFETY: called through a live piece.
        let from = unsafe { Dm::of(dm) }.rust.memory.piece(offset, length)?;
        // SAFETY: the program passes as many writable bytes; ours are in bounds.
        unsafe { ptr::copy(from, to.cast::<u8>(), length) };
        Ok(())
    })
}

/// Behind the inline ibv_reg_dm_mr: a region that requests name by offsets from its start.
pub unsafe extern "C" fn register(
    pd: *mut ibv_pd,
    dm: *mut ibv_dm,
    offset: u64,
    length: usize,
    access: c_uint,
) -> *mut ibv_mr {
    guard::pointer(|| {
        if access & IBV_ACCESS_ZERO_BASED == 0 {
            return Err(EINVAL);
        }
        let access = convert::region_access(access)?;
        // SAFETY: called with a live piece.
        let piece = unsafe { Dm::of(dm) };
        let address = piece.rust.memory.at(offset, length as u64)?;
        // SAFETY: called with a live PD.
        let domain = unsafe { Pd::of(pd) };
        let core = domain.rust.core.reg_mr(address as u64, length as u64, 0, access)?;
        piece.rust.users.add();
        domain.rust.users.add();
        Ok(mr::create(pd, ptr::null_mut(), length, core, Some(DmUser(dm))))
    })
}

/// A region's hold on the piece it is in.
#[derive(Debug)]
pub struct DmUser(*mut ibv_dm);

// SAFETY: only counted through.
unsafe impl Send for DmUser {}

impl Drop for DmUser {
    fn drop(&mut self) {
        // SAFETY: a piece with regions cannot be freed.
        unsafe { Dm::of(self.0) }.rust.users.sub();
    }
}

/// No such piece.
pub const GONE: Errno = Errno(libc::ENOENT);
