//! Registered memory of a socket: pages of its own, and where a peer has its.

use std::ffi::c_void;
use std::ptr::NonNull;

use freeflow_verbs_abi::{ibv_mr, ibv_pd};
use rustix::mm::{MapFlags, ProtFlags, mmap_anonymous, munmap};
use rustix::param::page_size;

use crate::edge::{Errno, Result};
use crate::verbs::Verbs;

/// A place in a peer's registered memory.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Remote {
    pub addr: u64,
    pub rkey: u32,
}

impl Remote {
    pub fn plus(self, offset: u64) -> Remote {
        Remote { addr: self.addr.wrapping_add(offset), ..self }
    }
}

/// A registration, as long as it lives.
#[derive(Debug)]
pub struct Registered {
    verbs: &'static Verbs,
    mr: *mut ibv_mr,
}

// SAFETY: the registration belongs to this value alone; who has it may use it from any thread.
unsafe impl Send for Registered {}

impl Registered {
    pub fn new(
        verbs: &'static Verbs,
        pd: *mut ibv_pd,
        addr: *mut c_void,
        len: usize,
        access: u32,
    ) -> Result<Registered> {
        Ok(Registered { verbs, mr: verbs.reg_mr(pd, addr, len, access)? })
    }

    pub fn lkey(&self) -> u32 {
        // SAFETY: registered as long as this value lives.
        unsafe { (*self.mr).lkey }
    }

    pub fn remote(&self) -> Remote {
        // SAFETY: registered as long as this value lives.
        let mr = unsafe { self.mr.read() };
        Remote { addr: mr.addr.addr() as u64, rkey: mr.rkey }
    }
}

impl Drop for Registered {
    fn drop(&mut self) {
        self.verbs.dereg_mr(self.mr);
    }
}

/// Zeroed pages of our own.
#[derive(Debug)]
struct Pages {
    base: NonNull<u8>,
    len: usize,
}

impl Pages {
    fn new(len: usize) -> Result<Pages> {
        let len = len.next_multiple_of(page_size());
        let (read_write, private) = (ProtFlags::READ | ProtFlags::WRITE, MapFlags::PRIVATE);
        // SAFETY: a new mapping, at no address in particular.
        let base = unsafe { mmap_anonymous(std::ptr::null_mut(), len, read_write, private) }?;
        Ok(Pages { base: NonNull::new(base.cast()).ok_or(Errno::NOMEM)?, len })
    }
}

impl Drop for Pages {
    fn drop(&mut self) {
        // SAFETY: mapped by `new`; nothing refers to it any more.
        let _ = unsafe { munmap(self.base.as_ptr().cast(), self.len) };
    }
}

/// Registered pages of our own. The registration goes before the pages.
#[derive(Debug)]
pub struct Region {
    memory: Registered,
    pages: Pages,
}

// SAFETY: the pages belong to this value alone; who has it may use it from any thread.
unsafe impl Send for Region {}

impl Region {
    /// At least `len` bytes, registered on `pd` with `access`.
    pub fn new(verbs: &'static Verbs, pd: *mut ibv_pd, len: usize, access: u32) -> Result<Region> {
        let pages = Pages::new(len)?;
        let memory = Registered::new(verbs, pd, pages.base.as_ptr().cast(), pages.len, access)?;
        Ok(Region { memory, pages })
    }

    /// `len` bytes at `offset`, for as long as the region lives. A peer may be writing to them.
    pub fn at(&self, offset: u64, len: usize) -> NonNull<u8> {
        let offset = offset as usize;
        assert!(offset <= self.pages.len && len <= self.pages.len - offset, "outside of a region");
        // SAFETY: inside the mapping, as just checked.
        unsafe { self.pages.base.add(offset) }
    }

    pub fn lkey(&self) -> u32 {
        self.memory.lkey()
    }

    pub fn remote(&self) -> Remote {
        self.memory.remote()
    }

    /// Copies bytes of the program's into the region.
    ///
    /// # Safety
    /// `from` points to `len` readable bytes.
    pub unsafe fn fill(&self, offset: u64, from: *const u8, len: usize) {
        let to = self.at(offset, len);
        // SAFETY: the caller's promise and `at`'s; the region is not the program's memory.
        unsafe { to.as_ptr().copy_from_nonoverlapping(from, len) };
    }

    /// Copies bytes of the region to the program.
    ///
    /// # Safety
    /// `to` points to `len` writable bytes.
    pub unsafe fn take(&self, offset: u64, to: *mut u8, len: usize) {
        let from = self.at(offset, len);
        // SAFETY: the caller's promise and `at`'s; the region is not the program's memory.
        unsafe { to.copy_from_nonoverlapping(from.as_ptr(), len) };
    }

    /// An aligned word of the region, which a peer may be writing to.
    pub fn word(&self, offset: u64) -> u64 {
        let place = self.at(offset, 8).cast::<u64>();
        assert!(place.is_aligned(), "a word is aligned");
        // SAFETY: inside the mapping and aligned; any bytes are a valid integer.
        unsafe { place.read_volatile() }
    }
}
