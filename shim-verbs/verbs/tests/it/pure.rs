//! Functions without state, compared value for value with Debian's library where it is installed.

use libloading::os::unix::{Library, RTLD_LOCAL, RTLD_NOW};
use std::ffi::{CStr, CString, c_char, c_int, c_uint};

const STOCK: &str = "/usr/lib/x86_64-linux-gnu/libibverbs.so.1";

fn open(path: &std::path::Path) -> Library {
    // SAFETY: both libraries' constructors only set up themselves.
    unsafe { Library::open(Some(path), RTLD_NOW | RTLD_LOCAL) }.expect("the library loads")
}

fn ours() -> Library {
    open(super::library())
}

fn both() -> Option<(Library, Library)> {
    let path = std::path::Path::new(STOCK);
    if !path.exists() {
        println!("skipped: {STOCK} (Debian package libibverbs1) is not installed");
        return None;
    }
    Some((ours(), open(path)))
}

fn call<A, R>(lib: &Library, name: &str, argument: A) -> R {
    // SAFETY: callers name functions of exactly this shape.
    let f = unsafe { lib.get::<extern "C" fn(A) -> R>(name.as_bytes()) }.expect("exported");
    f(argument)
}

fn text(lib: &Library, name: &str, value: c_int) -> String {
    let p: *const c_char = call(lib, name, value);
    // SAFETY: these functions return static C strings.
    unsafe { CStr::from_ptr(p) }.to_str().expect("ASCII").to_owned()
}

#[test]
fn strings_are_those_of_rdma_core() {
    let Some((ours, stock)) = both() else { return };
    for name in ["ibv_node_type_str", "ibv_port_state_str", "ibv_event_type_str", "ibv_wc_status_str"] {
        for value in -2..40 {
            assert_eq!(text(&ours, name, value), text(&stock, name, value), "{name}({value})");
        }
    }
}

#[test]
fn rates_are_those_of_rdma_core() {
    let Some((ours, stock)) = both() else { return };
    for value in -2..64 {
        for name in ["ibv_rate_to_mult", "ibv_rate_to_mbps"] {
            assert_eq!(
                call::<_, c_int>(&ours, name, value),
                call::<_, c_int>(&stock, name, value),
                "{name}({value})"
            );
        }
    }
    for value in -2..600 {
        let name = "mult_to_ibv_rate";
        assert_eq!(
            call::<_, c_uint>(&ours, name, value),
            call::<_, c_uint>(&stock, name, value),
            "{name}({value})"
        );
    }
    for rate in 0..64 {
        let mbps: c_int = call(&stock, "ibv_rate_to_mbps", rate);
        let back: c_uint = call(&ours, "mbps_to_ibv_rate", mbps);
        assert_eq!(back, call::<_, c_uint>(&stock, "mbps_to_ibv_rate", mbps), "mbps_to_ibv_rate({mbps})");
    }
}

#[test]
fn read_sysfs_file_strips_the_newline_and_wants_room_for_the_end() {
    let lib = ours();
    type Read = unsafe extern "C" fn(*const c_char, *const c_char, *mut c_char, usize) -> c_int;
    // SAFETY: that is its prototype.
    let read = unsafe { lib.get::<Read>(b"ibv_read_sysfs_file") }.expect("exported");
    let dir = std::env::temp_dir().join(format!("ff-sysfs-{}", std::process::id()));
    std::fs::create_dir_all(&dir).expect("a directory");
    std::fs::write(dir.join("attr"), "ab\n").expect("a file");
    std::fs::write(dir.join("bare"), "abcd").expect("a file");
    let c_dir = CString::new(dir.to_str().expect("UTF-8")).expect("no NUL");
    let mut buf = [b'#' as c_char; 8];
    // SAFETY: C strings and a buffer of the size said.
    let len = unsafe { read(c_dir.as_ptr(), c"attr".as_ptr(), buf.as_mut_ptr(), 8) };
    assert_eq!((len, buf[0] as u8, buf[1] as u8, buf[2]), (2, b'a', b'b', 0));
    // SAFETY: as above; four bytes hold the text but not its end.
    let full = unsafe { read(c_dir.as_ptr(), c"bare".as_ptr(), buf.as_mut_ptr(), 4) };
    assert_eq!(full, -1);
    // SAFETY: as above.
    let none = unsafe { read(c_dir.as_ptr(), c"missing".as_ptr(), buf.as_mut_ptr(), 8) };
    assert_eq!(none, -1);
    assert_eq!(std::io::Error::last_os_error().raw_os_error(), Some(libc::ENOENT));
    std::fs::remove_dir_all(&dir).expect("cleans up");
}
