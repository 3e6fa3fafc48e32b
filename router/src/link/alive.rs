//! When another host's kernel was last heard: its router may have no processor, or much to do, and the host is there.

use std::os::fd::{AsRawFd as _, BorrowedFd};
use std::time::Duration;

/// How long ago the other side's kernel acknowledged something (tcp(7), TCP_INFO). None: `socket` is no TCP connection.
pub fn acknowledged(socket: BorrowedFd<'_>) -> Option<Duration> {
    let mut info = std::mem::MaybeUninit::<libc::tcp_info>::zeroed();
    let mut len = size_of::<libc::tcp_info>() as libc::socklen_t;
    let (fd, to) = (socket.as_raw_fd(), info.as_mut_ptr().cast());
    // SAFETY: the kernel writes at most `len` bytes, which `info` has.
    let failed = unsafe { libc::getsockopt(fd, libc::IPPROTO_TCP, libc::TCP_INFO, to, &raw mut len) };
    if failed != 0 {
        return None;
    }
    // SAFETY: integers, for which all bytes are values; what an older kernel did not write is zero.
    let info = unsafe { info.assume_init() };
    Some(Duration::from_millis(info.tcpi_last_ack_recv.into()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write as _;
    use std::net::{TcpListener, TcpStream};
    use std::os::fd::AsFd as _;

    #[test]
    fn a_kernel_answers_for_a_program_that_does_not() {
        let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
        let here = TcpStream::connect(listener.local_addr().expect("bound")).expect("loopback");
        let _there = listener.accept().expect("connected"); // it never reads
        let quiet = Duration::from_millis(200);
        let ago = || acknowledged(here.as_fd()).expect("TCP");
        while ago() < quiet {
            std::thread::sleep(Duration::from_millis(10)); // nothing is said
        }
        // On a busy machine this may look late: then it asks once more.
        let asked = |_: &u32| {
            (&here).write_all(b"are you there?").expect("room");
            std::thread::sleep(Duration::from_millis(60)); // an acknowledgement may be delayed by 40 ms
            ago() < quiet
        };
        assert!((0..100).any(|n| asked(&n)), "no kernel answered");
        let (unix, _) = std::os::unix::net::UnixStream::pair().expect("socketpair");
        assert_eq!(acknowledged(unix.as_fd()), None);
    }
}
