//! The process's mappings, kept open: a question to an open descriptor costs a fraction of opening one.
//!
//! A program may close all descriptors it does not know, and get the number again for a file of its own. So an
//! answer that is none means that this one is lost; nothing but the query is ever asked of it, and it is not closed.

use std::os::fd::{IntoRawFd, OwnedFd};

use super::maps::Vma;
use super::os::{self, Maps};

pub(super) struct Recall {
    /// And the fork generation that it was opened in: a child's mappings are others.
    open: Option<(u64, Maps)>,
}

impl Recall {
    pub const fn new() -> Self {
        Recall { open: None }
    }

    /// The mapping that holds `addr`, without its name. None: there is none, or it must be looked up otherwise.
    pub fn at(&mut self, generation: u64, addr: u64) -> Option<Vma> {
        if !os::has_query() {
            return None;
        }
        if self.open.as_ref().is_none_or(|(opened, _)| *opened != generation) {
            self.lose();
            self.open = Some((generation, Maps::open().ok()?));
        }
        let (_, maps) = self.open.as_ref()?;
        match maps.nameless(addr) {
            Ok(vma) => (vma.start <= addr).then_some(vma),
            Err(rustix::io::Errno::NOENT) => None,
            Err(_) => {
                self.lose();
                None
            }
        }
    }

    fn lose(&mut self) {
        if let Some((_, maps)) = self.open.take() {
            let _ = OwnedFd::from(maps).into_raw_fd();
        }
    }
}
