//! Who is at the other end of a connection, by the kernel's word alone.
//!
//! Owns peer credentials, the pidfd and the descriptor of the process's memory. It must never believe a client.

use std::fs::File;
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::fs::MetadataExt;

use rustix::event::{PollFd, PollFlags, Timespec};
use rustix::io::Errno;
use rustix::process::{Pid, PidfdFlags, pidfd_open};

/// `SO_PEERPIDFD` of <asm-generic/socket.h> (Linux 6.5).
const SO_PEERPIDFD: libc::c_int = 77;

/// The process that connected.
#[derive(Debug)]
pub struct Peer {
    /// In the router's pid namespace.
    pub pid: u32,
    pub uid: u32,
    pub pidfd: OwnedFd,
}

impl Peer {
    /// Asks the kernel who connected.
    pub fn of(socket: impl AsFd) -> Result<Self, Errno> {
        let libc::ucred { pid, uid, .. } = credentials(&socket)?;
        // 0: it lives in a pid namespace that this one does not see into.
        let visible = Pid::from_raw(pid).ok_or(Errno::SRCH)?;
        let pidfd = match peer_pidfd(&socket) {
            Err(Errno::NOPROTOOPT) => open_pidfd(&socket, visible)?,
            other => other?,
        };
        Ok(Peer { pid: pid as u32, uid, pidfd })
    }

    /// Has the process ended?
    pub fn is_dead(&self) -> bool {
        ready(&self.pidfd, PollFlags::IN)
    }

    /// Opens the process's memory. Refused where the process is not (any more) what connected: dead, or turned into a
    /// set-user-id program, which the router could open but its caller could not.
    pub fn open_memory(&self) -> Result<File, Errno> {
        let path = format!("/proc/{}/mem", self.pid);
        let errno = |e: std::io::Error| e.raw_os_error().map_or(Errno::IO, Errno::from_raw_os_error);
        let memory = File::options().read(true).write(true).open(&path).map_err(errno)?;
        // The kernel gives /proc files of a process to root when it runs a program its user may not trace. Asked after
        // the opening: what is open belongs to the program that ran before any later exec.
        let owner = std::fs::metadata(&path).map_err(errno)?.uid();
        if owner != self.uid || self.is_dead() {
            return Err(Errno::PERM);
        }
        Ok(memory)
    }
}

fn ready(fd: impl AsFd, flags: PollFlags) -> bool {
    let now = Timespec { tv_sec: 0, tv_nsec: 0 };
    rustix::event::poll(&mut [PollFd::new(&fd, flags)], Some(&now)).is_ok_and(|n| n > 0)
}

/// Process, user and group that connected. (rustix's reader takes the pid for nonzero, which it need not be.)
pub fn credentials(socket: impl AsFd) -> Result<libc::ucred, Errno> {
    let mut found = libc::ucred { pid: 0, uid: u32::MAX, gid: u32::MAX };
    // SAFETY: the option's value is a ucred.
    unsafe { socket_option(socket, libc::SO_PEERCRED, &mut found) }?;
    Ok(found)
}

/// # Safety
/// The value of `option` is a `T`, and any bytes the kernel writes make a valid one.
unsafe fn socket_option<T>(socket: impl AsFd, option: libc::c_int, value: &mut T) -> Result<(), Errno> {
    let fd = socket.as_fd().as_raw_fd();
    let mut len = size_of::<T>() as libc::socklen_t;
    let to = std::ptr::from_mut(value).cast();
    // SAFETY: at most `len` bytes are written, to a live `T`; the length to a live local.
    let failed = unsafe { libc::getsockopt(fd, libc::SOL_SOCKET, option, to, &raw mut len) };
    let errno = || Errno::from_io_error(&std::io::Error::last_os_error()).unwrap_or(Errno::IO);
    if failed == 0 { Ok(()) } else { Err(errno()) }
}

fn peer_pidfd(socket: impl AsFd) -> Result<OwnedFd, Errno> {
    let mut fd: libc::c_int = -1;
    // SAFETY: the option's value is an int.
    unsafe { socket_option(socket, SO_PEERPIDFD, &mut fd) }?;
    // SAFETY: the kernel just made this descriptor for us; nobody else knows it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// For kernels without SO_PEERPIDFD. The pid may have been given to another process before it was opened; it was not if
/// the connection still has its other end afterwards.
fn open_pidfd(socket: impl AsFd, pid: Pid) -> Result<OwnedFd, Errno> {
    let pidfd = pidfd_open(pid, PidfdFlags::empty())?;
    let mut polled = [PollFd::new(&socket, PollFlags::HUP)];
    rustix::event::poll(&mut polled, Some(&Timespec { tv_sec: 0, tv_nsec: 0 }))?;
    if polled[0].revents().contains(PollFlags::HUP) { Err(Errno::SRCH) } else { Ok(pidfd) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use freeflow_core::ctl::Socket;
    use std::os::unix::fs::FileExt;

    #[test]
    fn the_other_end_is_this_process() {
        let (a, _b) = Socket::pair().expect("socketpair");
        let peer = Peer::of(&a).expect("credentials");
        assert_eq!(peer.pid, std::process::id());
        assert!(!peer.is_dead());
        let word = 0x1122_3344_5566_7788u64;
        let mut bytes = [0; 8];
        let memory = peer.open_memory().expect("own memory");
        memory.read_exact_at(&mut bytes, &raw const word as u64).expect("read");
        assert_eq!(u64::from_ne_bytes(bytes), word);
    }

    #[test]
    fn both_ways_to_a_pidfd_lead_to_the_same_process() {
        let (a, b) = Socket::pair().expect("socketpair");
        let pid = rustix::process::getpid();
        assert!(!ready(open_pidfd(&a, pid).expect("pidfd"), PollFlags::IN));
        drop(b);
        assert_eq!(open_pidfd(&a, pid).expect_err("hung up"), Errno::SRCH);
    }

    #[test]
    fn a_process_of_another_user_is_refused() {
        let (a, _b) = Socket::pair().expect("socketpair");
        let peer = Peer { uid: 12345, ..Peer::of(&a).expect("credentials") };
        assert_eq!(peer.open_memory().expect_err("not the user that connected"), Errno::PERM);
    }
}
