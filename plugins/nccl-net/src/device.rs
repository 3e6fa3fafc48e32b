//! The process's open device: one context and one protection domain, shared by all communicators, so that memory which
//! several of them register moves only once.
//!
//! It lives as long as somebody holds it: a communicator's context (since v11), or the process (before: there is no call
//! that would end it).

use std::sync::{Arc, Mutex, PoisonError, Weak};

use freeflow_core::client::{Cm, Context, Pd};
use freeflow_core::verbs::Gid;
use freeflow_nccl_abi::{TRAFFIC_CLASS_UNDEF, ptr};

use crate::connect::Pending;
use crate::fault::{Fault, Result};
use crate::slots::GROUP;

/// The device's name, as every door of FreeFlow has it.
pub const NAME: &std::ffi::CStr = c"ff0";
/// Longest message: NCCL cuts longer ones into pieces, and no size in test() is longer than an int.
pub const MAX_BYTES: usize = 1 << 30;
/// What NCCL's tuning reckons with, in Mb/s: between shared memory and TCP.
const SPEED: i32 = 100_000;

/// An open device.
#[derive(Debug)]
pub struct Device {
    pub context: Arc<Context>,
    pub pd: Arc<Pd>,
    cm: Mutex<Option<Arc<Cm>>>,
    /// Connections that connect() is being asked for again and again.
    pub pending: Mutex<Pending>,
    /// A forked child has the parent's device, which is of no use to it.
    pid: u32,
}

static CURRENT: Mutex<Weak<Device>> = Mutex::new(Weak::new());
static KEPT: Mutex<Option<Arc<Device>>> = Mutex::new(None);

/// The process's device, opened at first use and after the last one let it go.
pub fn open() -> Result<Arc<Device>> {
    let mut current = CURRENT.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some(device) = current.upgrade().filter(|device| device.is_ours()) {
        return Ok(device);
    }
    let context = Context::open()?;
    let pd = context.alloc_pd()?;
    let (cm, pending, pid) = (Mutex::default(), Mutex::default(), std::process::id());
    let device = Arc::new(Device { context, pd, cm, pending, pid });
    *current = Arc::downgrade(&device);
    Ok(device)
}

/// The same, to stay open while the process lives.
pub fn keep() -> Result<Arc<Device>> {
    let device = open()?;
    let old = KEPT.lock().unwrap_or_else(PoisonError::into_inner).replace(Arc::clone(&device));
    if let Some(inherited) = old.filter(|old| !old.is_ours()) {
        // It is the parent's to close.
        std::mem::forget(inherited);
    }
    Ok(device)
}

/// The open device, for calls that may only come after init.
pub fn current() -> Result<Arc<Device>> {
    let current = CURRENT.lock().unwrap_or_else(PoisonError::into_inner);
    let device = current.upgrade().filter(|device| device.is_ours());
    device.ok_or_else(|| Fault::usage("the plugin is not initialised in this process"))
}

impl Device {
    fn is_ours(&self) -> bool {
        self.pid == std::process::id()
    }

    pub fn gid(&self) -> Gid {
        self.context.gid()
    }

    /// The line to the connection manager.
    pub fn cm(&self) -> Result<Arc<Cm>> {
        let mut cm = self.cm.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(open) = &*cm {
            return Ok(Arc::clone(open));
        }
        Ok(Arc::clone(cm.insert(Cm::open()?)))
    }

    /// It is of no use any more: the next one to need it opens another.
    pub fn forget_cm(&self) {
        self.cm.lock().unwrap_or_else(PoisonError::into_inner).take();
    }

    pub fn properties(&self) -> Properties {
        let gid = self.gid().0;
        Properties {
            guid: gid[8..].try_into().map_or(0, u64::from_be_bytes),
            ptr_support: ptr::HOST,
            speed: SPEED,
            port: 1,
            latency: 1.0,
            max_comms: i32::try_from(self.context.limits().max_qp).unwrap_or(i32::MAX),
            max_recvs: GROUP as i32,
        }
    }
}

impl Drop for Device {
    /// Nothing of ours runs on when the last communicator's finalize returns.
    fn drop(&mut self) {
        *self.pending.get_mut().unwrap_or_else(PoisonError::into_inner) = Pending::default();
        self.context.close();
    }
}

/// What getProperties says in every version; what only some versions ask for, their adapters know.
#[derive(Debug, Clone, Copy)]
pub struct Properties {
    pub guid: u64,
    pub ptr_support: i32,
    pub speed: i32,
    pub port: i32,
    pub latency: f32,
    pub max_comms: i32,
    pub max_recvs: i32,
}

/// How a comm is to be, as its version of the interface and its communicator's configuration have it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Style {
    /// A message that is too long is cut and said to be so (regIsGlobal, since v8); else it is an error.
    pub truncates: bool,
    pub traffic_class: i32,
}

impl Style {
    pub const V6: Style = Style { truncates: false, traffic_class: TRAFFIC_CLASS_UNDEF };
    pub const V8: Style = Style { truncates: true, ..Style::V6 };
}
