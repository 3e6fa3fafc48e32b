//! The receive queue: post.

use std::sync::Arc;

use rustix::io::Errno;

use crate::ctl::{Ring, ring};
use crate::verbs::{Gid, QpState, QpType, Sge};

use super::Qp;

impl Qp {
    /// ibv_post_recv(3), one request.
    pub fn post_recv(self: &Arc<Self>, wr_id: u64, sges: &[Sge]) -> Result<(), Errno> {
        let posting = self.recv.lock();
        let elsewhere = self.lanes.tickets.is_some();
        if self.state() == QpState::Reset || elsewhere || sges.len() > self.caps.max_recv_sge as usize {
            return Err(Errno::INVAL);
        }
        if !self.lanes.recv.post(wr_id, sges, self.caps.max_recv_wr) {
            return Err(Errno::NOMEM);
        }
        drop(posting);
        let wanted = self.lanes.shared[0].receive_posted();
        // Behind the fence in there: whoever moves to ERR after this look announces the flush, and that finds the receive.
        if self.state() == QpState::Err {
            self.recv_cq.completed(self.recv_bit, true);
        } else if wanted && self.kind() != QpType::Ud {
            let dest = self.send.lock().route.dest;
            self.tell_sender(dest);
        }
        Ok(())
    }

    /// A send of the peer has waited long enough to sleep: the router wakes it.
    pub(in super::super) fn tell_sender(&self, dest: Option<(Gid, u32)>) {
        let Some((dgid, dest_qpn)) = dest else { return };
        let ring = Ring { qpn: self.qpn(), dest_qpn, dgid: dgid.0, what: ring::PROGRESS };
        let _ = self.context().conn.ask(&ring);
    }
}
