//! Moving runs of the program's pages into the file and back, a frozen chunk at a time.
//!
//! Where a run holds whole huge pages, the file's pages are made and mapped aside beforehand, so that nothing but
//! the copy happens while a chunk is frozen; afterwards the run is mapped by huge pages.

use std::os::fd::BorrowedFd;

use rustix::io::Errno;

use super::freeze::{CHUNK, frozen};
use super::maps::Vma;
use super::os::{self, Pagemap};
use super::pages::{self, Sharing};

/// A huge page.
const HUGE: u64 = 2 << 20;
/// Bytes made ready at a time. (Each time asks all processors to drain their lists of pages; but what was made is
/// still in the cache when it is copied to.)
const BATCH: u64 = 4 << 20;
/// Bytes frozen at a time where only the copy is left to do: they are done in the time that [`CHUNK`] bytes take
/// otherwise, and freezing costs as much as copying 64 KiB.
const READY_CHUNK: u64 = 256 << 10;
/// Longest scratch mapping used when pages are given back: as long a mapping is what the program gets.
const SCRATCH: u64 = 64 << 20;
const PAGES: usize = READY_CHUNK as usize / 4096;

/// Moves `[vma.start, vma.end)` (already clipped to what shall move) into the file at `off`. Tells how far it
/// got: what is left over stayed as it was.
pub(super) fn move_in(vma: &Vma, fd: BorrowedFd<'_>, off: u64) -> (u64, Result<(), Errno>) {
    let (low, high) = whole_huge_pages(vma, off);
    let mut aside = if low < high { Aside::new().ok() } else { None };
    let mut at = vma.start;
    while at < vma.end {
        let staged = (low..high).contains(&at);
        let end = if staged {
            high.min(at + BATCH)
        } else if at < low {
            low
        } else {
            vma.end
        };
        let (part, to) = (vma.clip(at, end), off + (at - vma.start));
        let ready = aside.as_mut().filter(|_| staged).and_then(|a| a.make(fd, to, end - at).ok());
        let (end, result) = chunks_in(&part, fd, to, ready);
        if result.is_err() {
            return (end, result);
        }
        at = end;
    }
    if aside.is_some_and(|a| a.huge) {
        // Only faster afterwards.
        let _ = pages::collapse(low, high - low);
    }
    (at, Ok(()))
}

/// The part of a run that huge pages can hold: none unless addresses and offsets agree.
fn whole_huge_pages(vma: &Vma, off: u64) -> (u64, u64) {
    let (low, high) = (vma.start.next_multiple_of(HUGE), vma.end / HUGE * HUGE);
    if (vma.start ^ off).is_multiple_of(HUGE) && low < high { (low, high) } else { (vma.end, vma.end) }
}

fn chunks_in(part: &Vma, fd: BorrowedFd<'_>, off: u64, ready: Option<Ready<'_>>) -> (u64, Result<(), Errno>) {
    let most = if ready.is_some() { READY_CHUNK } else { CHUNK };
    let mut at = part.start;
    while at < part.end {
        let (len, skip) = (most.min(part.end - at), at - part.start);
        let moved = frozen(at, len, || {
            let r = pages::protect(at, len, part, true)
                .and_then(|()| match &ready {
                    Some(ready) => ready.take_in(at, len, skip),
                    None => pages::write_out(at, len, fd, off + skip),
                })
                .and_then(|()| pages::map_file(at, len, part, Sharing::Shared, fd, off + skip));
            if r.is_err() {
                let _ = pages::protect(at, len, part, false);
            }
            r
        });
        if moved.is_err() {
            return (at, moved);
        }
        at += len;
    }
    (at, Ok(()))
}

/// A second mapping of a stretch of the file, at a huge page's boundary.
struct Aside {
    reserved: u64,
    at: u64,
    /// The kernel has given huge pages. Asked no more once it has refused: it tries hard before it does.
    huge: bool,
    refused: bool,
    pagemap: Option<Pagemap>,
}

/// Pages of the file that are there, all zero, mapped at `at`.
struct Ready<'a> {
    at: u64,
    pagemap: Option<&'a Pagemap>,
}

impl Aside {
    fn new() -> Result<Self, Errno> {
        let reserved = os::reserve(BATCH + HUGE)?;
        let at = reserved.next_multiple_of(HUGE);
        Ok(Aside { reserved, at, huge: false, refused: false, pagemap: Pagemap::open().ok() })
    }

    /// Has the file's pages made and maps them. Fails where there is no memory, or the kernel is too old.
    fn make(&mut self, fd: BorrowedFd<'_>, off: u64, len: u64) -> Result<Ready<'_>, Errno> {
        pages::map_aside(self.at, len, fd, off)?;
        if !self.refused {
            for first in (self.at..self.at + len).step_by(HUGE as usize) {
                // A file without any page here is not collapsed.
                os::populate(first, os::page_size())?;
            }
            self.refused = pages::collapse(self.at, len).is_err();
            self.huge |= !self.refused;
        }
        os::populate(self.at, len)?;
        Ok(Ready { at: self.at, pagemap: self.pagemap.as_ref() })
    }
}

impl Drop for Aside {
    fn drop(&mut self) {
        pages::unmap(self.reserved, BATCH + HUGE);
    }
}

impl Ready<'_> {
    /// Copies a frozen chunk, unless the program never wrote to it.
    fn take_in(&self, start: u64, len: u64, skip: u64) -> Result<(), Errno> {
        let mut own = [true; PAGES];
        let own = &mut own[..(len / os::page_size()) as usize];
        if let Some(pagemap) = self.pagemap {
            pagemap.own_copies(start, own)?;
        }
        if own.contains(&true) {
            pages::copy(start, self.at + skip, len);
        }
        Ok(())
    }
}

/// Gives `[vma.start, vma.end)`, which maps the file from `vma.offset`, back as private memory with the same
/// bytes. Returns how far it got.
pub(super) fn move_out(vma: &Vma, fd: BorrowedFd<'_>) -> u64 {
    let mut at = vma.start;
    while at < vma.end {
        let len = SCRATCH.min(vma.end - at);
        let Ok(scratch) = os::anonymous(len) else { break };
        let end = scratch_out(&vma.clip(at, at + len), fd, scratch);
        // Pages already moved over are holes here by now; no other thread's mapping can be told from a hole,
        // so only the rest is unmapped.
        if end < at + len {
            pages::unmap(scratch + (end - at), at + len - end);
            return end;
        }
        at = end;
    }
    at
}

/// Gives back what one scratch mapping can hold, a huge page's length at a time.
fn scratch_out(vma: &Vma, fd: BorrowedFd<'_>, scratch: u64) -> u64 {
    let mut at = vma.start;
    while at < vma.end {
        let part = vma.clip(at, (at + 1).next_multiple_of(HUGE));
        let end = chunks_out(&part, fd, scratch + (at - vma.start));
        if end < part.end {
            return end;
        }
        at = end;
    }
    at
}

fn chunks_out(part: &Vma, fd: BorrowedFd<'_>, scratch: u64) -> u64 {
    let all = os::is_all_data(fd, part.offset, part.offset + (part.end - part.start));
    if all {
        // Where the kernel cannot, it is only slower.
        let _ = os::populate(scratch, part.end - part.start);
    }
    let mut at = part.start;
    while at < part.end {
        let len = CHUNK.min(part.end - at);
        let (from, off) = (scratch + (at - part.start), part.offset + (at - part.start));
        if !all && os::next_data(fd, off, off + len).is_some() {
            let _ = os::populate(from, len);
        }
        let moved = frozen(at, len, || {
            let r = pages::protect(at, len, part, true)
                .and_then(|()| {
                    if all || os::next_data(fd, off, off + len).is_some() {
                        pages::read_in(from, len, fd, off)
                    } else {
                        Ok(())
                    }
                })
                .and_then(|()| {
                    if part.read && part.write { Ok(()) } else { pages::protect(from, len, part, false) }
                })
                .and_then(|()| pages::move_over(from, at, len));
            if r.is_err() {
                let _ = pages::protect(at, len, part, false);
            }
            r
        });
        if moved.is_err() {
            break;
        }
        at += len;
    }
    at
}
