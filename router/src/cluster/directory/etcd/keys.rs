//! How hosts and containers are called in etcd.
//!
//! ```text
//! /freeflow/1/host/NAME          where its router listens, IP:PORT
//! /freeflow/1/home/TENANT/IP     the name of the host that has it
//! ```

use super::super::{Home, HostName};

pub const PREFIX: &str = "/freeflow/1/";
/// The first key after all that have the prefix.
pub const PREFIX_END: &str = "/freeflow/10";

/// What a key names.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub enum Key {
    Host(HostName),
    Home(Home),
}

impl Key {
    pub fn text(&self) -> String {
        match self {
            Key::Host(name) => format!("{PREFIX}host/{name}"),
            Key::Home(home) => format!("{PREFIX}home/{}/{}", home.tenant, home.ip),
        }
    }

    /// The key that `text` is, if it is one of this version's: others may write to etcd, too.
    pub fn parse(text: &[u8]) -> Option<Self> {
        let rest = std::str::from_utf8(text).ok()?.strip_prefix(PREFIX)?;
        if let Some(name) = rest.strip_prefix("host/") {
            return Some(Key::Host(name.into()));
        }
        let (tenant, ip) = rest.strip_prefix("home/")?.split_once('/')?;
        Some(Key::Home(Home { tenant: tenant.into(), ip: ip.parse().ok()? }))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_are_read_as_they_are_written() {
        let home = |ip: &str| Key::Home(Home { tenant: "red".into(), ip: ip.parse().expect("address") });
        for key in [Key::Host("h1".into()), home("10.0.0.1"), home("fd00::1")] {
            assert_eq!(Key::parse(key.text().as_bytes()), Some(key));
        }
        for other in ["/freeflow/1/home/red", "/freeflow/1/home/red/x", "/freeflow/2/host/h1", "x", "\u{ff}"]
        {
            assert_eq!(Key::parse(other.as_bytes()), None, "{other}");
        }
    }
}
