//! The executor: one send request, as far as it gets.

use arrayvec::ArrayVec;

use crate::ctl::copy_kind;
use crate::ring::{Claim, Completion, INLINE_BYTES, MAX_SGE, QpShared, Ready, Ring};
use crate::shm::{LocalBytes, SharedBytes, copy_in, copy_out, prefetch_for_write};
use crate::sync::{AtomicU64, Ordering, fence};
use crate::verbs::{
    Access, Flush, Gid, QpState, SendFlags, SendOp, WcOpcode, WcStatus, grh, limits, wc_flags,
};

use super::pump::{Direction, Local, MAX_LOCAL, Remote, Unreachable, pump, pump_one};
use super::{LocalTable, Peer, PeerMemory, Progress, Reach, Request, Target, UdDest};

/// Everything around a request.
pub struct Env<'a, M> {
    pub local: LocalTable<'a>,
    /// None: the peer is not there (yet).
    pub peer: Option<Peer<'a>>,
    pub memory: &'a mut M,
    /// The poster.
    pub qpn: u32,
    pub client: u32,
    pub gid: Gid,
    /// Bytes this call may move.
    pub budget: u64,
}

/// How far the request got.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Outcome {
    Done {
        status: WcStatus,
        byte_len: u32,
    },
    /// The budget is used up: call again.
    Again,
    /// No receive is posted.
    Rnr,
    /// The peer has not polled its completions for long: they fill its ring (of a QP with a shared receive queue).
    Full,
    /// The peer does not serve requests: like a packet nobody answers.
    Absent,
    /// Who has to copy some of it is away.
    Later,
}

impl Outcome {
    fn failed(status: WcStatus) -> Self {
        Outcome::Done { status, byte_len: 0 }
    }
}

const TO_PEER: Direction = Direction { to_peer: true, far_kind: copy_kind::WRITE };
const FROM_PEER: Direction = Direction { to_peer: false, far_kind: copy_kind::READ };
const TO_RECEIVE: Direction = Direction { to_peer: true, far_kind: copy_kind::RECV };

/// Takes `request` as far as it gets; `progress` carries what earlier calls did.
///
/// The short way, a WRITE, is inlined whole; `env` and the peer go to everything else by value, because an address taken
/// anywhere would keep them in memory on the short way too.
#[inline(always)]
pub fn execute<M: PeerMemory>(request: &Request<'_>, progress: &mut Progress, env: Env<'_, M>) -> Outcome {
    let mut gathered = Gathered::default();
    if let Err(status) = gathered.gather(request, &env.local) {
        return refused(status, progress, env);
    }
    if let Target::Datagram(dest) = &request.target {
        return datagram(request, dest, &gathered, env);
    }
    let Some(peer) = env.peer else { return Outcome::Absent };
    // Announced before the first look at state or keys: whoever changes them waits for us.
    let _in_flight = peer.qp.enter();
    if !serves(&peer, env.qpn) {
        return Outcome::Absent;
    }
    match request.target {
        Target::Memory { addr, rkey } if request.op == SendOp::Read => {
            read(addr, rkey, &gathered, progress, peer, env)
        }
        Target::Memory { addr, rkey } if request.op == SendOp::AtomicWrite => {
            atomic_write(addr, rkey, &gathered, peer, env)
        }
        Target::Memory { addr, rkey } => write(request, addr, rkey, &gathered, progress, peer, env),
        Target::Atomic { .. } => atomic(request, &gathered, peer, env),
        Target::Receive | Target::Datagram(_) => send(request, &gathered, progress, peer, env),
        Target::Flush { addr, rkey, len, what } => flush((addr, rkey, len), what, peer, env),
        Target::Bind { .. } | Target::Invalidate { .. } => Outcome::failed(WcStatus::LocQpOpErr),
    }
}

/// The poster's own list is not what its keys allow.
#[cold]
fn refused<M: PeerMemory>(status: WcStatus, progress: &mut Progress, env: Env<'_, M>) -> Outcome {
    if let Some(peer) = env.peer {
        abandon(progress, peer, env.memory, env.qpn, env.client);
    }
    Outcome::failed(status)
}

/// Does the peer serve requests of `qpn`?
#[inline(always)]
fn serves(peer: &Peer<'_>, qpn: u32) -> bool {
    let state = QpState::try_from(peer.qp.state.load(Ordering::Acquire));
    state.is_ok_and(QpState::receives)
        && peer.qp.qpn.load(Ordering::Relaxed) == peer.qpn
        && peer.qp.peer_qpn.load(Ordering::Relaxed) == qpn
}

/// Gives a half-filled receive back when its request ends early.
#[cold]
pub fn abandon<M: PeerMemory>(
    progress: &mut Progress,
    peer: Peer<'_>,
    memory: &mut M,
    qpn: u32,
    client: u32,
) {
    let Some(suspended) = progress.claim.take() else { return };
    let _in_flight = peer.qp.enter();
    // A peer that serves us no more has taken it back, or will; the slot may be another sender's by now.
    if !serves(&peer, qpn) {
        return;
    }
    if let Some(claim) = peer.resume(suspended, client) {
        give_back(claim, peer, memory);
    }
}

/// Returns a receive untouched. Its owner may have begun to flush meanwhile and passed over it: it looks again.
#[cold]
fn give_back<M: PeerMemory>(claim: Claim<'_>, peer: Peer<'_>, memory: &mut M) {
    claim.release(&peer.qp.head);
    if peer.cq.completed(Some(peer.cq_bit), true) == Ring::Bell {
        memory.bell();
    }
}

/// The poster's buffers, checked.
#[derive(Default)]
struct Gathered {
    list: ArrayVec<Local, MAX_LOCAL>,
    total: u64,
}

impl Gathered {
    #[inline(always)]
    fn gather(&mut self, request: &Request<'_>, table: &LocalTable<'_>) -> Result<(), WcStatus> {
        let need = if request.op.writes_locally() { Access::LOCAL_WRITE } else { Access::empty() };
        let inline = request.flags.contains(SendFlags::INLINE);
        for sge in request.sges {
            let va = if inline { sge.addr } else { table.check(sge, need).ok_or(WcStatus::LocProtErr)? };
            self.push(va, u64::from(sge.length));
        }
        let limit = if matches!(request.target, Target::Datagram(_)) {
            u64::from(limits::MTU)
        } else {
            limits::MESSAGE
        };
        if self.total > limit { Err(WcStatus::LocLenErr) } else { Ok(()) }
    }

    #[inline(always)]
    fn push(&mut self, va: u64, len: u64) {
        // The queue's max_send_sge keeps the list within MAX_LOCAL.
        if len > 0 && self.list.try_push(Local { va, len }).is_ok() {
            self.total += len;
        }
    }

    /// The bytes, if they fit into a receive slot.
    fn small(&self) -> Option<([u8; INLINE_BYTES], usize)> {
        let total = usize::try_from(self.total).ok().filter(|t| *t <= INLINE_BYTES)?;
        let mut bytes = [0; INLINE_BYTES];
        let mut at = 0;
        for part in &self.list {
            let here = LocalBytes { addr: part.va, len: part.len as usize };
            // SAFETY: the bytes live on this stack until the copy is done; at + len <= total.
            let to = unsafe { SharedBytes::new(bytes[at..].as_mut_ptr(), here.len) };
            // SAFETY: the part was checked to be this process's registered (or inline) memory.
            unsafe { copy_in(to, here) };
            at += part.len as usize;
        }
        Some((bytes, total))
    }
}

/// A violation of the peer's rules: both QPs go to error.
#[cold]
fn violation<M: PeerMemory>(memory: &mut M, status: WcStatus) -> Outcome {
    if memory.is_reliable() {
        memory.fault();
    }
    Outcome::failed(status)
}

/// The peer's memory behind an rkey, if QP and MR both allow `need`. None: no bytes need no key.
#[inline(always)]
fn target<'a, M: PeerMemory>(
    peer: &Peer<'a>,
    memory: &M,
    rkey: u32,
    need: Access,
    iova: u64,
    len: u64,
) -> Result<Option<Remote<'a>>, WcStatus> {
    if len == 0 { Ok(None) } else { granted(peer, memory, rkey, need, iova, len).map(Some) }
}

/// The same, whatever the length.
#[inline(always)]
fn granted<'a, M: PeerMemory>(
    peer: &Peer<'a>,
    memory: &M,
    rkey: u32,
    need: Access,
    iova: u64,
    len: u64,
) -> Result<Remote<'a>, WcStatus> {
    let served = Access::from_bits_truncate(peer.qp.access.load(Ordering::Relaxed));
    if !served.contains(need) {
        return Err(WcStatus::RemInvReqErr);
    }
    let (entry, va) = match peer.check(rkey, need, iova, len) {
        Some(found) => found,
        None => {
            let window = peer.check_window(memory.retired(), rkey, need, iova, len);
            window.ok_or(WcStatus::RemAccessErr)?
        }
    };
    Ok(Remote { entry, key: rkey, iova, va, len })
}

#[inline(always)]
fn write<M: PeerMemory>(
    request: &Request<'_>,
    addr: u64,
    rkey: u32,
    from: &Gathered,
    progress: &mut Progress,
    peer: Peer<'_>,
    env: Env<'_, M>,
) -> Outcome {
    let with_imm = request.op == SendOp::WriteImm;
    let remote = match target(&peer, env.memory, rkey, Access::REMOTE_WRITE, addr, from.total) {
        Ok(remote) => remote,
        Err(status) => {
            if let Some(claim) = resume(progress, peer, env.client) {
                give_back(claim, peer, env.memory);
            }
            return violation(env.memory, status);
        }
    };
    let mut claim = None;
    if with_imm {
        match take_receive(progress, peer, env.client) {
            Ready::Claim(taken) => claim = Some(taken),
            Ready::NotReady => return Outcome::Rnr,
            Ready::Full => return Outcome::Full,
        }
    }
    let moved = match remote {
        Some(remote) => pump_one(env.memory, TO_PEER, &from.list, remote, progress.moved, env.budget),
        None => Ok(0),
    };
    match finish(moved, from.total, progress, claim, peer, env.memory) {
        Err(outcome) => outcome,
        Ok(claim) => {
            QpShared::count(&peer.qp.rx_bytes, from.total);
            if let Some(claim) = claim {
                let done = Completion {
                    status: WcStatus::Success as u8,
                    opcode: WcOpcode::RecvRdmaWithImm as u8,
                    flags: flags_of(request),
                    byte_len: from.total as u32,
                    imm: request.imm,
                    src_qp: from_whom(request, env.qpn),
                    slot: 0,
                };
                deliver(claim, &done, &peer, env.memory);
            }
            Outcome::Done { status: WcStatus::Success, byte_len: from.total as u32 }
        }
    }
}

/// After a pump: all moved (with the claim to complete), more to do, or the key is gone.
#[inline(always)]
fn finish<'a, M: PeerMemory>(
    moved: Result<u64, Unreachable>,
    total: u64,
    progress: &mut Progress,
    claim: Option<Claim<'a>>,
    peer: Peer<'_>,
    memory: &mut M,
) -> Result<Option<Claim<'a>>, Outcome> {
    match moved {
        Err(Unreachable::Later) => {
            progress.claim = claim.map(Claim::suspend);
            Err(Outcome::Later)
        }
        Err(Unreachable::Gone) => {
            if let Some(claim) = claim {
                give_back(claim, peer, memory);
            }
            Err(violation(memory, WcStatus::RemAccessErr))
        }
        Ok(step) => {
            progress.moved += step;
            if progress.moved < total {
                progress.claim = claim.map(Claim::suspend);
                return Err(Outcome::Again);
            }
            Ok(claim)
        }
    }
}

fn read<M: PeerMemory>(
    addr: u64,
    rkey: u32,
    to: &Gathered,
    progress: &mut Progress,
    peer: Peer<'_>,
    env: Env<'_, M>,
) -> Outcome {
    let moved = match target(&peer, env.memory, rkey, Access::REMOTE_READ, addr, to.total) {
        Ok(Some(remote)) => pump_one(env.memory, FROM_PEER, &to.list, remote, progress.moved, env.budget),
        Ok(None) => Ok(0),
        Err(status) => return violation(env.memory, status),
    };
    match finish(moved, to.total, progress, None, peer, env.memory) {
        Err(outcome) => outcome,
        Ok(_) => Outcome::Done { status: WcStatus::Success, byte_len: to.total as u32 },
    }
}

fn atomic<M: PeerMemory>(request: &Request<'_>, to: &Gathered, peer: Peer<'_>, env: Env<'_, M>) -> Outcome {
    let Target::Atomic { addr, rkey, compare_add, swap } = request.target else {
        return Outcome::failed(WcStatus::LocQpOpErr);
    };
    if to.total != 8 {
        return Outcome::failed(WcStatus::LocLenErr);
    }
    // Registration grants REMOTE_ATOMIC only where the pages moved, so far memory does not get here honestly.
    on_word(addr, rkey, (Access::REMOTE_ATOMIC, WcStatus::RemAccessErr), peer, env.memory, |word| {
        scatter_old(apply(word, request.op, compare_add, swap), to);
    })
}

/// One store of eight bytes.
fn atomic_write<M: PeerMemory>(
    addr: u64,
    rkey: u32,
    from: &Gathered,
    peer: Peer<'_>,
    env: Env<'_, M>,
) -> Outcome {
    let Some((bytes, 8)) = from.small() else { return Outcome::failed(WcStatus::LocLenErr) };
    let mut value = [0; 8];
    value.copy_from_slice(&bytes[..8]);
    on_word(addr, rkey, (Access::REMOTE_WRITE, WcStatus::RemOpErr), peer, env.memory, |word| {
        word.store(u64::from_ne_bytes(value), Ordering::Release);
    })
}

/// Requests are carried out in turn and copies are made when they return, so all that was written before is in place; the fence
/// has other processors see it before the completion is there. Only the rights remain to be looked at. It is an answer, which no
/// unreliable connection has.
#[cold]
#[inline(never)]
fn flush<M: PeerMemory>(
    (addr, rkey, len): (u64, u32, u64),
    what: Flush,
    peer: Peer<'_>,
    env: Env<'_, M>,
) -> Outcome {
    if !env.memory.is_reliable() {
        return Outcome::failed(WcStatus::LocQpOpErr);
    }
    // Of a whole region: no bytes at its start, wherever that is. A key that is none has no start, and is refused as such.
    let whole = what.contains(Flush::REGION);
    let (addr, len) = if whole { (peer.start_of(rkey).unwrap_or(addr), 0) } else { (addr, len) };
    match granted(&peer, env.memory, rkey, what.rights(), addr, len) {
        Ok(_) => {
            fence(Ordering::SeqCst);
            Outcome::Done { status: WcStatus::Success, byte_len: 0 }
        }
        Err(status) => violation(env.memory, status),
    }
}

/// Runs `act` on the aligned word of eight bytes behind an rkey. Memory that is reached through the router has no such
/// words: a request for one fails with `far`.
fn on_word<M: PeerMemory>(
    addr: u64,
    rkey: u32,
    (need, far): (Access, WcStatus),
    peer: Peer<'_>,
    memory: &mut M,
    act: impl FnOnce(&AtomicU64),
) -> Outcome {
    if !addr.is_multiple_of(8) {
        return violation(memory, WcStatus::RemInvReqErr);
    }
    let remote = match target(&peer, memory, rkey, need, addr, 8) {
        Ok(Some(remote)) => remote,
        Ok(None) => return violation(memory, far),
        Err(status) => return violation(memory, status),
    };
    let Reach::Here(bytes) = memory.reach(remote.entry, rkey, remote.va, 8) else {
        return violation(memory, far);
    };
    let Some(word) = crate::shm::atomic_word(&bytes) else {
        return violation(memory, WcStatus::RemInvReqErr);
    };
    act(word);
    Outcome::Done { status: WcStatus::Success, byte_len: 8 }
}

fn apply(word: &AtomicU64, op: SendOp, compare_add: u64, swap: u64) -> u64 {
    if op == SendOp::FetchAdd {
        return word.fetch_add(compare_add, Ordering::SeqCst);
    }
    match word.compare_exchange(compare_add, swap, Ordering::SeqCst, Ordering::SeqCst) {
        Ok(old) | Err(old) => old,
    }
}

/// Writes the old value into the poster's buffers.
fn scatter_old(old: u64, to: &Gathered) {
    let mut bytes = old.to_ne_bytes();
    let mut at = 0;
    for part in &to.list {
        let len = part.len as usize;
        // SAFETY: the bytes live on this stack until the copy is done; the parts add up to 8.
        let from = unsafe { SharedBytes::new(bytes[at..].as_mut_ptr(), len) };
        // SAFETY: `part` was checked for LOCAL_WRITE.
        unsafe { copy_out(LocalBytes { addr: part.va, len }, from) };
        at += len;
    }
}

/// The receive that an earlier call began to fill.
fn resume<'a>(progress: &mut Progress, peer: Peer<'a>, client: u32) -> Option<Claim<'a>> {
    progress.claim.take().and_then(|s| peer.resume(s, client))
}

/// Claims a receive, or takes up the one of an earlier call.
#[inline]
fn take_receive<'a>(progress: &mut Progress, peer: Peer<'a>, client: u32) -> Ready<'a> {
    if progress.claim.is_some() {
        if let Some(resumed) = resume(progress, peer, client) {
            return Ready::Claim(resumed);
        }
        progress.moved = 0;
    }
    peer.claim(client)
}

/// What a completion's `src_qp` says: the sender, whom a connected receiver knows anyway; so for XRC the queue it is for.
fn from_whom(request: &Request<'_>, qpn: u32) -> u32 {
    if request.srqn == 0 { qpn } else { request.srqn }
}

fn flags_of(request: &Request<'_>) -> u8 {
    let imm = match request.op {
        SendOp::SendInv => wc_flags::WITH_INV as u8,
        op if op.has_imm() => wc_flags::WITH_IMM as u8,
        _ => 0,
    };
    let solicited = if request.flags.contains(SendFlags::SOLICITED) { Completion::SOLICITED } else { 0 };
    imm | solicited
}

fn send<M: PeerMemory>(
    request: &Request<'_>,
    from: &Gathered,
    progress: &mut Progress,
    peer: Peer<'_>,
    env: Env<'_, M>,
) -> Outcome {
    let claim = match take_receive(progress, peer, env.client) {
        Ready::Claim(claim) => claim,
        Ready::NotReady => return Outcome::Rnr,
        Ready::Full => return Outcome::Full,
    };
    let mut done = Completion {
        status: WcStatus::Success as u8,
        opcode: WcOpcode::Recv as u8,
        flags: flags_of(request),
        byte_len: from.total as u32,
        imm: request.imm,
        src_qp: from_whom(request, env.qpn),
        slot: 0,
    };
    if request.op == SendOp::SendInv && peer.binding(env.memory.retired(), request.imm).is_none() {
        give_back(claim, peer, env.memory);
        return violation(env.memory, WcStatus::RemAccessErr);
    }
    let into = match scatter(&claim, &peer, from.total) {
        Ok(into) => into,
        Err((_, ours)) if !env.memory.is_reliable() => {
            give_back(claim, peer, env.memory);
            return Outcome::failed(ours);
        }
        Err((theirs, ours)) => {
            done.status = theirs as u8;
            deliver(claim, &done, &peer, env.memory);
            return Outcome::failed(ours);
        }
    };
    let claim = if let Some((bytes, len)) = from.small() {
        claim.write_inline(&bytes[..len]);
        done.flags |= Completion::INLINE;
        claim
    } else {
        let moved = pump(env.memory, TO_RECEIVE, &from.list, &into, progress.moved, env.budget);
        match finish(moved, from.total, progress, Some(claim), peer, env.memory) {
            Ok(Some(claim)) => claim,
            Ok(None) => return Outcome::failed(WcStatus::LocQpOpErr),
            Err(outcome) => return outcome,
        }
    };
    QpShared::count(&peer.qp.rx_bytes, from.total);
    if request.op == SendOp::SendInv {
        retire(request.imm, &peer, env.memory);
    }
    deliver(claim, &done, &peer, env.memory);
    // The next send will claim the next receive, whose line is in the receiver's cache.
    peer.next_receive().inspect(|word| prefetch_for_write(*word));
    Outcome::Done { status: WcStatus::Success, byte_len: from.total as u32 }
}

/// From now on this end does not use `key`, whatever the peer's table says of it: see [`super::Retired`].
#[cold]
fn retire<M: PeerMemory>(key: u32, peer: &Peer<'_>, memory: &M) {
    if let Some(epoch) = peer.binding(memory.retired(), key) {
        memory.retired().add(key, epoch, peer.mrs);
    }
}

/// The receiver's buffers.
type Scattered<'a> = ArrayVec<Remote<'a>, MAX_SGE>;

/// Checks the claimed receive's list as far as `total` bytes need it. An error is what (receiver, sender) complete with.
fn scatter<'a>(
    claim: &Claim<'_>,
    peer: &Peer<'a>,
    total: u64,
) -> Result<Scattered<'a>, (WcStatus, WcStatus)> {
    let mut scattered = Scattered::new();
    let mut room = 0;
    for sge in claim.sges().filter(|sge| sge.length > 0) {
        if room >= total {
            break;
        }
        let len = u64::from(sge.length);
        let (entry, va) =
            peer.check_receive(sge.lkey, sge.addr, len).ok_or((WcStatus::LocProtErr, WcStatus::RemOpErr))?;
        scattered.push(Remote { entry, key: sge.lkey, iova: sge.addr, va, len });
        room += len;
    }
    if room < total { Err((WcStatus::LocLenErr, WcStatus::RemInvReqErr)) } else { Ok(scattered) }
}

/// Completes the receive and wakes its owner if that is wanted.
fn deliver<M: PeerMemory>(claim: Claim<'_>, done: &Completion, peer: &Peer<'_>, memory: &mut M) {
    let solicited = done.flags & Completion::SOLICITED != 0 || done.status != WcStatus::Success as u8;
    let fenced = peer.cq.needs_fence();
    claim.complete(done, fenced);
    if peer.cq.completed_stored(fenced, Some(peer.cq_bit), solicited) == Ring::Bell {
        memory.bell();
    }
    if peer.srq.is_some_and(|srq| srq.header.below()) {
        memory.limit();
    }
}

/// Does the peer take datagrams for `dest`?
fn hears(peer: &Peer<'_>, dest: &UdDest) -> bool {
    let state = QpState::try_from(peer.qp.state.load(Ordering::Acquire));
    state.is_ok_and(QpState::receives)
        && peer.qp.qpn.load(Ordering::Relaxed) == dest.qpn
        && peer.qp.qkey.load(Ordering::Relaxed) == dest.qkey
}

/// A datagram is delivered whole or not at all, and always succeeds here.
fn datagram<M: PeerMemory>(
    request: &Request<'_>,
    dest: &UdDest,
    payload: &Gathered,
    env: Env<'_, M>,
) -> Outcome {
    let sent = Outcome::Done { status: WcStatus::Success, byte_len: payload.total as u32 };
    let Some(peer) = env.peer else { return sent };
    if !hears(&peer, dest) {
        return sent;
    }
    let Some(claim) = peer.claim_datagram(env.client) else { return sent };
    // Looked at once more under the claim, as keys are below: whoever changes them waits for claims (Qp::quiesce). The
    // fence's partner is the sequentially consistent change and look there.
    fence(Ordering::SeqCst);
    if !hears(&peer, dest) {
        give_back(claim, peer, env.memory);
        return sent;
    }
    let header = grh(env.gid, dest.dgid, payload.total as u32, dest.traffic_class, dest.hop_limit);
    let mut whole = Gathered::default();
    whole.push(header.as_ptr() as u64, header.len() as u64);
    for part in &payload.list {
        whole.push(part.va, part.len);
    }
    let Ok(into) = scatter(&claim, &peer, whole.total) else {
        give_back(claim, peer, env.memory);
        return sent;
    };
    if pump(env.memory, TO_RECEIVE, &whole.list, &into, 0, whole.total).is_err() {
        give_back(claim, peer, env.memory);
        return sent;
    }
    let done = Completion {
        status: WcStatus::Success as u8,
        opcode: WcOpcode::Recv as u8,
        flags: flags_of(request) | wc_flags::GRH as u8 | if header[0] == 0 { Completion::IPV4 } else { 0 },
        byte_len: whole.total as u32,
        imm: request.imm,
        src_qp: env.qpn,
        slot: 0,
    };
    deliver(claim, &done, &peer, env.memory);
    sent
}
