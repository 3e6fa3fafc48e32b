//! Registered memory that UCX gave back: it will likely be registered again, and moving its pages to and fro would cost more
//! than any transfer.
//!
//! UCX before 1.14 registers a buffer for each transfer. The program may unmap memory that is only held here: what is
//! found unmapped is dropped.

use std::sync::Arc;

use freeflow_core::client::{Mr, Pd};
use freeflow_core::error::Result;

use super::register_anew;

/// Regions kept.
const MOST: usize = 64;
/// Regions are whole pages: neighbours are found again.
const PAGE: u64 = 4096;

/// Most recently used last.
#[derive(Default)]
pub struct Cache(Vec<Arc<Mr>>);

impl Cache {
    /// A region that holds `[addr, addr+len)`.
    pub fn get(&mut self, pd: &Arc<Pd>, addr: u64, len: u64) -> Result<Arc<Mr>> {
        if let Some(known) = self.find(addr, len) {
            return Ok(known);
        }
        self.0.retain(|mr| mr.is_still_mapped());
        let start = addr - addr % PAGE;
        let end = addr.saturating_add(len).checked_next_multiple_of(PAGE).unwrap_or(u64::MAX);
        let whole = register_anew(pd, start, end - start);
        let made = whole.or_else(|_| {
            self.0.clear(); // the quota may be short
            register_anew(pd, addr, len)
        })?;
        self.keep(Arc::clone(&made));
        Ok(made)
    }

    fn find(&mut self, addr: u64, len: u64) -> Option<Arc<Mr>> {
        let holds = |mr: &Arc<Mr>| {
            mr.addr() <= addr && addr - mr.addr() <= mr.len() && len <= mr.len() - (addr - mr.addr())
        };
        let at = self.0.iter().rposition(holds)?;
        let found = self.0.remove(at);
        // Memory that did not move has no mapping of ours to look at: its region may be over anything by now. And a region with
        // some of it grants no atomics, which the part that is asked for may well be fit for.
        if !found.is_still_mapped() || !found.is_movable() {
            return None;
        }
        self.0.push(Arc::clone(&found));
        Some(found)
    }

    fn keep(&mut self, mr: Arc<Mr>) {
        if self.0.len() == MOST {
            self.0.remove(0);
        }
        self.0.push(mr);
    }

    /// UCX has no more use for it.
    pub fn put(&mut self, mr: Arc<Mr>) {
        if !mr.is_still_mapped() {
            self.0.retain(|kept| !Arc::ptr_eq(kept, &mr));
        }
    }
}
