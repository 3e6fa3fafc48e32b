//! The `ibv_wr_*` interface: work requests are collected between wr_start and wr_complete, then posted in one go.
//!
//! Owns the collection and its critical section. Nothing is posted before complete; abort drops everything. What the
//! program did wrong is remembered and told by complete, as the setters return nothing. All memory is reserved when the
//! QP is made.

use crate::ah::Ah;
use crate::guard::{ENOMEM, Errno, Result};
use crate::mw;
use crate::post;
use crate::qp::Qp;
use freeflow_core::client::SendWr;
use freeflow_core::exec::{Request, Target};
use freeflow_core::verbs::{Flush, MwType, QpCaps, SendFlags, SendOp, Sge};
use freeflow_verbs_abi::*;
use spin::mutex::{SpinMutex, SpinMutexGuard};
use std::ffi::{c_int, c_void};
use std::ops::Range;

/// `send_ops_flags` that are built.
pub const SUPPORTED_OPS: u64 = (IBV_QP_EX_WITH_RDMA_WRITE
    | IBV_QP_EX_WITH_RDMA_WRITE_WITH_IMM
    | IBV_QP_EX_WITH_SEND
    | IBV_QP_EX_WITH_SEND_WITH_IMM
    | IBV_QP_EX_WITH_RDMA_READ
    | IBV_QP_EX_WITH_ATOMIC_CMP_AND_SWP
    | IBV_QP_EX_WITH_ATOMIC_FETCH_AND_ADD
    | IBV_QP_EX_WITH_LOCAL_INV
    | IBV_QP_EX_WITH_BIND_MW
    | IBV_QP_EX_WITH_SEND_WITH_INV
    | IBV_QP_EX_WITH_ATOMIC_WRITE
    | QP_EX_WITH_FLUSH) as u64;

/// The collection of one QP. Its lock, held from wr_start to wr_complete or wr_abort, is only met by threads that share the
/// QP: they yield.
pub struct Builder {
    batch: SpinMutex<Batch, spin::Yield>,
    /// The operations the program asked for at creation; others are errors.
    ops: u64,
    max_sge: usize,
    max_inline: usize,
}

/// A request as collected so far.
struct Entry {
    wr_id: u64,
    op: SendOp,
    flags: SendFlags,
    imm: u32,
    target: Target,
    srqn: u32,
    /// Its part of the batch's scatter/gather entries.
    sges: Range<usize>,
}

/// Requests collected so far. The vectors never grow past the capacity they were made with, so addresses into them hold.
struct Batch {
    entries: Vec<Entry>,
    sges: Vec<Sge>,
    inline: Vec<u8>,
    /// The first thing that went wrong, or 0.
    error: c_int,
}

impl Builder {
    pub fn new(caps: &QpCaps, ops: u64) -> Self {
        let wrs = caps.max_send_wr as usize;
        let (max_sge, max_inline) = (caps.max_send_sge as usize, caps.max_inline_data as usize);
        let batch = Batch {
            entries: Vec::with_capacity(wrs),
            // inline data takes an entry too, even where a request may have none
            sges: Vec::with_capacity(wrs * max_sge.max(1)),
            // an atomic write's value is taken like inline data
            inline: Vec::with_capacity(wrs * max_inline.max(8)),
            error: 0,
        };
        Self { batch: SpinMutex::new(batch), ops, max_sge, max_inline }
    }
}

impl Batch {
    fn clear(&mut self) {
        self.entries.clear();
        self.sges.clear();
        self.inline.clear();
        self.error = 0;
    }

    #[cold]
    fn fail(&mut self, error: c_int) {
        if self.error == 0 {
            self.error = error;
        }
    }

    /// The request the setters apply to: none after an error or before the first.
    fn last(&mut self) -> Option<&mut Entry> {
        if self.error == 0 && self.entries.is_empty() {
            self.fail(libc::EINVAL);
        }
        if self.error == 0 { self.entries.last_mut() } else { None }
    }

    fn set_sges(&mut self, sges: &[Sge], max: usize) {
        if sges.len() > max || self.sges.capacity() - self.sges.len() < sges.len() {
            return self.fail(libc::EINVAL);
        }
        let start = self.sges.len();
        self.sges.extend_from_slice(sges);
        if let Some(entry) = self.last() {
            entry.sges = start..start + sges.len();
        }
    }

    /// Copies the buffers now: the program may reuse them before wr_complete.
    fn set_inline(&mut self, buffers: &[ibv_data_buf], max: usize) {
        let start = self.inline.len();
        let total = buffers.iter().fold(0usize, |sum, b| sum.saturating_add(b.length));
        if total > max || self.inline.capacity() - start < total {
            return self.fail(libc::ENOMEM);
        }
        for buffer in buffers {
            // SAFETY: the program passes readable buffers.
            self.inline.extend_from_slice(unsafe { slice(buffer.addr.cast::<u8>(), buffer.length) });
        }
        // SAFETY: start is at most the length.
        let addr = unsafe { self.inline.as_ptr().add(start) } as u64;
        self.set_sges(&[Sge { addr, length: total as u32, lkey: 0 }], 1);
        if let Some(entry) = self.last() {
            entry.flags |= SendFlags::INLINE;
        }
    }

    /// Posts what was collected, in order: all of it, or nothing if there is no room for all.
    fn post(&self, qp: &Qp) -> Result<()> {
        // A single request is refused by itself.
        if self.entries.len() > 1 && qp.rust.core.send_room() < self.entries.len() {
            return Err(ENOMEM);
        }
        for Entry { wr_id, op, flags, imm, target, srqn, sges } in &self.entries {
            let sges = &self.sges[sges.clone()];
            let (op, flags, imm, target, srqn) = (*op, *flags, *imm, *target, *srqn);
            let request = Request { op, flags, imm, target, srqn, sges };
            qp.rust.core.post_send(&SendWr { wr_id: *wr_id, request })?;
        }
        Ok(())
    }
}

/// The batch a setter adds to, between wr_start and wr_complete or wr_abort.
///
/// # Safety
/// `qp` is a live QP made with send_ops_flags, and its program is between the two calls, as the man page demands: this
/// thread then holds the lock.
unsafe fn batch<'a>(qp: *mut ibv_qp_ex) -> (&'a Builder, &'a mut Batch) {
    // SAFETY: the caller's promise.
    let builder = unsafe { builder(qp) };
    // SAFETY: the lock makes this thread the only user.
    (builder, unsafe { &mut *builder.batch.as_mut_ptr() })
}

/// # Safety
/// `qp` is a live QP made with send_ops_flags.
unsafe fn builder<'a>(qp: *mut ibv_qp_ex) -> &'a Builder {
    // SAFETY: the caller's promise.
    let qp = unsafe { Qp::of(qp) };
    // Only install() hands out these functions, and only for QPs with a builder.
    qp.rust.builder.as_ref().expect("a QP made with send_ops_flags has a builder")
}

/// Begins a request; a full queue or an operation that was not asked for is remembered.
///
/// # Safety
/// As for [`batch`].
#[inline]
unsafe fn begin(
    qp: *mut ibv_qp_ex,
    (op, wanted): (SendOp, ibv_qp_create_send_ops_flags),
    target: Target,
    imm: u32,
) {
    // SAFETY: the caller's promise.
    let (builder, batch) = unsafe { batch(qp) };
    if builder.ops & u64::from(wanted) == 0 {
        return batch.fail(libc::EOPNOTSUPP);
    }
    if batch.entries.len() == batch.entries.capacity() {
        return batch.fail(libc::ENOMEM);
    }
    // SAFETY: the program writes wr_id before each request, through the C structure.
    let wr_id = unsafe { (*qp).wr_id };
    // SAFETY: as above, for wr_flags.
    let flags = unsafe { (*qp).wr_flags } & !IBV_SEND_INLINE;
    let Some(flags) = SendFlags::from_bits(flags) else { return batch.fail(libc::EINVAL) };
    batch.entries.push(Entry { wr_id, op, flags, imm, target, srqn: 0, sges: 0..0 });
}

unsafe extern "C" fn wr_send(qp: *mut ibv_qp_ex) {
    // SAFETY: called through a live QP, as the C API demands.
    unsafe { begin(qp, (SendOp::Send, IBV_QP_EX_WITH_SEND), Target::Receive, 0) }
}

unsafe extern "C" fn wr_send_imm(qp: *mut ibv_qp_ex, imm_data: __be32) {
    let op = (SendOp::SendImm, IBV_QP_EX_WITH_SEND_WITH_IMM);
    // SAFETY: called through a live QP, as the C API demands.
    unsafe { begin(qp, op, Target::Receive, imm_data) }
}

unsafe extern "C" fn wr_send_inv(qp: *mut ibv_qp_ex, invalidate_rkey: u32) {
    let op = (SendOp::SendInv, IBV_QP_EX_WITH_SEND_WITH_INV);
    // SAFETY: called through a live QP, as the C API demands.
    unsafe { begin(qp, op, Target::Receive, invalidate_rkey) }
}

unsafe extern "C" fn wr_local_inv(qp: *mut ibv_qp_ex, invalidate_rkey: u32) {
    let op = (SendOp::LocalInv, IBV_QP_EX_WITH_LOCAL_INV);
    // SAFETY: called through a live QP, as the C API demands.
    unsafe { begin(qp, op, Target::Invalidate { rkey: invalidate_rkey }, 0) }
}

unsafe extern "C" fn wr_bind_mw(
    qp: *mut ibv_qp_ex,
    window: *mut ibv_mw,
    rkey: u32,
    info: *const ibv_mw_bind_info,
) {
    // SAFETY: called through a live QP, as the C API demands.
    let queue = unsafe { Qp::of(qp) };
    // SAFETY: the program passes what the window is to be bound to.
    let info = unsafe { &*info };
    // SAFETY: and a live window.
    match unsafe { mw::target(queue, MwType::Two, window, rkey, info) } {
        Ok((target, imm)) => {
            let op = (SendOp::BindMw, IBV_QP_EX_WITH_BIND_MW);
            // SAFETY: as above.
            unsafe { begin(qp, op, target, imm) }
        }
        // SAFETY: as above.
        Err(Errno(error)) => unsafe { batch(qp) }.1.fail(error),
    }
}

unsafe extern "C" fn wr_rdma_write(qp: *mut ibv_qp_ex, rkey: u32, addr: u64) {
    let op = (SendOp::Write, IBV_QP_EX_WITH_RDMA_WRITE);
    // SAFETY: called through a live QP, as the C API demands.
    unsafe { begin(qp, op, Target::Memory { addr, rkey }, 0) }
}

unsafe extern "C" fn wr_rdma_write_imm(qp: *mut ibv_qp_ex, rkey: u32, addr: u64, imm_data: __be32) {
    let op = (SendOp::WriteImm, IBV_QP_EX_WITH_RDMA_WRITE_WITH_IMM);
    // SAFETY: called through a live QP, as the C API demands.
    unsafe { begin(qp, op, Target::Memory { addr, rkey }, imm_data) }
}

unsafe extern "C" fn wr_rdma_read(qp: *mut ibv_qp_ex, rkey: u32, addr: u64) {
    let op = (SendOp::Read, IBV_QP_EX_WITH_RDMA_READ);
    // SAFETY: called through a live QP, as the C API demands.
    unsafe { begin(qp, op, Target::Memory { addr, rkey }, 0) }
}

unsafe extern "C" fn wr_atomic_cmp_swp(
    qp: *mut ibv_qp_ex,
    rkey: u32,
    addr: u64,
    compare_add: u64,
    swap: u64,
) {
    let op = (SendOp::CompareSwap, IBV_QP_EX_WITH_ATOMIC_CMP_AND_SWP);
    // SAFETY: called through a live QP, as the C API demands.
    unsafe { begin(qp, op, Target::Atomic { addr, rkey, compare_add, swap }, 0) }
}

unsafe extern "C" fn wr_atomic_fetch_add(qp: *mut ibv_qp_ex, rkey: u32, addr: u64, compare_add: u64) {
    let op = (SendOp::FetchAdd, IBV_QP_EX_WITH_ATOMIC_FETCH_AND_ADD);
    // SAFETY: called through a live QP, as the C API demands.
    unsafe { begin(qp, op, Target::Atomic { addr, rkey, compare_add, swap: 0 }, 0) }
}

/// The eight bytes are taken now.
unsafe extern "C" fn wr_atomic_write(qp: *mut ibv_qp_ex, rkey: u32, addr: u64, atomic_wr: *const c_void) {
    let op = (SendOp::AtomicWrite, IBV_QP_EX_WITH_ATOMIC_WRITE);
    // SAFETY: called through a live QP, as the C API demands.
    unsafe { begin(qp, op, Target::Memory { addr, rkey }, 0) };
    // SAFETY: as above.
    let (builder, batch) = unsafe { batch(qp) };
    batch.set_inline(&[ibv_data_buf { addr: atomic_wr.cast_mut(), length: 8 }], builder.max_inline.max(8));
}

/// ibv_wr_flush(3). Setters of data are allowed and mean nothing: it has none.
pub unsafe extern "C" fn wr_flush(
    qp: *mut ibv_qp_ex,
    rkey: u32,
    addr: u64,
    len: usize,
    placement: u8,
    level: u8,
) {
    let placements = Flush::GLOBAL | Flush::PERSISTENT;
    let asked = Flush::from_bits(placement).filter(|asked| !asked.is_empty() && placements.contains(*asked));
    let what = match (asked, level) {
        (Some(asked), 0) => asked,
        (Some(asked), 1) => asked | Flush::REGION,
        // SAFETY: called through a live QP, as the C API demands.
        _ => return unsafe { batch(qp) }.1.fail(libc::EINVAL),
    };
    let (op, len) = ((SendOp::Flush, QP_EX_WITH_FLUSH), len as u64);
    // SAFETY: as above.
    unsafe { begin(qp, op, Target::Flush { addr, rkey, len, what }, 0) }
}

unsafe extern "C" fn wr_set_ud_addr(qp: *mut ibv_qp_ex, ah: *mut ibv_ah, remote_qpn: u32, remote_qkey: u32) {
    // SAFETY: called through a live QP, as the C API demands.
    let (_, batch) = unsafe { batch(qp) };
    if ah.is_null() {
        return batch.fail(libc::EINVAL);
    }
    // SAFETY: the program passes a live AH.
    let ah = unsafe { Ah::of(ah) };
    if let Some(entry) = batch.last() {
        entry.target = post::datagram_to(ah, remote_qpn, remote_qkey);
    }
}

unsafe extern "C" fn wr_set_xrc_srqn(qp: *mut ibv_qp_ex, remote_srqn: u32) {
    // SAFETY: called through a live QP, as the C API demands.
    let (_, batch) = unsafe { batch(qp) };
    if let Some(entry) = batch.last() {
        entry.srqn = remote_srqn;
    }
}

unsafe extern "C" fn wr_set_sge(qp: *mut ibv_qp_ex, lkey: u32, addr: u64, length: u32) {
    // SAFETY: called through a live QP, as the C API demands.
    let (builder, batch) = unsafe { batch(qp) };
    batch.set_sges(&[Sge { addr, length, lkey }], builder.max_sge);
}

unsafe extern "C" fn wr_set_sge_list(qp: *mut ibv_qp_ex, num_sge: usize, sg_list: *const ibv_sge) {
    // SAFETY: called through a live QP, as the C API demands.
    let (builder, batch) = unsafe { batch(qp) };
    // SAFETY: the program passes a list of num_sge entries; ibv_sge and Sge have one layout (asserted in convert.rs).
    batch.set_sges(unsafe { slice(sg_list.cast::<Sge>(), num_sge) }, builder.max_sge);
}

unsafe extern "C" fn wr_set_inline_data(qp: *mut ibv_qp_ex, addr: *mut c_void, length: usize) {
    // SAFETY: called through a live QP, as the C API demands.
    let (builder, batch) = unsafe { batch(qp) };
    batch.set_inline(&[ibv_data_buf { addr, length }], builder.max_inline);
}

unsafe extern "C" fn wr_set_inline_data_list(
    qp: *mut ibv_qp_ex,
    num_buf: usize,
    buf_list: *const ibv_data_buf,
) {
    // SAFETY: called through a live QP, as the C API demands.
    let (builder, batch) = unsafe { batch(qp) };
    // SAFETY: the program passes a list of num_buf buffers.
    batch.set_inline(unsafe { slice(buf_list, num_buf) }, builder.max_inline);
}

unsafe extern "C" fn wr_start(qp: *mut ibv_qp_ex) {
    // SAFETY: called through a live QP, as the C API demands.
    let builder = unsafe { builder(qp) };
    SpinMutexGuard::leak(builder.batch.lock()).clear(); // released by wr_complete or wr_abort
}

/// Ends the batch, whose lock this thread has held since wr_start.
fn end(builder: &Builder) {
    // SAFETY: this thread's wr_start took the lock, and nothing uses the batch any more.
    unsafe { builder.batch.force_unlock() };
}

unsafe extern "C" fn wr_complete(qp: *mut ibv_qp_ex) -> c_int {
    // SAFETY: called through a live QP, as the C API demands.
    let (builder, batch) = unsafe { batch(qp) };
    // SAFETY: called through a live QP, as the C API demands.
    let qp = unsafe { Qp::of(qp) };
    let posted = if batch.error == 0 { batch.post(qp) } else { Err(Errno(batch.error)) };
    end(builder);
    posted.map_or_else(|Errno(error)| error, |()| 0)
}

unsafe extern "C" fn wr_abort(qp: *mut ibv_qp_ex) {
    // SAFETY: called through a live QP, as the C API demands.
    let (builder, batch) = unsafe { batch(qp) };
    batch.clear();
    end(builder);
}

/// Behind every function of an operation that is not built: wr_complete tells. It reads no argument but the first, which
/// the C calling convention allows.
unsafe extern "C" fn unbuilt(qp: *mut ibv_qp_ex) {
    // SAFETY: called through a live QP, as the C API demands.
    let (_, batch) = unsafe { batch(qp) };
    batch.fail(libc::EOPNOTSUPP);
}

/// A C list, where NULL is an empty one.
///
/// # Safety
/// `list` points to `len` entries or `len` is 0.
unsafe fn slice<'a, T>(list: *const T, len: usize) -> &'a [T] {
    if list.is_null() || len == 0 {
        return &[];
    }
    // SAFETY: the caller's promise.
    unsafe { std::slice::from_raw_parts(list, len) }
}

/// Points every `wr_*` of a QP made with send_ops_flags to a function; none stays NULL.
pub fn install(ex: &mut ibv_qp_ex) {
    ex.wr_atomic_cmp_swp = Some(wr_atomic_cmp_swp);
    ex.wr_atomic_fetch_add = Some(wr_atomic_fetch_add);
    ex.wr_rdma_read = Some(wr_rdma_read);
    ex.wr_rdma_write = Some(wr_rdma_write);
    ex.wr_rdma_write_imm = Some(wr_rdma_write_imm);
    ex.wr_send = Some(wr_send);
    ex.wr_send_imm = Some(wr_send_imm);
    ex.wr_set_ud_addr = Some(wr_set_ud_addr);
    ex.wr_set_inline_data = Some(wr_set_inline_data);
    ex.wr_set_inline_data_list = Some(wr_set_inline_data_list);
    ex.wr_set_sge = Some(wr_set_sge);
    ex.wr_set_sge_list = Some(wr_set_sge_list);
    ex.wr_start = Some(wr_start);
    ex.wr_complete = Some(wr_complete);
    ex.wr_abort = Some(wr_abort);
    ex.wr_bind_mw = Some(wr_bind_mw);
    ex.wr_local_inv = Some(wr_local_inv);
    ex.wr_send_inv = Some(wr_send_inv);
    ex.wr_set_xrc_srqn = Some(wr_set_xrc_srqn);
    ex.wr_send_tso = Some(unbuilt_tso);
    ex.wr_atomic_write = Some(wr_atomic_write);
}

/// What fills the place of functions that newer releases of rdma-core append to `ibv_qp_ex`.
pub const UNBUILT: unsafe extern "C" fn(*mut ibv_qp_ex) = unbuilt;

unsafe extern "C" fn unbuilt_tso(qp: *mut ibv_qp_ex, _: *mut c_void, _: u16, _: u16) {
    // SAFETY: called through a live QP, as the C API demands.
    unsafe { unbuilt(qp) }
}
