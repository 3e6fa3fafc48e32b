//! `rdma_getaddrinfo`: getaddrinfo(3) with RDMA's words.
//!
//! Everything in an rdma_addrinfo is malloc'ed here and freed by `rdma_freeaddrinfo`.

use std::ffi::{c_char, c_int, c_void};

use freeflow_verbs_abi::*;
use libc::{addrinfo, sockaddr, socklen_t};

use crate::edge::{self, Errno, Result};

/// getaddrinfo's code where it is not an errno: callers of rdma_getaddrinfo see it as it is.
enum Failure {
    Errno(Errno),
    Resolver(c_int),
}

impl From<Errno> for Failure {
    fn from(errno: Errno) -> Self {
        Failure::Errno(errno)
    }
}

fn zeroed_addrinfo() -> addrinfo {
    // SAFETY: pointers and integers, for which zero is valid.
    unsafe { std::mem::zeroed() }
}

fn zeroed_rai() -> rdma_addrinfo {
    // SAFETY: pointers and integers, for which zero is valid.
    unsafe { std::mem::zeroed() }
}

/// What getaddrinfo is asked for.
fn ask(hints: &rdma_addrinfo) -> addrinfo {
    let flags = hints.ai_flags as u32;
    let passive = if flags & RAI_PASSIVE != 0 { libc::AI_PASSIVE } else { 0 };
    let numeric = if flags & RAI_NUMERICHOST != 0 { libc::AI_NUMERICHOST } else { 0 };
    let socktype = match hints.ai_qp_type as ibv_qp_type {
        IBV_QPT_RC | IBV_QPT_UC => libc::SOCK_STREAM,
        IBV_QPT_UD => libc::SOCK_DGRAM,
        _ => 0,
    };
    let protocol = match hints.ai_port_space as rdma_port_space {
        RDMA_PS_TCP => libc::IPPROTO_TCP,
        RDMA_PS_UDP | RDMA_PS_IPOIB => libc::IPPROTO_UDP,
        _ => 0,
    };
    addrinfo {
        ai_flags: passive | numeric,
        ai_family: hints.ai_family,
        ai_socktype: socktype,
        ai_protocol: protocol,
        ..zeroed_addrinfo()
    }
}

/// A malloc'ed copy of `len` bytes.
///
/// # Safety
/// `from` points to `len` readable bytes.
unsafe fn copy(from: *const c_void, len: usize) -> Result<*mut c_void> {
    // SAFETY: a plain allocation, judged below.
    let to = unsafe { libc::malloc(len.max(1)) };
    if to.is_null() {
        return Err(Errno::NOMEM);
    }
    // SAFETY: the caller's promise; `to` was just allocated with that length.
    unsafe { std::ptr::copy_nonoverlapping(from.cast::<u8>(), to.cast::<u8>(), len) };
    Ok(to)
}

/// A malloc'ed copy of an address; NULL and 0 for none.
///
/// # Safety
/// `from` is NULL or points to `len` readable bytes.
unsafe fn copy_addr(from: *const sockaddr, len: socklen_t) -> Result<(*mut sockaddr, socklen_t)> {
    if from.is_null() || len == 0 {
        return Ok((std::ptr::null_mut(), 0));
    }
    // SAFETY: the caller's promise.
    Ok((unsafe { copy(from.cast(), len as usize) }?.cast(), len))
}

/// A malloc'ed copy of a name, or NULL.
///
/// # Safety
/// `from` is NULL or a string.
unsafe fn copy_name(from: *const c_char) -> *mut c_char {
    if from.is_null() {
        return std::ptr::null_mut();
    }
    // SAFETY: the caller's promise.
    unsafe { libc::strdup(from) }
}

/// Asks getaddrinfo and writes its first answer into `rai`.
///
/// # Safety
/// `node` and `service` are NULL or strings.
unsafe fn look_up(
    node: *const c_char,
    service: *const c_char,
    hints: &rdma_addrinfo,
    rai: &mut rdma_addrinfo,
) -> std::result::Result<(), Failure> {
    let (asked, mut list) = (ask(hints), std::ptr::null_mut());
    // SAFETY: the caller's strings, our hints, and a place for the answer.
    let code = unsafe { libc::getaddrinfo(node, service, &asked, &mut list) };
    if code != 0 {
        return Err(Failure::Resolver(code));
    }
    // SAFETY: success means that there is an answer.
    let filled = fill(unsafe { &*list }, hints, asked.ai_flags & libc::AI_PASSIVE != 0, rai);
    // SAFETY: got from getaddrinfo, not used after this.
    unsafe { libc::freeaddrinfo(list) };
    Ok(filled?)
}

fn fill(first: &addrinfo, hints: &rdma_addrinfo, passive: bool, rai: &mut rdma_addrinfo) -> Result<()> {
    let datagram = first.ai_socktype == libc::SOCK_DGRAM;
    rai.ai_family = first.ai_family;
    rai.ai_qp_type = match hints.ai_qp_type {
        0 if datagram => IBV_QPT_UD as c_int,
        0 => IBV_QPT_RC as c_int,
        given => given,
    };
    rai.ai_port_space = match hints.ai_port_space {
        0 if datagram => RDMA_PS_UDP as c_int,
        0 => RDMA_PS_TCP as c_int,
        given => given,
    };
    // SAFETY: an answer of getaddrinfo: an address of that length.
    let (addr, len) = unsafe { copy_addr(first.ai_addr, first.ai_addrlen) }?;
    // SAFETY: an answer of getaddrinfo: NULL or a string.
    let name = unsafe { copy_name(first.ai_canonname) };
    if passive {
        rai.ai_flags = RAI_PASSIVE as c_int;
        (rai.ai_src_addr, rai.ai_src_len, rai.ai_src_canonname) = (addr, len, name);
    } else {
        (rai.ai_dst_addr, rai.ai_dst_len, rai.ai_dst_canonname) = (addr, len, name);
    }
    Ok(())
}

/// # Safety
/// As for [`rdma_getaddrinfo`].
unsafe fn answer(
    node: *const c_char,
    service: *const c_char,
    hints: Option<&rdma_addrinfo>,
    rai: &mut rdma_addrinfo,
) -> std::result::Result<(), Failure> {
    if node.is_null() && service.is_null() && hints.is_none() {
        return Err(Errno::INVAL.into());
    }
    let none = zeroed_rai();
    let hints = hints.unwrap_or(&none);
    if node.is_null() && service.is_null() {
        rai.ai_flags = hints.ai_flags;
        rai.ai_family = hints.ai_family;
        rai.ai_qp_type = hints.ai_qp_type;
        rai.ai_port_space = hints.ai_port_space;
        // SAFETY: the program's address, of the length it says.
        (rai.ai_dst_addr, rai.ai_dst_len) = unsafe { copy_addr(hints.ai_dst_addr, hints.ai_dst_len) }?;
    } else {
        // SAFETY: the program's strings.
        unsafe { look_up(node, service, hints, rai) }?;
    }
    if rai.ai_src_addr.is_null() {
        // SAFETY: the program's address, of the length it says.
        (rai.ai_src_addr, rai.ai_src_len) = unsafe { copy_addr(hints.ai_src_addr, hints.ai_src_len) }?;
    }
    Ok(())
}

/// Frees everything an rdma_addrinfo points to.
fn free_parts(rai: &rdma_addrinfo) {
    let parts = [
        rai.ai_src_addr.cast(),
        rai.ai_dst_addr.cast(),
        rai.ai_src_canonname.cast(),
        rai.ai_dst_canonname.cast(),
        rai.ai_route,
        rai.ai_connect,
    ];
    for part in parts {
        // SAFETY: NULL or malloc'ed for this rdma_addrinfo.
        unsafe { libc::free(part) };
    }
}

pub unsafe extern "C" fn rdma_getaddrinfo(
    node: *const c_char,
    service: *const c_char,
    hints: *const rdma_addrinfo,
    res: *mut *mut rdma_addrinfo,
) -> c_int {
    let mut resolver = 0;
    let code = edge::code(|| {
        if res.is_null() {
            return Err(Errno::INVAL);
        }
        // SAFETY: NULL or the program's structure.
        let hints = unsafe { hints.as_ref() };
        let mut rai = zeroed_rai();
        // SAFETY: the program's strings and hints.
        if let Err(failure) = unsafe { answer(node, service, hints, &mut rai) } {
            free_parts(&rai);
            return match failure {
                Failure::Errno(errno) => Err(errno),
                Failure::Resolver(code) => {
                    resolver = code;
                    Ok(())
                }
            };
        }
        // SAFETY: a structure of that size.
        let made = unsafe { copy((&raw const rai).cast(), size_of::<rdma_addrinfo>()) };
        let made = made.inspect_err(|_| free_parts(&rai))?;
        // SAFETY: the caller's pointer to fill in.
        unsafe { *res = made.cast() };
        Ok(())
    });
    if code == 0 { resolver } else { code }
}

pub unsafe extern "C" fn rdma_freeaddrinfo(res: *mut rdma_addrinfo) {
    let mut next = res;
    while !next.is_null() {
        // SAFETY: an rdma_addrinfo of ours, freed below; the structure is plain data.
        let one = unsafe { next.read() };
        free_parts(&one);
        // SAFETY: malloc'ed by rdma_getaddrinfo.
        unsafe { libc::free(next.cast()) };
        next = one.ai_next;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::address;
    use freeflow_core::ctl::cm::cm_family;

    fn get(node: Option<&std::ffi::CStr>, flags: u32) -> std::result::Result<rdma_addrinfo, c_int> {
        let mut hints = zeroed_rai();
        hints.ai_flags = flags as c_int;
        hints.ai_port_space = RDMA_PS_TCP as c_int;
        let mut res = std::ptr::null_mut();
        let node = node.map_or(std::ptr::null(), |node| node.as_ptr());
        // SAFETY: strings and structures of this function.
        match unsafe { rdma_getaddrinfo(node, c"7471".as_ptr(), &hints, &mut res) } {
            // SAFETY: filled in on success; leaked by this test.
            0 => Ok(unsafe { res.read() }),
            code => Err(code),
        }
    }

    #[test]
    fn names_become_addresses() {
        let passive = get(None, RAI_PASSIVE).unwrap();
        // SAFETY: an address of getaddrinfo.
        let addr = unsafe { address::read(passive.ai_src_addr) }.unwrap();
        assert_eq!((addr.addr, addr.port), ([0; 16], 7471));
        assert!(passive.ai_dst_addr.is_null());
        assert_eq!(passive.ai_qp_type as u32, IBV_QPT_RC);

        let active = get(Some(c"10.1.2.3"), RAI_NUMERICHOST).unwrap();
        // SAFETY: an address of getaddrinfo.
        let addr = unsafe { address::read(active.ai_dst_addr) }.unwrap();
        assert_eq!((addr.family, addr.port, addr.addr[15]), (cm_family::V4, 7471, 3));
        assert!(active.ai_src_addr.is_null());

        assert_eq!(get(Some(c"not an address"), RAI_NUMERICHOST).err(), Some(libc::EAI_NONAME));
    }
}
