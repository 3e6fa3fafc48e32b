//! What is known of etcd's content, and what of it the table shows.
//!
//! An entry that etcd no longer had when it came back is only doubtful: its host may be about to make it anew. It goes
//! once the hosts have had the time to do so. No I/O, no time: both are the caller's.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use super::super::Hosts;
use super::keys::Key;

pub struct Mirror {
    hosts: Arc<Hosts>,
    known: BTreeMap<Key, String>,
    doubtful: BTreeSet<Key>,
}

impl Mirror {
    pub fn new(hosts: Arc<Hosts>) -> Self {
        Mirror { hosts, known: BTreeMap::new(), doubtful: BTreeSet::new() }
    }

    /// Everything that is there, after a time in which changes may have been missed.
    pub fn snapshot(&mut self, content: &BTreeMap<Key, String>) {
        self.doubtful = self.known.keys().filter(|key| !content.contains_key(key)).cloned().collect();
        content.iter().for_each(|(key, value)| self.put(key, value));
    }

    pub fn put(&mut self, key: &Key, value: &str) {
        self.doubtful.remove(key);
        self.known.insert(key.clone(), value.into());
        self.show(key, Some(value));
    }

    pub fn delete(&mut self, key: &Key) {
        self.doubtful.remove(key);
        self.known.remove(key);
        self.show(key, None);
    }

    /// Nobody made the doubtful entries anew.
    pub fn settle(&mut self) {
        for key in std::mem::take(&mut self.doubtful) {
            self.delete(&key);
        }
    }

    fn show(&self, key: &Key, value: Option<&str>) {
        match key {
            // An address that is none is as good as no host.
            Key::Host(name) => self.hosts.set_host(name, value.and_then(|addr| addr.parse().ok())),
            Key::Home(home) => self.hosts.set_home(home, value.map(Into::into).as_ref()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::super::Home;
    use super::*;

    #[test]
    fn what_etcd_lost_is_doubted_before_it_is_forgotten() {
        let hosts = Arc::new(Hosts::of("h1"));
        let mut mirror = Mirror::new(hosts.clone());
        let home = |last: u8| Home { tenant: "red".into(), ip: [10, 0, 0, last].into() };
        let found = |last| hosts.find(&home(last).tenant, home(last).ip).map(|host| host.name.to_string());
        let host = Key::Host("h2".into());
        mirror.put(&host, "192.168.0.2:4790");
        (1..=2).for_each(|last| mirror.put(&Key::Home(home(last)), "h2"));
        mirror.snapshot(&BTreeMap::new());
        assert_eq!(found(1).as_deref(), Some("h2"));
        mirror.put(&host, "192.168.0.2:4790");
        mirror.put(&Key::Home(home(1)), "h2");
        mirror.settle();
        assert_eq!((found(1).as_deref(), found(2)), (Some("h2"), None));
        mirror.delete(&Key::Home(home(1)));
        assert_eq!(found(1), None);
    }
}
