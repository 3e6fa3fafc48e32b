//! Which host has which container: a table that every thread may read, without I/O.
//!
//! Owns the table and who is told of its changes. A back-end of [`super::directory`] changes it from a thread of its own.
//! It must never know where entries come from. Nothing that an operation does looks here: only what sets a connection up.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::net::{IpAddr, SocketAddr};
use std::sync::{Arc, PoisonError, RwLock, RwLockReadGuard};

use crate::directory::Tenant;

/// A host's name: the one its certificate is for.
pub type HostName = Arc<str>;

/// Another host, and where its router listens.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Host {
    pub name: HostName,
    pub addr: SocketAddr,
}

/// Who a home belongs to.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Home {
    pub tenant: Tenant,
    pub ip: IpAddr,
}

/// A whole network that is on one host, for a tenant or for all of them.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Net {
    pub tenant: Option<Tenant>,
    pub base: IpAddr,
    pub bits: u8,
    pub host: HostName,
}

impl Net {
    fn holds(&self, tenant: &Tenant, ip: IpAddr) -> bool {
        self.tenant.as_ref().is_none_or(|own| own == tenant) && same_prefix(self.base, ip, self.bits)
    }

    /// The narrower one is meant: by length, then the tenant's own before everybody's.
    fn rank(&self) -> (u8, bool) {
        (self.bits, self.tenant.is_some())
    }
}

fn same_prefix(a: IpAddr, b: IpAddr, bits: u8) -> bool {
    let wide = |ip: IpAddr| match ip {
        IpAddr::V4(v4) => u128::from(u32::from(v4)) << 96,
        IpAddr::V6(v6) => u128::from(v6),
    };
    a.is_ipv4() == b.is_ipv4() && (bits == 0 || (wide(a) ^ wide(b)) >> (128 - u32::from(bits)) == 0)
}

/// Everything a back-end knows at one time.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Listing {
    pub hosts: BTreeMap<HostName, SocketAddr>,
    pub homes: BTreeMap<Home, HostName>,
    pub nets: Vec<Net>,
}

/// A container is on another host than before: what leads to the old one must end. That an entry is gone says nothing
/// about what is established: the directory may be lost for a while, hosts and their connections live on.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Moved {
    pub home: Home,
    pub to: HostName,
}

type Subscriber = Box<dyn Fn(&Moved) + Send + Sync>;
type Watcher = Box<dyn Fn() + Send + Sync>;

/// The table.
#[derive(Default)]
pub struct Hosts {
    own: HostNameOnce,
    table: RwLock<Table>,
    subscribers: RwLock<Vec<Subscriber>>,
    watchers: RwLock<Vec<Watcher>>,
}

type HostNameOnce = std::sync::OnceLock<HostName>;

#[derive(Debug, Default)]
struct Table {
    hosts: HashMap<HostName, Arc<Host>>,
    homes: HashMap<Home, HostName>,
    nets: Vec<Net>,
}

impl std::fmt::Debug for Hosts {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let table = self.read();
        write!(f, "Hosts({} hosts, {} containers)", table.hosts.len(), table.homes.len())
    }
}

impl Hosts {
    /// The table of the host `own`: what the directory says about itself it needs not look up.
    pub fn of(own: &str) -> Self {
        Hosts { own: HostNameOnce::from(HostName::from(own)), ..Hosts::default() }
    }

    /// This host's name; empty where there is no cluster.
    pub fn own(&self) -> &str {
        self.own.get().map_or("", |own| own)
    }

    fn read(&self) -> RwLockReadGuard<'_, Table> {
        self.table.read().unwrap_or_else(PoisonError::into_inner)
    }

    /// The other host that has `ip` of `tenant`.
    pub fn find(&self, tenant: &Tenant, ip: IpAddr) -> Option<Arc<Host>> {
        let table = self.read();
        let name = table.name_of(&Home { tenant: tenant.clone(), ip: ip.to_canonical() })?;
        (**name != *self.own()).then(|| table.hosts.get(name).cloned()).flatten()
    }

    /// The host of this name.
    pub fn by_name(&self, name: &str) -> Option<Arc<Host>> {
        self.read().hosts.get(name).cloned()
    }

    /// The other hosts that may have containers of a tenant.
    pub fn of_tenant(&self, tenant: &Tenant) -> BTreeSet<HostName> {
        let table = self.read();
        let homes = table.homes.iter().filter(|(home, _)| home.tenant == *tenant).map(|(_, host)| host);
        let nets = table.nets.iter().filter(|net| net.tenant.as_ref().is_none_or(|own| own == tenant));
        let names = homes.chain(nets.map(|net| &net.host));
        names.filter(|name| ***name != *self.own() && table.hosts.contains_key(*name)).cloned().collect()
    }

    /// Calls `tell` with each move from now on, from the back-end's thread; it must not wait for anything.
    pub fn subscribe(&self, tell: Subscriber) {
        self.subscribers.write().unwrap_or_else(PoisonError::into_inner).push(tell);
    }

    /// Calls `tell` whenever the table has changed, under the same condition: somebody may be found who was not.
    pub fn watch(&self, tell: Watcher) {
        self.watchers.write().unwrap_or_else(PoisonError::into_inner).push(tell);
    }

    /// Other hosts and containers known.
    pub fn len(&self) -> (usize, usize) {
        let table = self.read();
        (table.hosts.len(), table.homes.len())
    }

    /// `name` is reached at `addr`, or not known any more.
    pub fn set_host(&self, name: &HostName, addr: Option<SocketAddr>) {
        self.change(|table| {
            match addr {
                Some(addr) => {
                    table.hosts.insert(name.clone(), Arc::new(Host { name: name.clone(), addr }));
                }
                None => _ = table.hosts.remove(name),
            }
            vec![]
        });
    }

    /// `home` is on `host`, or on none that is known.
    pub fn set_home(&self, home: &Home, host: Option<&HostName>) {
        self.change(|table| match host {
            Some(host) => table.put(home, host).into_iter().collect(),
            None => {
                table.homes.remove(home);
                vec![]
            }
        });
    }

    /// Everything is as `listing` says, and nothing else.
    pub fn replace(&self, listing: &Listing) {
        self.change(|table| {
            let host = |(name, addr): (&HostName, &SocketAddr)| {
                (name.clone(), Arc::new(Host { name: name.clone(), addr: *addr }))
            };
            table.hosts = listing.hosts.iter().map(host).collect();
            table.nets.clone_from(&listing.nets);
            table.nets.sort_by_key(|net| std::cmp::Reverse(net.rank()));
            table.homes.retain(|home, _| listing.homes.contains_key(home));
            listing.homes.iter().filter_map(|(home, host)| table.put(home, host)).collect()
        });
    }

    fn change(&self, edit: impl FnOnce(&mut Table) -> Vec<Moved>) {
        let moved = edit(&mut self.table.write().unwrap_or_else(PoisonError::into_inner));
        let subscribers = self.subscribers.read().unwrap_or_else(PoisonError::into_inner);
        moved.iter().for_each(|moved| subscribers.iter().for_each(|tell| tell(moved)));
        self.watchers.read().unwrap_or_else(PoisonError::into_inner).iter().for_each(|tell| tell());
    }
}

impl Table {
    fn name_of(&self, home: &Home) -> Option<&HostName> {
        let net = || self.nets.iter().find(|net| net.holds(&home.tenant, home.ip)).map(|net| &net.host);
        self.homes.get(home).or_else(net)
    }

    fn put(&mut self, home: &Home, host: &HostName) -> Option<Moved> {
        let before = self.name_of(home).cloned();
        self.homes.insert(home.clone(), host.clone());
        let moved = before.is_some_and(|before| before != *host);
        moved.then(|| Moved { home: home.clone(), to: host.clone() })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Mutex;

    fn home(tenant: &str, ip: &str) -> Home {
        Home { tenant: tenant.into(), ip: ip.parse().expect("address") }
    }

    fn addr(last: u8) -> SocketAddr {
        ([192, 168, 0, last], 4790).into()
    }

    #[test]
    fn the_narrowest_entry_is_meant_and_never_this_host() {
        let hosts = Hosts::of("h1");
        let net = |tenant: Option<&str>, base: &str, bits, host: &str| Net {
            tenant: tenant.map(Into::into),
            base: base.parse().expect("address"),
            bits,
            host: host.into(),
        };
        let listing = Listing {
            hosts: [("h1".into(), addr(1)), ("h2".into(), addr(2)), ("h3".into(), addr(3))].into(),
            homes: [(home("red", "10.2.0.9"), "h3".into())].into(),
            nets: vec![
                net(None, "0.0.0.0", 0, "h3"),
                net(None, "10.1.0.0", 16, "h1"),
                net(None, "10.2.0.0", 16, "h2"),
                net(Some("blue"), "10.2.0.0", 16, "h3"),
            ],
        };
        hosts.replace(&listing);
        let at = |tenant: &str, ip: &str| {
            let host = hosts.find(&tenant.into(), ip.parse().expect("address"));
            host.map(|host| host.name.to_string())
        };
        assert_eq!(at("red", "10.2.0.1").as_deref(), Some("h2"));
        assert_eq!(at("red", "::ffff:10.2.0.1").as_deref(), Some("h2"));
        assert_eq!(at("red", "10.2.0.9").as_deref(), Some("h3"), "by its own entry");
        assert_eq!(at("blue", "10.2.0.1").as_deref(), Some("h3"), "the tenant's own network");
        assert_eq!(at("red", "10.1.0.1"), None, "this host's");
        assert_eq!(at("red", "11.0.0.1").as_deref(), Some("h3"));
        assert_eq!(at("red", "fd00::1"), None);
        let all = [HostName::from("h2"), "h3".into()];
        assert_eq!(hosts.of_tenant(&"red".into()), BTreeSet::from(all));
        hosts.replace(&Listing { nets: vec![net(Some("blue"), "10.2.0.0", 16, "h3")], ..listing });
        assert!(hosts.of_tenant(&"green".into()).is_empty());
        let of_red = hosts.of_tenant(&"red".into());
        assert_eq!(of_red.iter().map(|name| &**name).collect::<Vec<_>>(), ["h3"], "by its own entry");
    }

    #[test]
    fn only_a_move_is_told() {
        let hosts = Hosts::of("h1");
        let told = Arc::new(Mutex::new(vec![]));
        let sink = told.clone();
        hosts.subscribe(Box::new(move |moved| sink.lock().expect("test").push(moved.clone())));
        let (c, h2, h3) = (home("red", "10.0.0.1"), HostName::from("h2"), HostName::from("h3"));
        hosts.set_host(&h2, Some(addr(2)));
        hosts.set_home(&c, Some(&h2));
        hosts.set_home(&c, Some(&h2));
        hosts.set_home(&c, None);
        hosts.set_home(&c, Some(&h2));
        assert_eq!(*told.lock().expect("test"), []);
        hosts.set_home(&c, Some(&h3));
        assert_eq!(*told.lock().expect("test"), [Moved { home: c.clone(), to: h3 }]);
        assert_eq!(hosts.find(&c.tenant, c.ip), None, "h3 is not known yet");
    }
}
