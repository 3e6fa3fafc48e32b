//! A library to preload: UCX before 1.22 loads only the transport modules whose names were compiled in; with this it looks
//! for `libuct_ff` as well. Does nothing in any other program.
//!
//! UCX calls `ucs_load_modules` through its procedure linkage table, so ours is called instead. The real one is found in
//! the libucs that the caller's library uses, for a process may hold several.

use std::ffi::{CStr, c_char, c_uint, c_void};

/// Longest list of modules that ours is appended to; UCX's has some ten names.
const ROOM: usize = 1024;
const OURS: &[u8] = b":ff";

type LoadModules = unsafe extern "C" fn(*const c_char, *const c_char, *mut c_void, c_uint);

/// Takes UCX's call, notes who called, and goes on in Rust.
///
/// # Safety
/// As for UCX's own: two strings, and a word that belongs to them.
#[cfg(target_arch = "x86_64")]
#[unsafe(naked)]
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ucs_load_modules(
    framework: *const c_char,
    modules: *const c_char,
    once: *mut c_void,
    flags: c_uint,
) {
    std::arch::naked_asm!("mov r8, [rsp]", "jmp {}", sym load_modules)
}

/// Takes UCX's call, notes who called, and goes on in Rust.
///
/// # Safety
/// As for UCX's own: two strings, and a word that belongs to them.
#[cfg(target_arch = "aarch64")]
#[unsafe(naked)]
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ucs_load_modules(
    framework: *const c_char,
    modules: *const c_char,
    once: *mut c_void,
    flags: c_uint,
) {
    std::arch::naked_asm!("mov x4, x30", "b {}", sym load_modules)
}

unsafe extern "C" fn load_modules(
    framework: *const c_char,
    modules: *const c_char,
    once: *mut c_void,
    flags: c_uint,
    caller: *const c_void,
) {
    let Some(real) = real_one(caller) else { return };
    let mut longer = [0u8; ROOM];
    // SAFETY: UCX passes two strings.
    let name = unsafe { CStr::from_ptr(framework) };
    // SAFETY: as above.
    let list = unsafe { CStr::from_ptr(modules) };
    let ours = name == c"uct" && appended(list.to_bytes(), &mut longer);
    let list = if ours { longer.as_ptr().cast() } else { list.as_ptr() };
    // SAFETY: UCX's own function with its own arguments; the list is only read during the call.
    unsafe { real(framework, list, once, flags) };
}

/// `list` with our module at its end, in `out`. False: it does not fit.
fn appended(list: &[u8], out: &mut [u8; ROOM]) -> bool {
    // An empty list has no name for the colon to follow, which UCX does not mind.
    let end = list.len() + OURS.len();
    if end >= ROOM {
        return false;
    }
    out[..list.len()].copy_from_slice(list);
    out[list.len()..end].copy_from_slice(OURS);
    true
}

/// The function that would have been called without us.
fn real_one(caller: *const c_void) -> Option<LoadModules> {
    // SAFETY: plain data, overwritten by dladdr.
    let mut info: libc::Dl_info = unsafe { std::mem::zeroed() };
    // SAFETY: dladdr takes any address.
    if unsafe { libc::dladdr(caller, &mut info) } == 0 {
        return None;
    }
    // SAFETY: with RTLD_NOLOAD nothing is loaded; the name is the loader's own.
    let library = unsafe { libc::dlopen(info.dli_fname, libc::RTLD_LAZY | libc::RTLD_NOLOAD) };
    let ours = ucs_load_modules as *const c_void;
    // SAFETY: a handle, or null for the search of all libraries behind this one.
    let found =
        unsafe { libc::dlsym(if library.is_null() { libc::RTLD_NEXT } else { library }, NAME.as_ptr()) };
    // SAFETY: a function of libucs of that name; the signature is the same in all releases.
    (!found.is_null() && found.cast_const() != ours)
        .then(|| unsafe { std::mem::transmute::<*mut c_void, LoadModules>(found) })
}

const NAME: &CStr = c"ucs_load_modules";

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn our_module_is_appended() {
        let mut out = [0u8; ROOM];
        assert!(appended(b"ib:cma", &mut out));
        assert_eq!(CStr::from_bytes_until_nul(&out), Ok(c"ib:cma:ff"));
        assert!(!appended(&[b'x'; ROOM - 3], &mut [0; ROOM]), "no room for the end of the string");
    }
}
