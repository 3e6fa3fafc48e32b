//! XRC domains and their targets, which may be opened several times: a domain by the file it is named by, a target by its
//! number. All openers are one process: messages for the queues of another would have to be told there.

use crate::context::Context;
use crate::guard::{self, EINVAL, Errno, Result};
use crate::object::{Object, Users};
use freeflow_core::client;
use freeflow_verbs_abi::*;
use std::collections::HashMap;
use std::ffi::c_int;
use std::mem::MaybeUninit;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A domain as one caller of ibv_open_xrcd has it.
pub struct Handle {
    pub domain: Arc<Domain>,
    /// Shared receive queues and targets that were made with this handle.
    pub users: Users,
}

pub type Xrcd = Object<ibv_xrcd, Handle>;

/// What all handles of a domain share.
pub struct Domain {
    pub core: Arc<client::Xrcd>,
    /// By number.
    targets: Mutex<HashMap<u32, Weak<Target>>>,
}

/// A target as all handles of it share it.
pub struct Target {
    pub core: Arc<client::Qp>,
    /// What the handles are known by to events, which go to the first.
    handles: Mutex<Vec<u64>>,
}

impl Domain {
    /// ibv_create_qp_ex of a target.
    pub fn create_target(&self, cookie: u64) -> Result<Arc<Target>> {
        let core = self.core.create_target(cookie)?;
        let target = Arc::new(Target { core, handles: Mutex::new(vec![cookie]) });
        let mut targets = lock(&self.targets);
        targets.retain(|_, target| target.strong_count() > 0);
        targets.insert(target.core.qpn(), Arc::downgrade(&target));
        Ok(target)
    }

    /// ibv_open_qp.
    pub fn open_target(&self, number: u32, cookie: u64) -> Result<Arc<Target>> {
        let target = lock(&self.targets).get(&number).and_then(Weak::upgrade).ok_or(EINVAL)?;
        let mut handles = lock(&target.handles);
        if handles.is_empty() {
            return Err(EINVAL); // being destroyed
        }
        handles.push(cookie);
        drop(handles);
        Ok(target)
    }
}

impl Target {
    /// ibv_destroy_qp of one handle: the last one ends the queue pair.
    pub fn close(&self, cookie: u64) {
        let mut handles = lock(&self.handles);
        handles.retain(|handle| *handle != cookie);
        match handles.first() {
            Some(next) => self.core.tell(*next),
            None => self.core.close(),
        }
    }
}

/// The domains of a device that files name, by device and inode.
#[derive(Default)]
pub struct Domains(Mutex<HashMap<(u64, u64), Weak<Domain>>>);

impl Domains {
    /// The domain that `file` names, made if `flags` say so.
    fn open(&self, device: &Arc<client::Context>, file: c_int, flags: c_int) -> Result<Arc<Domain>> {
        let make = || -> Result<Arc<Domain>> {
            Ok(Arc::new(Domain { core: device.open_xrcd()?, targets: Mutex::default() }))
        };
        if file == -1 {
            return make();
        }
        let name = inode(file)?;
        let mut named = lock(&self.0);
        // Errors are the kernel's.
        match named.get(&name).and_then(Weak::upgrade) {
            Some(_) if flags & libc::O_EXCL != 0 => Err(EINVAL),
            Some(there) => Ok(there),
            None if flags & libc::O_CREAT == 0 => Err(Errno(libc::EAGAIN)),
            None => {
                named.retain(|_, domain| domain.strong_count() > 0);
                let domain = make()?;
                named.insert(name, Arc::downgrade(&domain));
                Ok(domain)
            }
        }
    }
}

fn inode(file: c_int) -> Result<(u64, u64)> {
    let mut stat = MaybeUninit::<libc::stat>::uninit();
    // SAFETY: the place is large enough; any number may be passed for the descriptor.
    if unsafe { libc::fstat(file, stat.as_mut_ptr()) } != 0 {
        return Err(Errno(libc::EBADF));
    }
    // SAFETY: fstat succeeded and filled it in.
    let stat = unsafe { stat.assume_init() };
    Ok((stat.st_dev, stat.st_ino))
}

/// Behind the inline ibv_open_xrcd.
pub unsafe extern "C" fn open_xrcd(
    context: *mut ibv_context,
    attr: *mut ibv_xrcd_init_attr,
) -> *mut ibv_xrcd {
    guard::pointer(|| {
        // SAFETY: the program passes its attributes.
        let attr = unsafe { &*attr };
        let needed = IBV_XRCD_INIT_ATTR_FD | IBV_XRCD_INIT_ATTR_OFLAGS;
        if attr.comp_mask != needed {
            return Err(EINVAL);
        }
        // SAFETY: called through a live context.
        let device = unsafe { &Context::of_ibv(context).rust };
        let domain = device.domains.open(&device.core, attr.fd, attr.oflags)?;
        Ok(Xrcd::alloc(ibv_xrcd { context }, Handle { domain, users: Users::default() }))
    })
}

pub unsafe extern "C" fn close_xrcd(xrcd: *mut ibv_xrcd) -> c_int {
    guard::code(|| {
        // SAFETY: called with a live domain.
        unsafe { Xrcd::of(xrcd) }.rust.users.check_none()?;
        // SAFETY: the C API forbids any use after this.
        unsafe { Xrcd::free(xrcd) };
        Ok(())
    })
}
