//! NCCL's logger: a variadic C function that any thread may call.

use std::ffi::{CStr, CString, c_int, c_ulong};
use std::sync::{PoisonError, RwLock};

use freeflow_nccl_abi::{DebugLogger, log_level, subsystem};

use crate::device::{Device, NAME};
use crate::fault::Fault;

static LOGGER: RwLock<Option<DebugLogger>> = RwLock::new(None);

/// The newest communicator's logger is everybody's: they are one function in practice.
pub fn set(logger: Option<DebugLogger>) {
    *LOGGER.write().unwrap_or_else(PoisonError::into_inner) = logger;
}

/// The line by which a user knows that the plugin is used.
pub fn greet(device: &Device, version: u32) {
    say(
        log_level::INFO,
        subsystem::INIT | subsystem::NET,
        &format!(
            "NET/FreeFlow: version {}, plugin API v{version}, {}, vIP {}, device {}",
            env!("CARGO_PKG_VERSION"),
            path(),
            device.gid().ip(),
            NAME.to_string_lossy(),
        ),
    );
}

pub fn fault(what: &str, fault: &Fault) {
    if !fault.text.is_empty() {
        say(log_level::WARN, subsystem::NET, &format!("NET/FreeFlow: {what}: {}", fault.text));
    }
}

fn say(level: c_int, subsystem: c_ulong, text: &str) {
    let Some(logger) = *LOGGER.read().unwrap_or_else(PoisonError::into_inner) else { return };
    let Ok(text) = CString::new(text) else { return };
    // SAFETY: NCCL's logger, as its header declares it; the text is an argument, not the format.
    unsafe {
        logger(level, subsystem, c"freeflow".as_ptr(), line!() as c_int, c"%s".as_ptr(), text.as_ptr())
    };
}

/// Where this library was loaded from.
fn path() -> String {
    let here = path as *const () as *const libc::c_void;
    // SAFETY: plain data, for which zero is valid; dladdr fills it.
    let mut info: libc::Dl_info = unsafe { std::mem::zeroed() };
    // SAFETY: an address in this library, and a structure to fill.
    let found = unsafe { libc::dladdr(here, &mut info) };
    if found == 0 || info.dli_fname.is_null() {
        return "path unknown".into();
    }
    // SAFETY: a string of the dynamic linker's, which lives as long as the library is loaded.
    unsafe { CStr::from_ptr(info.dli_fname) }.to_string_lossy().into_owned()
}
