//! Memory made in a PD's file for the program: it never has to move, and costs nothing where it was never touched.

use std::sync::Arc;

use super::{Extent, MemError, PdMemory, RUNS, Registration, mover, os, pages, too_many_runs};
use std::sync::atomic::Ordering;

impl PdMemory {
    /// New zeroed memory of at least `len` bytes, registered. It goes when the registration does, and its place in the
    /// file is never used again: a peer may be slow to learn of it.
    pub fn allocate(self: &Arc<Self>, len: u64) -> Result<Registration, MemError> {
        if self.is_foreign() {
            return Err(MemError::Forked);
        }
        let len =
            len.max(1).checked_next_multiple_of(os::page_size()).ok_or(MemError::Wraps { addr: 0, len })?;
        let _mover = mover();
        let va = os::reserve(len).map_err(|errno| MemError::System { what: "reserving addresses", errno })?;
        let parts = match self.map_new(va, len) {
            Ok(part) => vec![part],
            Err(error) => {
                pages::unmap(va, len);
                return Err(error);
            }
        };
        let extents = vec![Extent { va, len, offset: parts[0].off }];
        Ok(Registration { pd: Arc::clone(self), parts, extents, unmoved: None, retire: true, owned: true })
    }

    fn map_new(&self, va: u64, len: u64) -> Result<super::Part, MemError> {
        self.with_book(|book| {
            // Whatever was known of these addresses is gone.
            book.table.forget(va, va + len);
            let no_room = || MemError::TooManyRuns(RUNS.load(Ordering::Relaxed));
            let off = Some(()).filter(|()| !too_many_runs()).and_then(|()| book.windows.fresh(va, len));
            let off = off.ok_or_else(no_room)?;
            if let Err(errno) = pages::map_aside(va, len, self.fd(), off) {
                book.windows.release(off, len);
                return Err(MemError::System { what: "mapping a PD's file", errno });
            }
            Ok(book.table.insert(va, va + len, off))
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::client::mem::Want;

    #[test]
    fn memory_that_was_made_here_is_known_and_goes_with_its_registration() {
        let pd = PdMemory::new().unwrap();
        let made = pd.allocate(3 * 4096 + 1).unwrap();
        let Extent { va, len, .. } = made.extents()[0];
        assert_eq!(len, 4 * 4096);
        assert!(made.still_mapped());
        let want = Want { remote: true, local_write: true };
        assert!(pd.has_moved(va, len, want));
        let part = pd.register(va + 4096, 100, want).unwrap();
        assert_eq!(
            part.extents()[0].offset,
            made.extents()[0].offset + 4096,
            "registering it again moves nothing"
        );
        drop(part);
        let again = pd.allocate(4096).unwrap();
        assert_ne!(again.extents()[0].offset, made.extents()[0].offset);
        drop(made);
        assert_eq!(pd.register(va, len, want).err().map(|e| e.errno()), Some(rustix::io::Errno::FAULT));
    }
}
