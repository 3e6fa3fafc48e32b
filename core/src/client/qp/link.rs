//! The send queue of a QP whose peer is on another host: requests go to the router, results come from it.

use std::sync::Arc;

use crate::error::Result;
use crate::exec::{LocalTable, Request};
use crate::verbs::{QpState, SendFlags, WcStatus};

use super::super::events::AsyncKind;
use super::super::link::LinkQueue;
use super::super::stall::Stall;
use super::Qp;
use super::send::{SendSide, SendWr};

impl Qp {
    /// The router says that the peer is on another host: from now on requests go to it.
    pub(super) fn attach_link(&self, side: &mut SendSide) -> Result<()> {
        let context = self.context();
        if side.link.is_none() {
            let depth = self.caps.max_send_wr.max(1).next_power_of_two();
            let (sges, inline) = (self.caps.max_send_sge as usize, self.caps.max_inline_data as usize);
            let made = LinkQueue::new(context, depth, sges, inline)?;
            self.lanes.link.get_or_init(|| Arc::clone(&made.lane));
            side.link = Some(Box::new(made));
            self.send_cq.reaches_far();
            self.recv_cq.reaches_far();
        }
        let first = side.queue.next;
        let link = side.link.as_mut().map(|link| link.attach(context, self.qpn(), self.send_bit, first));
        link.unwrap_or(Ok(()))
    }

    /// SQE -> RTS: the router takes requests again, behind those that were flushed.
    pub(super) fn restart_link(&self) -> Result<()> {
        let mut side = self.send.lock();
        if !side.is_link() {
            return Ok(());
        }
        self.take_results(&mut side);
        self.attach_link(&mut side)
    }

    /// Hands over what is new, takes what is done.
    pub(super) fn run_link(&self, side: &mut SendSide) {
        if self.state() == QpState::Rts {
            self.forward(side);
        }
        self.take_results(side);
        // The program waits for the queue to drain and may not poll meanwhile.
        side.stall = if side.tell_drained { Stall::More } else { Stall::None };
    }

    fn forward(&self, side: &mut SendSide) {
        let patience = side.patience;
        let table = LocalTable::new(&self.context().mrs, self.pd.id);
        let mut any = false;
        loop {
            let SendSide { queue, link: Some(link), .. } = side else { return };
            let Some(SendWr { wr_id, request }) = queue.at(link.submitted) else { break };
            let (op, flags) = (request.op, request.flags);
            let quiet = !self.sq_sig_all && !flags.contains(SendFlags::SIGNALED);
            // What is about our own keys is done here and now.
            let own = self.run_own(&request);
            if let Some(status) = own.filter(|_| queue.next == link.submitted) {
                link.pass_over();
                self.finish(side, wr_id, op, flags, status, 0);
                if !quiet {
                    self.send_cq.sent(false);
                }
                if status == WcStatus::Success {
                    continue;
                }
                break;
            }
            // Behind others it takes its place among them: it ends when its turn comes.
            let request = match own {
                Some(status) => Request { imm: status as u32, sges: &[], ..request },
                None => request,
            };
            link.write(&table, &request, patience, quiet);
            any = true;
        }
        if let (true, Some(link)) = (any, &side.link) {
            link.publish();
        }
    }

    /// CQ: the router got further. Takes no other lock than the send queue's.
    pub(crate) fn poll_link(&self) {
        let mut side = self.send.lock();
        self.take_results(&mut side);
    }

    fn take_results(&self, side: &mut SendSide) {
        let before = side.queue.next;
        if let Some(done) = side.link.as_ref().and_then(|link| link.take()) {
            let count = side.link.as_ref().map_or(0, |link| link.count(done));
            while side.queue.next != count && self.end_head(side, WcStatus::Success) {}
            if let Ok(status @ 1..) = WcStatus::try_from(done.status).map(|s| s as u32) {
                self.end_head(side, WcStatus::try_from(status).unwrap_or(WcStatus::GeneralErr));
            }
        }
        if matches!(self.state(), QpState::Err | QpState::Sqe) {
            while self.end_head(side, WcStatus::WrFlushErr) {}
        }
        if side.queue.next != before {
            self.send_cq.sending(self.send_bit); // whoever took them, the CQ finds them
        }
        if side.tell_drained && side.queue.is_idle() && self.state() == QpState::Sqd {
            side.tell_drained = false;
            self.push(AsyncKind::SqDrained);
        }
    }

    /// The oldest request ended. False: there is none.
    fn end_head(&self, side: &mut SendSide, status: WcStatus) -> bool {
        let Some(SendWr { wr_id, request }) = side.queue.head() else { return false };
        let (op, flags) = (request.op, request.flags);
        let total: u64 = request.sges.iter().map(|sge| u64::from(sge.length)).sum();
        let byte_len = if status == WcStatus::Success { total as u32 } else { 0 };
        self.finish(side, wr_id, op, flags, status, byte_len);
        true
    }
}
