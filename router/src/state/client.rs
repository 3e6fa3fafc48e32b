//! A client: one connection of one process.

use std::collections::HashSet;
use std::fs::File;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use freeflow_core::ctl::Socket;
use freeflow_core::shm::{self, Mapping};

use super::mr::Mrs;
use super::resume::Resuming;
use super::table::Owner;
use crate::limiter::Limiter;

/// The router-made table of a client's memory regions, as the router sees it.
#[derive(Debug)]
pub struct MrTable {
    pub read_only: Arc<OwnedFd>,
    pub map: Arc<Mapping>,
}

impl MrTable {
    /// Makes an empty table, and its owner's writable descriptor, which the owner seals. It is sparse: 8 MiB of which a program touches what it
    /// registers.
    pub fn new() -> rustix::io::Result<(Self, OwnedFd)> {
        let len = freeflow_core::ring::MR_SLOTS * size_of::<freeflow_core::ring::MrEntry>();
        let fd = shm::make_owned_memfd("freeflow-mr", len as u64)?;
        let read_only = shm::reopen_read_only(&fd)?;
        let map = Mapping::new(&read_only, 0, len, false)?;
        Ok((MrTable { read_only: Arc::new(read_only), map: Arc::new(map) }, fd))
    }

    /// The table that an earlier router made.
    pub fn brought(fd: &OwnedFd) -> rustix::io::Result<Self> {
        let len = freeflow_core::ring::MR_SLOTS * size_of::<freeflow_core::ring::MrEntry>();
        if !shm::is_sealed_memfd(fd) || rustix::fs::fstat(fd)?.st_size as usize != len {
            return Err(rustix::io::Errno::INVAL);
        }
        let read_only = shm::reopen_read_only(fd)?;
        let map = Mapping::new(&read_only, 0, len, false)?;
        Ok(MrTable { read_only: Arc::new(read_only), map: Arc::new(map) })
    }
}

/// Kinds of descriptors that are given to a connection once.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Given {
    Slab(u32),
    Pd(u32),
    Channel(u32),
    MrTable(u32),
}

#[derive(Debug)]
pub struct Client {
    pub id: u32,
    pub container: u32,
    pub pid: u32,
    /// Kept to be shut down by others; only the session's thread reads and answers.
    pub rpc: Arc<Socket>,
    pub event: Arc<Socket>,
    /// The process's memory, opened by the router itself; why not, where it could not.
    pub memory: Result<Arc<File>, rustix::io::Errno>,
    /// Of a verbs client.
    pub mr_table: Option<Arc<MrTable>>,
    pub mrs: Mrs,
    /// It did not take its events: its connection is being ended.
    pub cut_off: bool,
    /// Descriptors this connection has.
    pub given: HashSet<Given>,
    /// Clients it has descriptors of.
    pub met: HashSet<u32>,
    /// Failures of keys.
    pub key_failures: Limiter,
    pub key_failures_total: u64,
    pub resuming: Resuming,
}

impl Client {
    pub fn owner(&self) -> Owner {
        Owner { client: self.id, container: self.container }
    }

    /// Ends the connection from the outside; its session then cleans up.
    pub fn hang_up(&self) {
        // An error means that it is gone already.
        let _ = rustix::net::shutdown(&*self.rpc, rustix::net::Shutdown::Both);
    }
}
