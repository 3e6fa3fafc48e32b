//! Socket addresses: between what programs write and what the router reads.

use std::net::{Ipv4Addr, Ipv6Addr};

use freeflow_core::ctl::RawGid;
use freeflow_core::ctl::cm::{CmAddr, cm_family};
use libc::{sockaddr, sockaddr_in, sockaddr_in6, sockaddr_storage};

use crate::edge::{Errno, Result, last_errno};

/// Reads a program's address.
///
/// # Safety
/// `addr` is NULL or points to a socket address as long as its family says.
pub unsafe fn read(addr: *const sockaddr) -> Result<CmAddr> {
    if addr.is_null() {
        return Err(Errno::INVAL);
    }
    // SAFETY: every socket address begins with its family.
    match i32::from(unsafe { (*addr).sa_family }) {
        // SAFETY: the family says so.
        libc::AF_INET => Ok(from_v4(&unsafe { addr.cast::<sockaddr_in>().read_unaligned() })),
        // SAFETY: the family says so.
        libc::AF_INET6 => Ok(from_v6(&unsafe { addr.cast::<sockaddr_in6>().read_unaligned() })),
        _ => Err(Errno::INVAL),
    }
}

fn from_v4(addr: &sockaddr_in) -> CmAddr {
    let ip = Ipv4Addr::from_bits(u32::from_be(addr.sin_addr.s_addr));
    let octets = if ip.is_unspecified() { [0; 16] } else { ip.to_ipv6_mapped().octets() };
    CmAddr { addr: octets, port: u16::from_be(addr.sin_port), family: cm_family::V4, scope: 0 }
}

fn from_v6(addr: &sockaddr_in6) -> CmAddr {
    CmAddr {
        addr: addr.sin6_addr.s6_addr,
        port: u16::from_be(addr.sin6_port),
        family: cm_family::V6,
        scope: addr.sin6_scope_id,
    }
}

/// `addr` as a program reads it; all zeros for no address.
pub fn storage(addr: &CmAddr) -> sockaddr_storage {
    // SAFETY: plain integers, for which zero is valid.
    let mut storage: sockaddr_storage = unsafe { std::mem::zeroed() };
    let place = &raw mut storage;
    match addr.family {
        cm_family::V4 => {
            let [.., a, b, c, d] = addr.addr;
            let sin = sockaddr_in {
                sin_family: libc::AF_INET as u16,
                sin_port: addr.port.to_be(),
                sin_addr: libc::in_addr { s_addr: u32::from_ne_bytes([a, b, c, d]) },
                sin_zero: [0; 8],
            };
            // SAFETY: a sockaddr_storage has room and alignment for any socket address.
            unsafe { place.cast::<sockaddr_in>().write(sin) };
        }
        cm_family::V6 => {
            let sin6 = sockaddr_in6 {
                sin6_family: libc::AF_INET6 as u16,
                sin6_port: addr.port.to_be(),
                sin6_flowinfo: 0,
                sin6_addr: libc::in6_addr { s6_addr: addr.addr },
                sin6_scope_id: addr.scope,
            };
            // SAFETY: a sockaddr_storage has room and alignment for any socket address.
            unsafe { place.cast::<sockaddr_in6>().write(sin6) };
        }
        _ => {}
    }
    storage
}

/// The port of an address inside an id, in network byte order; 0 if there is none.
pub fn port_be(storage: &sockaddr_storage) -> u16 {
    let place: *const sockaddr_storage = storage;
    // SAFETY: a whole sockaddr_storage, whose family says what it holds.
    let addr = unsafe { read(place.cast()) };
    addr.map_or(0, |addr| addr.port.to_be())
}

/// Whether `addr` leaves the choice of interface open.
pub fn is_wildcard(addr: &CmAddr) -> bool {
    Ipv6Addr::from(addr.addr).is_unspecified()
}

/// Whether `addr` is this system itself.
pub fn is_loopback(addr: &CmAddr) -> bool {
    Ipv6Addr::from(addr.addr).to_canonical().is_loopback()
}

/// Whether `addr` is on one of this network namespace's interfaces.
pub fn is_own(addr: &RawGid) -> Result<bool> {
    let mut list = std::ptr::null_mut();
    // SAFETY: `list` takes the head of the list.
    if unsafe { libc::getifaddrs(&mut list) } != 0 {
        return Err(last_errno());
    }
    let mut next = list;
    let mut found = false;
    while !next.is_null() && !found {
        // SAFETY: an entry of the list, which is freed below.
        let entry = unsafe { &*next };
        // SAFETY: NULL or an address as long as its family says.
        found = unsafe { read(entry.ifa_addr) }.is_ok_and(|have| have.addr == *addr);
        next = entry.ifa_next;
    }
    // SAFETY: got from getifaddrs, not used after this.
    unsafe { libc::freeifaddrs(list) };
    Ok(found)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn round(addr: CmAddr) -> CmAddr {
        let storage = storage(&addr);
        // SAFETY: a whole sockaddr_storage.
        unsafe { read((&raw const storage).cast()) }.unwrap()
    }

    #[test]
    fn addresses_survive_the_way_there_and_back() {
        let v4 = Ipv4Addr::new(10, 1, 2, 3).to_ipv6_mapped().octets();
        for (addr, family, scope) in [
            (v4, cm_family::V4, 0),
            ([0; 16], cm_family::V4, 0),
            (v4, cm_family::V6, 0),
            (Ipv6Addr::LOCALHOST.octets(), cm_family::V6, 3),
        ] {
            let addr = CmAddr { addr, port: 0x1234, family, scope };
            assert_eq!(round(addr), addr);
            assert_eq!(port_be(&storage(&addr)), 0x1234u16.to_be());
        }
        assert_eq!(port_be(&storage(&CmAddr::default())), 0);
        // SAFETY: NULL is allowed.
        assert_eq!(unsafe { read(std::ptr::null()) }, Err(Errno::INVAL));
    }

    #[test]
    fn loopback_is_an_interface_and_a_test_network_is_not() {
        assert_eq!(is_own(&Ipv4Addr::LOCALHOST.to_ipv6_mapped().octets()), Ok(true));
        assert_eq!(is_own(&Ipv4Addr::new(192, 0, 2, 77).to_ipv6_mapped().octets()), Ok(false));
    }
}
