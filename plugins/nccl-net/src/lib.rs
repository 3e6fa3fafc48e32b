//! NCCL's network plugin: messages between ranks over the virtual RDMA NIC.
//!
//! One implementation, over `freeflow_core::client`, and one adapter for each version of the interface:
//!
//! | module | owns |
//! |---|---|
//! | `boundary::adapters` | one file a version: its structure, and what only it has |
//! | `boundary` | C pointers: what is behind them, panics, NCCL's logger. The only `unsafe` |
//! | `device` | the process's open device: context, protection domain, connection manager |
//! | `handle`, `listen`, `connect` | rendezvous: a handle names a listener, the connection manager does the rest |
//! | `link` | one connected QP, and how its death is noticed |
//! | `slots` | what the two ends write into each other's memory |
//! | `send`, `recv` | the two kinds of comm: isend, irecv, test |
//! | `region` | registered memory |
//! | `fault` | errors, and the numbers that NCCL sees |
//!
//! One message: the receiver's irecv writes a *posting* (where, how long, which tag) into the sender's memory. The sender's
//! isend finds it, writes the data straight into the receiver's buffer and then an *arrival*, one word with the size, into
//! the receiver's memory, where test finds it. All three are RDMA WRITEs on one QP, which keeps their order: no byte is
//! copied twice, and nothing is allocated once the comm is there.

mod boundary;
mod connect;
mod device;
mod fault;
mod handle;
mod link;
mod listen;
mod recv;
mod region;
mod send;
mod slots;
