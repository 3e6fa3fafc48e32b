//! Sockets as such: made, named, listening, connected, closed.

use std::ffi::c_int;
use std::sync::Arc;

use freeflow_core::ctl::cm::{CmAddr, cm_family};
use freeflow_verbs_abi::rdma_addr__bindgen_ty_1;
use libc::{POLLIN, POLLOUT, sockaddr, sockaddr_storage, socklen_t};

use super::preload;
use super::socket::{Body, Socket};
use super::table;
use super::wait::{self, Deadline, FLUSHED};
use crate::address;
use crate::edge::{self, Errno, Result};
use crate::id::field;

pub unsafe extern "C" fn rsocket(domain: c_int, kind: c_int, protocol: c_int) -> c_int {
    let mut number = -1;
    let code = edge::code(|| {
        number = table::add(&open(domain, kind, protocol)?)?;
        Ok(())
    });
    if code == 0 { number } else { code }
}

fn open(domain: c_int, kind: c_int, protocol: c_int) -> Result<Arc<Socket>> {
    if domain != libc::AF_INET && domain != libc::AF_INET6 {
        return Err(Errno::AFNOSUPPORT);
    }
    // rsocket(7) has no flags here, and librspreload.so takes its plain socket then. That is right as long as it could not
    // carry what such a program calls next.
    let flags = if preload::is_in_front() { libc::SOCK_NONBLOCK | libc::SOCK_CLOEXEC } else { 0 };
    let socket = match (kind & !flags, protocol) {
        (libc::SOCK_STREAM, 0 | libc::IPPROTO_TCP) => Socket::stream(domain)?,
        (libc::SOCK_DGRAM, 0 | libc::IPPROTO_UDP) => Socket::datagram(domain)?,
        _ => return Err(Errno::PROTONOSUPPORT),
    };
    socket.set_nonblocking(kind & libc::SOCK_NONBLOCK != 0);
    let fd_flags = if kind & libc::SOCK_CLOEXEC != 0 { libc::FD_CLOEXEC } else { 0 };
    socket.fd_flags.store(fd_flags, std::sync::atomic::Ordering::Relaxed);
    Ok(socket)
}

/// Reads a program's address, which must be as long as its family says.
///
/// # Safety
/// `addr` is NULL or points to `len` readable bytes.
pub unsafe fn read_address(addr: *const sockaddr, len: socklen_t) -> Result<CmAddr> {
    if addr.is_null() {
        return Err(Errno::FAULT);
    }
    if (len as usize) < size_of::<libc::sa_family_t>() {
        return Err(Errno::INVAL);
    }
    // SAFETY: the caller's promise.
    let need = match i32::from(unsafe { (*addr).sa_family }) {
        libc::AF_INET => size_of::<libc::sockaddr_in>(),
        libc::AF_INET6 => size_of::<libc::sockaddr_in6>(),
        _ => return Err(Errno::AFNOSUPPORT),
    };
    if (len as usize) < need {
        return Err(Errno::INVAL);
    }
    // SAFETY: as long as its family says.
    unsafe { address::read(addr) }
}

/// Puts an address where a program wants it, cut off at its room; the length says what it would have been.
///
/// # Safety
/// `to` and `len` are NULL, or `len` points to the length of the room at `to`, which may be NULL if that is 0.
pub unsafe fn write_address(
    socket: &Socket,
    addr: &CmAddr,
    to: *mut sockaddr,
    len: *mut socklen_t,
) -> Result<()> {
    if len.is_null() {
        return if to.is_null() { Ok(()) } else { Err(Errno::FAULT) };
    }
    let family = if socket.domain == libc::AF_INET6 { cm_family::V6 } else { cm_family::V4 };
    let storage: sockaddr_storage = address::storage(&CmAddr { family, ..*addr });
    let whole = match family {
        cm_family::V6 => size_of::<libc::sockaddr_in6>(),
        _ => size_of::<libc::sockaddr_in>(),
    };
    // SAFETY: the caller's promise.
    let room = unsafe { len.read() } as usize;
    if !to.is_null() {
        // SAFETY: the caller's promise; a sockaddr_storage is longer than either address.
        unsafe { to.cast::<u8>().copy_from_nonoverlapping((&raw const storage).cast(), room.min(whole)) };
    }
    // SAFETY: the caller's promise.
    unsafe { len.write(whole as socklen_t) };
    Ok(())
}

/// Where a socket is bound to.
pub fn local(socket: &Socket) -> Result<CmAddr> {
    let state = socket.lock()?;
    let storage = field!(state.cm()?.id(), route.addr.__bindgen_anon_1.src_storage);
    // SAFETY: a whole sockaddr_storage. Without a family there is no address yet: all zeros.
    Ok(unsafe { address::read((&raw const storage).cast()) }.unwrap_or_default())
}

/// Where it is connected to.
fn remote(socket: &Socket) -> Result<CmAddr> {
    let state = socket.lock()?;
    match &state.body {
        Body::Stream(stream) if stream.is_connected() => {
            let storage = field!(stream.cm().id(), route.addr.__bindgen_anon_2.dst_storage);
            // SAFETY: a whole sockaddr_storage.
            unsafe { address::read((&raw const storage).cast()) }
        }
        Body::Datagram(datagram) => datagram.peer().ok_or(Errno::NOTCONN),
        Body::Stream(_) => Err(Errno::NOTCONN),
        Body::Closed => Err(Errno::BADF),
    }
}

pub unsafe extern "C" fn rbind(socket: c_int, addr: *const sockaddr, len: socklen_t) -> c_int {
    edge::code(|| {
        let socket = table::find(socket)?;
        // SAFETY: the program's address.
        let addr = unsafe { read_address(addr, len) }?;
        let mut state = socket.lock()?;
        match &mut state.body {
            Body::Stream(stream) => stream.bind(&addr),
            Body::Datagram(datagram) => {
                datagram.bind(&addr)?;
                table::service().map(|service| service.add(&socket))
            }
            Body::Closed => Err(Errno::BADF),
        }
    })
}

pub unsafe extern "C" fn rlisten(socket: c_int, backlog: c_int) -> c_int {
    edge::code(|| {
        let socket = table::find(socket)?;
        let service = table::service()?;
        socket.lock()?.stream()?.listen(usize::try_from(backlog).unwrap_or(0))?;
        service.add(&socket);
        Ok(())
    })
}

pub unsafe extern "C" fn raccept(socket: c_int, addr: *mut sockaddr, len: *mut socklen_t) -> c_int {
    let mut number = -1;
    let code = edge::code(|| {
        let listener = table::find(socket)?;
        let child = blocking(&listener, POLLIN, || listener.lock()?.stream()?.accept())?;
        // There is room in the queue again.
        table::service()?.look();
        let peer = remote(&child).unwrap_or_default();
        // SAFETY: the program's room for an address.
        unsafe { write_address(&child, &peer, addr, len) }?;
        number = table::add(&child)?;
        Ok(())
    });
    if code == 0 { number } else { code }
}

/// Does `attempt` again and again until it is possible, unless the socket does not wait.
fn blocking<T>(socket: &Arc<Socket>, events: i16, mut attempt: impl FnMut() -> Result<T>) -> Result<T> {
    loop {
        match attempt() {
            Err(Errno::AGAIN) if !socket.is_nonblocking() => wait::one(socket, events, Deadline::Never)?,
            done => return done,
        }
    }
}

pub unsafe extern "C" fn rconnect(socket: c_int, addr: *const sockaddr, len: socklen_t) -> c_int {
    edge::code(|| {
        let socket = table::find(socket)?;
        // SAFETY: the program's address.
        let addr = unsafe { read_address(addr, len) }?;
        if let Body::Datagram(datagram) = &mut socket.lock()?.body {
            return datagram.connect(addr);
        }
        socket.lock()?.stream()?.connect(addr)?;
        loop {
            match socket.progress() {
                Ok(true) => return Ok(()),
                Ok(false) if socket.is_nonblocking() => return Err(Errno::INPROGRESS),
                Ok(false) => wait::one(&socket, POLLOUT, Deadline::Never)?,
                Err(errno) => return Err(errno),
            }
        }
    })
}

pub unsafe extern "C" fn rshutdown(socket: c_int, how: c_int) -> c_int {
    edge::code(|| {
        let socket = table::find(socket)?;
        let (reading, writing) = match how {
            libc::SHUT_RD => (true, false),
            libc::SHUT_WR => (false, true),
            libc::SHUT_RDWR => (true, true),
            _ => return Err(Errno::INVAL),
        };
        let mut state = socket.lock()?;
        state.stream()?.shutdown(reading, writing)?;
        state.tell(true);
        Ok(())
    })
}

pub unsafe extern "C" fn rclose(socket: c_int) -> c_int {
    edge::code(|| {
        let socket = table::remove(socket)?;
        // One that was left in the middle of a call stays as it is, until the process ends.
        let Ok(()) = say_good_bye(&socket) else { return Ok(()) };
        let mut state = socket.lock()?;
        let body = std::mem::replace(&mut state.body, Body::Closed);
        state.tell(true);
        drop(state);
        // Whoever still waits for the socket polls its number, which must not be another file's meanwhile: the
        // descriptors go last.
        drop(body);
        Ok(())
    })
}

/// Ends a stream in order: the last byte arrives before the connection goes.
fn say_good_bye(socket: &Arc<Socket>) -> Result<()> {
    let patient = {
        let mut state = socket.lock()?;
        let patient = !state.options.drops_unsent();
        let Ok(stream) = state.stream() else { return Ok(()) };
        let unaccepted = stream.abandon();
        let connected = stream.is_connected() && stream.shutdown(true, true).is_ok();
        drop(state);
        drop(unaccepted);
        connected && patient
    };
    // What cannot be waited for is lost with the connection.
    while patient && wait::one(socket, FLUSHED, Deadline::Never) == Err(Errno::INTR) {}
    if let Ok(stream) = socket.lock()?.stream() {
        stream.hang_up();
    }
    Ok(())
}

pub unsafe extern "C" fn rgetpeername(socket: c_int, addr: *mut sockaddr, len: *mut socklen_t) -> c_int {
    edge::code(|| {
        let socket = table::find(socket)?;
        // SAFETY: the program's room for an address.
        unsafe { write_address(&socket, &remote(&socket)?, addr, len) }
    })
}

pub unsafe extern "C" fn rgetsockname(socket: c_int, addr: *mut sockaddr, len: *mut socklen_t) -> c_int {
    edge::code(|| {
        let socket = table::find(socket)?;
        // SAFETY: the program's room for an address.
        unsafe { write_address(&socket, &local(&socket)?, addr, len) }
    })
}

const _: () = assert!(size_of::<rdma_addr__bindgen_ty_1>() >= size_of::<sockaddr_storage>());
