//! Shared memory: memfds, mappings of them, the copies into pages that others see, and the bells beside them.
//!
//! Owns every raw pointer into shared memory; what is in the pages is `ring`'s business. The only `unsafe` outside
//! `client::mem` (which moves the program's own pages) and the doors.

mod bell;
mod copy;
mod lent;
mod mapping;
mod memfd;
mod windows;

pub use bell::{Bell, hush, make_bell};
pub use copy::{
    LocalBytes, SharedBytes, atomic_word, copy_in, copy_out, prefetch_for_read, prefetch_for_write,
};
pub use lent::{Array, Lender, Loan, Purpose};
pub use mapping::{Mapping, Shared, View};
pub use memfd::{is_sealed_memfd, make_memfd, make_owned_memfd, reopen_read_only, seal_for_owner};
pub use windows::PdMemoryView;

/// Size of a page.
pub const PAGE: u64 = 4096;
