//! The UCX transport `ff`: translates UCX's transport interface to `freeflow-core`'s client.
//!
//! * [`uct`]: UCX's interface as plain Rust; knows nothing of FreeFlow.
//! * [`component`]: what UCX's lists get: component, transport, configuration.
//! * [`device`]: what interfaces are opened on: which peers each leads to.
//! * [`md`], [`rkey`]: memory: registration, allocation, remote keys.
//! * [`iface`]: a worker's end: address, progress, events, what it can do and how fast.
//! * [`ep`]: a way to one peer: active messages, put, get, atomics, the pending queue, flush.
//! * [`wire`]: what two ends say to each other to get connected.
//!
//! An endpoint is one RC queue pair to a partner of its own at the other side, made by an exchange of datagrams. On the
//! direct path it then maps the peer's message FIFO and memory and uses loads and stores; elsewhere it posts requests.

mod component;
mod connect;
mod device;
mod ep;
mod iface;
mod md;
mod perf;
mod rkey;
mod uct;
mod wire;

use std::ffi::c_void;

use uct::symbols::{Ucx, refuse};
use uct::types::Status;

/// UCX calls this once it has loaded the library. Notes who called.
#[cfg(target_arch = "x86_64")]
#[unsafe(naked)]
#[unsafe(no_mangle)]
pub extern "C" fn ucs_module_global_init() -> Status {
    std::arch::naked_asm!("mov rdi, [rsp]", "jmp {}", sym init)
}

/// UCX calls this once it has loaded the library. Notes who called.
#[cfg(target_arch = "aarch64")]
#[unsafe(naked)]
#[unsafe(no_mangle)]
pub extern "C" fn ucs_module_global_init() -> Status {
    std::arch::naked_asm!("mov x0, x30", "b {}", sym init)
}

extern "C" fn init(caller: *const c_void) -> Status {
    let forced = std::env::var("UCX_FF_FORCE").is_ok_and(|v| matches!(v.as_str(), "y" | "yes" | "1" | "on"));
    match Ucx::of(caller, forced).and_then(component::register) {
        Ok(()) => Status::OK,
        Err(why) => {
            refuse(&why);
            Status::UNSUPPORTED
        }
    }
}
