//! Where a memory region's key comes from: the router, which accounts for the region.
//!
//! Memory that is registered again is likely to be registered once more. For such memory a few keys are leased at a
//! time, so that most registrations need no word with the router. A leased key is a region to the router like any
//! other: counted, random, and ended by deregistering it.

use std::collections::BTreeMap;
use std::sync::{Mutex, MutexGuard, PoisonError};

use rustix::io::Errno;

use crate::ctl::{DeregMr, LEASED_KEYS, LeaseMrs, RegMr};
use crate::error::{Error, Result};
use crate::verbs::Access;

use super::conn::Conn;

/// The keys of a PD that no region has yet.
pub(super) struct Keys {
    pd: u32,
    /// By the length that each is accounted for: a power of two.
    leased: Mutex<BTreeMap<u64, Vec<u32>>>,
}

impl Keys {
    pub fn new(pd: u32) -> Self {
        Keys { pd, leased: Mutex::default() }
    }

    /// A key for `len` bytes that peers cannot reach yet.
    pub fn for_new_memory(&self, conn: &Conn, addr: u64, len: u64, access: Access) -> Result<u32> {
        let ask =
            || conn.ask(&RegMr { pd: self.pd, access: access.bits(), addr, len }).map(|reply| reply.key);
        match ask() {
            Err(Error::Refused { errno: Errno::NOMEM, .. }) if self.give_back(conn) => ask(),
            other => other,
        }
    }

    /// A key for `len` bytes that another region holds already.
    pub fn for_known_memory(&self, conn: &Conn, addr: u64, len: u64, access: Access) -> Result<u32> {
        let Some(class) = len.checked_next_power_of_two() else {
            return self.for_new_memory(conn, addr, len, access);
        };
        if let Some(key) = self.leased().get_mut(&class).and_then(Vec::pop) {
            return Ok(key);
        }
        match conn.ask(&LeaseMrs { pd: self.pd, _pad: 0, len: class }) {
            Ok(lease) => {
                let (keys, count) = (lease.keys, (lease.count as usize).min(LEASED_KEYS));
                let [first, rest @ ..] = &keys[..count] else {
                    return Err(Error::Disconnected("a lease without keys".into()));
                };
                self.leased().entry(class).or_default().extend(rest);
                Ok(*first)
            }
            // Its power of two may be too much where it is not.
            Err(Error::Refused { errno: Errno::NOMEM, .. }) => self.for_new_memory(conn, addr, len, access),
            Err(error) => Err(error),
        }
    }

    /// Gives back what no region has. True if there was anything.
    pub fn give_back(&self, conn: &Conn) -> bool {
        let leased = std::mem::take(&mut *self.leased());
        for key in leased.values().flatten() {
            // A router that is gone has forgotten it.
            let _ = conn.ask(&DeregMr { key: *key, _pad: 0 });
        }
        leased.values().any(|keys| !keys.is_empty())
    }

    fn leased(&self) -> MutexGuard<'_, BTreeMap<u64, Vec<u32>>> {
        self.leased.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
