//! Which congestion control connections between routers use: the host's own, unless it is made for another kind of path.
//!
//! BBR lets so much be on its way as bandwidth times the shortest round trip that it has seen. Between two hosts of a cluster that is
//! some microseconds, but a router that waits for a processor answers after hundreds, and nothing is sent meanwhile; what its
//! timers send comes from another processor than what the thread sends, so that packets overtake each other and are sent again.
//! It is a common choice for hosts that serve the internet, and nobody means these connections by it. It is left before a socket is
//! connected, because a connection that has begun with BBR is paced for ever. It must never know what they carry.

use std::os::fd::AsFd;

use rustix::io::Errno;
use rustix::net::sockopt::{set_tcp_congestion, tcp_congestion};
use rustix::net::{AddressFamily, SocketType, socket};

/// What is not used unless it is named.
const BBR: &str = "bbr";
/// What takes its place: the first that this host lets us have.
const INSTEAD: [&str; 2] = ["cubic", "reno"];

/// What tcp(7) calls tcp_congestion_control, per connection.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Congestion {
    /// The host's own, or one of [`INSTEAD`].
    Host,
    /// As configured.
    Named(String),
}

impl Congestion {
    /// As the configuration has it: a name, or nothing. One that cannot be had is found out here.
    pub fn configured(name: &str) -> Result<Self, Errno> {
        if name.is_empty() {
            return Ok(Congestion::Host);
        }
        set_tcp_congestion(socket(AddressFamily::INET, SocketType::STREAM, None)?, name)?;
        Ok(Congestion::Named(name.into()))
    }

    /// Has a socket use it that is not connected, or one that listens and those that it accepts. Where it may not be
    /// chosen (any more) connections work as they are.
    pub fn apply(&self, tcp: impl AsFd) {
        let tcp = tcp.as_fd();
        let tried = match self {
            Congestion::Named(name) => set_tcp_congestion(tcp, name),
            Congestion::Host => tcp_congestion(tcp).and_then(|own| match &*own {
                BBR => set_tcp_congestion(tcp, INSTEAD[0]).or_else(|_| set_tcp_congestion(tcp, INSTEAD[1])),
                _ => Ok(()),
            }),
        };
        if let Err(errno) = tried {
            tracing::warn!("congestion control {self:?} of connections to other hosts: {errno}");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_hosts_own_is_kept_unless_it_is_bbr() {
        let host = Congestion::configured("").expect("nothing to find out");
        for name in ["reno", "cubic", "dctcp", BBR] {
            let tcp = socket(AddressFamily::INET, SocketType::STREAM, None).expect("a socket");
            // Those that this kernel lacks, or keeps for others, cannot be its own either.
            if set_tcp_congestion(&tcp, name).is_err() {
                continue;
            }
            host.apply(&tcp);
            let used = tcp_congestion(&tcp).expect("always readable");
            assert_eq!(used == name, name != BBR, "{name}: {used}");
        }
    }

    #[test]
    fn a_name_is_checked_at_once() {
        assert_eq!(
            Congestion::configured("reno"),
            Ok(Congestion::Named("reno".into())),
            "every kernel has it"
        );
        for bad in ["no-such-one", "longer-than-the-16-bytes-of-a-name"] {
            assert_eq!(Congestion::configured(bad), Err(Errno::NOENT));
        }
    }
}
