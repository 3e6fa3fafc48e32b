//! Completion queues: making, destroying and extending them. Polling is in post.rs and cq_ex.rs.

use crate::channel::{self, Channel};
use crate::context::Context;
use crate::cq_ex::{self, Cursor};
use crate::guard::{self, EINVAL, EOPNOTSUPP, Result};
use crate::object::{Acks, Delivered, Live, Object, Users, next_handle};
use freeflow_core::client;
use freeflow_verbs_abi::*;
use std::ffi::{c_int, c_void};
use std::mem::zeroed;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

pub struct Rust {
    pub core: Arc<client::Cq>,
    /// Events of the completion channel that the program got.
    pub comp_events: Delivered,
    /// Async events that the program got.
    pub async_events: Delivered,
    pub cursor: Cursor,
    /// Send and receive queues of QPs.
    pub users: Users,
    live: Arc<Live>,
}

pub type Cq = Object<ibv_cq_ex, Rust>;

impl Cq {
    pub fn comp_acks(&self) -> Acks {
        // SAFETY: a field of the live C structure.
        self.acks(unsafe { &raw mut (*self.c()).comp_events_completed })
    }

    pub fn async_acks(&self) -> Acks {
        // SAFETY: a field of the live C structure.
        self.acks(unsafe { &raw mut (*self.c()).async_events_completed })
    }

    fn acks(&self, completed: *mut u32) -> Acks {
        // SAFETY: a field of the live C structure.
        let mutex = unsafe { &raw mut (*self.c()).mutex };
        // SAFETY: a field of the live C structure.
        let cond = unsafe { &raw mut (*self.c()).cond };
        Acks { mutex, cond, completed }
    }
}

/// # Safety
/// Pointers are live objects of this library, or NULL where the man page allows it.
unsafe fn create(
    context: *mut ibv_context,
    cqe: u32,
    cq_context: *mut c_void,
    channel: *mut ibv_comp_channel,
    comp_vector: u32,
    timed: bool,
    install: impl FnOnce(&mut ibv_cq_ex),
) -> Result<*mut ibv_cq_ex> {
    // SAFETY: the caller's promise.
    if comp_vector >= unsafe { (*context).num_comp_vectors } as u32 {
        return Err(EINVAL);
    }
    // SAFETY: the caller's promise.
    let bell = (!channel.is_null()).then(|| unsafe { Channel::of(channel) }.rust.core.clone());
    let place = Cq::reserve();
    // SAFETY: the caller's promise.
    let device = unsafe { &Context::of_ibv(context).rust };
    let core = device.core.create_cq(cqe, place.cookie(), bell)?;
    // SAFETY: integers, nullable pointers and functions: all zeroes is valid.
    let mut ex: ibv_cq_ex = unsafe { zeroed() };
    ex.context = context;
    ex.channel = channel;
    ex.cq_context = cq_context;
    ex.handle = next_handle();
    ex.cqe = core.cqe() as c_int;
    ex.mutex = libc::PTHREAD_MUTEX_INITIALIZER;
    ex.cond = libc::PTHREAD_COND_INITIALIZER;
    install(&mut ex);
    device.live.insert(place.cookie());
    let rust = Rust {
        core,
        comp_events: Delivered::default(),
        async_events: Delivered::default(),
        cursor: Cursor::new(timed),
        users: Users::default(),
        live: Arc::clone(&device.live),
    };
    if !channel.is_null() {
        // SAFETY: the caller's promise.
        unsafe { channel::references(channel) }.fetch_add(1, Ordering::Relaxed);
    }
    Ok(place.fill(ex, rust))
}

/// # Safety
/// Pointers are live objects of this library, or NULL where the man page allows it.
pub unsafe extern "C" fn ibv_create_cq(
    context: *mut ibv_context,
    cqe: c_int,
    cq_context: *mut c_void,
    channel: *mut ibv_comp_channel,
    comp_vector: c_int,
) -> *mut ibv_cq {
    guard::pointer(|| {
        let cqe = u32::try_from(cqe).map_err(|_| EINVAL)?;
        let vector = u32::try_from(comp_vector).map_err(|_| EINVAL)?;
        // SAFETY: the caller's promise.
        Ok(unsafe { create(context, cqe, cq_context, channel, vector, false, |_| {}) }?.cast())
    })
}

/// Behind the inline ibv_create_cq_ex.
pub unsafe extern "C" fn create_ex(
    context: *mut ibv_context,
    attr: *mut ibv_cq_init_attr_ex,
) -> *mut ibv_cq_ex {
    guard::pointer(|| {
        // SAFETY: the program passes its attributes.
        let attr = unsafe { &*attr };
        let flags = if attr.comp_mask & IBV_CQ_INIT_ATTR_MASK_FLAGS != 0 { attr.flags } else { 0 };
        // A CQ never overruns here, so ignoring that it does costs nothing.
        let known = attr.comp_mask & !(IBV_CQ_INIT_ATTR_MASK_FLAGS | IBV_CQ_INIT_ATTR_MASK_PD) == 0
            && flags & !(IBV_CREATE_CQ_ATTR_SINGLE_THREADED | IBV_CREATE_CQ_ATTR_IGNORE_OVERRUN) == 0;
        if attr.comp_mask & IBV_CQ_INIT_ATTR_MASK_PD != 0 && attr.parent_domain.is_null() {
            return Err(EINVAL);
        }
        if !known || attr.wc_flags & !cq_ex::SUPPORTED_WC_FLAGS != 0 {
            return Err(EOPNOTSUPP);
        }
        let timed = attr.wc_flags & !u64::from(IBV_WC_STANDARD_FLAGS) != 0;
        let (cqe, user, vector) = (attr.cqe, attr.cq_context, attr.comp_vector);
        // SAFETY: called through a live context, with its channel or NULL.
        unsafe { create(context, cqe, user, attr.channel, vector, timed, cq_ex::install) }
    })
}

/// # Safety
/// `cq` is a live CQ of this library.
pub unsafe extern "C" fn ibv_resize_cq(cq: *mut ibv_cq, cqe: c_int) -> c_int {
    guard::code(|| {
        let cqe = u32::try_from(cqe).map_err(|_| EINVAL)?;
        // SAFETY: the caller's promise.
        unsafe { Cq::of(cq) }.rust.core.resize(cqe)?;
        // SAFETY: a field of a live C structure.
        unsafe { (*cq).cqe = cqe as c_int };
        Ok(())
    })
}

/// Behind the inline ibv_modify_cq.
pub unsafe extern "C" fn modify(cq: *mut ibv_cq, attr: *mut ibv_modify_cq_attr) -> c_int {
    guard::code(|| {
        // SAFETY: the program passes its attributes.
        let attr = unsafe { &*attr };
        if attr.attr_mask != IBV_CQ_ATTR_MODERATE {
            return Err(EINVAL);
        }
        let ibv_moderate_cq { cq_count, cq_period } = attr.moderate;
        // SAFETY: called with a live CQ.
        let core = unsafe { &Cq::of(cq).rust.core };
        Ok(core.moderate(cq_count, Duration::from_micros(cq_period.into()))?)
    })
}

/// # Safety
/// `cq` is a live CQ of this library.
pub unsafe extern "C" fn ibv_destroy_cq(cq: *mut ibv_cq) -> c_int {
    guard::code(|| {
        // SAFETY: the caller's promise.
        let queue = unsafe { Cq::of(cq) };
        queue.rust.users.check_none()?;
        queue.rust.live.remove(cq as u64);
        queue.comp_acks().wait(&queue.rust.comp_events);
        queue.async_acks().wait(&queue.rust.async_events);
        // SAFETY: a field of a live C structure.
        let channel = unsafe { (*cq).channel };
        // SAFETY: the C API forbids any use after this.
        unsafe { Cq::free(cq) };
        if !channel.is_null() {
            // SAFETY: a CQ keeps its channel alive.
            unsafe { channel::references(channel) }.fetch_sub(1, Ordering::Relaxed);
        }
        Ok(())
    })
}
