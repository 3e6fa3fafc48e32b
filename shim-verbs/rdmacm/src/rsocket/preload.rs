//! What librspreload.so of rdma-core 44 (Debian 12's) leaves out, so that today's programs get through it: accept4,
//! fcntl64 and the ioctl that makes a socket non-blocking.
//!
//! That library gives a program a placeholder (/dev/null) for each rsocket and dispatches the calls it knows by it. These
//! three stand in front of the C library's, without a version, wherever this library is searched first (as with
//! LD_PRELOAD), and turn to librspreload for its placeholders. For everything else they are the C library's own.

use std::ffi::{CStr, c_int, c_long, c_ulong, c_void};
use std::sync::OnceLock;

use libc::{sockaddr, socklen_t};

use crate::edge::{Errno, last_errno, set_errno};

type Accept = unsafe extern "C" fn(c_int, *mut sockaddr, *mut socklen_t) -> c_int;
type Accept4 = unsafe extern "C" fn(c_int, *mut sockaddr, *mut socklen_t, c_int) -> c_int;
type Fcntl = unsafe extern "C" fn(c_int, c_int, c_long) -> c_int;
type Ioctl = unsafe extern "C" fn(c_int, c_ulong, *mut c_void) -> c_int;

/// The next definition of each call behind ours.
struct Next {
    accept4: Accept4,
    fcntl64: Fcntl,
    ioctl: Ioctl,
}

/// librspreload's calls.
struct Preload {
    accept: Accept,
    fcntl: Fcntl,
}

/// The function of that name, as seen from `place`.
///
/// # Safety
/// `F` is the type of the C function of that name.
unsafe fn function<F: Copy>(place: *mut c_void, name: &CStr) -> Option<F> {
    // SAFETY: a name, and one of dlsym's pseudo-handles.
    let found = unsafe { libc::dlsym(place, name.as_ptr()) };
    const { assert!(size_of::<F>() == size_of::<*mut c_void>()) };
    // SAFETY: a function of type `F`, by the caller's promise.
    (!found.is_null()).then(|| unsafe { std::mem::transmute_copy(&found) })
}

fn next() -> &'static Next {
    static NEXT: OnceLock<Next> = OnceLock::new();
    NEXT.get_or_init(|| {
        // SAFETY: the C library's prototype.
        let accept4 = unsafe { function(libc::RTLD_NEXT, c"accept4") };
        // SAFETY: the C library's prototype, whose third argument fits into a long.
        let fcntl64 = unsafe { function(libc::RTLD_NEXT, c"fcntl64") };
        // Before glibc 2.28 there is only fcntl.
        // SAFETY: as above.
        let fcntl64 = fcntl64.or_else(|| unsafe { function(libc::RTLD_NEXT, c"fcntl") });
        // SAFETY: the C library's prototype, whose third argument fits into a pointer.
        let ioctl = unsafe { function(libc::RTLD_NEXT, c"ioctl") };
        match (accept4, fcntl64, ioctl) {
            (Some(accept4), Some(fcntl64), Some(ioctl)) => Next { accept4, fcntl64, ioctl },
            _ => unreachable!("the C library has all three"),
        }
    })
}

/// librspreload, if it is in this process.
fn preload() -> Option<&'static Preload> {
    static PRELOAD: OnceLock<Option<Preload>> = OnceLock::new();
    PRELOAD
        .get_or_init(|| {
            // SAFETY: the C library's prototype, which librspreload's is, too.
            let accept: Accept = unsafe { function(libc::RTLD_DEFAULT, c"accept") }?;
            // SAFETY: the same, with a third argument that fits into a long.
            let fcntl: Fcntl = unsafe { function(libc::RTLD_DEFAULT, c"fcntl") }?;
            is_librspreload(fcntl as *const c_void).then_some(Preload { accept, fcntl })
        })
        .as_ref()
}

fn is_librspreload(function: *const c_void) -> bool {
    // SAFETY: pointers and integers, for which zero is valid.
    let mut info: libc::Dl_info = unsafe { std::mem::zeroed() };
    // SAFETY: an address to look up, and a place for the answer.
    if unsafe { libc::dladdr(function, &mut info) } == 0 || info.dli_fname.is_null() {
        return false;
    }
    // SAFETY: a string of the loader's.
    unsafe { CStr::from_ptr(info.dli_fname) }.to_bytes().windows(12).any(|part| part == b"librspreload")
}

/// Whether the calls below are those that the program's calls reach.
pub fn is_in_front() -> bool {
    // SAFETY: the C library's prototype.
    let found: Option<Accept4> = unsafe { function(libc::RTLD_DEFAULT, c"accept4") };
    found.is_some_and(|found| std::ptr::fn_addr_eq(found, accept4 as Accept4))
}

/// # Safety
/// As for accept4(2).
#[unsafe(no_mangle)]
pub unsafe extern "C" fn accept4(
    socket: c_int,
    addr: *mut sockaddr,
    len: *mut socklen_t,
    flags: c_int,
) -> c_int {
    // SAFETY: the program's own call.
    let fd = unsafe { (next().accept4)(socket, addr, len, flags) };
    let placeholder = fd < 0 && last_errno() == Errno::NOTSOCK;
    let Some(preload) = preload().filter(|_| placeholder) else { return fd };
    // SAFETY: the program's own call.
    let fd = unsafe { (preload.accept)(socket, addr, len) };
    if fd >= 0 && flags & libc::SOCK_NONBLOCK != 0 {
        // SAFETY: a descriptor of librspreload's, just made.
        unsafe { (preload.fcntl)(fd, libc::F_SETFL, libc::O_NONBLOCK.into()) };
    }
    fd
}

/// # Safety
/// As for fcntl(2).
#[unsafe(no_mangle)]
pub unsafe extern "C" fn fcntl64(fd: c_int, command: c_int, argument: c_long) -> c_int {
    let fcntl = preload().map_or(next().fcntl64, |preload| preload.fcntl);
    // SAFETY: the program's own call.
    unsafe { fcntl(fd, command, argument) }
}

/// # Safety
/// As for ioctl(2).
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ioctl(fd: c_int, request: c_ulong, argument: *mut c_void) -> c_int {
    // SAFETY: the program's own call.
    let code = unsafe { (next().ioctl)(fd, request, argument) };
    let placeholder = code < 0 && request == libc::FIONBIO && last_errno() == Errno::NOTTY;
    let Some(preload) = preload().filter(|_| placeholder && !argument.is_null()) else { return code };
    // SAFETY: FIONBIO's argument.
    let on = unsafe { argument.cast::<c_int>().read() } != 0;
    let flags = if on { libc::O_NONBLOCK } else { 0 };
    // SAFETY: a descriptor of the program's, which librspreload knows or not.
    let code = unsafe { (preload.fcntl)(fd, libc::F_SETFL, flags.into()) };
    if code < 0 {
        set_errno(Errno::NOTTY);
    }
    code
}
