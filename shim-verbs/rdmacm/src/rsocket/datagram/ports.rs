//! A UD queue pair with its buffers: places that messages are sent from, and places that they arrive in.

use std::collections::VecDeque;
use std::mem::MaybeUninit;
use std::os::fd::RawFd;

use freeflow_verbs_abi::*;
use libc::iovec;

use super::HEADER;
use crate::edge::{Errno, Result};
use crate::id::{Id, field};
use crate::queues;
use crate::rsocket::completions::{BATCH, Completions};
use crate::rsocket::region::Region;
use crate::verbs::{Verbs, verbs};

/// Messages on their way out, and messages that may wait to be read.
const SENDS: u16 = 64;
const RECEIVES: u16 = 256;
/// In front of each message that arrives.
const GRH: usize = 40;
/// Marks the completions of sends.
const SENT: u64 = 1 << 32;

/// The queue pair and its buffers.
#[derive(Debug)]
pub struct Ports {
    verbs: &'static Verbs,
    id: *const Id,
    qp: *mut ibv_qp,
    done: Completions,
    /// Longest message, with its header.
    mtu: usize,
    outgoing: Region,
    incoming: Region,
    free: Vec<u16>,
    /// Places with messages in the order they came, and their lengths with headers.
    arrived: VecDeque<(u16, usize)>,
}

// SAFETY: the objects belong to this value alone, and libibverbs' may be used by any thread.
unsafe impl Send for Ports {}

impl Ports {
    /// Opens the queue pair of `id`, which is attached to the device and outlives it.
    pub fn open(id: &Id) -> Result<Ports> {
        let verbs = verbs()?;
        let pd = id.session.device.rsocket_pd()?;
        let mtu = 128usize << id.session.device.open()?.mtu.min(5);
        let outgoing = Region::new(verbs, pd, usize::from(SENDS) * mtu, 0)?;
        let incoming = Region::new(verbs, pd, usize::from(RECEIVES) * (GRH + mtu), IBV_ACCESS_LOCAL_WRITE)?;
        let done = Completions::open(verbs, id, u32::from(SENDS) + u32::from(RECEIVES))?;
        let cap = ibv_qp_cap {
            max_send_wr: SENDS.into(),
            max_recv_wr: RECEIVES.into(),
            max_send_sge: 1,
            max_recv_sge: 1,
            max_inline_data: 0,
        };
        let mut attr = ibv_qp_init_attr {
            qp_context: std::ptr::null_mut(),
            send_cq: done.cq(),
            recv_cq: done.cq(),
            srq: std::ptr::null_mut(),
            cap,
            qp_type: IBV_QPT_UD,
            sq_sig_all: 1,
        };
        queues::create_qp(id, pd, &mut attr)?;
        let (qp, free) = (field!(id, qp), (0..SENDS).collect());
        let ports = Ports { verbs, id, qp, done, mtu, outgoing, incoming, free, arrived: VecDeque::new() };
        (0..RECEIVES).try_for_each(|place| ports.post(place))?;
        Ok(ports)
    }

    pub fn number(&self) -> u32 {
        // SAFETY: destroyed by this value's drop only.
        unsafe { (*self.qp).qp_num }
    }

    pub fn pd(&self) -> *mut ibv_pd {
        // SAFETY: destroyed by this value's drop only.
        unsafe { (*self.qp).pd }
    }

    fn place(&self, place: u16) -> u64 {
        u64::from(place) * (GRH + self.mtu) as u64
    }

    fn post(&self, place: u16) -> Result<()> {
        let addr = self.incoming.remote().addr + self.place(place);
        let mut sge = ibv_sge { addr, length: (GRH + self.mtu) as u32, lkey: self.incoming.lkey() };
        let mut wr =
            ibv_recv_wr { wr_id: place.into(), next: std::ptr::null_mut(), sg_list: &mut sge, num_sge: 1 };
        self.verbs.post_recv(self.qp, &mut wr)
    }

    /// Sends a message, if there is a place for it.
    ///
    /// # Safety
    /// The buffers are readable.
    pub unsafe fn send(
        &mut self,
        header: &[u8; HEADER],
        list: &[iovec],
        (ah, qpn, qkey): (*mut ibv_ah, u32, u32),
    ) -> Result<usize> {
        let len = list.iter().try_fold(0usize, |sum, buffer| sum.checked_add(buffer.iov_len));
        let len = len.filter(|len| *len <= self.mtu - HEADER).ok_or(Errno::MSGSIZE)?;
        let place = *self.free.last().ok_or(Errno::AGAIN)?;
        let start = u64::from(place) * self.mtu as u64;
        // SAFETY: bytes of our own.
        unsafe { self.outgoing.fill(start, header.as_ptr(), HEADER) };
        let mut at = start + HEADER as u64;
        for buffer in list.iter().filter(|buffer| buffer.iov_len > 0) {
            // SAFETY: the caller's promise.
            unsafe { self.outgoing.fill(at, buffer.iov_base.cast(), buffer.iov_len) };
            at += buffer.iov_len as u64;
        }
        let addr = self.outgoing.remote().addr + start;
        let mut sge = ibv_sge { addr, length: (HEADER + len) as u32, lkey: self.outgoing.lkey() };
        // SAFETY: pointers, integers and unions of them, for all of which zero is valid.
        let mut wr: ibv_send_wr = unsafe { std::mem::zeroed() };
        wr.wr_id = SENT | u64::from(place);
        wr.sg_list = &mut sge;
        wr.num_sge = 1;
        wr.opcode = IBV_WR_SEND;
        wr.wr.ud = ibv_send_wr__bindgen_ty_2__bindgen_ty_3 { ah, remote_qpn: qpn, remote_qkey: qkey };
        self.verbs.post_send(self.qp, &mut wr)?;
        self.free.pop();
        Ok(len)
    }

    /// The header of the message that came first, and the length of what follows it.
    pub fn first(&self) -> Option<([u8; HEADER], usize)> {
        let (place, len) = *self.arrived.front()?;
        let mut header = [0; HEADER];
        // SAFETY: bytes of our own. Those of a message too short for a header are of an earlier one, or zero.
        unsafe { self.incoming.take(self.place(place) + GRH as u64, header.as_mut_ptr(), HEADER) };
        Some((header, len - HEADER))
    }

    /// Copies it to the program, as much as fits.
    ///
    /// # Safety
    /// The buffers are writable.
    pub unsafe fn copy_first(&self, list: &[iovec]) -> usize {
        let Some((place, len)) = self.arrived.front() else { return 0 };
        let start = self.place(*place) + (GRH + HEADER) as u64;
        let mut copied = 0;
        for buffer in list {
            let now = buffer.iov_len.min(len - HEADER - copied);
            if now > 0 {
                // SAFETY: the caller's promise.
                unsafe { self.incoming.take(start + copied as u64, buffer.iov_base.cast(), now) };
            }
            copied += now;
        }
        copied
    }

    /// Its place may be used again.
    pub fn done_with_first(&mut self) -> Result<()> {
        match self.arrived.pop_front() {
            Some((place, _)) => self.post(place),
            None => Ok(()),
        }
    }

    /// Takes what has completed; says whether anything had.
    pub fn pump(&mut self) -> bool {
        let mut any = false;
        let mut room = [const { MaybeUninit::uninit() }; BATCH];
        while let Ok(done @ [_, ..]) = self.done.poll(&mut room) {
            any = true;
            let last = done.len() < BATCH;
            for wc in done {
                let place = wc.wr_id as u16;
                let len = (wc.byte_len as usize).saturating_sub(GRH);
                if wc.wr_id & SENT != 0 {
                    self.free.push(place);
                } else if wc.status == IBV_WC_SUCCESS && (HEADER..=self.mtu).contains(&len) {
                    self.arrived.push_back((place, len));
                } else if wc.status == IBV_WC_SUCCESS {
                    // Not one of ours; its place can only be lost with the queue pair.
                    let _ = self.post(place);
                }
            }
            if last {
                break;
            }
        }
        any
    }

    pub fn is_readable(&self) -> bool {
        !self.arrived.is_empty()
    }

    pub fn is_writable(&self) -> bool {
        !self.free.is_empty()
    }

    pub fn fd(&self) -> RawFd {
        self.done.fd()
    }

    /// Asks for an event; says whether something has completed meanwhile.
    pub fn arm(&mut self) -> bool {
        // A queue that cannot be armed is looked at by its users' own calls.
        let _ = self.done.arm();
        self.pump()
    }

    pub fn woken(&mut self) -> bool {
        let any = self.done.take_events();
        self.pump() || any
    }
}

impl Drop for Ports {
    fn drop(&mut self) {
        // SAFETY: the id outlives its queue pair, which goes before the memory and the completions that it uses.
        let _ = queues::destroy_qp(unsafe { &*self.id });
    }
}
