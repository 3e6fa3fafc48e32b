//! Shared memory: memfds, mappings of them, and the copies into pages that others see.
//!
//! Owns every raw pointer into shared memory; what is in the pages is `ring`'s business. The only `unsafe` outside
//! `client::mem` (which moves the program's own pages) and the doors.

mod copy;
mod mapping;
mod memfd;

pub use copy::{LocalBytes, SharedBytes, atomic_word, copy_in, copy_out, prefetch_for_write};
pub use mapping::{Mapping, Shared, View};
pub use memfd::{is_sealed_memfd, make_memfd, reopen_read_only, seal};

/// Size of a page.
pub const PAGE: u64 = 4096;
