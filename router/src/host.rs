//! What the daemon needs of its host: interface addresses, signals, descriptor limits, readiness.

use std::io;
use std::net::{IpAddr, Ipv4Addr};
use std::os::fd::{FromRawFd, OwnedFd};

/// Addresses of this host's interfaces, in the kernel's order.
pub fn addresses() -> io::Result<Vec<IpAddr>> {
    let mut list: *mut libc::ifaddrs = std::ptr::null_mut();
    // SAFETY: the pointer is to a live local; on success it holds a list we must free.
    if unsafe { libc::getifaddrs(&raw mut list) } != 0 {
        return Err(io::Error::last_os_error());
    }
    let mut found = vec![];
    let mut next = list;
    // SAFETY: null, or an entry of the list, which is not freed yet.
    while let Some(entry) = unsafe { next.as_ref() } {
        found.extend(address(entry.ifa_addr));
        next = entry.ifa_next;
    }
    // SAFETY: the list of the successful call above, freed once, no reference into it left.
    unsafe { libc::freeifaddrs(list) };
    Ok(found)
}

/// The IP address in a socket address of getifaddrs' list.
fn address(raw: *const libc::sockaddr) -> Option<IpAddr> {
    // SAFETY: null, or a socket address that the caller's list owns.
    let family = i32::from(unsafe { raw.as_ref() }?.sa_family);
    match family {
        libc::AF_INET => {
            // SAFETY: an AF_INET address is a sockaddr_in.
            let v4 = unsafe { &*raw.cast::<libc::sockaddr_in>() };
            Some(Ipv4Addr::from(u32::from_be(v4.sin_addr.s_addr)).into())
        }
        libc::AF_INET6 => {
            // SAFETY: an AF_INET6 address is a sockaddr_in6.
            let v6 = unsafe { &*raw.cast::<libc::sockaddr_in6>() };
            Some(IpAddr::from(v6.sin6_addr.s6_addr))
        }
        _ => None,
    }
}

/// Can another host mean this one by it?
pub fn is_outward(ip: IpAddr) -> bool {
    let local = match ip {
        IpAddr::V4(v4) => v4.is_link_local(),
        IpAddr::V6(v6) => v6.is_unicast_link_local(),
    };
    !local && !ip.is_loopback() && !ip.is_unspecified()
}

/// The default container's vIP: the first IPv4 address that is not loopback.
pub fn vip(addresses: &[IpAddr]) -> IpAddr {
    let outward = |ip: &&IpAddr| ip.is_ipv4() && !ip.is_loopback();
    addresses.iter().find(outward).copied().unwrap_or(Ipv4Addr::LOCALHOST.into())
}

/// Blocks SIGTERM and SIGINT in this thread and those it starts, and gives a descriptor that becomes readable with them.
pub fn termination() -> io::Result<OwnedFd> {
    let mut set = std::mem::MaybeUninit::<libc::sigset_t>::uninit();
    // SAFETY: initializes the live local it is given.
    unsafe { libc::sigemptyset(set.as_mut_ptr()) };
    for signal in [libc::SIGTERM, libc::SIGINT] {
        // SAFETY: an initialized set and a valid signal.
        unsafe { libc::sigaddset(set.as_mut_ptr(), signal) };
    }
    // SAFETY: an initialized set; the old mask is not asked for.
    let failed = unsafe { libc::pthread_sigmask(libc::SIG_BLOCK, set.as_ptr(), std::ptr::null_mut()) };
    if failed != 0 {
        return Err(io::Error::from_raw_os_error(failed));
    }
    // SAFETY: -1 asks for a new descriptor; the set is initialized.
    let fd = unsafe { libc::signalfd(-1, set.as_ptr(), libc::SFD_CLOEXEC) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the kernel just made this descriptor for us.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// Waits for a signal on the descriptor of [`termination`].
pub fn wait_for_signal(fd: &OwnedFd) -> io::Result<()> {
    let mut info = [0u8; size_of::<libc::signalfd_siginfo>()];
    loop {
        match rustix::io::read(fd, &mut info) {
            Err(rustix::io::Errno::INTR) => continue,
            other => return other.map(|_| ()).map_err(Into::into),
        }
    }
}

/// Allows as many descriptors as the administrator does, and gives how many that are.
pub fn raise_descriptor_limit() -> u64 {
    use rustix::process::{Resource, getrlimit, setrlimit};
    let mut limit = getrlimit(Resource::Nofile);
    limit.current = limit.maximum;
    if let Err(errno) = setrlimit(Resource::Nofile, limit) {
        tracing::warn!("cannot raise the limit of open files: {errno}");
    }
    getrlimit(Resource::Nofile).current.unwrap_or(u64::MAX)
}

/// Tells a service manager, if one asked by NOTIFY_SOCKET.
pub fn notify(state: &str) -> io::Result<()> {
    use std::os::linux::net::SocketAddrExt;
    use std::os::unix::ffi::OsStrExt;
    use std::os::unix::net::{SocketAddr, UnixDatagram};
    let Some(name) = std::env::var_os("NOTIFY_SOCKET").filter(|name| !name.is_empty()) else { return Ok(()) };
    let address = match name.as_bytes().strip_prefix(b"@") {
        Some(abstract_name) => SocketAddr::from_abstract_name(abstract_name)?,
        None => SocketAddr::from_pathname(&name)?,
    };
    UnixDatagram::unbound()?.send_to_addr(state.as_bytes(), &address)?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn loopback_is_among_the_addresses() {
        let found = addresses().expect("getifaddrs");
        assert!(found.contains(&Ipv4Addr::LOCALHOST.into()), "{found:?}");
    }

    #[test]
    fn the_vip_is_the_first_outward_ipv4() {
        let ips = |list: &[&str]| list.iter().map(|ip| ip.parse().expect("address")).collect::<Vec<IpAddr>>();
        assert_eq!(vip(&ips(&["127.0.0.1", "fe80::1", "10.1.2.3", "10.9.9.9"])).to_string(), "10.1.2.3");
        assert_eq!(vip(&ips(&["127.0.0.1", "::1", "2001:db8::1"])).to_string(), "127.0.0.1");
    }
}
