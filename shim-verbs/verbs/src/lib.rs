//! Drop-in libibverbs.so.1: the verbs front door.
//!
//! Owns the C ABI: exported names and versions, the structures clients reach into through inline functions, and the
//! bookkeeping rdma-core's own library does for them. Each function checks, converts, makes one call into
//! `freeflow_core::client` and converts back. It must never know rings, sockets or the router.
// The unit tests leave out the trampolines, which are what uses most of this.
#![cfg_attr(test, allow(dead_code, unused_imports))]

mod addr;
mod ah;
mod channel;
mod context;
mod convert;
mod cq;
mod cq_ex;
mod device;
mod dm;
mod events;
mod exports;
mod fork;
mod guard;
mod imports;
mod lend;
mod madvise;
mod marshal;
mod mcast;
mod mr;
mod mw;
mod object;
mod pd;
mod post;
mod qp;
mod query;
mod rates;
mod signals;
mod srq;
mod strings;
mod sysfs;
mod unsupported;
mod wr_builder;
mod xrc;
