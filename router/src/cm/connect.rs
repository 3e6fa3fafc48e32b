//! The handshake: request, reply, ready to use; for datagrams lookup and answer.

use std::time::{Duration, Instant};

use freeflow_core::ctl::RawGid;
use freeflow_core::ctl::cm::*;
use rustix::io::Errno;

use super::far::{End, Word};
use super::id::{Id, State};
use super::manager::{Manager, Result};
use super::{Answer, Home};

/// How long the other side's program may take for its part of the handshake: what a REQ or REP that was
/// acknowledged with MRA gets on RoCE.
pub const ANSWER_TIMEOUT: Duration = Duration::from_secs(70);

/// The peer's parameters as its receiver sees them: what one side starts, the other answers.
fn mirrored(params: CmParams) -> CmParams {
    CmParams {
        responder_resources: params.initiator_depth,
        initiator_depth: params.responder_resources,
        ..params
    }
}

/// Private data within its limit, reported at the length that RoCE's messages have.
fn padded(data: &CmData, length: usize) -> Result<CmData> {
    if data.len as usize > length {
        return Err(Errno::INVAL);
    }
    let mut bytes = [0; cm_data::MAX];
    bytes[..data.len as usize].copy_from_slice(data.bytes());
    Ok(CmData { len: length as u32, bytes })
}

fn check(params: &CmParams) -> Result<()> {
    match params.qpn < 1 << 24 && params.psn < 1 << 24 && params.retry_count < 8 && params.rnr_retry_count < 8
    {
        true => Ok(()),
        false => Err(Errno::INVAL),
    }
}

impl Manager {
    pub(super) fn connect(&mut self, client: u32, request: &CmConnect, now: Instant) -> Result<Answer> {
        let found = self.owned(client, request.id)?;
        let (datagram, to) = (found.is_datagram(), found.to.clone());
        if found.state != State::RouteResolved {
            return Err(Errno::INVAL);
        }
        let to = to.ok_or(Errno::INVAL)?;
        check(&request.params)?;
        let data = padded(&request.data, if datagram { cm_data::SIDR_REQUEST } else { cm_data::REQUEST })?;
        self.has_room(self.owned(client, request.id)?.channel)?;
        let home = self.home(client)?;
        let asked = match self.directory.host(&to) {
            Some(host) => {
                self.ask_far(request, data, &home, &to, &host);
                Ok(End::There { host, id: 0 })
            }
            None => self.ask(request, data, home, &to).map(End::Here),
        };
        match asked {
            Ok(peer) => {
                if let Some(found) = self.id_mut(request.id) {
                    found.peer = Some(peer);
                }
                self.set(request.id, State::ReqSent, Some(now + ANSWER_TIMEOUT));
            }
            Err(reason) => self.turned_down(request.id, reason, CmData::default()),
        }
        Ok(Answer::Done)
    }

    /// Makes the passive id at the listener and its event, or says why not ([`cm_reason`]).
    fn ask(
        &mut self,
        request: &CmConnect,
        data: CmData,
        home: Home,
        to: &Home,
    ) -> std::result::Result<u32, u32> {
        let active = self.id(request.id).ok_or(cm_reason::CONSUMER_DEFINED)?;
        let (local, remote, space) = (active.remote, active.local, active.space);
        let number = self.ports.listener(to, space, &local).ok_or(cm_reason::INVALID_SERVICE_ID)?;
        let listener = self.id(number).ok_or(cm_reason::INVALID_SERVICE_ID)?;
        if listener.waiting >= listener.backlog {
            return Err(cm_reason::CONSUMER_DEFINED);
        }
        let gid = home.vip;
        let mut passive = Id::new(listener.client, listener.channel, space);
        passive.state = State::ReqRcvd;
        passive.local = local;
        passive.remote = remote;
        passive.to = Some(home);
        passive.peer = Some(End::Here(request.id));
        let peer = self.add(passive).map_err(|_| cm_reason::CONSUMER_DEFINED)?;
        self.announce(number, peer, gid, request.params, data);
        Ok(peer)
    }

    /// A request that came from another host, at listener `number`.
    pub(super) fn request(
        &mut self,
        number: u32,
        passive: Id,
        gid: RawGid,
        params: CmParams,
        data: CmData,
    ) -> std::result::Result<(), u32> {
        let peer = self.add(passive).map_err(|_| cm_reason::CONSUMER_DEFINED)?;
        self.announce(number, peer, gid, params, data);
        Ok(())
    }

    fn announce(&mut self, number: u32, peer: u32, gid: RawGid, params: CmParams, data: CmData) {
        if let Some(listener) = self.id_mut(number) {
            listener.waiting += 1;
        }
        let (kind, params) = (cm_event::CONNECT_REQUEST, mirrored(params));
        self.post(peer, CmNext { kind, listener: number, gid, params, data, ..Default::default() });
    }

    /// The active side's request failed. `reason` is one of the connected service's.
    pub(super) fn turned_down(&mut self, id: u32, reason: u32, data: CmData) {
        let Some(found) = self.id_mut(id) else { return };
        found.peer = None;
        let datagram = found.is_datagram();
        self.set(id, State::Ended, None);
        let event = match (datagram, reason) {
            (false, reason) => {
                CmNext { kind: cm_event::REJECTED, status: reason as i32, data, ..Default::default() }
            }
            (true, reason) => {
                let none = reason == cm_reason::INVALID_SERVICE_ID;
                let status = if none { cm_reason::SIDR_UNSUPPORTED } else { cm_reason::SIDR_REJECT };
                CmNext { kind: cm_event::UNREACHABLE, status: status as i32, data, ..Default::default() }
            }
        };
        self.post(id, event);
    }

    pub(super) fn accept(&mut self, client: u32, request: &CmAccept, now: Instant) -> Result<Answer> {
        let found = self.owned(client, request.id)?;
        let (datagram, peer) = (found.is_datagram(), found.peer.clone());
        if found.state != State::ReqRcvd {
            return Err(Errno::INVAL);
        }
        let peer = peer.ok_or(Errno::INVAL)?;
        check(&request.params)?;
        let data = padded(&request.data, if datagram { cm_data::SIDR_REPLY } else { cm_data::REPLY })?;
        let gid = self.home(client)?.vip;
        let (mine, until) = match datagram {
            true => (State::Datagram, None),
            false => (State::RepSent, Some(now + ANSWER_TIMEOUT)),
        };
        self.set(request.id, mine, until);
        self.say(request.id, &peer, Word::Accepted { params: request.params, gid, data }, now);
        if datagram {
            self.part(request.id);
        }
        Ok(Answer::Done)
    }

    /// The passive side accepted.
    pub(super) fn accepted(&mut self, id: u32, params: CmParams, gid: RawGid, data: CmData) {
        let Some(found) = self.id_mut(id) else { return };
        let datagram = found.is_datagram();
        if datagram && matches!(found.peer, Some(End::There { .. })) {
            found.peer = None;
        }
        self.set(id, if datagram { State::Datagram } else { State::RepRcvd }, None);
        let kind = if datagram { cm_event::ESTABLISHED } else { cm_event::CONNECT_RESPONSE };
        self.post(id, CmNext { kind, gid, params: mirrored(params), data, ..Default::default() });
    }

    pub(super) fn establish(&mut self, client: u32, id: u32, now: Instant) -> Result<Answer> {
        let found = self.owned(client, id)?;
        let peer = found.peer.clone().ok_or(Errno::INVAL)?;
        if found.state != State::RepRcvd {
            return Err(Errno::INVAL);
        }
        self.set(id, State::Established, None);
        self.say(id, &peer, Word::Ready, now);
        Ok(Answer::Done)
    }

    /// Data arrived before the other side's word did.
    pub(super) fn notify(&mut self, client: u32, id: u32) -> Result<Answer> {
        match self.owned(client, id)?.state {
            State::RepSent => self.ready(id),
            State::Established => {}
            _ => return Err(Errno::INVAL),
        }
        Ok(Answer::Done)
    }

    pub(super) fn ready(&mut self, passive: u32) {
        if self.id(passive).is_some_and(|found| found.state == State::RepSent) {
            self.set(passive, State::Established, None);
            self.post(passive, CmNext { kind: cm_event::ESTABLISHED, ..Default::default() });
        }
    }

    pub(super) fn reject(&mut self, client: u32, request: &CmReject, now: Instant) -> Result<Answer> {
        let found = self.owned(client, request.id)?;
        let peer = found.peer.clone().ok_or(Errno::INVAL)?;
        if !matches!(found.state, State::ReqRcvd | State::RepSent | State::RepRcvd) {
            return Err(Errno::INVAL);
        }
        let reason = match request.reason {
            0 => cm_reason::CONSUMER_DEFINED,
            cm_reason::VENDOR_OPTION => cm_reason::VENDOR_OPTION,
            _ => return Err(Errno::INVAL),
        };
        let limit = if found.is_datagram() { cm_data::SIDR_REPLY } else { cm_data::REJECT };
        let data = padded(&request.data, limit)?;
        self.part(request.id);
        self.set(request.id, State::Ended, None);
        self.say(request.id, &peer, Word::TurnedDown { reason, data }, now);
        Ok(Answer::Done)
    }
}
