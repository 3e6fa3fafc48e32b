//! riomap, riounmap, riowrite: buffers that the peer writes into by offset, without the program's doing.

use std::ffi::{c_int, c_void};
use std::sync::Arc;

use freeflow_verbs_abi::{IBV_ACCESS_LOCAL_WRITE, IBV_ACCESS_REMOTE_WRITE};
use libc::{PROT_NONE, PROT_WRITE, off_t};

use super::socket::Socket;
use super::table;
use super::wait::{self, Deadline, FLUSHED};
use crate::edge::{self, Errno, Result};

/// Does `attempt` again after completions, while there is no room in the queues.
fn with_room<T>(socket: &Arc<Socket>, until: Deadline, mut attempt: impl FnMut() -> Result<T>) -> Result<T> {
    loop {
        match attempt() {
            Err(Errno::AGAIN) => {}
            done => return done,
        }
        // Credits, places in the send queue and in the staging buffer all come back with completions.
        wait::one(socket, libc::POLLOUT | FLUSHED, until)?;
    }
}

pub unsafe extern "C" fn riomap(
    socket: c_int,
    buf: *mut c_void,
    len: usize,
    protection: c_int,
    flags: c_int,
    offset: off_t,
) -> off_t {
    let mut mapped = -1;
    edge::code(|| {
        let socket = table::find(socket)?;
        if protection & !(PROT_WRITE | PROT_NONE) != 0 || flags != 0 || buf.is_null() || len == 0 {
            return Err(Errno::INVAL);
        }
        let remote = if protection & PROT_WRITE != 0 { IBV_ACCESS_REMOTE_WRITE } else { 0 };
        let access = IBV_ACCESS_LOCAL_WRITE | remote;
        // Without a name of the program's the buffer is called by its address.
        let offset = if offset == -1 { buf.addr() as off_t } else { offset };
        with_room(&socket, Deadline::Never, || {
            let mut state = socket.lock()?;
            let conn = state.stream()?.connected()?;
            // SAFETY: the program keeps the buffer as long as it is mapped.
            unsafe { conn.map(buf, len, access, offset as u64) }
        })?;
        mapped = offset;
        Ok(())
    });
    mapped
}

pub unsafe extern "C" fn riounmap(socket: c_int, buf: *mut c_void, len: usize) -> c_int {
    edge::code(|| {
        let socket = table::find(socket)?;
        with_room(&socket, Deadline::Never, || socket.lock()?.stream()?.connected()?.unmap(buf, len))
    })
}

/// # Safety
/// `from` points to `len` readable bytes.
unsafe fn write(
    socket: &Arc<Socket>,
    from: *const u8,
    len: usize,
    offset: u64,
    until: Deadline,
) -> Result<usize> {
    let mut done = 0;
    while done < len {
        let step = with_room(socket, until, || {
            let mut state = socket.lock()?;
            let conn = state.stream()?.connected()?;
            conn.pump();
            let (to, run) = conn.mapped(offset + done as u64).ok_or(Errno::INVAL)?;
            // SAFETY: inside the caller's bytes.
            match unsafe { conn.write_mapped(from.wrapping_add(done), run.min(len - done), to) }? {
                0 => Err(Errno::AGAIN),
                written => Ok(written),
            }
        });
        match step {
            Ok(written) => done += written,
            Err(errno) if done == 0 => return Err(errno),
            Err(_) => break,
        }
    }
    Ok(done)
}

pub unsafe extern "C" fn riowrite(
    socket: c_int,
    buf: *const c_void,
    len: usize,
    offset: off_t,
    flags: c_int,
) -> isize {
    edge::count(|| {
        let socket = table::find(socket)?;
        let wait = flags & libc::MSG_DONTWAIT == 0 && !socket.is_nonblocking();
        let until = if wait { Deadline::Never } else { Deadline::Now };
        // SAFETY: the program's buffer.
        unsafe { write(&socket, buf.cast(), len, offset as u64, until) }
    })
}
