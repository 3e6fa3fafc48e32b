//! Bells: a byte in a pipe wakes the owner, and whoever else holds the pipe can never make a ringer wait.
//!
//! An eventfd would be a word, but its flags belong to all its holders, and one that is full and made blocking by a
//! peer stops the next ringer for good. A pipe can be opened anew: each ringer has a description of its own, with its
//! own flags, and a reading end of it, so that a reader that is gone is no SIGPIPE.

use std::os::fd::{AsFd, AsRawFd, OwnedFd};

use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;
use rustix::pipe::{PipeFlags, pipe_with};

/// The ringing end of a bell.
#[derive(Debug)]
pub struct Bell(OwnedFd);

/// A new bell's two ends: the owner's, to wait on and empty with [`hush`], and the one to give away.
pub fn make_bell() -> Result<(OwnedFd, OwnedFd), Errno> {
    let (reader, writer) = pipe_with(PipeFlags::CLOEXEC | PipeFlags::NONBLOCK)?;
    // Ringers of other users open it anew.
    rustix::fs::fchmod(&writer, Mode::from_raw_mode(0o666))?;
    Ok((reader, writer))
}

/// Owner: empties its end. What does not fit into one read is only a wake-up for nothing.
pub fn hush(reader: &OwnedFd) {
    let _ = rustix::io::read(reader, &mut [0u8; 4096]);
}

/// Is it an anonymous pipe? (A named one could be a file system's that keeps its openers waiting.)
fn is_pipe(fd: impl AsFd) -> bool {
    rustix::fs::readlink(own_path(fd), Vec::new()).is_ok_and(|name| name.as_bytes().starts_with(b"pipe:["))
}

fn own_path(fd: impl AsFd) -> String {
    format!("/proc/self/fd/{}", fd.as_fd().as_raw_fd())
}

impl Bell {
    /// Opens the ringing end of a bell that anybody may hold. EINVAL: it is none.
    pub fn open(given: impl AsFd) -> Result<Self, Errno> {
        if !is_pipe(&given) {
            return Err(Errno::INVAL);
        }
        let flags = OFlags::RDWR | OFlags::NONBLOCK | OFlags::CLOEXEC;
        rustix::fs::open(own_path(given), flags, Mode::empty()).map(Bell)
    }

    /// Wakes the owner, and never waits: a full pipe (EAGAIN) rings already.
    pub fn ring(&self) {
        let _ = rustix::io::write(&self.0, &[1]);
    }
}

impl AsFd for Bell {
    fn as_fd(&self) -> std::os::fd::BorrowedFd<'_> {
        self.0.as_fd()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustix::event::{PollFd, PollFlags, Timespec, poll};

    fn rings(reader: &OwnedFd) -> bool {
        poll(&mut [PollFd::new(reader, PollFlags::IN)], Some(&Timespec::default())).expect("poll") > 0
    }

    #[test]
    fn a_ring_is_heard_until_hushed() {
        let (reader, writer) = make_bell().expect("bell");
        let bell = Bell::open(&writer).expect("open");
        assert!(!rings(&reader));
        bell.ring();
        bell.ring();
        assert!(rings(&reader));
        hush(&reader);
        assert!(!rings(&reader));
        hush(&reader);
    }

    #[test]
    fn another_holder_cannot_make_a_ringer_wait_or_die() {
        let (reader, theirs) = make_bell().expect("bell");
        let bell = Bell::open(&theirs).expect("open");
        while rustix::io::write(&theirs, &[0; 4096]).is_ok() {}
        rustix::fs::fcntl_setfl(&theirs, OFlags::empty()).expect("blocking from now on");
        bell.ring();
        assert!(rings(&reader));
        drop((reader, theirs));
        // No reader but its own is left: SIGPIPE (which the test runner ignores, so look at the error) would end us.
        hush(&bell.0);
        assert_eq!(rustix::io::write(&bell.0, &[1]), Ok(1));
    }

    #[test]
    fn only_pipes_are_bells() {
        let file = crate::shm::make_memfd("bell", 4096).expect("memfd");
        assert_eq!(Bell::open(&file).expect_err("a memfd"), Errno::INVAL);
    }
}
