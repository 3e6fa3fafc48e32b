//! rpoll and rselect: poll(2) and select(2) over sockets of ours and any other descriptors.

use std::ffi::{c_int, c_ulong};
use std::os::fd::RawFd;
use std::time::Duration;

use libc::{FD_SETSIZE, POLLIN, POLLOUT, fd_set, pollfd, timeval};

use super::table;
use super::wait::{self, Deadline, Entry};
use crate::edge::{self, Errno, Result};

fn entry(fd: RawFd, events: i16) -> Entry {
    Entry { socket: table::find(fd).ok(), fd, events, revents: 0 }
}

pub unsafe extern "C" fn rpoll(fds: *mut pollfd, count: c_ulong, timeout: c_int) -> c_int {
    edge::count(|| {
        let fds = match count {
            0 => &mut [],
            _ if fds.is_null() => return Err(Errno::FAULT),
            // SAFETY: the program's array.
            _ => unsafe { std::slice::from_raw_parts_mut(fds, count as usize) },
        };
        let mut entries: Vec<Entry> = fds.iter().map(|fd| entry(fd.fd, fd.events)).collect();
        let ready = wait::many(&mut entries, Deadline::millis(timeout))?;
        for (fd, entry) in fds.iter_mut().zip(&entries) {
            fd.revents = entry.revents;
        }
        Ok(ready)
    }) as c_int
}

/// One of select(2)'s three sets; NULL is empty.
struct Set(*mut fd_set);

impl Set {
    fn has(&self, fd: RawFd) -> bool {
        // SAFETY: the program's set; the caller keeps `fd` below FD_SETSIZE.
        !self.0.is_null() && unsafe { libc::FD_ISSET(fd, self.0) }
    }

    /// Leaves those in it that are ready; says how many.
    fn keep(&self, entries: &[Entry], flags: i16) -> usize {
        let mut kept = 0;
        for entry in entries.iter().filter(|entry| self.has(entry.fd)) {
            if entry.revents & flags != 0 {
                kept += 1;
            } else {
                // SAFETY: the program's set, of which `fd` is a member.
                unsafe { libc::FD_CLR(entry.fd, self.0) };
            }
        }
        kept
    }
}

fn select_deadline(timeout: *mut timeval) -> Result<Deadline> {
    // SAFETY: NULL or the program's time.
    let Some(time) = (unsafe { timeout.as_ref() }) else { return Ok(Deadline::Never) };
    let (seconds, micros) = (u64::try_from(time.tv_sec), u64::try_from(time.tv_usec));
    let (Ok(seconds), Ok(micros)) = (seconds, micros) else { return Err(Errno::INVAL) };
    let time = Duration::from_secs(seconds).saturating_add(Duration::from_micros(micros));
    Ok(if time.is_zero() { Deadline::Now } else { Deadline::after(time) })
}

pub unsafe extern "C" fn rselect(
    count: c_int,
    reads: *mut fd_set,
    writes: *mut fd_set,
    excepts: *mut fd_set,
    timeout: *mut timeval,
) -> c_int {
    // What select(2) takes for ready.
    const READ: i16 = POLLIN | libc::POLLHUP | libc::POLLERR;
    const WRITE: i16 = POLLOUT | libc::POLLERR;
    edge::count(|| {
        if !(0..=FD_SETSIZE as c_int).contains(&count) {
            return Err(Errno::INVAL);
        }
        let sets = [(Set(reads), POLLIN), (Set(writes), POLLOUT), (Set(excepts), libc::POLLPRI)];
        let events = |fd| {
            let members = sets.iter().filter(|(set, _)| set.has(fd));
            members.map(|(_, event)| *event).reduce(|all, event| all | event)
        };
        let mut entries: Vec<Entry> =
            (0..count).filter_map(|fd| events(fd).map(|events| entry(fd, events))).collect();
        wait::many(&mut entries, select_deadline(timeout)?)?;
        if entries.iter().any(|entry| entry.revents & libc::POLLNVAL != 0) {
            return Err(Errno::BADF);
        }
        let flags = [READ, WRITE, libc::POLLPRI];
        Ok(sets.iter().zip(flags).map(|((set, _), flags)| set.keep(&entries, flags)).sum())
    }) as c_int
}
