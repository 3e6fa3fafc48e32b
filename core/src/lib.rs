//! The virtual RDMA NIC: what verbs mean, over shared memory and a router per host.
//!
//! Layers, arrows pointing down only (tests/ holds them):
//! `client` -> `exec` -> `ring`, `ctl`, `shm` -> `verbs`, `error`, `sync`.

pub mod client;
pub mod ctl;
pub mod error;
pub mod exec;
pub mod ring;
pub mod shm;
pub mod sync;
pub mod verbs;
