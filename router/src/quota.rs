//! What one container may hold, and what it holds.
//!
//! Owns the counting. It must never know which process holds what.

use crate::config::Settings;

/// Things that are counted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(usize)]
pub enum Resource {
    Clients,
    Qps,
    Cqs,
    Channels,
    Mrs,
    Pds,
    Slabs,
    MrBytes,
    SlabBytes,
    Srqs,
    Mcasts,
}

impl Resource {
    const COUNT: usize = 11;

    /// The parameter that sets its limit.
    pub fn parameter(self) -> &'static str {
        const NAMES: [&str; Resource::COUNT] = [
            "max_clients",
            "max_qp",
            "max_cq",
            "max_channel",
            "max_mr",
            "max_pd",
            "max_slab",
            "max_mr_bytes",
            "max_slab_bytes",
            "max_srq",
            "max_mcast",
        ];
        NAMES[self as usize]
    }
}

/// A request beyond a quota.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error(
    "quota {0}: {used} in use, {asked} more asked for, {limit} allowed ({0} in the router's configuration)",
    resource.parameter()
)]
pub struct Exceeded {
    pub resource: Resource,
    pub used: u64,
    pub asked: u64,
    pub limit: u64,
}

/// Limits and use of one container.
#[derive(Debug, Clone)]
pub struct Quota {
    used: [u64; Resource::COUNT],
    limit: [u64; Resource::COUNT],
}

impl Quota {
    pub fn new(s: &Settings) -> Self {
        let limit = [
            s.max_clients.into(),
            s.max_qp.into(),
            s.max_cq.into(),
            s.max_channel.into(),
            s.max_mr.into(),
            s.max_pd.into(),
            s.max_slab.into(),
            s.max_mr_bytes,
            s.max_slab_bytes,
            s.max_srq.into(),
            s.max_mcast.into(),
        ];
        Quota { used: [0; Resource::COUNT], limit }
    }

    /// Takes all of `wants`, or nothing.
    pub fn take(&mut self, wants: &[(Resource, u64)]) -> Result<(), Exceeded> {
        for &(resource, asked) in wants {
            let (used, limit) = (self.used[resource as usize], self.limit[resource as usize]);
            if asked > limit.saturating_sub(used) {
                return Err(Exceeded { resource, used, asked, limit });
            }
        }
        for &(resource, asked) in wants {
            self.used[resource as usize] += asked;
        }
        Ok(())
    }

    pub fn give_back(&mut self, what: &[(Resource, u64)]) {
        for &(resource, amount) in what {
            let used = &mut self.used[resource as usize];
            debug_assert!(*used >= amount, "{resource:?}: {amount} given back of {used}");
            *used = used.saturating_sub(amount);
        }
    }

    pub fn left(&self, resource: Resource) -> u64 {
        self.limit[resource as usize].saturating_sub(self.used[resource as usize])
    }

    pub fn used(&self, resource: Resource) -> u64 {
        self.used[resource as usize]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn all_or_nothing() {
        let mut quota = Quota::new(&Settings { max_mr: 2, max_mr_bytes: 100, ..Settings::default() });
        let mr = |bytes| [(Resource::Mrs, 1), (Resource::MrBytes, bytes)];
        quota.take(&mr(60)).expect("fits");
        let refused = quota.take(&mr(41)).expect_err("too many bytes");
        assert_eq!(refused, Exceeded { resource: Resource::MrBytes, used: 60, asked: 41, limit: 100 });
        assert_eq!(quota.used(Resource::Mrs), 1, "nothing was taken");
        quota.take(&mr(40)).expect("fits");
        assert_eq!(quota.take(&mr(0)).expect_err("too many").resource, Resource::Mrs);
        assert_eq!(quota.take(&[(Resource::MrBytes, u64::MAX)]).expect_err("no overflow").used, 100);
        quota.give_back(&mr(60));
        quota.take(&mr(60)).expect("fits again");
    }
}
