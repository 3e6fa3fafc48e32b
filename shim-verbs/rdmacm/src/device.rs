//! The RDMA device of the container, as ids are attached to it.
//!
//! Owns the one open context (kept open, as rdma_get_devices promises), the default PD, which lives as long as an id is
//! attached, the PD of rsockets, so that a peer of one of those does not reach what the program registers, and the XRC domain.

use std::ffi::c_int;
use std::sync::{Mutex, PoisonError};

use freeflow_verbs_abi::{ibv_context, ibv_mtu, ibv_pd, ibv_xrcd};

use crate::edge::{self, Errno, Result};
use crate::session::Session;
use crate::verbs::verbs;

/// The port every id uses.
pub const PORT: u8 = 1;

/// What is known about an open device.
#[derive(Debug, Clone, Copy)]
pub struct Open {
    pub context: *mut ibv_context,
    pub mtu: ibv_mtu,
    pub max_initiator_depth: u8,
    pub max_responder_resources: u8,
}

#[derive(Debug)]
struct State {
    open: Option<Open>,
    pd: *mut ibv_pd,
    rsockets: *mut ibv_pd,
    xrcd: *mut ibv_xrcd,
    /// Attached ids.
    users: usize,
}

/// The device of a session.
#[derive(Debug)]
pub struct Device(Mutex<State>);

// SAFETY: contexts and PDs of libibverbs may be used by any thread.
unsafe impl Send for Device {}
// SAFETY: as above, and the state is behind a mutex.
unsafe impl Sync for Device {}

impl Default for Device {
    fn default() -> Self {
        Device(Mutex::new(State {
            open: None,
            pd: std::ptr::null_mut(),
            rsockets: std::ptr::null_mut(),
            xrcd: std::ptr::null_mut(),
            users: 0,
        }))
    }
}

impl State {
    fn open(&mut self) -> Result<Open> {
        if let Some(open) = self.open {
            return Ok(open);
        }
        let verbs = verbs()?;
        let context = verbs.open_first()?;
        let queried = verbs.query_device(context).and_then(|d| Ok((d, verbs.query_port(context, PORT)?)));
        let (device, port) = queried.inspect_err(|_| verbs.close(context))?;
        let small = |n: c_int| u8::try_from(n).unwrap_or(if n < 0 { 0 } else { u8::MAX });
        let open = Open {
            context,
            mtu: port.active_mtu,
            max_initiator_depth: small(device.max_qp_init_rd_atom),
            max_responder_resources: small(device.max_qp_rd_atom),
        };
        self.open = Some(open);
        Ok(open)
    }
}

impl Device {
    fn lock(&self) -> std::sync::MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The open device.
    pub fn open(&self) -> Result<Open> {
        self.lock().open()
    }

    /// The PD of rsockets, which stays once it is there.
    pub fn rsocket_pd(&self) -> Result<*mut ibv_pd> {
        let mut state = self.lock();
        if state.rsockets.is_null() {
            let open = state.open()?;
            state.rsockets = verbs()?.alloc_pd(open.context)?;
        }
        Ok(state.rsockets)
    }

    /// The XRC domain of ids whose program names none; it stays once it is there.
    pub fn xrcd(&self) -> Result<*mut ibv_xrcd> {
        let mut state = self.lock();
        if state.xrcd.is_null() {
            let open = state.open()?;
            state.xrcd = verbs()?.open_xrcd(open.context)?;
        }
        Ok(state.xrcd)
    }

    /// One more id uses the device and its default PD.
    pub fn attach(&self) -> Result<(Open, *mut ibv_pd)> {
        let mut state = self.lock();
        let open = state.open()?;
        if state.users == 0 {
            state.pd = verbs()?.alloc_pd(open.context)?;
        }
        state.users += 1;
        Ok((open, state.pd))
    }

    /// One id less; the last gives the PD back.
    pub fn detach(&self) {
        let mut state = self.lock();
        state.users -= 1;
        if state.users == 0
            && let Ok(verbs) = verbs()
        {
            verbs.dealloc_pd(state.pd);
            state.pd = std::ptr::null_mut();
        }
    }
}

/// Two pointers: the device and the end of the list.
type List = [*mut ibv_context; 2];

pub unsafe extern "C" fn rdma_get_devices(count: *mut c_int) -> *mut *mut ibv_context {
    edge::pointer(|| {
        let open = Session::current()?.device.open()?;
        // SAFETY: a plain allocation, judged below.
        let list = unsafe { libc::malloc(size_of::<List>()) }.cast::<List>();
        if list.is_null() {
            return Err(Errno::NOMEM);
        }
        // SAFETY: allocated above with room for two pointers.
        unsafe { list.write([open.context, std::ptr::null_mut()]) };
        if !count.is_null() {
            // SAFETY: the caller's int.
            unsafe { count.write(1) };
        }
        Ok(list.cast())
    })
}

pub unsafe extern "C" fn rdma_free_devices(list: *mut *mut ibv_context) {
    // SAFETY: NULL or from rdma_get_devices, which uses malloc.
    unsafe { libc::free(list.cast()) };
}
