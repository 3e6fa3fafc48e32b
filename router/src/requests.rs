//! The requests of verbs clients: a table kind -> handler, each handler a translation to the state's operations.

use std::os::fd::OwnedFd;
use std::sync::Arc;

use freeflow_core::ctl::*;
use freeflow_core::shm::{Bell, Mapping, is_sealed_memfd, make_memfd};
use freeflow_core::verbs::{Gid, QpType};
use rustix::fs::FallocateFlags;
use zerocopy::IntoBytes;

use crate::config::Settings;
use crate::copy;
use crate::link::Links;
use crate::refusal::{Refusal, Result};
use crate::session::{Failure, Reply, Session};
use crate::shared::ring_bell;
use crate::state::{NewQp, Notice, Slab, Srq};

type Fds = Vec<Arc<OwnedFd>>;

/// A request this router serves.
trait Handle: Request {
    fn handle(self, session: &Session, fds: Vec<OwnedFd>) -> Result<(Self::Reply, Fds)>;
}

/// One row of the table.
#[derive(Debug)]
pub struct Entry {
    pub kind: u16,
    pub name: &'static str,
    pub run: fn(&Session, Incoming) -> std::result::Result<Reply, Failure>,
}

fn run<R: Handle>(session: &Session, mut message: Incoming) -> std::result::Result<Reply, Failure> {
    let request = message.request::<R>().map_err(Failure::Broken)?;
    let (reply, fds) = request.handle(session, std::mem::take(&mut message.fds))?;
    Ok(Reply { body: reply.as_bytes().to_vec(), fds })
}

const fn entry<R: Handle>() -> Entry {
    Entry { kind: R::KIND, name: R::NAME, run: run::<R> }
}

const TABLE: &[Entry] = &[
    entry::<MakeSlab>(),
    entry::<AllocPd>(),
    entry::<DeallocPd>(),
    entry::<CreateChannel>(),
    entry::<DestroyChannel>(),
    entry::<CreateCq>(),
    entry::<DestroyCq>(),
    entry::<RegMr>(),
    entry::<DeregMr>(),
    entry::<CreateQp>(),
    entry::<DestroyQp>(),
    entry::<CreateSrq>(),
    entry::<DestroySrq>(),
    entry::<AttachMcast>(),
    entry::<DetachMcast>(),
    entry::<ListMembers>(),
    entry::<Connect>(),
    entry::<Disconnect>(),
    entry::<Resolve>(),
    entry::<CopyMem>(),
    entry::<Ring>(),
    entry::<LeaseMrs>(),
    entry::<Claim>(),
    entry::<BringSlab>(),
    entry::<Resumed>(),
    entry::<OpenDoorbell>(),
    entry::<AttachLink>(),
];

/// The handler of a kind.
pub fn find(kind: u16) -> Option<&'static Entry> {
    TABLE.iter().find(|entry| entry.kind == kind)
}

/// What a client is told at hello.
pub fn limits(s: &Settings) -> Limits {
    Limits {
        max_qp: s.max_qp,
        max_cq: s.max_cq,
        max_mr: s.max_mr,
        max_pd: s.max_pd,
        max_qp_wr: s.max_qp_wr,
        max_cqe: s.max_cqe,
        max_srq: s.max_srq,
        max_mcast: s.max_mcast,
        max_mr_bytes: s.max_mr_bytes,
    }
}

fn done(result: Result<()>) -> Result<(Done, Fds)> {
    result.map(|()| (Done {}, vec![]))
}

fn id(session: &Session, what: u32, result: Result<u32>) -> Result<(Id, Fds)> {
    Ok((proven(session, what, result?), vec![]))
}

/// An id, and what a later router will know it by.
fn proven(session: &Session, what: u32, id: u32) -> Id {
    Id { id, _pad: 0, proof: session.proof(what, id) }
}

/// The one descriptor of a request that has one; `Incoming::request` counted it.
fn only(fds: Vec<OwnedFd>) -> Result<OwnedFd> {
    fds.into_iter().next().ok_or(Refusal::Invalid("a descriptor is missing"))
}

impl Handle for MakeSlab {
    fn handle(self, session: &Session, _: Vec<OwnedFd>) -> Result<(Id, Fds)> {
        let (id, fd) = take_slab(session, self.len, || make_memfd("freeflow-slab", self.len))?;
        Ok((proven(session, claim::OBJECT, id), vec![fd]))
    }
}

impl Handle for BringSlab {
    fn handle(self, session: &Session, fds: Vec<OwnedFd>) -> Result<(Id, Fds)> {
        let fd = only(fds)?;
        if !is_sealed_memfd(&fd) || rustix::fs::fstat(&fd).is_ok_and(|stat| stat.st_size as u64 != self.len) {
            return Err(Refusal::Invalid("queue memory must be a sealed memfd of the length that is said"));
        }
        id(session, claim::OBJECT, take_slab(session, self.len, || Ok(fd)).map(|(id, _)| id))
    }
}

/// Enters queue memory, if the quota has room for it.
fn take_slab(
    session: &Session,
    len: u64,
    memory: impl FnOnce() -> rustix::io::Result<OwnedFd>,
) -> Result<(u32, Arc<OwnedFd>)> {
    let owner = session.owner;
    session.shared.with(|state| state.reserve_slab(owner, len))?;
    let slab = memory().and_then(|fd| fill_slab(fd, len)).map_err(Refusal::system("queue memory"));
    let entered = slab.and_then(|slab| {
        let fd = slab.fd.clone();
        let id = session.shared.with(|state| state.insert_slab(owner, slab))?;
        Ok((id, fd))
    });
    entered.inspect_err(|_| session.shared.with(|state| state.unreserve_slab(owner, len)))
}

impl Handle for Claim {
    fn handle(self, session: &Session, _: Vec<OwnedFd>) -> Result<(Done, Fds)> {
        let good = self.what == claim::KEY || self.proof == session.proof(self.what, self.id);
        done(session.shared.with(|state| state.claim(session.owner, (self.what, self.id), good)))
    }
}

impl Handle for Resumed {
    fn handle(self, session: &Session, _: Vec<OwnedFd>) -> Result<(Done, Fds)> {
        done(session.shared.with(|state| state.resumed(session.owner, session.shared.is_late())))
    }
}

/// A segment whose pages all exist: touching it never fails and never costs the toucher anything.
fn fill_slab(fd: OwnedFd, len: u64) -> rustix::io::Result<Slab> {
    rustix::fs::fallocate(&fd, FallocateFlags::empty(), 0, len)?;
    let map = Mapping::new(&fd, 0, len as usize, true)?;
    Ok(Slab { fd: Arc::new(fd), map: Arc::new(map) })
}

impl Handle for AllocPd {
    fn handle(self, session: &Session, fds: Vec<OwnedFd>) -> Result<(Id, Fds)> {
        let fd = only(fds)?;
        if !is_sealed_memfd(&fd) {
            return Err(Refusal::Invalid(
                "a PD's memory must be a memfd sealed against shrinking and growing",
            ));
        }
        id(session, claim::OBJECT, session.shared.with(|state| state.alloc_pd(session.owner, fd)))
    }
}

impl Handle for DeallocPd {
    fn handle(self, session: &Session, _: Vec<OwnedFd>) -> Result<(Done, Fds)> {
        done(session.shared.with(|state| state.dealloc_pd(session.owner, self.pd)))
    }
}

impl Handle for CreateChannel {
    fn handle(self, session: &Session, fds: Vec<OwnedFd>) -> Result<(Id, Fds)> {
        let bell = only(fds)?;
        if Bell::open(&bell).is_err() {
            return Err(Refusal::Invalid("a channel's bell must be a pipe that anybody may open anew"));
        }
        id(session, claim::OBJECT, session.shared.with(|state| state.create_channel(session.owner, bell)))
    }
}

impl Handle for DestroyChannel {
    fn handle(self, session: &Session, _: Vec<OwnedFd>) -> Result<(Done, Fds)> {
        done(session.shared.with(|state| state.destroy_channel(session.owner, self.channel)))
    }
}

impl Handle for CreateCq {
    fn handle(self, session: &Session, _: Vec<OwnedFd>) -> Result<(Id, Fds)> {
        id(
            session,
            claim::OBJECT,
            session.shared.with(|state| state.create_cq(session.owner, self.channel, self.slab, self.off)),
        )
    }
}

impl Handle for DestroyCq {
    fn handle(self, session: &Session, _: Vec<OwnedFd>) -> Result<(Done, Fds)> {
        done(session.shared.with(|state| state.destroy_cq(session.owner, self.cq)))
    }
}

impl Handle for RegMr {
    fn handle(self, session: &Session, _: Vec<OwnedFd>) -> Result<(MrReply, Fds)> {
        let key = session.shared.with(|state| state.reg_mr(session.owner, self.pd, self.addr, self.len))?;
        Ok((MrReply { key }, vec![]))
    }
}

impl Handle for LeaseMrs {
    fn handle(self, session: &Session, _: Vec<OwnedFd>) -> Result<(LeaseReply, Fds)> {
        let leased = session.shared.with(|state| state.lease_mrs(session.owner, self.pd, self.len))?;
        let mut keys = [0; LEASED_KEYS];
        keys.iter_mut().zip(&leased).for_each(|(to, from)| *to = *from);
        Ok((LeaseReply { count: leased.len() as u32, keys }, vec![]))
    }
}

impl Handle for DeregMr {
    fn handle(self, session: &Session, _: Vec<OwnedFd>) -> Result<(Done, Fds)> {
        done(copy::deregister(&session.shared, session.owner, self.key))
    }
}

impl Handle for CreateQp {
    fn handle(self, session: &Session, _: Vec<OwnedFd>) -> Result<(Id, Fds)> {
        let CreateQp { pd, send_cq, recv_cq, kind, slab, qp_off, rq_off, rq_depth, .. } = self;
        let CreateQp { rq_sge, cq_bit, srq, xrcd, .. } = self;
        let new =
            NewQp { pd, send_cq, recv_cq, kind, slab, qp_off, rq_off, rq_depth, rq_sge, cq_bit, srq, xrcd };
        id(session, claim::QP, session.shared.with(|state| state.create_qp(session.owner, new)))
    }
}

impl Handle for DestroyQp {
    fn handle(self, session: &Session, _: Vec<OwnedFd>) -> Result<(Done, Fds)> {
        session.shared.take_datagrams(session.owner.client);
        done(session.shared.with(|state| state.destroy_qp(session.owner, self.qpn)))
    }
}

impl Handle for CreateSrq {
    fn handle(self, session: &Session, _: Vec<OwnedFd>) -> Result<(Id, Fds)> {
        let CreateSrq { pd, slab, off, slots, depth, cq, cq_bit, xrcd } = self;
        let new = Srq { pd, slab, off, slots, depth, cq, cq_bit, xrcd, users: 0 };
        id(session, claim::SRQ, session.shared.with(|state| state.create_srq(session.owner, new)))
    }
}

impl Handle for DestroySrq {
    fn handle(self, session: &Session, _: Vec<OwnedFd>) -> Result<(Done, Fds)> {
        session.shared.with(|state| state.destroy_srq(session.owner, self.srq))?;
        session.shared.links.get().into_iter().for_each(|links| links.forget_queue(self.srq));
        Ok((Done {}, vec![]))
    }
}

impl Handle for AttachMcast {
    fn handle(self, session: &Session, _: Vec<OwnedFd>) -> Result<(Done, Fds)> {
        session.shared.with(|state| state.attach_mcast(session.owner, self.qpn, Gid(self.mgid)))?;
        // Who hears from it that it is in the group may send to it at once.
        session.shared.links.get().into_iter().for_each(Links::wait_until_known);
        done(Ok(()))
    }
}

impl Handle for DetachMcast {
    fn handle(self, session: &Session, _: Vec<OwnedFd>) -> Result<(Done, Fds)> {
        done(session.shared.with(|state| state.detach_mcast(session.owner, self.qpn, Gid(self.mgid))))
    }
}

impl Handle for ListMembers {
    fn handle(self, session: &Session, _: Vec<OwnedFd>) -> Result<(MembersReply, Fds)> {
        let (mgid, page) = (Gid(self.mgid), self.page == 0);
        let listed = session.shared.with(|state| state.list_members(session.owner, mgid, self.after, page));
        listed.map(|(reply, page)| (reply, page.into_iter().collect()))
    }
}

impl Handle for Connect {
    fn handle(self, session: &Session, _: Vec<OwnedFd>) -> Result<(Connected, Fds)> {
        let (qpn, dest, gid) = (self.qpn, self.dest_qpn, Gid(self.dgid));
        session.shared.with(|state| {
            state.connect(session.owner, qpn, dest, gid)?;
            state.qps.get_mut(qpn).into_iter().for_each(|row| row.traffic_class = self.traffic_class as u8);
            Ok::<_, Refusal>(())
        })?;
        let far = connect_far(session, qpn, gid)?;
        Ok((Connected { path: if far { peer_state::LINK } else { 0 } }, vec![]))
    }
}

/// The name of the other host that has `gid`, as the session's container sees it.
fn far_host(session: &Session, gid: Gid) -> Option<Arc<str>> {
    session.shared.links.get()?;
    let (tenant, ip) = session.shared.with(|state| state.elsewhere(session.owner, gid))?;
    let host = session.shared.cluster.get()?.hosts.find(&tenant, ip)?;
    Some(host.name.clone())
}

/// Connects a queue pair that is linked to `gid` to another host, if that has it. True: it does.
fn connect_far(session: &Session, qpn: u32, gid: Gid) -> Result<bool> {
    let (Some(host), Some(links)) = (far_host(session, gid), session.shared.links.get()) else {
        return Ok(false);
    };
    let qp = session.shared.with(|state| {
        let qp = state.far_qp(qpn)?;
        let Some(row) = state.qps.get_mut(qpn).filter(|_| qp.kind != QpType::Ud) else { return Ok(None) };
        // One that is connected there already stays so: its requests may be under way.
        let before = std::mem::replace(&mut row.far, true);
        Ok::<_, Refusal>(Some((qp, before)))
    })?;
    if let Some((qp, false)) = qp {
        links.connect(qp, host);
        return Ok(true);
    }
    Ok(qp.is_some())
}

impl Handle for OpenDoorbell {
    fn handle(self, session: &Session, _: Vec<OwnedFd>) -> Result<(Done, Fds)> {
        let (owner, links) = (session.owner, session.shared.links.get());
        let links = links.ok_or(Refusal::Unsupported("link: this host is in no cluster"))?;
        let (doorbell, home) = session.shared.with(|state| {
            let doorbell = state.far_doorbell(owner, self.slab, self.off)?;
            Ok::<_, Refusal>((doorbell, state.home_of(owner)?))
        })?;
        let bell = links.open_doorbell(owner.client, home, doorbell);
        let bell = bell.map_err(Refusal::system("bell of the link"))?;
        Ok((Done {}, vec![Arc::new(bell)]))
    }
}

impl Handle for AttachLink {
    fn handle(self, session: &Session, _: Vec<OwnedFd>) -> Result<(Done, Fds)> {
        let (owner, links) = (session.owner, session.shared.links.get());
        let links = links.ok_or(Refusal::Unsupported("link: this host is in no cluster"))?;
        let AttachLink { qpn, slab, off, depth, stride, bit, send_bit } = self;
        let ring = session.shared.with(|state| state.far_ring(owner, slab, off, depth, stride))?;
        if links.attach(owner.client, qpn, ring, bit, send_bit) {
            Ok((Done {}, vec![]))
        } else {
            Err(Refusal::Invalid("submissions of a queue pair that no link has, or without a doorbell"))
        }
    }
}

impl Handle for Disconnect {
    fn handle(self, session: &Session, _: Vec<OwnedFd>) -> Result<(Done, Fds)> {
        done(session.shared.with(|state| state.disconnect(session.owner, self.qpn)))
    }
}

impl Handle for Resolve {
    fn handle(self, session: &Session, _: Vec<OwnedFd>) -> Result<(PeerInfo, Fds)> {
        let (qpn, dest, gid) = (self.qpn, self.dest_qpn, Gid(self.dgid));
        let (mut info, fds) =
            session.shared.with(|state| state.resolve(session.owner, qpn, dest, gid, self.srqn))?;
        if info.state == peer_state::ABSENT && far_host(session, gid).is_some() {
            // One whose peer came to be known as far only now is connected there now.
            connect_far(session, qpn, gid)?;
            info.state = peer_state::LINK;
        }
        Ok((info, fds))
    }
}

impl Handle for CopyMem {
    fn handle(self, session: &Session, _: Vec<OwnedFd>) -> Result<(Done, Fds)> {
        done(copy::copy(&session.shared, session.owner, &self))
    }
}

impl Handle for Ring {
    fn handle(self, session: &Session, _: Vec<OwnedFd>) -> Result<(Done, Fds)> {
        let (shared, owner) = (&session.shared, session.owner);
        let (qpn, dest, gid) = (self.qpn, self.dest_qpn, Gid(self.dgid));
        let notify = |notice: fn(u32) -> Notice| {
            done(shared.with(|state| state.notify_peer(owner, (qpn, dest, gid), notice)))
        };
        match self.what {
            ring::PROGRESS => notify(|qpn| Notice::PeerProgress { qpn }),
            ring::LIMIT => done(shared.with(|state| state.srq_limit(owner, (qpn, dest, gid)))),
            ring::FAULT => notify(|qpn| Notice::PeerFault { qpn }),
            ring::BELL => {
                let bell = shared.with(|state| state.peer_bell(owner, qpn, dest, gid))?;
                bell.iter().for_each(|bell| ring_bell(bell));
                done(Ok(()))
            }
            _ => Err(Refusal::Invalid("nothing that can be rung")),
        }
    }
}
