//! ibv_modify_qp(3): judged by the table in `verbs`, carried out here.

use std::sync::{Arc, PoisonError};

use crate::ctl::{Connect, Disconnect, peer_state};
use crate::error::{Error, Result};
use crate::sync::Ordering;
use crate::verbs::{QpAttr, QpAttrMask as Mask, QpState, QpType, limits, transition};

use super::super::ah::resolve_ah;
use super::Qp;

impl Qp {
    /// Moves to `new.qp_state` (or stays) and takes over the attributes `mask` names. Nothing changes on error.
    pub fn modify(self: &Arc<Self>, new: &QpAttr, mask: Mask) -> Result<()> {
        let mut attr = self.attr.lock().unwrap_or_else(PoisonError::into_inner);
        let from = self.state();
        if mask.contains(Mask::CUR_STATE) && new.cur_qp_state != from {
            return Err(Error::Invalid("cur_qp_state is not the QP's state"));
        }
        let to = if mask.contains(Mask::STATE) { new.qp_state } else { from };
        let rule = transition(self.kind(), from, to).ok_or(Error::Invalid("no such transition"))?;
        if !rule.accepts(mask) {
            return Err(Error::Invalid(
                "attr_mask lacks a required attribute or has one that this transition forbids",
            ));
        }
        Self::check_values(new, mask)?;
        let mut next = *attr;
        next.update(new, mask);
        if mask.contains(Mask::AV) {
            next.ah = resolve_ah(next.ah, self.context().gid())?;
        }
        match to {
            QpState::Reset => {
                self.reset();
                next = QpAttr::default();
            }
            QpState::Err => self.to_error(from),
            QpState::Rtr if from == QpState::Init => self.connect(&next)?,
            QpState::Rts if from == QpState::Sqe => self.restart_link()?,
            _ => {}
        }
        *attr = next;
        self.send.lock().set_patience(&next);
        drop(attr);
        self.publish(&next);
        let lasting = |now| now == from || now == to;
        if !matches!(to, QpState::Reset | QpState::Err) && !self.lanes.change_state(to, lasting) {
            return Err(Error::Invalid("the QP failed meanwhile (ibv_query_qp tells its state)"));
        }
        if to == QpState::Sqd && mask.contains(Mask::EN_SQD_ASYNC_NOTIFY) {
            self.send.lock().tell_drained = true;
        }
        if matches!(to, QpState::Rts | QpState::Sqd) {
            self.progress(false);
        }
        Ok(())
    }

    fn check_values(new: &QpAttr, mask: Mask) -> Result<()> {
        let given = |flag: Mask, bad: bool| mask.contains(flag) && bad;
        let rules = [
            (given(Mask::PORT, new.port_num != 1), "port_num must be 1"),
            (given(Mask::PKEY_INDEX, new.pkey_index != 0), "pkey_index must be 0"),
            (given(Mask::PATH_MTU, !(1..=5).contains(&new.path_mtu)), "path_mtu must be 256 to 4096"),
            (given(Mask::TIMEOUT, new.timeout > 31), "timeout must be at most 31"),
            (given(Mask::RETRY_CNT, new.retry_cnt > 7), "retry_cnt must be at most 7"),
            (given(Mask::RNR_RETRY, new.rnr_retry > 7), "rnr_retry must be at most 7"),
            (given(Mask::MIN_RNR_TIMER, new.min_rnr_timer > 31), "min_rnr_timer must be at most 31"),
            (given(Mask::DEST_QPN, new.dest_qpn > 0xff_ffff), "a QPN has 24 bits"),
            (
                given(Mask::MAX_QP_RD_ATOMIC, new.max_rd_atomic > limits::RD_ATOMIC),
                "max_rd_atomic is beyond the device's",
            ),
            (
                given(Mask::MAX_DEST_RD_ATOMIC, new.max_dest_rd_atomic > limits::RD_ATOMIC),
                "max_dest_rd_atomic is beyond the device's",
            ),
            (mask.contains(Mask::ALT_PATH), "there is no alternate path"),
            (mask.contains(Mask::PATH_MIG_STATE), "there is no path migration"),
        ];
        rules.iter().find(|(bad, _)| *bad).map_or(Ok(()), |(_, why)| Err(Error::Invalid(why)))
    }

    /// Attributes that peers read.
    fn publish(&self, attr: &QpAttr) {
        let shared = &self.lanes.shared[0];
        shared.access.store(attr.access.bits(), Ordering::Relaxed);
        shared.rnr_timer.store(u32::from(attr.min_rnr_timer), Ordering::Relaxed);
        shared.qkey.store(attr.qkey, Ordering::Relaxed);
    }

    /// INIT -> RTR: from now on the peer may find us, so everything it reads is in place first.
    fn connect(&self, attr: &QpAttr) -> Result<()> {
        let connected = self.kind() != QpType::Ud;
        let (dgid, dest_qpn) = if connected { (attr.ah.dgid, attr.dest_qpn) } else { Default::default() };
        self.publish(attr);
        let shared = &self.lanes.shared[0];
        shared.qpn.store(self.qpn(), Ordering::Relaxed);
        shared.peer_qpn.store(dest_qpn, Ordering::Relaxed);
        self.send.lock().route.dest = connected.then_some((dgid, dest_qpn));
        self.ask_again.store(true, Ordering::Release);
        self.lanes.change_state(QpState::Rtr, |now| now == QpState::Init);
        let traffic_class = u32::from(attr.ah.traffic_class);
        let told =
            self.context().conn.ask(&Connect { qpn: self.qpn(), dest_qpn, dgid: dgid.0, traffic_class });
        if told.is_err() {
            self.lanes.change_state(QpState::Init, |now| now == QpState::Rtr);
        }
        // XRC's target sends nothing.
        if told?.path == peer_state::LINK && self.kind() != QpType::XrcRecv {
            self.attach_link(&mut self.send.lock())?;
        }
        Ok(())
    }

    fn to_error(self: &Arc<Self>, from: QpState) {
        if from == QpState::Reset {
            self.lanes.set_state(QpState::Err); // nothing queued, nobody connected
        }
        self.enter_error();
    }

    /// Any -> RESET: both queues are emptied without completions.
    fn reset(&self) {
        self.lanes.set_state(QpState::Reset);
        let _ = self.context().conn.ask(&Disconnect { qpn: self.qpn(), error: 0 });
        self.context().windows.forsake(self.context(), self.qpn());
        self.quiesce_briefly();
        let empty = || {
            let mut side = self.send.lock();
            let _posting = self.recv.lock();
            self.give_up(&mut side);
            side.reset();
            self.lanes.send.reset();
            let shared = &self.lanes.shared[0];
            self.give_receives_back();
            self.lanes.recv.reset(shared);
            self.lanes.tickets.as_ref().inspect(|tickets| tickets.reset(&self.lanes));
            shared.peer_qpn.store(0, Ordering::Relaxed);
            self.lanes.deserted.store(false, Ordering::Relaxed);
            self.send_failed.store(false, Ordering::Relaxed);
        };
        // Both CQs held still, in one order for everybody.
        let (a, b) = (&self.send_cq, &self.recv_cq);
        if Arc::ptr_eq(a, b) {
            a.paused(empty);
        } else if Arc::as_ptr(a) < Arc::as_ptr(b) {
            a.paused(|| b.paused(empty));
        } else {
            b.paused(|| a.paused(empty));
        }
    }
}
