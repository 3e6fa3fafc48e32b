//! 2 MiB pages for tests that use them: reserved for as long as the test runs, where this user may.

use std::fs;

const FILE: &str = "/proc/sys/vm/nr_hugepages";

/// A reservation; what was there before comes back when it is dropped.
#[derive(Debug)]
pub struct Reserved {
    before: Option<u64>,
}

/// Makes sure that at least `pages` are there. None: this user may not, or the memory has no such pieces left.
pub fn reserve(pages: u64) -> Option<Reserved> {
    let before = count()?;
    if before >= pages {
        return Some(Reserved { before: None });
    }
    fs::write(FILE, pages.to_string()).ok()?;
    let reserved = Reserved { before: Some(before) };
    (count()? >= pages).then_some(reserved)
}

fn count() -> Option<u64> {
    fs::read_to_string(FILE).ok()?.trim().parse().ok()
}

impl Drop for Reserved {
    fn drop(&mut self) {
        if let Some(before) = self.before {
            // Best effort: the pages are only memory.
            fs::write(FILE, before.to_string()).ok();
        }
    }
}
