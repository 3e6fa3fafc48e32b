//! Every way a connection is over: disconnect, destroy, death, time.

use std::time::{Duration, Instant};

use freeflow_core::ctl::cm::*;
use rustix::io::Errno;

use super::Answer;
use super::far::{End, Word};
use super::id::State;
use super::manager::{Manager, Result};

/// How long a disconnect waits for the other side's program.
pub const DREQ_TIMEOUT: Duration = Duration::from_secs(10);
/// How long a closed connection's numbers stay unused.
pub const TIME_WAIT: Duration = Duration::from_secs(1);

/// REJECTED's status when the other end did not wait any longer: IB_CM_REJ_TIMEOUT.
pub const REJ_TIMEOUT: i32 = 4;

impl Manager {
    pub(super) fn disconnect(&mut self, client: u32, id: u32, now: Instant) -> Result<Answer> {
        let found = self.owned(client, id)?;
        let peer = found.peer.clone();
        match found.state {
            State::Established => {
                self.set(id, State::DreqSent, Some(now + DREQ_TIMEOUT));
                match peer.filter(|peer| self.is_there(peer)) {
                    Some(peer) => self.say(id, &peer, Word::HungUp, now),
                    None => self.closed(id, 0, now),
                }
            }
            State::DreqRcvd => self.answer_disconnect(id, now),
            state if state.has_connected() => {}
            _ => return Err(Errno::INVAL),
        }
        Ok(Answer::Done)
    }

    /// The other side has hung up: its DREQ came.
    pub(super) fn hung_up(&mut self, id: u32) {
        self.set(id, State::DreqRcvd, None);
        self.post(id, CmNext { kind: cm_event::DISCONNECTED, ..Default::default() });
    }

    /// Both sides know: the one that began hears of it.
    pub(super) fn closed(&mut self, id: u32, status: i32, now: Instant) {
        self.part(id);
        self.set(id, State::TimeWait, Some(now + TIME_WAIT));
        self.post(id, CmNext { kind: cm_event::DISCONNECTED, status, ..Default::default() });
    }

    fn answer_disconnect(&mut self, id: u32, now: Instant) {
        let peer = self.part(id);
        self.set(id, State::TimeWait, Some(now + TIME_WAIT));
        if let Some(peer) = peer {
            self.say(id, &peer, Word::Closed, now);
        }
    }

    fn is_there(&self, end: &End) -> bool {
        match end {
            End::Here(id) => self.id(*id).is_some(),
            End::There { .. } => true,
        }
    }

    /// Cuts the two ends apart; says who the other one was.
    pub(super) fn part(&mut self, id: u32) -> Option<End> {
        let peer = self.id_mut(id)?.peer.take()?;
        if let End::Here(peer) = peer
            && let Some(found) = self.id_mut(peer)
        {
            found.peer = None;
        }
        Some(peer)
    }

    /// What destroying `id` (or its process's death) means for the other end.
    pub(super) fn end(&mut self, id: u32, now: Instant) {
        let Some(state) = self.id(id).map(|found| found.state) else { return };
        match state {
            State::DreqRcvd => self.answer_disconnect(id, now),
            State::ReqSent => {
                if let Some(peer) = self.part(id) {
                    self.say(id, &peer, Word::Refused { status: REJ_TIMEOUT }, now);
                }
            }
            State::ReqRcvd | State::RepSent | State::RepRcvd => {
                if let Some(peer) = self.part(id) {
                    let (reason, data) = (cm_reason::CONSUMER_DEFINED, CmData::default());
                    self.say(id, &peer, Word::TurnedDown { reason, data }, now);
                }
            }
            State::Established => {
                if let Some(peer) = self.part(id) {
                    self.say(id, &peer, Word::HungUp, now);
                }
            }
            _ => {
                self.part(id);
            }
        }
    }

    /// A passive end whose asker is gone.
    pub(super) fn refused(&mut self, id: u32, status: i32) {
        self.id_mut(id).into_iter().for_each(|found| found.peer = None);
        self.set(id, State::Ended, None);
        self.post(id, CmNext { kind: cm_event::REJECTED, status, ..Default::default() });
    }

    /// A deadline passed.
    pub(super) fn expire(&mut self, id: u32, now: Instant) {
        let Some(state) = self.id(id).map(|found| found.state) else { return };
        let status = -Errno::TIMEDOUT.raw_os_error();
        match state {
            State::ReqSent | State::RepSent => {
                let peer = self.part(id);
                self.set(id, State::Ended, None);
                self.post(id, CmNext { kind: cm_event::UNREACHABLE, status, ..Default::default() });
                if let Some(peer) = peer {
                    self.say(id, &peer, Word::Refused { status: REJ_TIMEOUT }, now);
                }
            }
            State::DreqSent => self.closed(id, status, now),
            State::TimeWait => {
                self.set(id, State::Ended, None);
                self.post(id, CmNext { kind: cm_event::TIMEWAIT_EXIT, ..Default::default() });
            }
            _ => self.set(id, state, None),
        }
    }
}
