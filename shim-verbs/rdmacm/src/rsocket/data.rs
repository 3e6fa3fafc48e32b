//! Sending and receiving: the socket calls, all of them on two, over a list of buffers.

use std::ffi::{c_int, c_void};
use std::sync::Arc;

use libc::{POLLIN, POLLOUT, iovec, msghdr, sockaddr, socklen_t};

use super::api::write_address;
use super::socket::{Body, Socket};
use super::table;
use super::wait::{self, Deadline};
use crate::edge::{self, Errno, Result};

/// Flags of send(2) and recv(2) that ask for what there is not. Others that mean nothing here are ignored, as the kernel
/// does.
const REFUSED: c_int = libc::MSG_OOB | libc::MSG_ERRQUEUE | libc::MSG_FASTOPEN;

/// Most buffers of one call (`IOV_MAX`).
const MAX_BUFFERS: usize = 1024;

/// The program's buffers.
///
/// # Safety
/// `iov` is NULL or points to `count` buffers.
unsafe fn buffers<'a>(iov: *const iovec, count: usize) -> Result<&'a [iovec]> {
    match (count, iov.is_null()) {
        (0, _) => Ok(&[]),
        (1..=MAX_BUFFERS, false) => {
            // SAFETY: the caller's promise.
            Ok(unsafe { std::slice::from_raw_parts(iov, count) })
        }
        (_, true) => Err(Errno::FAULT),
        _ => Err(Errno::MSGSIZE),
    }
}

fn one(buf: *const c_void, len: usize) -> [iovec; 1] {
    [iovec { iov_base: buf.cast_mut(), iov_len: len }]
}

/// Until when a call waits.
fn deadline(socket: &Socket, flags: c_int, sending: bool) -> Result<Deadline> {
    if socket.is_nonblocking() || flags & libc::MSG_DONTWAIT != 0 {
        return Ok(Deadline::Now);
    }
    let state = socket.lock()?;
    let timeout = if sending { state.options.send_timeout } else { state.options.receive_timeout };
    Ok(timeout.map_or(Deadline::Never, Deadline::after))
}

// ---- sending

/// Sends `list`, all of it unless the call may not wait.
///
/// # Safety
/// The buffers are readable.
unsafe fn send(
    number: c_int,
    list: &[iovec],
    flags: c_int,
    to: (*const sockaddr, socklen_t),
) -> Result<usize> {
    let socket = table::find(number)?;
    if flags & REFUSED != 0 {
        return Err(Errno::OPNOTSUPP);
    }
    let until = deadline(&socket, flags, true)?;
    if matches!(socket.lock()?.body, Body::Datagram(_)) {
        // SAFETY: the caller's promise, and the program's address.
        return unsafe { super::datagram::send(&socket, list, to, until) };
    }
    let mut sent = 0;
    for buffer in list {
        // SAFETY: the caller's promise.
        match unsafe { send_one(&socket, buffer, until) } {
            Ok(done) => sent += done,
            Err(errno) if sent == 0 => return Err(errno),
            Err(_) => break,
        }
        if !is_whole(list, buffer, sent) {
            break;
        }
    }
    Ok(sent)
}

/// Whether everything up to and with `buffer` was sent.
fn is_whole(list: &[iovec], buffer: &iovec, sent: usize) -> bool {
    let upto = list.iter().take_while(|other| !std::ptr::eq(*other, buffer)).map(|other| other.iov_len);
    sent == upto.sum::<usize>() + buffer.iov_len
}

/// # Safety
/// The buffer is readable.
unsafe fn send_one(socket: &Arc<Socket>, buffer: &iovec, until: Deadline) -> Result<usize> {
    let from: *const u8 = buffer.iov_base.cast();
    let mut sent = 0;
    loop {
        // SAFETY: the caller's promise.
        let done = unsafe { socket.lock()?.stream()?.send(from.wrapping_add(sent), buffer.iov_len - sent) };
        match done {
            Ok(more) => sent += more,
            Err(Errno::AGAIN) => match wait::one(socket, POLLOUT, until) {
                Ok(()) => continue,
                Err(errno) if sent == 0 => return Err(errno),
                Err(_) => return Ok(sent),
            },
            Err(errno) if sent == 0 => return Err(errno),
            Err(_) => return Ok(sent),
        }
        if sent == buffer.iov_len {
            return Ok(sent);
        }
    }
}

// ---- receiving

/// Receives into `list` what is there, or all of it with MSG_WAITALL.
///
/// # Safety
/// The buffers are writable, and there is room for an address.
unsafe fn receive(
    number: c_int,
    list: &[iovec],
    flags: c_int,
    from: (*mut sockaddr, *mut socklen_t),
) -> Result<(usize, bool)> {
    let socket = table::find(number)?;
    if flags & REFUSED != 0 {
        return Err(Errno::OPNOTSUPP);
    }
    let until = deadline(&socket, flags, false)?;
    let peek = flags & libc::MSG_PEEK != 0;
    if matches!(socket.lock()?.body, Body::Datagram(_)) {
        // SAFETY: the caller's promise.
        let got = unsafe { super::datagram::receive(&socket, list, peek, until) }?;
        if !from.1.is_null() {
            // SAFETY: the caller's promise.
            unsafe { write_address(&socket, &got.from, from.0, from.1) }?;
        }
        let whole = flags & libc::MSG_TRUNC != 0;
        return Ok((if whole { got.len } else { got.copied }, got.copied < got.len));
    }
    // SAFETY: the caller's promise.
    let got = unsafe { receive_stream(&socket, list, peek, flags & libc::MSG_WAITALL != 0, until) }?;
    Ok((got, false))
}

/// # Safety
/// The buffers are writable.
unsafe fn receive_stream(
    socket: &Arc<Socket>,
    list: &[iovec],
    peek: bool,
    all: bool,
    until: Deadline,
) -> Result<usize> {
    let mut got = 0;
    for buffer in list.iter().filter(|buffer| buffer.iov_len > 0) {
        let wait_for_all = all && !peek;
        let until = if got > 0 && !wait_for_all { Deadline::Now } else { until };
        // SAFETY: the caller's promise.
        match unsafe { receive_one(socket, buffer, peek, wait_for_all, until) } {
            Ok(more) => got += more,
            Err(errno) if got == 0 => return Err(errno),
            Err(_) => break,
        }
        // Peeking again would only find the same bytes.
        if peek || got == 0 {
            break;
        }
    }
    Ok(got)
}

/// # Safety
/// The buffer is writable.
unsafe fn receive_one(
    socket: &Arc<Socket>,
    buffer: &iovec,
    peek: bool,
    all: bool,
    until: Deadline,
) -> Result<usize> {
    let to: *mut u8 = buffer.iov_base.cast();
    let mut got = 0;
    loop {
        // SAFETY: the caller's promise.
        let done =
            unsafe { socket.lock()?.stream()?.receive(to.wrapping_add(got), buffer.iov_len - got, peek) };
        match done {
            Ok(0) => return Ok(got),
            Ok(more) => got += more,
            Err(Errno::AGAIN) => match wait::one(socket, POLLIN, until) {
                Ok(()) => continue,
                Err(errno) if got == 0 => return Err(errno),
                Err(_) => return Ok(got),
            },
            Err(errno) if got == 0 => return Err(errno),
            Err(_) => return Ok(got),
        }
        if !all || got == buffer.iov_len {
            return Ok(got);
        }
    }
}

// ---- the calls

pub unsafe extern "C" fn rsend(socket: c_int, buf: *const c_void, len: usize, flags: c_int) -> isize {
    // SAFETY: the program's buffer.
    edge::count(|| unsafe { send(socket, &one(buf, len), flags, (std::ptr::null(), 0)) })
}

pub unsafe extern "C" fn rsendto(
    socket: c_int,
    buf: *const c_void,
    len: usize,
    flags: c_int,
    to: *const sockaddr,
    to_len: socklen_t,
) -> isize {
    // SAFETY: the program's buffer and address.
    edge::count(|| unsafe { send(socket, &one(buf, len), flags, (to, to_len)) })
}

pub unsafe extern "C" fn rwrite(socket: c_int, buf: *const c_void, len: usize) -> isize {
    // SAFETY: the program's buffer.
    unsafe { rsend(socket, buf, len, 0) }
}

pub unsafe extern "C" fn rwritev(socket: c_int, iov: *const iovec, count: c_int) -> isize {
    edge::count(|| {
        let count = usize::try_from(count).map_err(|_| Errno::INVAL)?;
        // SAFETY: the program's buffers.
        let list = unsafe { buffers(iov, count) }?;
        // SAFETY: the program's buffers.
        unsafe { send(socket, list, 0, (std::ptr::null(), 0)) }
    })
}

pub unsafe extern "C" fn rsendmsg(socket: c_int, message: *const msghdr, flags: c_int) -> isize {
    edge::count(|| {
        // SAFETY: NULL or the program's message.
        let message = unsafe { message.as_ref() }.ok_or(Errno::FAULT)?;
        if !message.msg_control.is_null() && message.msg_controllen > 0 {
            return Err(Errno::OPNOTSUPP);
        }
        let to = (message.msg_name.cast_const().cast(), message.msg_namelen);
        // SAFETY: the program's buffers.
        let list = unsafe { buffers(message.msg_iov, message.msg_iovlen) }?;
        // SAFETY: the program's buffers and address.
        unsafe { send(socket, list, flags, to) }
    })
}

pub unsafe extern "C" fn rrecv(socket: c_int, buf: *mut c_void, len: usize, flags: c_int) -> isize {
    let nobody = (std::ptr::null_mut(), std::ptr::null_mut());
    // SAFETY: the program's buffer.
    edge::count(|| unsafe { receive(socket, &one(buf, len), flags, nobody) }.map(|(got, _)| got))
}

pub unsafe extern "C" fn rrecvfrom(
    socket: c_int,
    buf: *mut c_void,
    len: usize,
    flags: c_int,
    from: *mut sockaddr,
    from_len: *mut socklen_t,
) -> isize {
    // SAFETY: the program's buffer and room for an address.
    edge::count(|| unsafe { receive(socket, &one(buf, len), flags, (from, from_len)) }.map(|(got, _)| got))
}

pub unsafe extern "C" fn rread(socket: c_int, buf: *mut c_void, len: usize) -> isize {
    // SAFETY: the program's buffer.
    unsafe { rrecv(socket, buf, len, 0) }
}

pub unsafe extern "C" fn rreadv(socket: c_int, iov: *const iovec, count: c_int) -> isize {
    let nobody = (std::ptr::null_mut(), std::ptr::null_mut());
    edge::count(|| {
        let count = usize::try_from(count).map_err(|_| Errno::INVAL)?;
        // SAFETY: the program's buffers.
        let list = unsafe { buffers(iov, count) }?;
        // SAFETY: the program's buffers.
        unsafe { receive(socket, list, 0, nobody) }.map(|(got, _)| got)
    })
}

pub unsafe extern "C" fn rrecvmsg(socket: c_int, message: *mut msghdr, flags: c_int) -> isize {
    edge::count(|| {
        // SAFETY: NULL or the program's message.
        let message = unsafe { message.as_mut() }.ok_or(Errno::FAULT)?;
        let wants_name = !message.msg_name.is_null();
        let len = if wants_name { &raw mut message.msg_namelen } else { std::ptr::null_mut() };
        let from = (message.msg_name.cast(), len);
        // SAFETY: the program's buffers.
        let list = unsafe { buffers(message.msg_iov, message.msg_iovlen) }?;
        // SAFETY: the program's buffers and room for an address.
        let (got, cut) = unsafe { receive(socket, list, flags, from) }?;
        message.msg_flags = if cut { libc::MSG_TRUNC } else { 0 };
        message.msg_controllen = 0;
        Ok(got)
    })
}
