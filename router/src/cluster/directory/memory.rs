//! A directory inside one process, for the suite: what the rules are, without the world around them.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, PoisonError};

use super::{Backend, Claim, Home, HostName, Hosts};

#[derive(Debug, Default)]
struct Content {
    homes: BTreeMap<Home, HostName>,
    members: Vec<(HostName, SocketAddr, Arc<Hosts>)>,
}

/// The directory itself.
#[derive(Debug, Default, Clone)]
pub struct Memory(Arc<Mutex<Content>>);

/// One host's part in it.
#[derive(Debug)]
pub struct Member {
    directory: Memory,
    name: HostName,
}

impl Memory {
    pub fn join(&self, name: &str, addr: SocketAddr, hosts: Arc<Hosts>) -> Member {
        let name: HostName = name.into();
        let mut content = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        content.homes.iter().for_each(|(home, host)| hosts.set_home(home, Some(host)));
        content.members.push((name.clone(), addr, hosts));
        for (_, _, hosts) in &content.members {
            content.members.iter().for_each(|(name, addr, _)| hosts.set_host(name, Some(*addr)));
        }
        Member { directory: self.clone(), name }
    }
}

impl Backend for Member {
    fn publish(&self, home: &Home, claim: Claim) {
        let mut content = self.directory.0.lock().unwrap_or_else(PoisonError::into_inner);
        if claim == Claim::Modest && content.homes.contains_key(home) {
            return;
        }
        content.homes.insert(home.clone(), self.name.clone());
        content.members.iter().for_each(|(_, _, hosts)| hosts.set_home(home, Some(&self.name)));
    }

    fn withdraw(&self, home: &Home) {
        let mut content = self.directory.0.lock().unwrap_or_else(PoisonError::into_inner);
        if content.homes.get(home) == Some(&self.name) {
            content.homes.remove(home);
            content.members.iter().for_each(|(_, _, hosts)| hosts.set_home(home, None));
        }
    }
}

impl Drop for Member {
    fn drop(&mut self) {
        let mut content = self.directory.0.lock().unwrap_or_else(PoisonError::into_inner);
        let Content { homes, members } = &mut *content;
        members.retain(|(name, _, _)| *name != self.name);
        for (_, _, hosts) in members {
            homes
                .iter()
                .filter(|(_, host)| **host == self.name)
                .for_each(|(home, _)| hosts.set_home(home, None));
            hosts.set_host(&self.name, None);
        }
        homes.retain(|_, host| *host != self.name);
    }
}
