//! The device list: one device, `ff0`, where a router answers; none otherwise.

use crate::guard;
use crate::imports::Exports;
use crate::object::Object;
use crate::{context, query};
use freeflow_core::client;
use freeflow_core::verbs::Gid;
use freeflow_core::verbs::device::{NAME, NODE};
use freeflow_verbs_abi::*;
use std::ffi::{c_char, c_int};
use std::mem::{size_of, zeroed};
use std::ptr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

/// A device as clients see it: provider libraries read a private tail behind it and must find zeroes.
#[repr(C)]
pub struct Padded {
    device: ibv_device,
    tail: [u8; DEVICE_ALLOC_SIZE - size_of::<ibv_device>()],
}

pub struct Rust {
    gid: Gid,
    references: AtomicU32,
}

type Device = Object<Padded, Rust>;

/// A list of at most one device, with the NULL that ends it.
type List = [*mut ibv_device; 2];

fn put(text: &str, to: &mut [c_char]) {
    for (to, from) in to.iter_mut().zip(text.bytes()) {
        *to = from as c_char;
    }
}

fn create(gid: Gid) -> *mut ibv_device {
    // SAFETY: integers, arrays and nullable functions: all zeroes is valid.
    let mut padded: Padded = unsafe { zeroed() };
    let device = &mut padded.device;
    device.node_type = IBV_NODE_CA;
    device.transport_type = IBV_TRANSPORT_IB;
    put(NAME, &mut device.name);
    put(NODE, &mut device.dev_name);
    put(&format!("/sys/class/infiniband_verbs/{NODE}"), &mut device.dev_path);
    put(&format!("/sys/class/infiniband/{NAME}"), &mut device.ibdev_path);
    Device::alloc(padded, Rust { gid, references: AtomicU32::new(1) }).cast()
}

/// # Safety
/// `num_devices` is NULL or has room, as the C prototype demands.
pub unsafe extern "C" fn ibv_get_device_list(num_devices: *mut c_int) -> *mut *mut ibv_device {
    guard::pointer(|| {
        let device = client::available().map_or(ptr::null_mut(), |info| create(info.vip));
        // SAFETY: the caller's promise.
        if let Some(number) = unsafe { num_devices.as_mut() } {
            *number = c_int::from(!device.is_null());
        }
        let list: List = [device, ptr::null_mut()];
        Ok(Box::into_raw(Box::new(list)).cast())
    })
}

/// # Safety
/// `list` came from [`ibv_get_device_list`].
pub unsafe extern "C" fn ibv_free_device_list(list: *mut *mut ibv_device) {
    guard::nothing(|| {
        // SAFETY: the caller's promise: a List of ours.
        let list = unsafe { Box::from_raw(list.cast::<List>()) };
        if !list[0].is_null() {
            // SAFETY: the list held a reference.
            unsafe { release(list[0]) };
        }
    });
}

/// Takes a reference for a context.
///
/// # Safety
/// `device` is live.
pub unsafe fn hold(device: *mut ibv_device) {
    // SAFETY: the caller's promise.
    unsafe { Device::of(device) }.rust.references.fetch_add(1, Ordering::Relaxed);
}

/// Gives back a reference to a device: lists and contexts hold one each.
///
/// # Safety
/// `device` is live, and the caller's reference is not used any more.
pub unsafe fn release(device: *mut ibv_device) {
    // SAFETY: the caller's promise.
    // AcqRel: the last owner sees what the others did before.
    if unsafe { Device::of(device) }.rust.references.fetch_sub(1, Ordering::AcqRel) == 1 {
        // SAFETY: that was the last reference.
        unsafe { Device::free(device) };
    }
}

/// # Safety
/// `device` is a live device of this library.
pub unsafe extern "C" fn ibv_open_device(device: *mut ibv_device) -> *mut ibv_context {
    guard::pointer(|| {
        let core = client::Context::open()?;
        // SAFETY: the caller's promise.
        unsafe { hold(device) };
        let (live, (exports, cmd_fd)) = (Arc::default(), Exports::new()?);
        exports.offer(device, &core, &live);
        Ok(context::create(device, core, live, exports, cmd_fd))
    })
}

/// # Safety
/// `device` is a live device of this library.
pub unsafe extern "C" fn ibv_get_device_name(device: *mut ibv_device) -> *const c_char {
    // SAFETY: the address of a field of a live C structure.
    unsafe { (&raw const (*device).name).cast() }
}

/// # Safety
/// `device` is a live device of this library.
pub unsafe extern "C" fn ibv_get_device_guid(device: *mut ibv_device) -> __be64 {
    // SAFETY: the caller's promise.
    query::guid(unsafe { Device::of(device) }.rust.gid)
}

/// The kernel does not know our device.
pub extern "C" fn ibv_get_device_index(_: *mut ibv_device) -> c_int {
    -1
}
