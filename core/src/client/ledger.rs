//! What the router has been told, so that its successor can be told again.
//!
//! Owns the record and the way it is replayed: objects in the order in which they were made, each claimed under the
//! number it had. Whether a request leaves something to remember is said here, for every request: a new one does not
//! compile without its line.

use std::collections::BTreeMap;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use crate::ctl::*;

/// What becomes of a request while no router is there.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Away {
    /// It waits a while for the next one.
    Wait,
    /// It fails at once: whoever sends it tries again by itself, or must not be held up.
    Fail,
}

/// A request, as the ledger sees it.
pub(super) trait Record: Request {
    const AWAY: Away = Away::Wait;

    /// It was answered; `sent` and `got` are the descriptors that went along.
    fn record(&self, _: &Self::Reply, _sent: &[BorrowedFd<'_>], _got: &[OwnedFd], _: &mut Ledger) {}

    /// No router hears of it. What ends something ends it all the same: the next router will not hear of that.
    fn missed(&self, _: &mut Ledger) {}
}

/// A request to say again, in the words of its kind.
#[derive(Debug)]
struct Entry {
    /// Ids count up: the order of making.
    order: u64,
    proof: u64,
    request: Again,
}

#[derive(Debug)]
enum Again {
    Slab(BringSlab, OwnedFd),
    Pd(OwnedFd),
    Channel(OwnedFd),
    Cq(CreateCq),
    Mr(RegMr),
    Qp(CreateQp, Option<Connect>, Vec<AttachMcast>),
    Srq(CreateSrq),
}

/// What this connection has at the router.
#[derive(Debug, Default)]
pub(super) struct Ledger {
    /// By [`claim`] and number.
    entries: BTreeMap<(u32, u32), Entry>,
    made: u64,
}

fn keep(fd: impl AsFd) -> Option<OwnedFd> {
    rustix::io::fcntl_dupfd_cloexec(fd, 3).ok()
}

impl Ledger {
    fn enter(&mut self, what: u32, id: &Id, request: Again) {
        self.made += 1;
        let entry = Entry { order: self.made, proof: id.proof, request };
        self.entries.insert((what, id.id), entry);
    }

    fn enter_key(&mut self, key: u32, request: RegMr) {
        self.enter(claim::KEY, &Id { id: key, ..Id::default() }, Again::Mr(request));
    }

    fn leave(&mut self, what: u32, id: u32) {
        self.entries.remove(&(what, id));
    }

    fn connection(&mut self, qpn: u32) -> Option<&mut Option<Connect>> {
        match &mut self.entries.get_mut(&(claim::QP, qpn))?.request {
            Again::Qp(_, connection, _) => Some(connection),
            _ => None,
        }
    }

    fn groups(&mut self, qpn: u32) -> Option<&mut Vec<AttachMcast>> {
        match &mut self.entries.get_mut(&(claim::QP, qpn))?.request {
            Again::Qp(_, _, groups) => Some(groups),
            _ => None,
        }
    }

    /// Says everything again. Numbers of queue pairs that could not be had again, and what was gone with them; an error
    /// means that the router is gone again, or that nothing can come of it.
    pub fn replay(&self, socket: &Socket) -> Result<Vec<u32>, SocketError> {
        let mut entries: Vec<_> = self.entries.iter().collect();
        entries.sort_by_key(|(_, entry)| entry.order);
        let mut lost = vec![];
        for ((what, id), entry) in entries {
            socket.call(&Claim { what: *what, id: *id, proof: entry.proof }, &[])?;
            match entry.request.say(socket) {
                Ok(()) => {}
                Err(SocketError::Refused(_)) if *what == claim::QP => lost.push(*id),
                Err(error) => return Err(error),
            }
        }
        socket.call(&Resumed {}, &[])?;
        Ok(lost)
    }
}

impl Again {
    fn say(&self, socket: &Socket) -> Result<(), SocketError> {
        match self {
            Again::Slab(request, memory) => socket.call(request, &[memory.as_fd()]).map(drop),
            Again::Pd(memory) => socket.call(&AllocPd {}, &[memory.as_fd()]).map(drop),
            Again::Channel(bell) => socket.call(&CreateChannel {}, &[bell.as_fd()]).map(drop),
            Again::Cq(request) => socket.call(request, &[]).map(drop),
            Again::Mr(request) => socket.call(request, &[]).map(drop),
            Again::Srq(request) => socket.call(request, &[]).map(drop),
            Again::Qp(request, connection, groups) => {
                socket.call(request, &[])?;
                groups.iter().try_for_each(|attach| socket.call(attach, &[]).map(drop))?;
                connection.map_or(Ok(()), |connect| connect_again(socket, &connect))
            }
        }
    }
}

/// What a link had under way went with the old router: such a queue pair fails, instead of going on with a gap.
fn connect_again(socket: &Socket, connect: &Connect) -> Result<(), SocketError> {
    let connected = socket.call(connect, &[])?.0;
    if connected.path != peer_state::LINK {
        return Ok(());
    }
    socket.call(&Disconnect { qpn: connect.qpn, error: 1 }, &[])?;
    Err(SocketError::Refused(rustix::io::Errno::CONNRESET))
}

macro_rules! objects {
    ($($request:ty, $what:expr, |$this:ident, $sent:ident, $got:ident| $again:expr;)*) => { $(
        impl Record for $request {
            fn record(&self, id: &Id, $sent: &[BorrowedFd<'_>], $got: &[OwnedFd], ledger: &mut Ledger) {
                let $this = self;
                // Without room for a descriptor it cannot be said again: the next router will refuse what builds on it.
                if let Some(again) = $again {
                    ledger.enter($what, id, again);
                }
            }
        }
    )* };
}

objects! {
    MakeSlab, claim::OBJECT, |this, _sent, got| {
        got.first().and_then(keep).map(|memory| Again::Slab(BringSlab { len: this.len }, memory))
    };
    AllocPd, claim::OBJECT, |_this, sent, _got| sent.first().and_then(keep).map(Again::Pd);
    CreateChannel, claim::OBJECT, |_this, sent, _got| sent.first().and_then(keep).map(Again::Channel);
    CreateCq, claim::OBJECT, |this, _sent, _got| Some(Again::Cq(*this));
    CreateSrq, claim::SRQ, |this, _sent, _got| Some(Again::Srq(*this));
    CreateQp, claim::QP, |this, _sent, _got| Some(Again::Qp(*this, None, vec![]));
}

macro_rules! ends {
    ($($request:ty, $what:expr, $field:ident;)*) => { $(
        impl Record for $request {
            const AWAY: Away = Away::Fail;

            fn record(&self, _: &Done, _: &[BorrowedFd<'_>], _: &[OwnedFd], ledger: &mut Ledger) {
                self.missed(ledger);
            }

            fn missed(&self, ledger: &mut Ledger) {
                ledger.leave($what, self.$field);
            }
        }
    )* };
}

ends! {
    DeallocPd, claim::OBJECT, pd;
    DestroyChannel, claim::OBJECT, channel;
    DestroyCq, claim::OBJECT, cq;
    DeregMr, claim::KEY, key;
    DestroyQp, claim::QP, qpn;
    DestroySrq, claim::SRQ, srq;
}

impl Record for RegMr {
    fn record(&self, reply: &MrReply, _: &[BorrowedFd<'_>], _: &[OwnedFd], ledger: &mut Ledger) {
        ledger.enter_key(reply.key, *self);
    }
}

impl Record for LeaseMrs {
    fn record(&self, lease: &LeaseReply, _: &[BorrowedFd<'_>], _: &[OwnedFd], ledger: &mut Ledger) {
        let request = RegMr { pd: self.pd, access: 0, addr: 0, len: self.len };
        let keys = lease.keys.iter().take(lease.count as usize);
        keys.for_each(|key| ledger.enter_key(*key, request));
    }
}

impl Record for Connect {
    fn record(&self, _: &Connected, _: &[BorrowedFd<'_>], _: &[OwnedFd], ledger: &mut Ledger) {
        ledger.connection(self.qpn).into_iter().for_each(|connection| *connection = Some(*self));
    }
}

impl Record for Disconnect {
    const AWAY: Away = Away::Fail;

    fn record(&self, _: &Done, _: &[BorrowedFd<'_>], _: &[OwnedFd], ledger: &mut Ledger) {
        self.missed(ledger);
    }

    fn missed(&self, ledger: &mut Ledger) {
        ledger.connection(self.qpn).into_iter().for_each(|connection| *connection = None);
    }
}

impl Record for AttachMcast {
    fn record(&self, _: &Done, _: &[BorrowedFd<'_>], _: &[OwnedFd], ledger: &mut Ledger) {
        ledger.groups(self.qpn).into_iter().for_each(|groups| groups.push(*self));
    }
}

impl Record for DetachMcast {
    const AWAY: Away = Away::Fail;

    fn record(&self, _: &Done, _: &[BorrowedFd<'_>], _: &[OwnedFd], ledger: &mut Ledger) {
        self.missed(ledger);
    }

    fn missed(&self, ledger: &mut Ledger) {
        let groups = ledger.groups(self.qpn);
        groups.into_iter().for_each(|groups| groups.retain(|attach| attach.mgid != self.mgid));
    }
}

/// The next datagram asks again.
impl Record for ListMembers {
    const AWAY: Away = Away::Fail;
}

/// A stalled queue asks again by itself.
impl Record for Resolve {
    const AWAY: Away = Away::Fail;
}

/// Whoever is to be rung looks by himself when the router is back.
impl Record for Ring {
    const AWAY: Away = Away::Fail;
}

/// The request that needs the copy waits in its queue.
impl Record for CopyMem {
    const AWAY: Away = Away::Fail;
}

/// A link begins anew with a new router.
impl Record for OpenDoorbell {
    const AWAY: Away = Away::Fail;
}

impl Record for AttachLink {
    const AWAY: Away = Away::Fail;
}

macro_rules! nothing_lasts {
    ($($request:ident)*) => { $(
        impl Record for cm::$request {
            const AWAY: Away = Away::Fail;
        }
    )* };
}

// A connection manager begins anew with a new router: its ids end with the old one.
nothing_lasts! {
    CmOpenChannel CmCloseChannel CmCreate CmDestroy CmMigrate CmBind CmListen CmResolveAddr CmResolveRoute CmConnect
    CmAccept CmEstablish CmReject CmDisconnect CmNotify CmNextEvent
}
