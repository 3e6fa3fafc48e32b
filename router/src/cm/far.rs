//! The two ends of a handshake: both here, or one behind another host's router.
//!
//! Whatever one side's program does to the other is a [`Word`]. One to an id of this manager is heard at once; one to
//! another host leaves as a message, and is heard there. What comes from another host is judged like a program's request.

use std::sync::Arc;
use std::time::Instant;

use freeflow_core::ctl::RawGid;
use freeflow_core::ctl::cm::*;
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

use super::Home;
use super::id::{Id, State};
use super::manager::Manager;

/// Another host's name.
pub type HostName = Arc<str>;

/// The other side of an id.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum End {
    Here(u32),
    /// `id` is 0 until the other side has answered.
    There {
        host: HostName,
        id: u32,
    },
}

/// What one side's program does to the other.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Word {
    /// It accepted.
    Accepted { params: CmParams, gid: RawGid, data: CmData },
    /// It is ready to use the connection.
    Ready,
    /// It said no, or cannot.
    TurnedDown { reason: u32, data: CmData },
    /// It does not wait any longer.
    Refused { status: i32 },
    /// It hung up: its DREQ.
    HungUp,
    /// It knows: its DREP.
    Closed,
}

mod kind {
    pub const REQUEST: u32 = 1;
    pub const ACCEPTED: u32 = 2;
    pub const READY: u32 = 3;
    pub const TURNED_DOWN: u32 = 4;
    pub const REFUSED: u32 = 5;
    pub const HUNG_UP: u32 = 6;
    pub const CLOSED: u32 = 7;
}

/// A word, or the request that begins a handshake, between managers. The tenant's name follows.
#[derive(Debug, Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct FarMessage {
    kind: u32,
    from: u32,
    to: u32,
    space: u32,
    /// Of a refusal.
    status: i32,
    /// As the sender of a request sees them.
    local: CmAddr,
    remote: CmAddr,
    /// The sender's and the receiver's address.
    gid: RawGid,
    dest: RawGid,
    params: CmParams,
    data: CmData,
}

/// A message for a host.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FarOutput {
    pub host: HostName,
    pub bytes: Vec<u8>,
}

fn message(kind: u32, from: u32, to: u32) -> FarMessage {
    FarMessage {
        kind,
        from,
        to,
        space: 0,
        status: 0,
        local: CmAddr::default(),
        remote: CmAddr::default(),
        gid: RawGid::default(),
        dest: RawGid::default(),
        params: CmParams::default(),
        data: CmData::default(),
    }
}

impl Word {
    fn message(&self, from: u32, to: u32) -> FarMessage {
        match *self {
            Word::Accepted { params, gid, data } => {
                FarMessage { params, gid, data, ..message(kind::ACCEPTED, from, to) }
            }
            Word::Ready => message(kind::READY, from, to),
            Word::TurnedDown { reason, data } => {
                FarMessage { status: reason.cast_signed(), data, ..message(kind::TURNED_DOWN, from, to) }
            }
            Word::Refused { status } => FarMessage { status, ..message(kind::REFUSED, from, to) },
            Word::HungUp => message(kind::HUNG_UP, from, to),
            Word::Closed => message(kind::CLOSED, from, to),
        }
    }

    fn of(m: &FarMessage) -> Option<Word> {
        Some(match m.kind {
            kind::ACCEPTED => Word::Accepted { params: m.params, gid: m.gid, data: m.data },
            kind::READY => Word::Ready,
            kind::TURNED_DOWN => Word::TurnedDown { reason: m.status.cast_unsigned(), data: m.data },
            kind::REFUSED => Word::Refused { status: m.status },
            kind::HUNG_UP => Word::HungUp,
            kind::CLOSED => Word::Closed,
            _ => return None,
        })
    }
}

impl Manager {
    /// Tells the other side of `from` something.
    pub(super) fn say(&mut self, from: u32, to: &End, word: Word, now: Instant) {
        match to {
            End::Here(peer) => self.hear(*peer, word, now),
            End::There { host, id } => self.send(host, word.message(from, *id), ""),
        }
    }

    fn send(&mut self, host: &HostName, message: FarMessage, tenant: &str) {
        let bytes = [message.as_bytes(), tenant.as_bytes()].concat();
        self.output.far.push(FarOutput { host: host.clone(), bytes });
    }

    /// The other side did something to `id`.
    pub(super) fn hear(&mut self, id: u32, word: Word, now: Instant) {
        match word {
            Word::Accepted { params, gid, data } => self.accepted(id, params, gid, data),
            Word::Ready => self.ready(id),
            Word::TurnedDown { reason, data } => self.turned_down(id, reason, data),
            Word::Refused { status } => self.refused(id, status),
            Word::HungUp => self.hung_up(id),
            Word::Closed => {
                if self.id(id).is_some_and(|found| found.state == State::DreqSent) {
                    self.closed(id, 0, now);
                }
            }
        }
    }

    /// Begins a handshake with a listener on another host.
    pub(super) fn ask_far(
        &mut self,
        request: &CmConnect,
        data: CmData,
        from: &Home,
        to: &Home,
        host: &HostName,
    ) {
        let Some(found) = self.id(request.id) else { return };
        let message = FarMessage {
            space: found.space,
            local: found.local,
            remote: found.remote,
            gid: from.vip,
            dest: to.vip,
            params: request.params,
            data,
            ..message(kind::REQUEST, request.id, 0)
        };
        self.send(host, message, &from.tenant);
    }

    /// A message of another host's manager.
    pub(super) fn far(&mut self, host: &HostName, bytes: &[u8], now: Instant) {
        let Ok((message, tenant)) = FarMessage::read_from_prefix(bytes) else { return };
        if message.data.len as usize > cm_data::MAX {
            return;
        }
        if message.kind == kind::REQUEST {
            let Ok(tenant) = std::str::from_utf8(tenant) else { return };
            return self.asked(host, &message, tenant);
        }
        let Some(word) = Word::of(&message) else { return };
        if self.may_hear(host, &message, &word) {
            self.hear(message.to, word, now);
        } else if word == Word::HungUp {
            self.send(host, Word::Closed.message(message.to, message.from), "");
        }
    }

    /// Is the word from the other side of the id that it is for, and one for the state that the id is in?
    fn may_hear(&mut self, host: &HostName, message: &FarMessage, word: &Word) -> bool {
        let Some(found) = self.id_mut(message.to) else { return false };
        let Some(End::There { host: there, id }) = &mut found.peer else { return false };
        let first = *id == 0 && found.state == State::ReqSent;
        if *there != *host || (*id != message.from && !first) {
            return false;
        }
        *id = message.from;
        let early = matches!(found.state, State::ReqSent | State::ReqRcvd | State::RepSent | State::RepRcvd);
        match word {
            Word::Accepted { .. } => found.state == State::ReqSent,
            Word::Ready => found.state == State::RepSent,
            Word::TurnedDown { .. } | Word::Refused { .. } => early,
            Word::HungUp => matches!(found.state, State::Established | State::RepSent | State::RepRcvd),
            Word::Closed => found.state == State::DreqSent,
        }
    }

    /// A request from another host.
    fn asked(&mut self, host: &HostName, message: &FarMessage, tenant: &str) {
        let tenant: Arc<str> = tenant.into();
        let from = Home { tenant: tenant.clone(), vip: message.gid };
        let to = Home { tenant, vip: message.dest };
        if self.directory.host(&from).as_ref() != Some(host) {
            return; // it does not have that container
        }
        if let Err(reason) = self.admit(host, message, from, &to) {
            let word = Word::TurnedDown { reason, data: CmData::default() };
            self.send(host, word.message(0, message.from), "");
        }
    }

    fn admit(&mut self, host: &HostName, m: &FarMessage, from: Home, to: &Home) -> Result<(), u32> {
        let (local, remote) = (m.remote, m.local);
        let number = self.ports.listener(to, m.space, &local).ok_or(cm_reason::INVALID_SERVICE_ID)?;
        let listener = self.id(number).ok_or(cm_reason::INVALID_SERVICE_ID)?;
        if listener.waiting >= listener.backlog || self.has_room(listener.channel).is_err() {
            return Err(cm_reason::CONSUMER_DEFINED);
        }
        let mut passive = Id::new(listener.client, listener.channel, m.space);
        passive.state = State::ReqRcvd;
        passive.local = local;
        passive.remote = remote;
        passive.to = Some(from);
        passive.peer = Some(End::There { host: host.clone(), id: m.from });
        self.request(number, passive, m.gid, m.params, m.data)
    }

    /// A host's manager is gone, and with it the other sides of these ids.
    pub(super) fn host_gone(&mut self, host: &HostName) {
        for id in self.ids_with(|found| matches!(&found.peer, Some(End::There { host: h, .. }) if h == host))
        {
            let Some(found) = self.id_mut(id) else { continue };
            let state = found.state;
            found.peer = None;
            match state {
                State::Established => self.hung_up(id),
                State::DreqSent => self.closed(id, 0, Instant::now()),
                State::ReqSent => {
                    self.set(id, State::Ended, None);
                    let status = -rustix::io::Errno::TIMEDOUT.raw_os_error();
                    self.post(id, CmNext { kind: cm_event::UNREACHABLE, status, ..Default::default() });
                }
                State::ReqRcvd | State::RepSent | State::RepRcvd => {
                    self.refused(id, super::ends::REJ_TIMEOUT)
                }
                _ => {}
            }
        }
    }
}
