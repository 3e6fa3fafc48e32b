//! Import and export of devices, PDs, MRs and device memory: a second handle on what this process has open already.
//!
//! A device's `cmd_fd` names its context. Of another process's context neither the memory nor the queues are here, so
//! importing one is EOPNOTSUPP.

use crate::context::{self, Context};
use crate::dm::{self, Dm};
use crate::guard::{self, EOPNOTSUPP, Errno, Result};
use crate::mr;
use crate::pd::{self, Pd};
use freeflow_core::client;
use freeflow_verbs_abi::*;
use std::collections::HashMap;
use std::ffi::c_int;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

/// What a context offers for import, by handle. Handles on one device share it.
#[derive(Debug, Default)]
pub struct Exports {
    tables: Mutex<Tables>,
    /// The inode of `cmd_fd`.
    name: u64,
}

#[derive(Debug, Default)]
struct Tables {
    pds: HashMap<u32, Weak<client::Pd>>,
    /// Length and key.
    mrs: HashMap<u32, (usize, u32)>,
    dms: HashMap<u32, Weak<dm::Memory>>,
}

/// What stands behind an open device.
struct Opened {
    core: Weak<client::Context>,
    live: Weak<crate::object::Live>,
    exports: Weak<Exports>,
    device: usize,
}

/// Open devices by the inode of their `cmd_fd`.
static OPENED: Mutex<Option<HashMap<u64, Opened>>> = Mutex::new(None);

fn opened() -> MutexGuard<'static, Option<HashMap<u64, Opened>>> {
    OPENED.lock().unwrap_or_else(PoisonError::into_inner)
}

fn inode(fd: impl AsFd) -> Result<u64> {
    Ok(rustix::fs::fstat(fd)?.st_ino)
}

impl Exports {
    /// Of a device that is opened now, with the descriptor that names it.
    pub fn new() -> Result<(Arc<Self>, OwnedFd)> {
        let fd = rustix::fs::memfd_create(c"freeflow-context", rustix::fs::MemfdFlags::CLOEXEC)?;
        let name = inode(&fd)?;
        Ok((Arc::new(Self { tables: Mutex::default(), name }), fd))
    }

    /// From now on the device can be imported.
    pub fn offer(
        self: &Arc<Self>,
        device: *mut ibv_device,
        core: &Arc<client::Context>,
        live: &Arc<crate::object::Live>,
    ) {
        let entry = Opened {
            core: Arc::downgrade(core),
            live: Arc::downgrade(live),
            exports: Arc::downgrade(self),
            device: device as usize,
        };
        opened().get_or_insert_default().insert(self.name, entry);
    }

    fn tables(&self) -> MutexGuard<'_, Tables> {
        self.tables.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub fn offer_pd(&self, handle: u32, pd: &Arc<client::Pd>) {
        self.tables().pds.insert(handle, Arc::downgrade(pd));
    }

    pub fn withdraw_pd(&self, handle: u32) {
        self.tables().pds.remove(&handle);
    }

    pub fn offer_mr(&self, handle: u32, length: usize, key: u32) {
        self.tables().mrs.insert(handle, (length, key));
    }

    pub fn withdraw_mr(&self, handle: u32) {
        self.tables().mrs.remove(&handle);
    }

    pub fn offer_dm(&self, handle: u32, memory: &Arc<dm::Memory>) {
        self.tables().dms.insert(handle, Arc::downgrade(memory));
    }

    pub fn withdraw_dm(&self, handle: u32) {
        self.tables().dms.remove(&handle);
    }
}

impl Drop for Exports {
    fn drop(&mut self) {
        if let Some(opened) = opened().as_mut() {
            opened.remove(&self.name);
        }
    }
}

/// The new handle takes the descriptor over, and closes it with the device.
pub extern "C" fn ibv_import_device(cmd_fd: c_int) -> *mut ibv_context {
    guard::pointer(|| {
        if cmd_fd < 0 {
            return Err(Errno(libc::EBADF));
        }
        // SAFETY: the program passes an open descriptor, looked at before it is taken over.
        let borrowed = unsafe { BorrowedFd::borrow_raw(cmd_fd) };
        let name = inode(borrowed)?;
        let found = opened().as_ref().and_then(|all| {
            let entry = all.get(&name)?;
            Some((entry.core.upgrade()?, entry.live.upgrade()?, entry.exports.upgrade()?, entry.device))
        });
        let (core, live, exports, device) = found.ok_or(EOPNOTSUPP)?;
        // SAFETY: ibv_import_device(3): the descriptor is the library's from now on.
        let fd = unsafe { std::os::fd::FromRawFd::from_raw_fd(cmd_fd) };
        let device = device as *mut ibv_device;
        // SAFETY: a device lives while a context of it does.
        unsafe { crate::device::hold(device) };
        Ok(context::create(device, core, live, exports, fd))
    })
}

/// # Safety
/// `context` is a live context of this library.
pub unsafe extern "C" fn ibv_import_pd(context: *mut ibv_context, handle: u32) -> *mut ibv_pd {
    guard::pointer(|| {
        // SAFETY: the caller's promise.
        let rust = unsafe { &Context::of_ibv(context).rust };
        let core = rust.exports.tables().pds.get(&handle).and_then(Weak::upgrade);
        Ok(pd::create(context, core.ok_or(dm::GONE)?, handle))
    })
}

/// # Safety
/// `pd` came from [`ibv_import_pd`].
pub unsafe extern "C" fn ibv_unimport_pd(pd: *mut ibv_pd) {
    guard::nothing(|| {
        // SAFETY: the caller's promise.
        let idle = unsafe { Pd::of(pd) }.rust.users.check_none().is_ok();
        // A program may unimport a PD before it destroys the queue pairs it made in it; they still count themselves out. Such
        // a handle stays.
        if idle {
            // SAFETY: the C API forbids any use after this, and no object refers to it.
            unsafe { Pd::free(pd) };
        }
    });
}

/// # Safety
/// `pd` is a live PD of this library.
pub unsafe extern "C" fn ibv_import_mr(pd: *mut ibv_pd, handle: u32) -> *mut ibv_mr {
    guard::pointer(|| {
        // SAFETY: a field of a live C structure.
        let context = unsafe { (*pd).context };
        // SAFETY: a PD keeps its context alive.
        let rust = unsafe { &Context::of_ibv(context).rust };
        let found = rust.exports.tables().mrs.get(&handle).copied();
        let (length, key) = found.ok_or(dm::GONE)?;
        Ok(mr::imported(pd, length, key))
    })
}

/// # Safety
/// `mr` came from [`ibv_import_mr`].
pub unsafe extern "C" fn ibv_unimport_mr(mr: *mut ibv_mr) {
    // SAFETY: the C API forbids any use after this.
    guard::nothing(|| unsafe { mr::Mr::free(mr) });
}

/// # Safety
/// `context` is a live context of this library.
pub unsafe extern "C" fn ibv_import_dm(context: *mut ibv_context, handle: u32) -> *mut ibv_dm {
    guard::pointer(|| {
        // SAFETY: the caller's promise.
        let rust = unsafe { &Context::of_ibv(context).rust };
        let memory = rust.exports.tables().dms.get(&handle).and_then(Weak::upgrade);
        Ok(dm::create(context, memory.ok_or(dm::GONE)?, handle))
    })
}

/// # Safety
/// `dm` came from [`ibv_import_dm`].
pub unsafe extern "C" fn ibv_unimport_dm(dm: *mut ibv_dm) {
    // SAFETY: the C API forbids any use after this.
    guard::nothing(|| unsafe { Dm::free(dm) });
}
