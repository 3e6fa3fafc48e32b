//! The memory of another process's PD, as far as it is mapped here.

use std::collections::BTreeMap;
use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex, PoisonError};

use rustix::io::Errno;

use super::{Mapping, PAGE};
use crate::ring::Extent;

/// Mappings of one PD kept at a time; beyond, all unused ones are dropped.
const MAX_WINDOWS: usize = 4096;
/// Address space that the mappings of one PD may take: extents are the peer's claim, and cost it nothing.
const MAX_MAPPED: u64 = 1 << 40;

/// The memfd of a peer's PD and what of it is mapped here.
#[derive(Debug)]
pub struct PdMemoryView {
    fd: OwnedFd,
    /// Bytes in the file, for good: touching a page behind them raises SIGBUS.
    size: u64,
    windows: Mutex<BTreeMap<u64, Arc<Mapping>>>,
}

impl PdMemoryView {
    /// The router has seen that the file's size is sealed.
    pub fn new(fd: OwnedFd) -> std::result::Result<Self, Errno> {
        let size = rustix::fs::fstat(&fd)?.st_size as u64;
        Ok(PdMemoryView { fd, size, windows: Mutex::default() })
    }

    /// Maps the pages an extent is in, or finds them mapped. The mapping begins at the start of the first page.
    pub fn window(&self, extent: &Extent) -> std::result::Result<Arc<Mapping>, Errno> {
        let (offset, len) = whole_pages(extent).ok_or(Errno::INVAL)?;
        if offset + len as u64 > self.size {
            return Err(Errno::INVAL);
        }
        let mut windows = self.windows.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(found) = windows.get(&offset).filter(|map| map.len() >= len) {
            return Ok(Arc::clone(found));
        }
        let mapped: u64 = windows.values().map(|map| map.len() as u64).sum();
        if windows.len() >= MAX_WINDOWS || mapped + len as u64 > MAX_MAPPED {
            windows.retain(|_, map| Arc::strong_count(map) > 1);
            let kept: u64 = windows.values().map(|map| map.len() as u64).sum();
            if windows.len() >= MAX_WINDOWS || kept.saturating_add(len as u64) > MAX_MAPPED {
                return Err(Errno::NOMEM);
            }
        }
        let map = Mapping::new(&self.fd, offset, len, true)?;
        map.dont_fork();
        let map = Arc::new(map);
        windows.insert(offset, Arc::clone(&map));
        Ok(map)
    }
}

/// File offset and length of the whole pages an extent is in; None if a peer wrote nonsense.
fn whole_pages(extent: &Extent) -> Option<(u64, usize)> {
    let lead = extent.offset % PAGE;
    let congruent = extent.va % PAGE == lead;
    let len = lead.checked_add(extent.len)?.checked_next_multiple_of(PAGE)?;
    let start = extent.offset - lead;
    start.checked_add(len).filter(|_| congruent && extent.len > 0)?;
    Some((start, usize::try_from(len).ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn extents_are_mapped_by_whole_pages() {
        let pages = |va, len, offset| whole_pages(&Extent { va, len, offset });
        assert_eq!(pages(0x5000, 0x1000, 0x3000), Some((0x3000, 0x1000)));
        assert_eq!(pages(0x5010, 64, 0x3010), Some((0x3000, 0x1000)), "an MR smaller than a page");
        assert_eq!(pages(0x5ff0, 32, 0x3ff0), Some((0x3000, 0x2000)), "across a page border");
        assert_eq!(pages(0x5010, 64, 0x3000), None, "addresses that no mapping can have");
        assert_eq!(pages(0x5000, 0, 0x3000), None);
        assert_eq!(pages(0x5000, u64::MAX, 0x3000), None);
        assert_eq!(pages(0xf000, 0x2000, u64::MAX - 0xfff), None);
    }

    #[test]
    fn nothing_is_mapped_beyond_the_file() {
        let fd = crate::shm::make_memfd("peer", 2 * PAGE).expect("memfd");
        let view = PdMemoryView::new(fd).expect("fstat");
        let window =
            |len, offset| view.window(&Extent { va: 0x5000, len, offset }).map(|map| map.len() as u64);
        assert_eq!(window(PAGE, PAGE), Ok(PAGE));
        assert_eq!(window(2 * PAGE, 0), Ok(2 * PAGE));
        assert_eq!(window(PAGE, 2 * PAGE), Err(Errno::INVAL));
        assert_eq!(window(2 * PAGE, PAGE), Err(Errno::INVAL));
    }

    #[test]
    fn a_peers_claims_do_not_take_all_address_space() {
        let extent = |len, offset| Extent { va: 0x7000_0000, len, offset };
        let vast = PdMemoryView::new(crate::shm::make_memfd("vast", 1 << 50).expect("memfd")).expect("view");
        let kept = vast.window(&extent(MAX_MAPPED / 2, 0)).expect("half of what is allowed");
        let quarter = MAX_MAPPED / 4;
        drop(vast.window(&extent(quarter, MAX_MAPPED)).expect("in use no longer"));
        let _kept = (kept, vast.window(&extent(MAX_MAPPED / 2, 2 * MAX_MAPPED)).expect("in its place"));
        assert_eq!(vast.window(&extent(0x1000, 0)).expect("mapped already").len() as u64, MAX_MAPPED / 2);
        assert_eq!(vast.window(&extent(0x1000, 4096)).expect_err("everything is in use"), Errno::NOMEM);
    }
}
