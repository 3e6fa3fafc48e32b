//! Port spaces: which id holds which port of which container, and who listens there.
//!
//! Owns nothing but the table; it must never know what a connection is.

use std::collections::HashMap;

use freeflow_core::ctl::RawGid;
use freeflow_core::ctl::cm::{CmAddr, cm_family};

use super::Home;

/// Ports that a program gets when it asks for none.
const EPHEMERAL: std::ops::RangeInclusive<u16> = 32768..=60999;

/// The prefix of an IPv4 address written as an IPv6 one.
const V4: [u8; 12] = [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0xff, 0xff];

/// What kind of address an address is.
pub trait AddrExt {
    fn is_v4(&self) -> bool;
    fn is_any(&self) -> bool;
    fn is_loopback(&self) -> bool;
    fn is_multicast(&self) -> bool;
}

impl AddrExt for RawGid {
    fn is_v4(&self) -> bool {
        self.starts_with(&V4)
    }

    fn is_any(&self) -> bool {
        *self == [0; 16] || (self.is_v4() && self[12..] == [0; 4])
    }

    fn is_loopback(&self) -> bool {
        (self.is_v4() && self[12] == 127) || *self == std::net::Ipv6Addr::LOCALHOST.octets()
    }

    fn is_multicast(&self) -> bool {
        (self.is_v4() && self[12] >> 4 == 0xe) || self[0] == 0xff
    }
}

/// The loopback address of a family.
pub fn loopback(family: u16) -> RawGid {
    match family {
        cm_family::V4 => std::net::Ipv4Addr::LOCALHOST.to_ipv6_mapped().octets(),
        _ => std::net::Ipv6Addr::LOCALHOST.octets(),
    }
}

/// The destinations a bound id answers for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Scope {
    Any { v4: bool, v6: bool },
    One(RawGid),
}

impl Scope {
    /// What binding to `addr` covers.
    pub fn of(addr: &CmAddr, family_only: bool) -> Self {
        match addr.addr.is_any() {
            true => Scope::Any {
                v4: addr.family == cm_family::V4 || !family_only,
                v6: addr.family == cm_family::V6,
            },
            false => Scope::One(addr.addr),
        }
    }

    fn covers(&self, addr: &RawGid) -> bool {
        match self {
            Scope::Any { v4, v6 } => *if addr.is_v4() { v4 } else { v6 },
            Scope::One(one) => one == addr,
        }
    }

    fn overlaps(&self, other: &Scope) -> bool {
        match (self, other) {
            (Scope::Any { v4, v6 }, Scope::Any { v4: w4, v6: w6 }) => (*v4 && *w4) || (*v6 && *w6),
            (any, Scope::One(addr)) | (Scope::One(addr), any) => any.covers(addr),
        }
    }
}

/// One id's claim on a port.
#[derive(Debug, Clone, Copy)]
pub struct Claim {
    pub id: u32,
    pub scope: Scope,
    /// May share the port with other claims that also may, as long as nobody listens.
    pub reuse: bool,
    pub listening: bool,
}

impl Claim {
    fn excludes(&self, other: &Claim) -> bool {
        let shared = self.reuse && other.reuse && !self.listening && !other.listening;
        self.id != other.id && self.scope.overlaps(&other.scope) && !shared
    }
}

/// A port of one container: home, port space, number.
type Key = (Home, u32, u16);

/// All ports of all containers.
#[derive(Debug, Default)]
pub struct Ports {
    claims: HashMap<Key, Vec<Claim>>,
    rotor: u16,
}

impl Ports {
    /// `seed` decides where the search for free ports begins.
    pub fn new(seed: u16) -> Self {
        Ports { claims: HashMap::new(), rotor: seed }
    }

    /// Whether `claim` could be made.
    pub fn is_free(&self, home: &Home, space: u32, port: u16, claim: &Claim) -> bool {
        let key = (home.clone(), space, port);
        !self.claims.get(&key).is_some_and(|held| held.iter().any(|other| other.excludes(claim)))
    }

    /// A port that nobody holds at all.
    pub fn pick(&mut self, home: &Home, space: u32) -> Option<u16> {
        let (first, count) = (*EPHEMERAL.start(), EPHEMERAL.len() as u16);
        let start = self.rotor % count;
        let port = (0..count)
            .map(|step| first + (start + step) % count)
            .find(|port| !self.claims.contains_key(&(home.clone(), space, *port)))?;
        self.rotor = (port - first + 1) % count;
        Some(port)
    }

    /// Makes or replaces the claim of `claim.id`.
    pub fn claim(&mut self, home: &Home, space: u32, port: u16, claim: Claim) {
        let held = self.claims.entry((home.clone(), space, port)).or_default();
        held.retain(|other| other.id != claim.id);
        held.push(claim);
    }

    /// Gives up the claim of `id`.
    pub fn release(&mut self, home: &Home, space: u32, port: u16, id: u32) {
        let key = (home.clone(), space, port);
        if let Some(held) = self.claims.get_mut(&key) {
            held.retain(|other| other.id != id);
            if held.is_empty() {
                self.claims.remove(&key);
            }
        }
    }

    /// Who listens at `addr`: one that bound exactly it before one that bound them all.
    pub fn listener(&self, home: &Home, space: u32, addr: &CmAddr) -> Option<u32> {
        let held = self.claims.get(&(home.clone(), space, addr.port))?;
        let mut fitting = held.iter().filter(|claim| claim.listening && claim.scope.covers(&addr.addr));
        let exact = fitting.clone().find(|claim| matches!(claim.scope, Scope::One(_)));
        exact.or_else(|| fitting.next()).map(|claim| claim.id)
    }

    #[cfg(test)]
    pub fn is_empty(&self) -> bool {
        self.claims.is_empty()
    }

    /// Ports with a listener, in order.
    pub fn listening(&self, home: &Home) -> Vec<u16> {
        let mut ports: Vec<u16> = self
            .claims
            .iter()
            .filter(|((owner, ..), held)| owner == home && held.iter().any(|claim| claim.listening))
            .map(|((_, _, port), _)| *port)
            .collect();
        ports.sort_unstable();
        ports.dedup();
        ports
    }
}
