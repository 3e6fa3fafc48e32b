//! What this library does not do, each with its documented way to say so.

use crate::edge::{Errno, set_errno};

/// rsockets: -1 and ENOSYS. Fits their `int`, `ssize_t` and `off_t` results alike.
pub extern "C" fn rsocket() -> isize {
    set_errno(Errno::NOSYS);
    -1
}

/// Multicast: -1 and EOPNOTSUPP.
pub extern "C" fn multicast() -> isize {
    set_errno(Errno::OPNOTSUPP);
    -1
}
