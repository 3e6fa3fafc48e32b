//! Atomics: the processor's own on the peer's memory where it is mapped here, else COMPARE_AND_SWAP and FETCH_AND_ADD of
//! 64 bits, in a loop for what those two do not do. Memory whose pages cannot move has an owner who does them ([`super::owner`]).

use std::ffi::{c_uint, c_void};
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering::SeqCst};

use freeflow_core::exec::Target;
use freeflow_core::verbs::{Access, SendOp, Sge};

use super::Ep;
use super::queue::{Start, Then};
use crate::rkey::Rkey;
use crate::uct::types::{Completion, Status, atomic};

const NEED: Access = Access::REMOTE_ATOMIC;

/// What an operation makes of a value.
fn apply(op: c_uint, old: u64, value: u64, compare: u64) -> Option<u64> {
    Some(match op {
        atomic::ADD => old.wrapping_add(value),
        atomic::AND => old & value,
        atomic::OR => old | value,
        atomic::XOR => old ^ value,
        atomic::SWAP => value,
        atomic::CSWAP => {
            if old == compare {
                value
            } else {
                old
            }
        }
        _ => return None,
    })
}

macro_rules! here {
    ($name:ident, $word:ty, $int:ty) => {
        /// On memory that is mapped here. None: no such operation.
        fn $name(word: &$word, op: c_uint, value: u64, compare: u64) -> Option<u64> {
            let (value, compare) = (value as $int, compare as $int);
            Some(u64::from(match op {
                atomic::ADD => word.fetch_add(value, SeqCst),
                atomic::AND => word.fetch_and(value, SeqCst),
                atomic::OR => word.fetch_or(value, SeqCst),
                atomic::XOR => word.fetch_xor(value, SeqCst),
                atomic::SWAP => word.swap(value, SeqCst),
                atomic::CSWAP => match word.compare_exchange(compare, value, SeqCst, SeqCst) {
                    Ok(old) | Err(old) => old,
                },
                _ => return None,
            }))
        }
    };
}

here!(here32, AtomicU32, u32);
here!(here64, AtomicU64, u64);

/// An operation as UCX asks for it.
#[derive(Clone, Copy)]
pub struct Asked {
    pub op: c_uint,
    pub size: usize,
    pub value: u64,
    pub compare: u64,
    pub addr: u64,
    /// Where the old value goes; null: nowhere.
    pub result: *mut c_void,
}

/// An operation on memory that is not mapped here: compare-and-swap of the aligned 8 bytes, until nobody was faster.
pub struct Loop {
    asked: Asked,
    rkey: u32,
    /// What the word is believed to be.
    guess: u64,
    /// The whole thing was one request: its result is the old value.
    plain: bool,
}

impl Loop {
    fn word(&self) -> u64 {
        self.asked.addr & !7
    }

    /// The operand within the word.
    fn lane(&self) -> (u32, u64) {
        if self.asked.size == 8 { (0, u64::MAX) } else { ((self.asked.addr & 4) as u32 * 8, 0xffff_ffff) }
    }

    fn first(&mut self) -> (SendOp, Target) {
        let Asked { op, size, value, compare, .. } = self.asked;
        self.plain = size == 8 && (op == atomic::ADD || op == atomic::CSWAP);
        if !self.plain {
            return self.try_guess();
        }
        let (send, compare_add) =
            if op == atomic::ADD { (SendOp::FetchAdd, value) } else { (SendOp::CompareSwap, compare) };
        (send, Target::Atomic { addr: self.word(), rkey: self.rkey, compare_add, swap: value })
    }

    fn try_guess(&self) -> (SendOp, Target) {
        let (shift, mask) = self.lane();
        let old = self.guess >> shift & mask;
        let new = apply(self.asked.op, old, self.asked.value & mask, self.asked.compare & mask)
            .unwrap_or(old)
            & mask;
        let swap = self.guess & !(mask << shift) | new << shift;
        (
            SendOp::CompareSwap,
            Target::Atomic { addr: self.word(), rkey: self.rkey, compare_add: self.guess, swap },
        )
    }

    /// After a try, with what the word was at `found`: the next one, if somebody else had changed it.
    pub fn next(&mut self, found: *const u8) -> Option<(SendOp, Target)> {
        // SAFETY: the 8 bytes of ours that the request filled.
        let found = unsafe { found.cast::<u64>().read_unaligned() };
        if self.plain || found == self.guess {
            return None;
        }
        self.guess = found;
        Some(self.try_guess())
    }

    /// The operation is done: its result is in the word at `found`.
    pub fn store(&self, found: *const u8) {
        // SAFETY: the 8 bytes of ours that the request filled.
        let found = unsafe { found.cast::<u64>().read_unaligned() };
        let (shift, mask) = self.lane();
        // SAFETY: UCX's place for a result of that size, or null.
        unsafe { store_result(self.asked.result, self.asked.size, found >> shift & mask) };
    }
}

/// # Safety
/// `to` is null or has `size` bytes.
pub unsafe fn store_result(to: *mut c_void, size: usize, value: u64) {
    if !to.is_null() {
        // SAFETY: by the caller's promise; little-endian, so that the low bytes are the first.
        unsafe { to.cast::<u8>().copy_from_nonoverlapping(value.to_le_bytes().as_ptr(), size) };
    }
}

impl Ep {
    fn atomic(&self, asked: Asked, rkey: &Rkey, comp: *mut Completion) -> Status {
        let Asked { op, size, value, compare, addr, result } = asked;
        if !addr.is_multiple_of(size as u64) || apply(op, 0, 0, 0).is_none() {
            return Status::INVALID_PARAM;
        }
        if !self.may_access() {
            return self.obstacle();
        }
        let Some(there) = rkey.near(self, NEED, addr, size as u64) else {
            return if rkey.allows_atomics() {
                self.atomic_elsewhere(asked, rkey, comp)
            } else {
                self.atomic_by_owner(asked, rkey, comp)
            };
        };
        // SAFETY: in the peer's memory, mapped and checked by near(), and aligned like the peer's address.
        let old = unsafe { carry_out(there, op, size, value, compare) };
        // SAFETY: UCX's place for the result, or null.
        unsafe { store_result(result, size, old.unwrap_or_default()) };
        Status::OK
    }

    #[cold]
    fn atomic_elsewhere(&self, asked: Asked, rkey: &Rkey, comp: *mut Completion) -> Status {
        if self.qp().send_room() == 0 {
            return Status::NO_RESOURCE;
        }
        let Some(buffer) = self.iface().buffer() else { return Status::NO_RESOURCE };
        let mut tries = Loop { asked, rkey: rkey.key(), guess: 0, plain: false };
        let (op, target) = tries.first();
        self.start(Start {
            op,
            target,
            sges: &[Sge { addr: buffer.at as u64, length: 8, lkey: buffer.lkey }],
            then: Then::Atomic(tries),
            comp,
            bounce: Some(buffer),
            keep: None,
        })
    }
}

/// On an operand that is mapped here. None: no such operation.
///
/// # Safety
/// `at` is aligned and has `size` bytes, 4 or 8, that are only used as atomics meanwhile.
pub unsafe fn carry_out(at: *mut u8, op: c_uint, size: usize, value: u64, compare: u64) -> Option<u64> {
    if size == 4 {
        // SAFETY: by the caller's promise.
        here32(unsafe { AtomicU32::from_ptr(at.cast()) }, op, value, compare)
    } else {
        // SAFETY: by the caller's promise.
        here64(unsafe { AtomicU64::from_ptr(at.cast()) }, op, value, compare)
    }
}

/// Any of the entry points below.
///
/// # Safety
/// UCX's own arguments.
unsafe fn run(ep: *mut c_void, rkey: usize, asked: Asked, comp: *mut Completion) -> Status {
    // SAFETY: an endpoint of ours.
    let ep = unsafe { Ep::from_raw(ep) };
    // SAFETY: a key of ours.
    ep.atomic(asked, unsafe { Rkey::from_raw(rkey) }, comp)
}

/// Without a result there is no completion either.
fn posted(status: Status) -> Status {
    if status == Status::INPROGRESS { Status::OK } else { status }
}

/// `ep_atomic_cswap64`.
pub unsafe extern "C" fn cswap64(
    ep: *mut c_void,
    compare: u64,
    value: u64,
    addr: u64,
    rkey: usize,
    result: *mut u64,
    comp: *mut Completion,
) -> Status {
    let asked = Asked { op: atomic::CSWAP, size: 8, value, compare, addr, result: result.cast() };
    // SAFETY: UCX's own arguments.
    unsafe { run(ep, rkey, asked, comp) }
}

/// `ep_atomic_cswap32`.
pub unsafe extern "C" fn cswap32(
    ep: *mut c_void,
    compare: u32,
    value: u32,
    addr: u64,
    rkey: usize,
    result: *mut u32,
    comp: *mut Completion,
) -> Status {
    let (value, compare) = (value.into(), compare.into());
    let asked = Asked { op: atomic::CSWAP, size: 4, value, compare, addr, result: result.cast() };
    // SAFETY: UCX's own arguments.
    unsafe { run(ep, rkey, asked, comp) }
}

/// `ep_atomic32_post`.
pub unsafe extern "C" fn post32(ep: *mut c_void, op: c_uint, value: u32, addr: u64, rkey: usize) -> Status {
    let asked = Asked { op, size: 4, value: value.into(), compare: 0, addr, result: std::ptr::null_mut() };
    // SAFETY: UCX's own arguments.
    posted(unsafe { run(ep, rkey, asked, std::ptr::null_mut()) })
}

/// `ep_atomic64_post`.
pub unsafe extern "C" fn post64(ep: *mut c_void, op: c_uint, value: u64, addr: u64, rkey: usize) -> Status {
    let asked = Asked { op, size: 8, value, compare: 0, addr, result: std::ptr::null_mut() };
    // SAFETY: UCX's own arguments.
    posted(unsafe { run(ep, rkey, asked, std::ptr::null_mut()) })
}

/// `ep_atomic32_fetch`.
pub unsafe extern "C" fn fetch32(
    ep: *mut c_void,
    op: c_uint,
    value: u32,
    result: *mut u32,
    addr: u64,
    rkey: usize,
    comp: *mut Completion,
) -> Status {
    let asked = Asked { op, size: 4, value: value.into(), compare: 0, addr, result: result.cast() };
    // SAFETY: UCX's own arguments.
    unsafe { run(ep, rkey, asked, comp) }
}

/// `ep_atomic64_fetch`.
pub unsafe extern "C" fn fetch64(
    ep: *mut c_void,
    op: c_uint,
    value: u64,
    result: *mut u64,
    addr: u64,
    rkey: usize,
    comp: *mut Completion,
) -> Status {
    let asked = Asked { op, size: 8, value, compare: 0, addr, result: result.cast() };
    // SAFETY: UCX's own arguments.
    unsafe { run(ep, rkey, asked, comp) }
}
