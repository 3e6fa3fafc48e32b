//! The functions behind the exported names of symbols.txt, and the trampolines build.rs makes for them.

pub use crate::ah::*;
pub use crate::channel::*;
pub use crate::context::*;
pub use crate::cq::*;
pub use crate::device::*;
pub use crate::events::*;
pub use crate::fork::*;
pub use crate::imports::*;
pub use crate::marshal::*;
pub use crate::mcast::*;
pub use crate::mr::*;
pub use crate::pd::*;
pub use crate::qp::*;
pub use crate::query::*;
pub use crate::rates::*;
pub use crate::srq::*;
pub use crate::strings::*;
pub use crate::sysfs::*;

// Not in the unit tests: an executable has no version script to resolve the versions against.
#[cfg(not(test))]
include!(concat!(env!("OUT_DIR"), "/trampolines.rs"));
