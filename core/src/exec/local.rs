//! The poster's own memory regions.

use crate::ring::{MrEntry, mr::slot_of};
use crate::verbs::{Access, Sge};

/// A process's own MR table, as one protection domain sees it.
#[derive(Debug, Clone, Copy)]
pub struct LocalTable<'a> {
    entries: &'a [MrEntry],
    pd: u32,
}

impl<'a> LocalTable<'a> {
    pub fn new(entries: &'a [MrEntry], pd: u32) -> Self {
        LocalTable { entries, pd }
    }

    /// The virtual address of `sge`, if its lkey grants `need` there. Entries of length 0 name nothing.
    #[inline(always)]
    pub fn check(&self, sge: &Sge, need: Access) -> Option<u64> {
        if sge.length == 0 {
            return Some(sge.addr);
        }
        let (entry, len) = (self.entries.get(slot_of(sge.lkey))?, u64::from(sge.length));
        let found = entry.check(sge.lkey, self.pd, need, sge.addr, len);
        found.or_else(|| entry.check_null(sge.lkey, self.pd, need, len))
    }
}
