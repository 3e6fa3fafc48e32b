//! Registered memory that UCX gave back: it will likely be registered again, and moving its pages to and fro would cost more
//! than any transfer.
//!
//! UCX before 1.14 registers a buffer for each transfer. The program may unmap memory that is only held here: what it
//! unmapped is dropped ([`Unmaps`]).

use std::sync::Arc;

use freeflow_core::client::{Mr, Pd};
use freeflow_core::error::Result;

use super::register_anew;
use super::unmaps::{Unmapped, Unmaps};

/// Regions kept.
const MOST: usize = 64;
/// Regions are whole pages: neighbours are found again.
const PAGE: u64 = 4096;

/// Of one protection domain.
pub struct Cache {
    /// Most recently used last.
    kept: Vec<Arc<Mr>>,
    unmaps: Unmaps,
}

impl Cache {
    pub fn new(unmaps: Unmaps) -> Self {
        Cache { kept: Vec::new(), unmaps }
    }

    /// A region that holds `[addr, addr+len)`.
    pub fn get(&mut self, pd: &Arc<Pd>, addr: u64, len: u64) -> Result<Arc<Mr>> {
        let ask = self.drop_unmapped();
        if let Some(known) = self.find(addr, len, ask) {
            return Ok(known);
        }
        if ask {
            self.kept.retain(|mr| mr.is_still_mapped());
        }
        let start = addr - addr % PAGE;
        let end = addr.saturating_add(len).checked_next_multiple_of(PAGE).unwrap_or(u64::MAX);
        let whole = register_anew(pd, start, end - start);
        let made = whole.or_else(|_| {
            self.kept.clear(); // the quota may be short
            register_anew(pd, addr, len)
        })?;
        // Memory that cannot move has no mapping of ours to look at: kept, its region might be over anything by and by.
        if made.is_movable() {
            self.keep(Arc::clone(&made));
        }
        Ok(made)
    }

    /// Drops what is over memory that was unmapped since the last call. True: the kernel must be asked about what is left.
    fn drop_unmapped(&mut self) -> bool {
        match self.unmaps.take() {
            Unmapped::Nothing => false,
            Unmapped::These(ranges) => {
                let over =
                    |mr: &Arc<Mr>, (start, end): (u64, u64)| mr.addr() < end && start < mr.addr() + mr.len();
                self.kept.retain(|mr| !ranges.iter().any(|range| over(mr, *range)));
                false
            }
            Unmapped::Anything => {
                self.kept.clear();
                false
            }
            Unmapped::Unknown => true,
        }
    }

    fn find(&mut self, addr: u64, len: u64, ask: bool) -> Option<Arc<Mr>> {
        let holds = |mr: &Arc<Mr>| {
            mr.addr() <= addr && addr - mr.addr() <= mr.len() && len <= mr.len() - (addr - mr.addr())
        };
        let at = self.kept.iter().rposition(holds)?;
        if ask && !self.kept[at].is_still_mapped() {
            self.kept.remove(at);
            return None;
        }
        self.kept[at..].rotate_left(1);
        self.kept.last().cloned()
    }

    fn keep(&mut self, mr: Arc<Mr>) {
        if self.kept.len() == MOST {
            self.kept.remove(0);
        }
        self.kept.push(mr);
    }
}
