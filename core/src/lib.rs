//! The virtual RDMA NIC: what verbs mean, over shared memory and a router per host.
//!
//! Layers, arrows pointing down only (tests/ holds them):
//! `client` -> `exec` -> `ring`, `ctl`, `shm` -> `verbs`, `error`, `sync`.

#[cfg(not(loom))]
pub mod client;
#[cfg(not(loom))]
pub mod ctl;
pub mod error;
#[cfg(not(loom))]
pub mod exec;
pub mod ring;
#[cfg(not(loom))]
pub mod shm;
pub mod sync;
pub mod verbs;
