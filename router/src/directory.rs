//! (tenant, vIP) -> container, of this host. Other hosts' are in `cluster::hosts`.
//!
//! Owns who has which address. It must never know connections or objects.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

/// A tenant's name.
pub type Tenant = std::sync::Arc<str>;

/// The addresses of this host's containers.
#[derive(Debug, Default)]
pub struct Directory {
    by_address: BTreeMap<(Tenant, IpAddr), u32>,
    tenants_of: BTreeMap<IpAddr, BTreeSet<Tenant>>,
}

impl Directory {
    /// Gives `ip` to `container`; an address has one holder per tenant.
    pub fn claim(&mut self, tenant: &Tenant, ip: IpAddr, container: u32) -> Result<(), u32> {
        let ip = ip.to_canonical();
        match self.by_address.entry((tenant.clone(), ip)) {
            std::collections::btree_map::Entry::Occupied(held) if *held.get() != container => {
                Err(*held.get())
            }
            entry => {
                entry.or_insert(container);
                self.tenants_of.entry(ip).or_default().insert(tenant.clone());
                Ok(())
            }
        }
    }

    /// Takes all of a container's addresses away.
    pub fn forget(&mut self, container: u32) {
        let tenants_of = &mut self.tenants_of;
        self.by_address.retain(|(tenant, ip), holder| {
            let keep = *holder != container;
            if !keep && let Some(tenants) = tenants_of.get_mut(ip) {
                tenants.remove(tenant);
            }
            keep
        });
        tenants_of.retain(|_, tenants| !tenants.is_empty());
    }

    /// Who has `ip`, as `tenant` sees it.
    pub fn find(&self, tenant: &Tenant, ip: IpAddr) -> Option<u32> {
        self.by_address.get(&(tenant.clone(), ip.to_canonical())).copied()
    }

    /// Does a tenant other than `tenant` use `ip`? Only the operator's log may learn of it.
    pub fn elsewhere(&self, tenant: &Tenant, ip: IpAddr) -> Option<&Tenant> {
        self.tenants_of.get(&ip.to_canonical())?.iter().find(|other| *other != tenant)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tenants_may_share_an_address_but_do_not_see_each_other() {
        let (red, blue): (Tenant, Tenant) = ("red".into(), "blue".into());
        let ip: IpAddr = [10, 0, 0, 1].into();
        let mut directory = Directory::default();
        directory.claim(&red, ip, 1).expect("free");
        assert_eq!(directory.find(&blue, ip), None);
        assert_eq!(directory.elsewhere(&blue, ip), Some(&red));
        directory.claim(&blue, ip, 2).expect("another tenant");
        assert_eq!((directory.find(&red, ip), directory.find(&blue, ip)), (Some(1), Some(2)));
        assert_eq!(directory.claim(&red, ip, 3), Err(1));
        directory.claim(&red, ip, 1).expect("its own already");
        let mapped: IpAddr = "::ffff:10.0.0.1".parse().expect("address");
        assert_eq!(directory.find(&red, mapped), Some(1));
        directory.forget(1);
        assert_eq!((directory.find(&red, ip), directory.find(&blue, ip)), (None, Some(2)));
        assert_eq!(directory.elsewhere(&blue, ip), None);
    }
}
