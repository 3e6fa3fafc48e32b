//! Multicast between hosts: routers tell each other which of their containers are in a group.
//!
//! A datagram to a group goes once to each host that has members of it, and that host's router delivers it to them. Only
//! hosts that may have containers of the tenant are told of its groups, and only hosts that the directory says have the member get
//! a datagram. What is told is repeated whole when a host is connected anew.

use std::collections::BTreeSet;
use std::sync::Arc;

use freeflow_core::verbs::Gid;
use zerocopy::IntoBytes as _;

use super::conn::{Conn, End};
use super::engine::Engine;
use super::requester::Nonsense;
use super::wire::{self, Header, Kind, Malformed, Opening, PROMPT, membership};
use crate::cluster::Hosts;
use crate::directory::Tenant;
use crate::shared::Shared;
use crate::state::{FarMember, Joining};

/// Memberships that one host may tell of: more are not kept.
const MOST: usize = 1 << 16;

/// The message that a container is in a group, or is not.
fn message(joining: &Joining, word: u8, seq: u32) -> Vec<u8> {
    let ends = Opening { from: joining.vip.0, to: joining.mgid.0 };
    let len = (size_of::<Opening>() + joining.tenant.len()) as u32;
    let header = Header { status: word, len, seq, ..Header::new(Kind::Member, 0, 0) };
    [header.as_bytes(), ends.as_bytes(), joining.tenant.as_bytes()].concat()
}

/// The hosts that have members, by the directory as well as by their own word.
pub fn hosts_of(hosts: &Hosts, tenant: &Tenant, members: &[FarMember]) -> Vec<Arc<str>> {
    let has =
        |(host, vip): &&FarMember| hosts.find(tenant, vip.ip()).is_some_and(|known| known.name == *host);
    let named: BTreeSet<&Arc<str>> = members.iter().filter(has).map(|(host, _)| host).collect();
    named.into_iter().cloned().collect()
}

impl Engine {
    /// A container of this host has joined or left a group: those that must know are told how it is now.
    pub fn tell_group(&mut self, joining: &Joining) {
        let Some(shared) = self.shared.upgrade() else { return };
        let word =
            if shared.with(|state| state.is_joined(joining)) { membership::IN } else { membership::OUT };
        self.tell_tenant(&shared, &joining.tenant);
        for host in self.told(&joining.tenant) {
            self.say_groups(&host, |seq| vec![message(joining, word, seq())]);
        }
        if word == membership::OUT && shared.with(|state| state.joined().is_empty()) {
            self.remotes.values_mut().for_each(|remote| remote.is_to_know = false);
        }
    }

    /// The directory has changed: there may be hosts that do not know of our groups.
    pub fn tell_groups(&mut self) {
        let Some(shared) = self.shared.upgrade() else { return };
        let tenants: BTreeSet<Tenant> =
            shared.with(|state| state.joined()).into_iter().map(|j| j.tenant).collect();
        tenants.iter().for_each(|tenant| self.tell_tenant(&shared, tenant));
    }

    /// Connected hosts that were told of a tenant's groups.
    fn told(&self, tenant: &Tenant) -> Vec<Arc<str>> {
        let told = self.remotes.iter().filter(|(_, remote)| remote.is_up() && remote.told.contains(tenant));
        told.map(|(host, _)| host.clone()).collect()
    }

    /// Reaches all hosts that may have containers of a tenant, and tells those that were not told yet.
    fn tell_tenant(&mut self, shared: &Shared, tenant: &Tenant) {
        let Some(cluster) = shared.cluster.get() else { return };
        let now = self.now();
        for host in cluster.hosts.of_tenant(tenant) {
            self.reach(&host, now);
            let Some(remote) = self.remotes.get_mut(&host) else { continue };
            remote.is_to_know = true;
            if !remote.is_up() || !remote.told.insert(tenant.clone()) {
                continue;
            }
            let joined = shared.with(|state| state.joined());
            let theirs = joined.iter().filter(|joining| joining.tenant == *tenant);
            self.say_groups(&host, |seq| {
                theirs.map(|joining| message(joining, membership::IN, seq())).collect()
            });
        }
    }

    /// What a host that was just connected is told: that all it knew is over, and how it is now.
    pub fn introduce_groups(&mut self, host: &Arc<str>) -> Vec<Vec<u8>> {
        let Some(shared) = self.shared.upgrade() else { return vec![] };
        let (Some(cluster), Some(remote)) = (shared.cluster.get(), self.remotes.get_mut(host)) else {
            return vec![];
        };
        let joined = shared.with(|state| state.joined());
        remote.told.clear();
        let none =
            Header { status: membership::NONE, seq: remote.next_said(), ..Header::new(Kind::Member, 0, 0) };
        let mut messages = vec![none.as_bytes().to_vec()];
        let known = joined.iter().filter(|joining| cluster.hosts.of_tenant(&joining.tenant).contains(host));
        for joining in known {
            remote.told.insert(joining.tenant.clone());
            messages.push(message(joining, membership::IN, remote.next_said()));
        }
        messages
    }

    fn say_groups(
        &mut self,
        host: &Arc<str>,
        messages: impl FnOnce(&mut dyn FnMut() -> u32) -> Vec<Vec<u8>>,
    ) {
        let Some(remote) = self.remotes.get_mut(host) else { return };
        let Some(conn) = remote.meeting.conn(PROMPT).and_then(|at| self.conns.get_mut(at)?.as_mut()) else {
            return;
        };
        let messages = messages(&mut || remote.next_said());
        messages.iter().for_each(|message| conn.send_raw(message));
    }

    /// Has every host that can be reached heard of all that was told?
    pub fn all_know(&self) -> bool {
        self.remotes.values().all(|remote| !remote.is_to_learn())
    }

    /// Another router says who is in a group.
    pub fn member(&mut self, conn: &mut Conn, header: &Header) -> Result<(), End> {
        let said = match header.status {
            membership::NONE => None,
            word => Some((word == membership::IN, parse(conn.payload(header.len))?)),
        };
        if self.note_member(&conn.host, said) {
            conn.send_bytes(&Header { seq: header.seq, ..Header::new(Kind::Known, 0, 0) }, &[]);
        }
        Ok(())
    }

    /// False: it is one too many, and not kept.
    fn note_member(&mut self, host: &Arc<str>, said: Option<(bool, Joining)>) -> bool {
        let (Some(shared), Some(remote)) = (self.shared.upgrade(), self.remotes.get_mut(host)) else {
            return false;
        };
        let Some((joins, joining)) = said else {
            shared.with(|state| state.far_forget(host));
            remote.members = 0;
            return true;
        };
        if joins && remote.members >= MOST {
            tracing::warn!("host {host} tells of more than {MOST} members of multicast groups");
            return false;
        }
        if joins {
            remote.members += usize::from(shared.with(|state| state.far_joins(host, &joining)));
        } else {
            remote.members -= usize::from(shared.with(|state| state.far_leaves(host, &joining)));
        }
        true
    }

    /// It has heard everything up to `seq`.
    pub fn known(&mut self, host: &str, seq: u32) -> Result<(), Nonsense> {
        let Some(remote) = self.remotes.get_mut(host) else { return Ok(()) };
        self.learned = true;
        remote.knows(seq)
    }
}

fn parse(payload: &[u8]) -> Result<Joining, Malformed> {
    let (ends, tenant, _) = wire::split::<Opening>(payload, |_, rest| rest.len())?;
    let (vip, mgid) = (Gid(ends.from), Gid(ends.to));
    if !mgid.is_multicast() {
        return Err(Malformed::Content("a group whose address is none"));
    }
    Ok(Joining { tenant: tenant.into(), mgid, vip })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cluster::Home;

    #[test]
    fn a_group_is_said_as_it_is_read() {
        let joining = Joining {
            tenant: "red".into(),
            mgid: Gid::of([239, 1, 1, 1].into()),
            vip: Gid::of([10, 0, 0, 1].into()),
        };
        let bytes = message(&joining, membership::IN, 7);
        let (kind, header) = Header::parse(&bytes).expect("ours").expect("whole");
        assert_eq!((kind, header.seq, header.status), (Kind::Member, 7, membership::IN));
        assert_eq!(parse(&bytes[wire::HEADER..]), Ok(joining.clone()));
        let no_group = message(&Joining { mgid: joining.vip, ..joining }, membership::IN, 7);
        assert!(parse(&no_group[wire::HEADER..]).is_err());
        assert!(parse(&bytes[wire::HEADER..wire::HEADER + 20]).is_err());
    }

    #[test]
    fn a_datagram_to_a_group_goes_only_where_the_directory_has_the_member() {
        let hosts = Hosts::of("h1");
        let red: Tenant = "red".into();
        let vip = |last| Gid::of([10, 0, 0, last].into());
        for (name, last) in [("h2", 2), ("h3", 3)] {
            hosts.set_host(&name.into(), Some(([192, 168, 0, last], 4790).into()));
            hosts.set_home(&Home { tenant: red.clone(), ip: vip(last).ip() }, Some(&name.into()));
        }
        // h3 claims what h2 has, and h4 what nobody has.
        let said: Vec<FarMember> =
            vec![("h2".into(), vip(2)), ("h3".into(), vip(2)), ("h3".into(), vip(9)), ("h4".into(), vip(4))];
        assert_eq!(hosts_of(&hosts, &red, &said), ["h2".into()]);
        assert!(hosts_of(&hosts, &"blue".into(), &said).is_empty());
    }
}
