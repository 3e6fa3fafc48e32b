//! Protection domains and memory regions.

use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::ctl::{AllocPd, DeallocPd, DeregMr};
use crate::error::{Error, Result};
use crate::exec::LocalTable;
use crate::ring::mr::slot_of;
use crate::ring::{Extent, MrView};
use crate::sync::{AtomicUsize, Ordering};
use crate::verbs::{Access, Sge};

use super::context::Context;
use super::keys::Keys;
use super::mem::{MemError, PdMemory, Registration, Want};

/// How long deregistration and ERR wait for copies of honest peers; a copy step is bounded, so this is generous.
pub(super) const QUIESCE: Duration = Duration::from_secs(1);

/// A protection domain.
pub struct Pd {
    pub(super) context: Arc<Context>,
    pub(super) id: u32,
    memory: Arc<PdMemory>,
    keys: Keys,
    /// Copies that were given up on: their bytes may still come, so no place in the file is used twice meanwhile.
    late_copies: AtomicUsize,
}

/// A memory region.
pub struct Mr {
    pd: Arc<Pd>,
    key: u32,
    addr: u64,
    len: u64,
    /// Gives the pages back when dropped, after the key is dead. None only then.
    registration: Option<Registration>,
}

impl Context {
    /// ibv_alloc_pd(3).
    pub fn alloc_pd(self: &Arc<Self>) -> Result<Arc<Pd>> {
        let memory = PdMemory::new()?;
        let id = self.conn.call(&AllocPd {}, &[memory.fd()])?.0.id;
        let (keys, late_copies) = (Keys::new(id), AtomicUsize::new(0));
        Ok(Arc::new(Pd { context: Arc::clone(self), id, memory, keys, late_copies }))
    }
}

impl Pd {
    /// The context it belongs to.
    pub fn context(&self) -> &Arc<Context> {
        &self.context
    }

    /// A peer of one of its QPs did not end its copy in time (it is stopped): what it writes when it goes on must not
    /// land in memory that is registered by then.
    pub(super) fn expect_late_copy(&self) {
        self.late_copies.fetch_add(1, Ordering::AcqRel);
    }

    /// That peer is dead.
    pub(super) fn late_copy_ended(&self) {
        self.late_copies.fetch_sub(1, Ordering::AcqRel);
    }

    /// ibv_reg_mr(3), ibv_reg_mr_iova(3): registers `[addr, addr+len)`; requests name it by addresses from `iova` on.
    pub fn reg_mr(self: &Arc<Self>, addr: u64, len: u64, iova: u64, access: Access) -> Result<Arc<Mr>> {
        check_rights(access)?;
        if access.contains(Access::ON_DEMAND) && (addr, len) == (0, u64::MAX) {
            return self.reg_everything(access);
        }
        if addr.checked_add(len).is_none() || iova.checked_add(len).is_none() {
            return Err(Error::BadAddress { addr, len, why: "wraps around" });
        }
        let iova = if access.contains(Access::ZERO_BASED) { 0 } else { iova };
        let context = &self.context;
        let want = Want {
            remote: access.intersects(Access::REMOTE | Access::MW_BIND),
            local_write: access.contains(Access::LOCAL_WRITE),
        };
        let key = if self.memory.has_moved(addr, len, want) {
            self.keys.for_known_memory(&context.conn, addr, len, access)?
        } else {
            self.keys.for_new_memory(&context.conn, addr, len, access)?
        };
        let registration = match self.memory.register(addr, len, want) {
            Ok(registration) => registration,
            Err(error) => {
                let _ = context.conn.ask(&DeregMr { key, _pad: 0 });
                return Err(error.into());
            }
        };
        if access.contains(Access::REMOTE_ATOMIC) && !covers(registration.extents(), addr, len) {
            let _ = context.conn.ask(&DeregMr { key, _pad: 0 });
            return Err(Error::Unsupported(
                "REMOTE_ATOMIC on memory whose pages cannot move (stack, file, hugetlb, locked)",
            ));
        }
        let view = MrView { key, access, pd: self.id, iova, addr, len, ..MrView::default() };
        Ok(self.publish(view, registration))
    }

    /// Implicit on-demand paging: the whole address space. Nothing moves; peers reach it through the router, which faults pages
    /// in as the program itself would.
    fn reg_everything(self: &Arc<Self>, access: Access) -> Result<Arc<Mr>> {
        if access.contains(Access::REMOTE_ATOMIC) {
            return Err(Error::Unsupported("REMOTE_ATOMIC on the whole address space"));
        }
        let key = self.keys.for_new_memory(&self.context.conn, 0, 0, access)?;
        let view = MrView { key, access, pd: self.id, len: u64::MAX, ..MrView::default() };
        self.context.mrs[slot_of(key)].publish(&view);
        Ok(Arc::new(Mr { pd: Arc::clone(self), key, addr: 0, len: u64::MAX, registration: None }))
    }

    /// A key that opens nothing until the table says what.
    pub(super) fn key_of_no_memory(&self) -> Result<u32> {
        self.keys.for_new_memory(&self.context.conn, 0, 0, Access::empty())
    }

    /// A key of this PD is dead: waits until nothing happens under it any more.
    pub(super) fn revoke(&self) {
        let deadline = Instant::now() + QUIESCE;
        for qp in self.context.all_qps().into_iter().filter(|qp| qp.touches(self.id)) {
            // A send of ours may be reading it; the next one sees the dead key.
            qp.settle();
            if !qp.quiesce(deadline) {
                qp.expect_late_copy();
                qp.enter_error();
            }
        }
    }

    /// Does `sge` name memory of this PD, by a key that grants `need`? Where it is, then.
    pub fn resolve(&self, sge: &Sge, need: Access) -> Option<u64> {
        LocalTable::new(&self.context.mrs, self.id).check(sge, need)
    }

    /// New zeroed memory that is registered from birth: its pages need not move, and untouched ones cost nothing. It
    /// goes with the region.
    pub fn allocate(self: &Arc<Self>, len: u64, access: Access) -> Result<Arc<Mr>> {
        let context = &self.context;
        let registration = self.new_memory(len)?;
        let super::mem::Extent { va: addr, len, .. } = registration.extents()[0];
        let key = self.keys.for_new_memory(&context.conn, addr, len, access)?;
        let view = MrView { key, access, pd: self.id, iova: addr, addr, len, ..MrView::default() };
        Ok(self.publish(view, registration))
    }

    /// Zeroed memory that comes as it is touched, where a peer can map it.
    pub(super) fn new_memory(&self, len: u64) -> Result<Registration> {
        Ok(self.memory.allocate(len)?)
    }

    /// From now on peers may use the key.
    fn publish(self: &Arc<Self>, mut view: MrView, registration: Registration) -> Arc<Mr> {
        let MrView { key, addr, len, .. } = view;
        for (slot, extent) in view.extents.iter_mut().zip(registration.extents()) {
            *slot = Extent { va: extent.va, len: extent.len, offset: extent.offset };
            view.extent_count += 1;
        }
        self.context.mrs[slot_of(key)].publish(&view);
        Arc::new(Mr { pd: Arc::clone(self), key, addr, len, registration: Some(registration) })
    }
}

fn check_rights(access: Access) -> Result<()> {
    let writes = access.intersects(Access::REMOTE_WRITE | Access::REMOTE_ATOMIC);
    if writes && !access.contains(Access::LOCAL_WRITE) {
        return Err(Error::Invalid("REMOTE_WRITE and REMOTE_ATOMIC need LOCAL_WRITE"));
    }
    Ok(())
}

/// Do the extents hold all of the range?
pub(super) fn covers(extents: &[super::mem::Extent], addr: u64, len: u64) -> bool {
    let mut at = addr;
    while at < addr + len {
        match extents.iter().find(|e| e.va <= at && at < e.va + e.len) {
            Some(extent) => at = extent.va + extent.len,
            None => return false,
        }
    }
    true
}

impl Drop for Pd {
    fn drop(&mut self) {
        self.keys.give_back(&self.context.conn);
        let _ = self.context.conn.ask(&DeallocPd { pd: self.id });
    }
}

impl Mr {
    /// lkey and rkey.
    pub fn key(&self) -> u32 {
        self.key
    }

    /// Is a memory window bound to it? Then it can be neither deregistered nor changed.
    pub fn is_bound(&self) -> bool {
        self.pd.context.windows.are_bound(self.key)
    }

    /// ibv_rereg_mr(3) of the rights alone: the key stays, and when it returns nothing happens under the old ones.
    pub fn set_access(&self, access: Access) -> Result<()> {
        check_rights(access)?;
        let entry = &self.pd.context.mrs[slot_of(self.key)];
        let view = entry.read(self.key).ok_or(Error::Invalid("the region is being changed"))?;
        let extents = self.registration.as_ref().map_or(&[][..], Registration::extents);
        if access.contains(Access::REMOTE_ATOMIC) && !covers(extents, self.addr, self.len) {
            return Err(Error::Unsupported("REMOTE_ATOMIC on memory whose pages did not move"));
        }
        entry.kill();
        self.pd.revoke();
        entry.publish(&MrView { access, ..view });
        Ok(())
    }

    /// First byte, in this process.
    pub fn addr(&self) -> u64 {
        self.addr
    }

    pub fn len(&self) -> u64 {
        self.len
    }

    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Is all of it where a peer can map it? Stacks, files and locked memory never are.
    pub fn is_movable(&self) -> bool {
        self.registration.as_ref().is_some_and(|r| covers(r.extents(), self.addr, self.len))
    }

    /// Whether its memory is still what was registered: a program may have unmapped it and mapped something else there
    /// without deregistering.
    pub fn is_still_mapped(&self) -> bool {
        self.registration.as_ref().is_some_and(Registration::still_mapped)
    }
}

impl Drop for Mr {
    /// ibv_dereg_mr(3): when it returns, nothing lands any more, and nothing is read any more.
    fn drop(&mut self) {
        let context = &self.pd.context;
        if context.conn.is_inherited() {
            return;
        }
        context.mrs[slot_of(self.key)].kill();
        context.windows.orphan(context, self.key);
        self.pd.revoke();
        let _ = context.conn.ask(&DeregMr { key: self.key, _pad: 0 });
        if self.pd.late_copies.load(Ordering::Acquire) > 0
            && let Some(registration) = self.registration.take()
        {
            registration.retire();
        }
    }
}

impl From<MemError> for Error {
    fn from(error: MemError) -> Self {
        Error::Memory { errno: error.errno(), why: error.to_string() }
    }
}

impl std::fmt::Debug for Pd {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Pd").field("id", &self.id).finish_non_exhaustive()
    }
}

impl std::fmt::Debug for Mr {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Mr({:#x})", self.key)
    }
}
