//! The null memory region: an lkey under which what is received is discarded and what is sent is zeros, whatever the address.
//!
//! Its entry in the table names two places of new, sparse memory: one that nobody reads, and one that nobody writes. A peer
//! that scatters a message into the first finds it like any other buffer. Pages come as they are touched: as many as the
//! longest piece of a message that was discarded, and they stay until the region goes.

use std::sync::Arc;

use crate::ctl::DeregMr;
use crate::error::Result;
use crate::ring::mr::{domain, slot_of};
use crate::ring::{Extent, MrView};
use crate::verbs::{Access, limits};

use super::mem::Registration;
use super::pd::Pd;

/// ibv_alloc_null_mr(3).
pub struct NullMr {
    pd: Arc<Pd>,
    key: u32,
    _memory: [Registration; 2],
}

impl Pd {
    /// ibv_alloc_null_mr(3).
    pub fn alloc_null_mr(self: &Arc<Self>) -> Result<Arc<NullMr>> {
        let len = limits::MESSAGE;
        let memory = [self.new_memory(len)?, self.new_memory(len)?];
        let [sink, zeros] = memory.each_ref().map(|part| {
            let extent = part.extents()[0];
            Extent { va: extent.va, len: extent.len, offset: extent.offset }
        });
        let key = self.key_of_no_memory()?;
        let mut view = MrView { key, access: Access::LOCAL_WRITE, len, ..MrView::default() };
        (view.pd, view.addr, view.iova) = (domain::null_of_pd(self.id), sink.va, zeros.va);
        (view.extents[0], view.extents[1], view.extent_count) = (sink, zeros, 2);
        self.context.mrs[slot_of(key)].publish(&view);
        Ok(Arc::new(NullMr { pd: Arc::clone(self), key, _memory: memory }))
    }
}

impl NullMr {
    pub fn lkey(&self) -> u32 {
        self.key
    }
}

impl Drop for NullMr {
    fn drop(&mut self) {
        let context = &self.pd.context;
        if context.conn.is_inherited() {
            return;
        }
        context.mrs[slot_of(self.key)].kill();
        self.pd.revoke();
        let _ = context.conn.ask(&DeregMr { key: self.key, _pad: 0 });
    }
}

impl std::fmt::Debug for NullMr {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "NullMr({:#x})", self.key)
    }
}
