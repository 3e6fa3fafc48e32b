//! What this library does not do, each with its documented way to say so.

use crate::edge::{Errno, set_errno};

/// Multicast: -1 and EOPNOTSUPP.
pub extern "C" fn multicast() -> isize {
    set_errno(Errno::OPNOTSUPP);
    -1
}
