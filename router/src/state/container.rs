//! A container: one identity, one tenant, one vIP, and what its processes used so far.

use std::collections::{BTreeSet, HashSet};
use std::net::IpAddr;
use std::path::PathBuf;

use crate::directory::Tenant;
use crate::limiter::Limiter;
use crate::quota::Quota;

/// Bytes and errors, as `ps` counts them.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Counters {
    pub tx_bytes: u64,
    pub rx_bytes: u64,
    pub errors: u64,
}

impl Counters {
    /// The sum; what a program scribbled into its counters must not wrap.
    pub fn plus(self, other: Counters) -> Counters {
        Counters {
            tx_bytes: self.tx_bytes.saturating_add(other.tx_bytes),
            rx_bytes: self.rx_bytes.saturating_add(other.rx_bytes),
            errors: self.errors.saturating_add(other.errors),
        }
    }
}

#[derive(Debug)]
pub struct Container {
    pub id: u32,
    pub name: String,
    pub tenant: Tenant,
    pub vip: IpAddr,
    pub socket: PathBuf,
    pub quota: Quota,
    /// Of QPs that ended.
    pub ended: Counters,
    /// Removal has begun: no connection is taken on any more.
    pub leaving: bool,
    /// Addresses in other tenants it tried to reach; each is logged once.
    pub refused: HashSet<IpAddr>,
    /// Log lines its processes can cause.
    pub log: Limiter,
}

impl Container {
    /// May a name be used for a container, its directory and its log lines?
    pub fn valid_name(name: &str) -> bool {
        let plain = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '_' | '-');
        (1..=64).contains(&name.len())
            && name.starts_with(|c: char| c.is_ascii_alphanumeric())
            && name.chars().all(plain)
    }
}

/// Sorted pids without repetition.
pub fn sorted(pids: impl Iterator<Item = u32>) -> Vec<u32> {
    pids.collect::<BTreeSet<_>>().into_iter().collect()
}
