//! Drop-in libibverbs.so.1: the verbs front door.
//!
//! Owns the C ABI: exported names and versions, the structures clients reach into through inline functions, and the
//! bookkeeping rdma-core's own library does for them. Each function checks, converts, makes one call into
//! `freeflow_core::client` and converts back. It must never know rings, sockets or the router.

mod exports;
mod fork;
mod guard;
mod marshal;
mod rates;
mod strings;
mod sysfs;
mod unsupported;
