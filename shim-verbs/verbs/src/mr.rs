//! Memory regions.

use crate::context::Context;
use crate::convert;
use crate::dm::DmUser;
use crate::guard::{self, EBUSY, EINVAL, EOPNOTSUPP, Errno, Result, set_errno};
use crate::object::Object;
use crate::pd::Pd;
use crate::post::sges;
use freeflow_core::client;
use freeflow_core::verbs::{Access, Sge};
use freeflow_verbs_abi::*;
use std::ffi::{c_int, c_uint, c_void};
use std::sync::{Arc, Mutex, PoisonError};

pub struct Rust {
    /// Deregisters when dropped. None: a region of another handle on the device, which it only names.
    core: Mutex<Option<Arc<client::Mr>>>,
    access: Mutex<c_uint>,
    /// The device memory it is in.
    _dm: Option<DmUser>,
    /// Of the null region: what it is.
    _null: Option<Arc<client::NullMr>>,
}

pub type Mr = Object<ibv_mr, Rust>;

impl Mr {
    /// EBUSY while a memory window is bound to it.
    fn check_unbound(&self) -> Result<()> {
        let bound = lock(&self.rust.core).as_ref().is_some_and(|core| core.is_bound());
        if bound { Err(EBUSY) } else { Ok(()) }
    }
}

/// The C side of a region.
pub fn create(
    pd: *mut ibv_pd,
    addr: *mut c_void,
    length: usize,
    core: Arc<client::Mr>,
    dm: Option<DmUser>,
) -> *mut ibv_mr {
    let key = core.key();
    // SAFETY: a field of a live C structure.
    let context = unsafe { (*pd).context };
    // SAFETY: a PD keeps its context alive.
    unsafe { Context::of_ibv(context) }.rust.exports.offer_mr(key, length, key);
    let mr = ibv_mr { context, pd, addr, length, handle: key, lkey: key, rkey: key };
    Mr::alloc(mr, Rust { core: Mutex::new(Some(core)), access: Mutex::new(0), _dm: dm, _null: None })
}

/// A second handle on a region.
pub fn imported(pd: *mut ibv_pd, length: usize, key: u32) -> *mut ibv_mr {
    // SAFETY: a field of a live C structure.
    let context = unsafe { (*pd).context };
    let addr = std::ptr::null_mut();
    let mr = ibv_mr { context, pd, addr, length, handle: key, lkey: key, rkey: key };
    Mr::alloc(mr, Rust { core: Mutex::default(), access: Mutex::default(), _dm: None, _null: None })
}

/// Behind the inline ibv_alloc_null_mr: an lkey, and no rkey.
pub unsafe extern "C" fn alloc_null(pd: *mut ibv_pd) -> *mut ibv_mr {
    guard::pointer(|| {
        // SAFETY: called through a live PD.
        let domain = unsafe { Pd::of(pd) };
        let null = domain.rust.core.alloc_null_mr()?;
        domain.rust.users.add();
        // SAFETY: a field of a live C structure.
        let context = unsafe { (*pd).context };
        let (addr, lkey) = (std::ptr::null_mut(), null.lkey());
        let mr = ibv_mr { context, pd, addr, length: usize::MAX, handle: lkey, lkey, rkey: 0 };
        let (core, access) = (Mutex::default(), Mutex::default());
        Ok(Mr::alloc(mr, Rust { core, access, _dm: None, _null: Some(null) }))
    })
}

/// The one registration behind all three functions: a region at `addr` that peers address from `iova` on.
///
/// # Safety
/// `pd` is a live PD of this library, and the program vouches for the memory until it deregisters it.
unsafe fn register(
    pd: *mut ibv_pd,
    addr: *mut c_void,
    length: usize,
    iova: u64,
    flags: c_uint,
) -> *mut ibv_mr {
    guard::pointer(|| {
        let access = convert::region_access(flags)?;
        // SAFETY: the caller's promise.
        let domain = unsafe { Pd::of(pd) };
        let core = domain.rust.core.reg_mr(addr as u64, length as u64, iova, access)?;
        domain.rust.users.add();
        let mr = create(pd, addr, length, core, None);
        // SAFETY: just made.
        *lock(&unsafe { Mr::of(mr) }.rust.access) = flags;
        Ok(mr)
    })
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// # Safety
/// `pd` is a live PD of this library, and the program vouches for the memory until it deregisters it.
pub unsafe extern "C" fn ibv_reg_mr(
    pd: *mut ibv_pd,
    addr: *mut c_void,
    length: usize,
    access: c_int,
) -> *mut ibv_mr {
    // SAFETY: the caller's promise.
    unsafe { register(pd, addr, length, addr as u64, access as c_uint) }
}

/// # Safety
/// As for [`ibv_reg_mr`].
pub unsafe extern "C" fn ibv_reg_mr_iova(
    pd: *mut ibv_pd,
    addr: *mut c_void,
    length: usize,
    iova: u64,
    access: c_int,
) -> *mut ibv_mr {
    // SAFETY: the caller's promise.
    unsafe { register(pd, addr, length, iova, access as c_uint) }
}

/// # Safety
/// As for [`ibv_reg_mr`].
pub unsafe extern "C" fn ibv_reg_mr_iova2(
    pd: *mut ibv_pd,
    addr: *mut c_void,
    length: usize,
    iova: u64,
    access: c_uint,
) -> *mut ibv_mr {
    // SAFETY: the caller's promise.
    unsafe { register(pd, addr, length, iova, access) }
}

/// What a region becomes by ibv_rereg_mr: registered anew, under new keys, before the old registration ends; so a call that
/// fails leaves the region as it was (IBV_REREG_MR_ERR_INPUT).
///
/// # Safety
/// `mr` is a live MR of this library, `pd` a live PD where the flags name it, and the program vouches for the memory.
pub unsafe extern "C" fn ibv_rereg_mr(
    mr: *mut ibv_mr,
    flags: c_int,
    pd: *mut ibv_pd,
    addr: *mut c_void,
    length: usize,
    access: c_int,
) -> c_int {
    // SAFETY: the caller's promise.
    let done = unsafe { reregister(mr, flags as u32, pd, addr, length, access as c_uint) };
    done.map_or_else(
        |errno| {
            set_errno(errno);
            IBV_REREG_MR_ERR_INPUT
        },
        |()| 0,
    )
}

/// # Safety
/// As for [`ibv_rereg_mr`].
unsafe fn reregister(
    mr: *mut ibv_mr,
    flags: u32,
    pd: *mut ibv_pd,
    addr: *mut c_void,
    length: usize,
    access: c_uint,
) -> Result<()> {
    let named = |flag| flags & flag != 0;
    let moves = named(IBV_REREG_MR_CHANGE_TRANSLATION);
    if flags & !IBV_REREG_MR_FLAGS_SUPPORTED != 0
        || (moves && (addr.is_null() || length == 0))
        || (named(IBV_REREG_MR_CHANGE_PD) && pd.is_null())
    {
        return Err(EINVAL);
    }
    // SAFETY: the live C structure, copied.
    let old = unsafe { mr.read() };
    // SAFETY: the caller's promise.
    let region = unsafe { Mr::of(mr) };
    region.check_unbound()?;
    let rust = &region.rust;
    let (addr, length) = if moves { (addr, length) } else { (old.addr, old.length) };
    if addr.is_null() && named(IBV_REREG_MR_CHANGE_PD) {
        return Err(EOPNOTSUPP); // device memory, or all of memory
    }
    let new_pd = if named(IBV_REREG_MR_CHANGE_PD) { pd } else { old.pd };
    let flags = if named(IBV_REREG_MR_CHANGE_ACCESS) { access } else { *lock(&rust.access) };
    // SAFETY: the caller's promise.
    let domain = unsafe { Pd::of(new_pd) };
    let access = convert::region_access(flags)?;
    if (moves, new_pd) == (false, old.pd) {
        // The rights alone: peers go on with the key they have.
        let core = lock(&rust.core);
        core.as_ref().ok_or(EINVAL)?.set_access(access)?;
        *lock(&rust.access) = flags;
        return Ok(());
    }
    let core = domain.rust.core.reg_mr(addr as u64, length as u64, addr as u64, access)?;
    let key = core.key();
    let before = lock(&rust.core).replace(core);
    drop(before); // deregistered: nothing lands there any more
    *lock(&rust.access) = flags;
    // SAFETY: a PD keeps its context alive.
    let exports = unsafe { &Context::of_ibv(old.context).rust.exports };
    exports.withdraw_mr(old.handle);
    exports.offer_mr(key, length, key);
    domain.rust.users.add();
    // SAFETY: an MR keeps its PD alive.
    unsafe { Pd::of(old.pd) }.rust.users.sub();
    let new = ibv_mr { pd: new_pd, addr, length, handle: key, lkey: key, rkey: key, ..old };
    // SAFETY: the live C structure.
    unsafe { mr.write(new) };
    Ok(())
}

/// # Safety
/// `mr` is a live MR of this library.
pub unsafe extern "C" fn ibv_dereg_mr(mr: *mut ibv_mr) -> c_int {
    guard::code(|| {
        // SAFETY: the caller's promise.
        unsafe { Mr::of(mr) }.check_unbound()?;
        // SAFETY: the live C structure, copied.
        let c = unsafe { mr.read() };
        // SAFETY: a PD keeps its context alive.
        unsafe { Context::of_ibv(c.context) }.rust.exports.withdraw_mr(c.handle);
        // SAFETY: the C API forbids any use after this.
        unsafe { Mr::free(mr) };
        // SAFETY: an MR keeps its PD alive.
        unsafe { Pd::of(c.pd) }.rust.users.sub();
        Ok(())
    })
}

/// Behind the inline ibv_advise_mr: pages of on-demand regions are touched before they are needed.
pub unsafe extern "C" fn advise(
    pd: *mut ibv_pd,
    advice: ib_uverbs_advise_mr_advice,
    flags: u32,
    sg_list: *mut ibv_sge,
    num_sge: u32,
) -> c_int {
    guard::code(|| {
        let (need, populate) = match advice {
            IB_UVERBS_ADVISE_MR_ADVICE_PREFETCH => (Access::empty(), Some(libc::MADV_POPULATE_READ)),
            IB_UVERBS_ADVISE_MR_ADVICE_PREFETCH_WRITE => {
                (Access::LOCAL_WRITE, Some(libc::MADV_POPULATE_WRITE))
            }
            IB_UVERBS_ADVISE_MR_ADVICE_PREFETCH_NO_FAULT => (Access::empty(), None),
            _ => return Err(EOPNOTSUPP),
        };
        if flags & !IB_UVERBS_ADVISE_MR_FLAG_FLUSH != 0 || num_sge == 0 {
            return Err(EINVAL);
        }
        let count = c_int::try_from(num_sge).map_err(|_| EINVAL)?;
        // SAFETY: the program passes a list of that many entries.
        let list: &[Sge] = unsafe { sges(sg_list, count, num_sge) }?;
        // SAFETY: called through a live PD.
        let domain = unsafe { Pd::of(pd) };
        for sge in list {
            let va = domain.rust.core.resolve(sge, need).ok_or(Errno(libc::ENOENT))?;
            if let Some(populate) = populate {
                touch(va, sge.length.into(), populate)?;
            }
        }
        Ok(())
    })
}

/// Has the kernel make the pages that a range is in.
fn touch(va: u64, len: u64, how: c_int) -> Result<()> {
    let page = freeflow_core::shm::PAGE;
    let start = va - va % page;
    // SAFETY: advice that changes no byte.
    let done = unsafe { libc::madvise(start as *mut c_void, (va - start + len) as usize, how) };
    match std::io::Error::last_os_error().raw_os_error() {
        _ if done == 0 => Ok(()),
        Some(libc::EINVAL) => Ok(()), // a kernel that does not know it (before 5.14): pages come when they are touched
        _ => Err(Errno(libc::EFAULT)),
    }
}
