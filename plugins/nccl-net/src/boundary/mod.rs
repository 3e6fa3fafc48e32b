//! The C boundary: what is behind NCCL's pointers, and nothing else. The only module with `unsafe`.
//!
//! NCCL's contract, which the SAFETY comments mean by "NCCL's contract": pointers are those that this plugin gave out and
//! not yet closed; out parameters are writable; one comm's isend, irecv and test are called by one thread at a time
//! (regMr and deregMr may be called by another one meanwhile); a comm is closed when nobody uses it any more.

mod adapters;
mod calls;
mod log;

use std::cell::UnsafeCell;
use std::ffi::c_void;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, Mutex};

use freeflow_nccl_abi::{NcclResult, result};

use crate::device::{Device, Style};
use crate::fault::{Fault, Result};
use crate::listen::Listener;
use crate::recv::Receiver;
use crate::region::Regions;
use crate::send::{REQUESTS, Sender};
use crate::slots::GROUPS;

/// A communicator's context, since v11.
struct Session {
    device: Arc<Device>,
    style: Style,
}

/// A listen comm. accept() is only ever called by one thread, but nothing is lost by a lock.
struct ListenComm(Mutex<Listener>);

/// A send or receive comm. Dropped from the top: first the connection, then what it wrote to.
struct Comm {
    side: UnsafeCell<Side>,
    regions: Regions,
    requests: Box<[Request]>,
    device: Arc<Device>,
}

#[allow(clippy::large_enum_variant, reason = "one a comm, boxed with it")]
enum Side {
    Send(Sender),
    Recv(Receiver),
}

/// What a request pointer points to.
struct Request {
    comm: *const Comm,
    index: u32,
}

impl Comm {
    fn make(device: Arc<Device>, side: Side) -> *mut c_void {
        let count = if matches!(side, Side::Send(_)) { REQUESTS } else { GROUPS };
        let (side, regions, requests) = (UnsafeCell::new(side), Regions::default(), Box::default());
        let comm = Box::into_raw(Box::new(Comm { side, regions, requests, device }));
        let requests = (0..count as u32).map(|index| Request { comm, index }).collect();
        // SAFETY: made above; nobody else has it yet.
        unsafe { (*comm).requests = requests };
        comm.cast()
    }

    /// # Safety
    /// NCCL's contract.
    unsafe fn of<'a>(comm: *mut c_void) -> Result<&'a Comm> {
        // SAFETY: NULL or a comm that Comm::make made.
        unsafe { comm.cast::<Comm>().as_ref() }.ok_or_else(|| Fault::usage("no comm"))
    }

    /// # Safety
    /// NCCL's contract: nobody else is in isend, irecv or test of this comm.
    #[allow(clippy::mut_from_ref, reason = "the caller's promise is that there is no other")]
    unsafe fn side(&self) -> &mut Side {
        // SAFETY: the caller's promise.
        unsafe { &mut *self.side.get() }
    }

    fn request(&self, index: u32) -> *mut c_void {
        std::ptr::from_ref(&self.requests[index as usize]).cast_mut().cast()
    }
}

/// Turns a result into NCCL's number, with a word in its log. A panic is a bug in here.
fn code(what: &str, f: impl FnOnce() -> Result<()>) -> NcclResult {
    match catch_unwind(AssertUnwindSafe(f)) {
        Ok(Ok(())) => result::SUCCESS,
        Ok(Err(fault)) => {
            log::fault(what, &fault);
            fault.code
        }
        Err(_) => result::INTERNAL_ERROR,
    }
}

/// # Safety
/// `slot` is NULL or writable.
unsafe fn put<T>(slot: *mut T, value: T) -> Result<()> {
    if slot.is_null() {
        return Err(Fault::usage("NULL where a result goes"));
    }
    // SAFETY: the caller's promise.
    unsafe { slot.write(value) };
    Ok(())
}

/// # Safety
/// `list` is NULL or has at least `n` items.
unsafe fn list<'a, T>(list: *const T, n: usize) -> Result<&'a [T]> {
    if list.is_null() {
        return Err(Fault::usage("NULL where a list is"));
    }
    // SAFETY: the caller's promise.
    Ok(unsafe { std::slice::from_raw_parts(list, n) })
}
