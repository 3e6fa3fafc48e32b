//! Protection domains, and the thread and parent domains that stand for them.

use crate::context::Context;
use crate::guard::{self, EINVAL, Result};
use crate::lend::{Allocators, Loans};
use crate::object::{Live, Object, Users, next_handle};
use freeflow_core::client;
use freeflow_verbs_abi::*;
use std::ffi::c_int;
use std::ptr;
use std::sync::Arc;

pub struct Rust {
    pub core: Arc<client::Pd>,
    /// MRs, QPs and AHs.
    pub users: Users,
    /// Where QPs of this PD are entered.
    pub live: Arc<Live>,
    /// Of a parent domain: the PD and the thread domain it was made with.
    parent: *mut ibv_pd,
    thread: *mut ibv_td,
    /// And what it lends to queues.
    allocators: Option<Allocators>,
}

pub type Pd = Object<ibv_pd, Rust>;

impl Pd {
    /// For one more queue: what this domain lends, if it does.
    pub fn loans(&self) -> Option<Arc<Loans>> {
        self.rust.allocators.map(|allocators| Loans::new(self.c(), allocators))
    }
}

/// The C side of a PD.
pub fn create(context: *mut ibv_context, core: Arc<client::Pd>, handle: u32) -> *mut ibv_pd {
    wrap(context, core, handle, (ptr::null_mut(), ptr::null_mut()), None)
}

fn wrap(
    context: *mut ibv_context,
    core: Arc<client::Pd>,
    handle: u32,
    (parent, thread): (*mut ibv_pd, *mut ibv_td),
    allocators: Option<Allocators>,
) -> *mut ibv_pd {
    // SAFETY: callers pass a live context.
    let live = Arc::clone(&unsafe { Context::of_ibv(context) }.rust.live);
    let users = Users::default();
    Pd::alloc(ibv_pd { context, handle }, Rust { core, users, live, parent, thread, allocators })
}

/// # Safety
/// `context` is a live context of this library.
pub unsafe extern "C" fn ibv_alloc_pd(context: *mut ibv_context) -> *mut ibv_pd {
    guard::pointer(|| {
        // SAFETY: the caller's promise.
        let device = unsafe { &Context::of_ibv(context).rust };
        let core = device.core.alloc_pd()?;
        let handle = next_handle();
        device.exports.offer_pd(handle, &core);
        Ok(create(context, core, handle))
    })
}

/// # Safety
/// `pd` is a live PD of this library.
pub unsafe extern "C" fn ibv_dealloc_pd(pd: *mut ibv_pd) -> c_int {
    guard::code(|| {
        // SAFETY: the caller's promise.
        let rust = unsafe { &Pd::of(pd).rust };
        rust.users.check_none()?;
        let (parent, thread) = (rust.parent, rust.thread);
        if parent.is_null() {
            // SAFETY: the live C structure, copied.
            let c = unsafe { pd.read() };
            // SAFETY: a PD keeps its context alive.
            unsafe { Context::of_ibv(c.context) }.rust.exports.withdraw_pd(c.handle);
        }
        // SAFETY: the C API forbids any use after this.
        unsafe { Pd::free(pd) };
        if !parent.is_null() {
            // SAFETY: a parent domain keeps its PD alive.
            unsafe { Pd::of(parent) }.rust.users.sub();
        }
        if !thread.is_null() {
            // SAFETY: and its thread domain.
            unsafe { Td::of(thread) }.rust.sub();
        }
        Ok(())
    })
}

/// A thread domain: a promise that objects are used by one thread, of which nothing here needs to make use (locks are spun
/// for, not slept on, and free of contention cost a store).
pub type Td = Object<ibv_td, Users>;

/// Behind the inline ibv_alloc_td.
pub unsafe extern "C" fn alloc_td(context: *mut ibv_context, attr: *mut ibv_td_init_attr) -> *mut ibv_td {
    guard::pointer(|| {
        // SAFETY: the program passes its attributes.
        if unsafe { (*attr).comp_mask } != 0 {
            return Err(EINVAL);
        }
        Ok(Td::alloc(ibv_td { context }, Users::default()))
    })
}

pub unsafe extern "C" fn dealloc_td(td: *mut ibv_td) -> c_int {
    guard::code(|| {
        // SAFETY: called with a live thread domain.
        unsafe { Td::of(td) }.rust.check_none()?;
        // SAFETY: the C API forbids any use after this.
        unsafe { Td::free(td) };
        Ok(())
    })
}

/// The allocators that attributes name; None: it names none.
fn allocators(attr: &ibv_parent_domain_init_attr) -> Result<Option<Allocators>> {
    if attr.comp_mask & IBV_PARENT_DOMAIN_INIT_ATTR_ALLOCATORS == 0 {
        return Ok(None);
    }
    let named = attr.comp_mask & IBV_PARENT_DOMAIN_INIT_ATTR_PD_CONTEXT != 0;
    let context = if named { attr.pd_context } else { ptr::null_mut() };
    let (alloc, free) = attr.alloc.zip(attr.free).ok_or(EINVAL)?;
    Ok(Some(Allocators { alloc, free, context }))
}

/// Behind the inline ibv_alloc_parent_domain: another name for a PD. Its allocators lend the private memory of queue pairs and
/// shared receive queues; what peers map is in memory that the router made, and a completion queue has no other.
pub unsafe extern "C" fn alloc_parent_domain(
    context: *mut ibv_context,
    attr: *mut ibv_parent_domain_init_attr,
) -> *mut ibv_pd {
    guard::pointer(|| {
        // SAFETY: the program passes its attributes.
        let attr = unsafe { &*attr };
        let known = IBV_PARENT_DOMAIN_INIT_ATTR_ALLOCATORS | IBV_PARENT_DOMAIN_INIT_ATTR_PD_CONTEXT;
        if attr.pd.is_null() || attr.comp_mask & !known != 0 {
            return Err(EINVAL);
        }
        let allocators = allocators(attr)?;
        // SAFETY: the program names a live PD.
        let parent = unsafe { Pd::of(attr.pd) };
        parent.rust.users.add();
        if !attr.td.is_null() {
            // SAFETY: the program names a live thread domain.
            unsafe { Td::of(attr.td) }.rust.add();
        }
        let core = Arc::clone(&parent.rust.core);
        // SAFETY: a field of a live C structure.
        let handle = unsafe { (*attr.pd).handle };
        Ok(wrap(context, core, handle, (attr.pd, attr.td), allocators))
    })
}
