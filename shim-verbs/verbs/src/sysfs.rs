//! The two sysfs helpers libibverbs exports for its sister libraries. Our devices have no sysfs entries of their own.

use crate::guard::{self, EINVAL, Errno};
use std::ffi::{CStr, CString, OsStr, c_char, c_int};
use std::io::Read;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::PathBuf;
use std::sync::OnceLock;

/// `/sys`, or what SYSFS_PATH says without its trailing slashes; a setuid program ignores the variable.
pub extern "C" fn ibv_get_sysfs_path() -> *const c_char {
    static PATH: OnceLock<CString> = OnceLock::new();
    PATH.get_or_init(|| {
        // SAFETY: getauxval has no preconditions.
        let secure = unsafe { libc::getauxval(libc::AT_SECURE) } != 0;
        let from_env = std::env::var_os("SYSFS_PATH").filter(|p| !secure && !p.is_empty());
        let mut path = from_env.map_or_else(|| b"/sys".to_vec(), OsStringExt::into_vec);
        while path.len() > 1 && path.ends_with(b"/") {
            path.pop();
        }
        CString::new(path).unwrap_or_else(|_| c"/sys".into())
    })
    .as_ptr()
}

/// Reads `dir/file` into `buf` as a C string without its newline; returns its length, or -1.
///
/// # Safety
/// `dir` and `file` are C strings and `buf` has `size` bytes, as the C prototype demands.
pub unsafe extern "C" fn ibv_read_sysfs_file(
    dir: *const c_char,
    file: *const c_char,
    buf: *mut c_char,
    size: usize,
) -> c_int {
    guard::number(|| {
        // SAFETY: the caller passes a C string.
        let dir = unsafe { CStr::from_ptr(dir) };
        // SAFETY: the caller passes a C string.
        let file = unsafe { CStr::from_ptr(file) };
        // SAFETY: the caller passes size writable bytes; plain bytes may hold anything.
        let buf = unsafe { std::slice::from_raw_parts_mut(buf.cast::<u8>(), size) };
        let path = PathBuf::from(OsStr::from_bytes(dir.to_bytes())).join(OsStr::from_bytes(file.to_bytes()));
        let failed = |e: std::io::Error| Errno(e.raw_os_error().unwrap_or(libc::EIO));
        let mut length = std::fs::File::open(path).and_then(|mut f| f.read(buf)).map_err(failed)?;
        if buf[..length].ends_with(b"\n") {
            length -= 1;
        }
        *buf.get_mut(length).ok_or(EINVAL)? = 0;
        c_int::try_from(length).map_err(|_| EINVAL)
    })
}
