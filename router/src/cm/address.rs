//! Binding, listening and resolving: from addresses to containers and ports.

use freeflow_core::ctl::RawGid;
use freeflow_core::ctl::cm::*;
use rustix::io::Errno;

use super::id::State;
use super::manager::{Manager, Result};
use super::ports::{AddrExt, Claim, Scope, loopback};
use super::{Answer, Home};

/// Most requests that may wait at one listener, and what a backlog of 0 means.
pub const MAX_BACKLOG: u32 = 1_024;

/// An address of a family we know, in the form that family is written in.
fn check(addr: &CmAddr) -> Result<()> {
    match addr.family {
        cm_family::V4 if addr.addr.is_v4() || addr.addr.is_any() => Ok(()),
        cm_family::V6 => Ok(()),
        _ => Err(Errno::AFNOSUPPORT),
    }
}

/// A bind that was judged possible.
struct Bind {
    addr: CmAddr,
    claim: Claim,
    home: Home,
    space: u32,
}

impl Manager {
    pub(super) fn bind(&mut self, client: u32, request: &CmBind) -> Result<Answer> {
        if self.owned(client, request.id)?.state != State::Idle || request.flags & !cm_flags::ALL != 0 {
            return Err(Errno::INVAL);
        }
        let bind = self.judge_bind(client, request.id, request.flags, request.addr)?;
        self.commit_bind(request.id, request.flags, bind).map(Answer::Addr)
    }

    /// Checks address and port and picks a port for 0; changes nothing that could be missed.
    fn judge_bind(&mut self, client: u32, id: u32, flags: u32, mut addr: CmAddr) -> Result<Bind> {
        check(&addr)?;
        let (home, space) = (self.home(client)?, self.owned(client, id)?.space);
        let ours = addr.addr.is_any() || addr.addr.is_loopback() || addr.addr == home.vip;
        if !ours && flags & cm_flags::OWN == 0 {
            return Err(Errno::ADDRNOTAVAIL);
        }
        let family_only = flags & cm_flags::AF_ONLY != 0 && addr.family == cm_family::V6;
        let scope = Scope::of(&addr, family_only);
        let claim = Claim { id, scope, reuse: flags & cm_flags::REUSE != 0, listening: false };
        if addr.port == 0 {
            addr.port = self.ports.pick(&home, space).ok_or(Errno::ADDRNOTAVAIL)?;
        } else if !self.ports.is_free(&home, space, addr.port, &claim) {
            return Err(Errno::ADDRINUSE);
        }
        Ok(Bind { addr, claim, home, space })
    }

    fn commit_bind(&mut self, id: u32, flags: u32, bind: Bind) -> Result<CmAddr> {
        self.ports.claim(&bind.home, bind.space, bind.addr.port, bind.claim);
        let found = self.id_mut(id).ok_or(Errno::NOENT)?;
        found.local = bind.addr;
        found.flags = flags;
        found.holds_port = true;
        found.state = State::Bound;
        Ok(bind.addr)
    }

    pub(super) fn listen(&mut self, client: u32, id: u32, backlog: u32) -> Result<Answer> {
        match self.owned(client, id)?.state {
            State::Bound => {}
            State::Idle => {
                let any = CmAddr { family: cm_family::V4, ..Default::default() };
                let bind = self.judge_bind(client, id, 0, any)?;
                self.commit_bind(id, 0, bind)?;
            }
            _ => return Err(Errno::INVAL),
        }
        let (home, found) = (self.home(client)?, self.owned(client, id)?);
        let (addr, space) = (found.local, found.space);
        let scope = Scope::of(&addr, found.family_only());
        let claim = Claim { id, scope, reuse: found.has(cm_flags::REUSE), listening: true };
        if !self.ports.is_free(&home, space, addr.port, &claim) {
            return Err(Errno::ADDRINUSE);
        }
        self.ports.claim(&home, space, addr.port, claim);
        let found = self.id_mut(id).ok_or(Errno::NOENT)?;
        found.backlog = if backlog == 0 { MAX_BACKLOG } else { backlog.min(MAX_BACKLOG) };
        self.set(id, State::Listening, None);
        Ok(Answer::Addr(addr))
    }

    pub(super) fn resolve_addr(&mut self, client: u32, request: &CmResolveAddr) -> Result<Answer> {
        let found = self.owned(client, request.id)?;
        let (state, channel) = (found.state, found.channel);
        if !matches!(state, State::Idle | State::Bound) || request.flags & !cm_flags::ALL != 0 {
            return Err(Errno::INVAL);
        }
        check(&request.dst)?;
        self.has_room(channel)?;
        if state == State::Idle {
            self.bind_source(client, request)?;
        }
        let home = self.home(client)?;
        let mut dst = request.dst;
        if dst.addr.is_any() {
            dst.addr = loopback(dst.family);
        }
        if dst.addr.is_multicast() {
            self.resolved_group(request.id, &home, dst);
            return Ok(Answer::Done);
        }
        match self.locate(&home, &dst.addr, request.flags) {
            Some(to) => self.resolved(request.id, &home, to, dst, request.flags),
            None => {
                let status = -Errno::HOSTUNREACH.raw_os_error();
                if let Some(found) = self.id_mut(request.id) {
                    found.remote = dst;
                }
                self.post(request.id, CmNext { kind: cm_event::ADDR_ERROR, status, ..Default::default() });
            }
        }
        Ok(Answer::Done)
    }

    /// The bind that comes with resolving an id that has none.
    fn bind_source(&mut self, client: u32, request: &CmResolveAddr) -> Result<()> {
        let src = match request.src.family {
            cm_family::NONE => CmAddr { family: request.dst.family, ..Default::default() },
            _ => request.src,
        };
        let own = if request.flags & cm_flags::SRC_OWN != 0 { cm_flags::OWN } else { 0 };
        let flags = own | request.flags & (cm_flags::REUSE | cm_flags::AF_ONLY);
        let bind = self.judge_bind(client, request.id, flags, src)?;
        self.commit_bind(request.id, flags, bind).map(|_| ())
    }

    /// Where `addr` leads: to the container that has it, else, if it is the caller's own, back to the caller.
    fn locate(&self, home: &Home, addr: &RawGid, flags: u32) -> Option<Home> {
        if addr.is_loopback() {
            return Some(home.clone());
        }
        let found = self.directory.locate(home, addr).filter(|to| to.tenant == home.tenant);
        found.or_else(|| (flags & cm_flags::OWN != 0).then(|| home.clone()))
    }

    fn resolved(&mut self, id: u32, home: &Home, to: Home, dst: CmAddr, flags: u32) {
        let gid = to.vip;
        let Some(found) = self.id_mut(id) else { return };
        if found.local.addr.is_any() {
            let stays = to == *home && (dst.addr.is_loopback() || flags & cm_flags::OWN != 0);
            found.local.addr = if stays { dst.addr } else { home.vip };
            found.local.family = if home.vip.is_v4() || stays { dst.family } else { cm_family::V6 };
        }
        found.remote = dst;
        found.to = Some(to);
        found.state = State::AddrResolved;
        self.post(id, CmNext { kind: cm_event::ADDR_RESOLVED, gid, ..Default::default() });
    }

    /// A group is nowhere in particular: the id can join it, but not connect.
    fn resolved_group(&mut self, id: u32, home: &Home, dst: CmAddr) {
        let Some(found) = self.id_mut(id) else { return };
        if found.local.addr.is_any() {
            found.local.addr = home.vip;
            found.local.family = if home.vip.is_v4() { dst.family } else { cm_family::V6 };
        }
        found.remote = dst;
        found.state = State::AddrResolved;
        self.post(id, CmNext { kind: cm_event::ADDR_RESOLVED, gid: dst.addr, ..Default::default() });
    }

    /// Puts the answer to a join among the id's events. Who is in a group is the queue pairs' business.
    pub(super) fn join(&mut self, client: u32, id: u32, group: &CmAddr) -> Result<Answer> {
        let found = self.owned(client, id)?;
        let may = found.is_datagram()
            && matches!(found.state, State::Bound | State::AddrResolved | State::RouteResolved);
        check(group)?;
        if !may || !group.addr.is_multicast() {
            return Err(Errno::INVAL);
        }
        self.has_room(found.channel)?;
        self.post(id, CmNext { kind: cm_event::MULTICAST_JOIN, gid: group.addr, ..Default::default() });
        Ok(Answer::Done)
    }

    pub(super) fn resolve_route(&mut self, client: u32, id: u32) -> Result<Answer> {
        let found = self.owned(client, id)?;
        if found.state != State::AddrResolved {
            return Err(Errno::INVAL);
        }
        let gid = found.to.as_ref().map(|to| to.vip).unwrap_or_default();
        self.set(id, State::RouteResolved, None);
        self.post(id, CmNext { kind: cm_event::ROUTE_RESOLVED, gid, ..Default::default() });
        Ok(Answer::Done)
    }
}
