//! The `ibv_start_poll` interface of a CQ made with create_cq_ex: one completion at a time, read field by field.
//!
//! Owns the critical section between start_poll and end_poll, and the completion being read.

use crate::cq::Cq;
use crate::object::Held;
use freeflow_core::verbs::Wc;
use freeflow_verbs_abi::*;
use std::cell::UnsafeCell;
use std::ffi::{c_int, c_uint};

/// `wc_flags` of create_cq_ex that are built.
pub const SUPPORTED_WC_FLAGS: u64 = (IBV_WC_STANDARD_FLAGS
    | IBV_WC_EX_WITH_COMPLETION_TIMESTAMP
    | IBV_WC_EX_WITH_COMPLETION_TIMESTAMP_WALLCLOCK) as u64;

/// The completion being read, and who may read it.
pub struct Cursor {
    mutex: UnsafeCell<libc::pthread_mutex_t>,
    current: UnsafeCell<Wc>,
    /// When it was taken, by the clock that ibv_query_rt_values_ex reads and by that of the day, in nanoseconds.
    taken: UnsafeCell<Taken>,
}

#[derive(Clone, Copy, Default)]
struct Taken {
    wanted: bool,
    raw: u64,
    wallclock: u64,
}

/// Nanoseconds of a clock.
pub fn now(clock: libc::clockid_t) -> u64 {
    let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: a place for the answer.
    unsafe { libc::clock_gettime(clock, &mut time) };
    time.tv_sec as u64 * 1_000_000_000 + time.tv_nsec as u64
}

impl Taken {
    fn now() -> Self {
        Self { wanted: true, raw: now(libc::CLOCK_MONOTONIC), wallclock: now(libc::CLOCK_REALTIME) }
    }
}

impl Cursor {
    /// `timed`: completions carry the time at which they were taken.
    pub fn new(timed: bool) -> Self {
        let mutex = UnsafeCell::new(libc::PTHREAD_MUTEX_INITIALIZER);
        let taken = UnsafeCell::new(Taken { wanted: timed, ..Taken::default() });
        Self { mutex, current: UnsafeCell::new(Wc::default()), taken }
    }
}

/// Takes the next completion off the CQ and puts what clients read without a call where they look; ENOENT if none is there.
///
/// # Safety
/// `cq` is a live CQ of this library and this thread is in its critical section.
unsafe fn advance(cq: *mut ibv_cq_ex) -> c_int {
    // SAFETY: the caller's promise.
    let cursor = unsafe { &Cq::of(cq).rust.cursor };
    // SAFETY: the critical section makes this thread the only user.
    let current = unsafe { &mut *cursor.current.get() };
    // SAFETY: the caller's promise.
    if unsafe { Cq::of(cq) }.rust.core.poll(std::slice::from_mut(current)) == 0 {
        return libc::ENOENT;
    }
    // SAFETY: the critical section makes this thread the only user.
    let taken = unsafe { &mut *cursor.taken.get() };
    if taken.wanted {
        *taken = Taken::now();
    }
    // SAFETY: a field of a live C structure.
    unsafe { (*cq).status = current.status };
    // SAFETY: as above.
    unsafe { (*cq).wr_id = current.wr_id };
    0
}

/// The completion being read.
///
/// # Safety
/// As for [`advance`], which has found one.
unsafe fn current<'a>(cq: *mut ibv_cq_ex) -> &'a Wc {
    // SAFETY: the caller's promise.
    let cursor = unsafe { &Cq::of(cq).rust.cursor };
    // SAFETY: only advance changes it, in the same critical section.
    unsafe { &*cursor.current.get() }
}

unsafe extern "C" fn start_poll(cq: *mut ibv_cq_ex, attr: *mut ibv_poll_cq_attr) -> c_int {
    // SAFETY: the program passes its attributes or NULL.
    if unsafe { attr.as_ref() }.is_some_and(|a| a.comp_mask != 0) {
        return libc::EINVAL;
    }
    // SAFETY: called through a live CQ, as the C API demands.
    let held = Held::lock(unsafe { Cq::of(cq) }.rust.cursor.mutex.get());
    // SAFETY: the lock is held.
    let result = unsafe { advance(cq) };
    if result == 0 {
        std::mem::forget(held); // released by end_poll
    }
    result
}

unsafe extern "C" fn next_poll(cq: *mut ibv_cq_ex) -> c_int {
    // SAFETY: called after start_poll, as the C API demands.
    unsafe { advance(cq) }
}

unsafe extern "C" fn end_poll(cq: *mut ibv_cq_ex) {
    // SAFETY: called through a live CQ, after a start_poll that found something.
    drop(Held::adopt(unsafe { Cq::of(cq) }.rust.cursor.mutex.get()));
}

/// Makes a reader of a field of the current completion.
macro_rules! readers {
    ($($name:ident -> $ty:ty = $field:ident;)*) => { $(
        unsafe extern "C" fn $name(cq: *mut ibv_cq_ex) -> $ty {
            // SAFETY: called after a successful poll, as the C API demands.
            <$ty>::from(unsafe { current(cq) }.$field)
        }
    )* };
}

readers! {
    read_opcode -> c_uint = opcode;
    read_vendor_err -> u32 = vendor_err;
    read_byte_len -> u32 = byte_len;
    read_imm_data -> u32 = imm_data;
    read_qp_num -> u32 = qp_num;
    read_src_qp -> u32 = src_qp;
    read_wc_flags -> c_uint = wc_flags;
    read_slid -> u32 = slid;
    read_sl -> u8 = sl;
    read_dlid_path_bits -> u8 = dlid_path_bits;
}

/// When the completion being read was taken.
///
/// # Safety
/// As for [`current`].
unsafe fn taken(cq: *mut ibv_cq_ex) -> Taken {
    // SAFETY: the caller's promise.
    let cursor = unsafe { &Cq::of(cq).rust.cursor };
    // SAFETY: only advance changes it, in the same critical section.
    unsafe { *cursor.taken.get() }
}

unsafe extern "C" fn read_completion_ts(cq: *mut ibv_cq_ex) -> u64 {
    // SAFETY: called after a successful poll, as the C API demands.
    unsafe { taken(cq) }.raw
}

unsafe extern "C" fn read_completion_wallclock_ns(cq: *mut ibv_cq_ex) -> u64 {
    // SAFETY: called after a successful poll, as the C API demands.
    unsafe { taken(cq) }.wallclock
}

/// Points the functions of an extended CQ to ours. Those of refused wc_flags stay NULL, as with every provider.
pub fn install(ex: &mut ibv_cq_ex) {
    ex.start_poll = Some(start_poll);
    ex.next_poll = Some(next_poll);
    ex.end_poll = Some(end_poll);
    ex.read_opcode = Some(read_opcode);
    ex.read_vendor_err = Some(read_vendor_err);
    ex.read_byte_len = Some(read_byte_len);
    ex.read_imm_data = Some(read_imm_data);
    ex.read_qp_num = Some(read_qp_num);
    ex.read_src_qp = Some(read_src_qp);
    ex.read_wc_flags = Some(read_wc_flags);
    ex.read_slid = Some(read_slid);
    ex.read_sl = Some(read_sl);
    ex.read_dlid_path_bits = Some(read_dlid_path_bits);
    ex.read_completion_ts = Some(read_completion_ts);
    ex.read_completion_wallclock_ns = Some(read_completion_wallclock_ns);
}
