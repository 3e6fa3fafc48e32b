//! Memory windows: keys that open a part of a memory region, by a request in a send queue and without a word with anybody.
//!
//! The router gives a window its key once, as a region's of no length. Binding publishes that key, with the last byte that the
//! program chose, in the process's table; invalidating kills it. What a key opens and when it is over are therefore what they
//! are for regions (`ring::mr`), and so is the rule of revocation: when the request is complete, no copy lands any more.
//! This is the record of what is bound to what; requests come here from the send queue, invalidations by the peer from the
//! CQ that takes its message.

use std::collections::{BTreeSet, HashMap};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use crate::ctl::DeregMr;
use crate::error::Result;
use crate::exec::Target;
use crate::ring::MrView;
use crate::ring::mr::{domain, slot_of};
use crate::verbs::{Access, MwType, WcStatus};

use super::context::Context;
use super::mem::Extent;
use super::pd::{Pd, QUIESCE, covers};
use super::qp::Qp;

/// A memory window.
pub struct Mw {
    pd: Arc<Pd>,
    key: u32,
}

/// The windows of a context.
#[derive(Debug, Default)]
pub(super) struct Windows(Mutex<Known>);

#[derive(Debug, Default)]
struct Known {
    /// By slot.
    windows: HashMap<usize, Window>,
    /// (region's key, window's slot)
    bound: BTreeSet<(u32, usize)>,
}

#[derive(Debug)]
struct Window {
    kind: MwType,
    pd: u32,
    bound: Option<Binding>,
}

#[derive(Debug, Clone, Copy)]
struct Binding {
    rkey: u32,
    mr: u32,
    /// Of type 2: the queue pair it was bound by, and is for.
    qpn: u32,
}

/// To be let go of without the record's lock: the last to hold a queue pair closes it, and that takes the lock.
type WaitedFor = Vec<Arc<Qp>>;

impl Pd {
    /// ibv_alloc_mw(3).
    pub fn alloc_mw(self: &Arc<Self>, kind: MwType) -> Result<Arc<Mw>> {
        let key = self.key_of_no_memory()?;
        let window = Window { kind, pd: self.id, bound: None };
        self.context.windows.known().windows.insert(slot_of(key), window);
        Ok(Arc::new(Mw { pd: Arc::clone(self), key }))
    }
}

impl Mw {
    /// The key that the router gave: its last byte is the binder's to choose.
    pub fn key(&self) -> u32 {
        self.key
    }
}

impl Drop for Mw {
    /// ibv_dealloc_mw(3): a window that is bound is invalidated.
    fn drop(&mut self) {
        let context = &self.pd.context;
        if context.conn.is_inherited() {
            return;
        }
        let mut known = context.windows.known();
        let waited_for = known.unbind(context, slot_of(self.key));
        known.windows.remove(&slot_of(self.key));
        drop(known);
        drop(waited_for);
        let _ = context.conn.ask(&DeregMr { key: self.key, _pad: 0 });
    }
}

impl Windows {
    fn known(&self) -> MutexGuard<'_, Known> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Is a window bound to region `mr`?
    pub fn are_bound(&self, mr: u32) -> bool {
        self.known().slots_of(mr).next().is_some()
    }

    /// Region `mr`, whose key is dead, ends in spite of windows: so do they. The caller waits for copies as for its own key.
    pub fn orphan(&self, context: &Context, mr: u32) {
        let mut known = self.known();
        let slots: Vec<_> = known.slots_of(mr).collect();
        slots.into_iter().for_each(|slot| _ = known.kill(context, slot));
    }

    /// A queue pair is reset or destroyed: windows that were its alone are free. The caller waits for its copies.
    pub fn forsake(&self, context: &Context, qpn: u32) {
        let mut known = self.known();
        let its = |window: &Window| {
            window.kind == MwType::Two && window.bound.is_some_and(|bound| bound.qpn == qpn)
        };
        let slots: Vec<_> = known.windows.iter().filter(|(_, w)| its(w)).map(|(slot, _)| *slot).collect();
        slots.into_iter().for_each(|slot| _ = known.kill(context, slot));
    }

    /// Carries out a request about the poster's own keys.
    pub fn run(&self, qp: &Qp, target: &Target, access: Access) -> WcStatus {
        let mut known = self.known();
        let done = match *target {
            Target::Bind { rkey, .. } => known.bind(qp, slot_of(rkey), target, access),
            Target::Invalidate { rkey } => known.invalidate(qp, rkey),
            _ => None,
        };
        drop(known);
        if done.is_some() { WcStatus::Success } else { WcStatus::MwBindErr }
    }

    /// A message of `qp`'s peer ended a key. The peer has used it no more since before it sent that. False: there is no such
    /// key, which no honest peer says.
    pub fn invalidated(&self, qp: &Qp, rkey: u32) -> bool {
        let mut known = self.known();
        known.bound_to(qp, rkey).is_some_and(|slot| known.kill(qp.context(), slot).is_some())
    }
}

impl Known {
    fn slots_of(&self, mr: u32) -> impl Iterator<Item = usize> + '_ {
        self.bound.range((mr, 0)..=(mr, usize::MAX)).map(|(_, slot)| *slot)
    }

    /// Nobody may begin anything under the window's key any more. What it was bound to, if it was.
    fn kill(&mut self, context: &Context, slot: usize) -> Option<Binding> {
        let bound = self.windows.get_mut(&slot)?.bound.take()?;
        self.bound.remove(&(bound.mr, slot));
        context.mrs[slot].kill();
        Some(bound)
    }

    /// The same, and what was under way has ended.
    fn unbind(&mut self, context: &Context, slot: usize) -> WaitedFor {
        let window = self.windows.get(&slot).map(|window| (window.kind, window.pd));
        let (Some((kind, pd)), Some(bound)) = (window, self.kill(context, slot)) else { return vec![] };
        let qps = match kind {
            MwType::One => context.all_qps(),
            MwType::Two => context.qp(bound.qpn).into_iter().collect(),
        };
        settle(&qps, pd);
        qps
    }

    /// None: it may not be bound so.
    fn bind(&mut self, qp: &Qp, slot: usize, target: &Target, access: Access) -> Option<WaitedFor> {
        let Target::Bind { rkey, mr, addr, len } = *target else { return None };
        let (context, pd) = (qp.context(), qp.pd_id());
        let window = self.windows.get(&slot).filter(|window| window.pd == pd)?;
        let (kind, free) = (window.kind, window.bound.is_none());
        if kind == MwType::Two && !free {
            return None;
        }
        let view = if len == 0 { None } else { Some(opened(context, pd, (mr, addr, len), access)?) };
        let waited_for = self.unbind(context, slot);
        let Some(view) = view else { return Some(waited_for) }; // of no length: it is only unbound
        let pd = match kind {
            MwType::One => domain::window_of_pd(pd),
            MwType::Two => domain::window_of_qp(qp.qpn()),
        };
        context.mrs[slot].publish(&MrView { key: rkey, pd, ..view });
        self.windows.get_mut(&slot)?.bound = Some(Binding { rkey, mr, qpn: qp.qpn() });
        self.bound.insert((mr, slot));
        Some(waited_for)
    }

    /// The window of type 2 that is bound by `qp`, under just this key.
    fn bound_to(&self, qp: &Qp, rkey: u32) -> Option<usize> {
        let slot = slot_of(rkey);
        let window = self.windows.get(&slot).filter(|window| window.kind == MwType::Two)?;
        let bound = window.bound.filter(|bound| bound.rkey == rkey && bound.qpn == qp.qpn());
        bound.map(|_| slot)
    }

    fn invalidate(&mut self, qp: &Qp, rkey: u32) -> Option<WaitedFor> {
        let slot = self.bound_to(qp, rkey)?;
        Some(self.unbind(qp.context(), slot))
    }
}

/// What a window over `[addr, addr+len)` of region `mr` opens. None: the region does not allow it.
fn opened(context: &Context, pd: u32, (mr, addr, len): (u32, u64, u64), access: Access) -> Option<MrView> {
    let region = context.mrs[slot_of(mr)].read(mr)?;
    let va = region.translate(addr, len)?;
    let writes = access.intersects(Access::REMOTE_WRITE | Access::REMOTE_ATOMIC);
    let extents: Vec<_> =
        region.extents().iter().map(|e| Extent { va: e.va, len: e.len, offset: e.offset }).collect();
    let allowed = region.pd == pd
        && region.access.contains(Access::MW_BIND)
        && (!writes || region.access.contains(Access::LOCAL_WRITE))
        && (!access.contains(Access::REMOTE_ATOMIC) || covers(&extents, va, len));
    let iova = if access.contains(Access::ZERO_BASED) { 0 } else { addr };
    let access = access & Access::WINDOW;
    allowed.then_some(MrView { access, iova, addr: va, len, ..region })
}

/// Waits until what peers had begun under a dead key has ended. A queue pair whose peer does not end its copy in time fails,
/// by a thread of its own: the caller may hold that queue pair's lock, or another one's.
fn settle(qps: &[Arc<Qp>], pd: u32) {
    let deadline = Instant::now() + QUIESCE;
    for qp in qps.iter().filter(|qp| qp.touches(pd) && !qp.quiesce(deadline)) {
        qp.expect_late_copy();
        let late = Arc::clone(qp);
        std::thread::spawn(move || late.enter_error());
    }
}

impl std::fmt::Debug for Mw {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Mw({:#x})", self.key)
    }
}
