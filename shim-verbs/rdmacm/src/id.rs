//! `rdma_cm_id`: what programs see of it, and what this library keeps beside it.
//!
//! Owns creation and destruction and the count of events not yet acknowledged. The fields in front are the program's as much as ours (inline functions of rdma_verbs.h read them), so they are only touched by value.

use std::cell::UnsafeCell;
use std::ffi::{c_int, c_void};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};

use freeflow_core::ctl::cm::{CmAddr, CmCreate, CmDestroy, CmParams, cm_space};
use freeflow_core::ctl::{Id as Number, RawGid};
use freeflow_verbs_abi::*;

use crate::channel::Channel;
use crate::device::{Open, PORT};
use crate::edge::{self, Errno, Result};
use crate::multicast::Group;
use crate::session::Session;
use crate::{address, event};

/// The other end of a connection, as its message described it.
#[derive(Debug, Clone, Copy)]
pub struct Peer {
    pub gid: RawGid,
    pub params: CmParams,
}

/// What this library keeps about an id.
#[derive(Debug)]
pub struct State {
    /// Made without a channel: calls wait for their own event.
    pub sync: bool,
    /// Events handed to the program, and given back by it.
    pub reported: u64,
    pub acked: u64,
    pub attached: Option<Open>,
    /// [`cm_flags`] for the bind.
    pub flags: u32,
    pub bound: bool,
    pub tos: u8,
    pub ack_timeout: u8,
    pub peer: Option<Peer>,
    pub psn: u32,
    pub initiator_depth: u8,
    pub responder_resources: u8,
    pub retry_count: u8,
    /// Going to RTS failed: the program knows, what follows is not told.
    pub connect_error: bool,
    /// From rdma_create_ep: private data put before the program's, and the QP for each request.
    pub connect_data: Vec<u8>,
    pub accept_qp: Option<ibv_qp_init_attr>,
    pub local_ece: (u32, u32),
    pub remote_ece: (u32, u32),
    pub groups: Vec<Group>,
}

/// The local ACK timeout that RoCE ends up with.
const ACK_TIMEOUT: u8 = 14;

/// An id. `public` comes first: the program's pointer is a pointer to this.
#[derive(Debug)]
#[repr(C)]
pub struct Id {
    public: UnsafeCell<rdma_cm_id>,
    pub session: &'static Session,
    pub number: u32,
    state: Mutex<State>,
    acked: Condvar,
}

// SAFETY: `public` is accessed by value in single reads and writes, under the C API's rule that calls which change
// an id are not made concurrently; everything else is behind a mutex.
unsafe impl Sync for Id {}

/// Reads a public field.
macro_rules! field {
    ($id:expr, $($name:tt).+) => {{
        let public: *mut freeflow_verbs_abi::rdma_cm_id = $crate::id::Id::public($id);
        // SAFETY: `public` belongs to a live id; all its fields may be read by value in any state.
        unsafe { (&raw const (*public).$($name).+).read() }
    }};
}
pub(crate) use field;

/// Writes a public field.
macro_rules! set_field {
    ($id:expr, $($name:tt).+ = $value:expr) => {{
        let value = $value;
        let public: *mut freeflow_verbs_abi::rdma_cm_id = $crate::id::Id::public($id);
        // SAFETY: `public` belongs to a live id; no reference to the field exists.
        unsafe { (*public).$($name).+ = value };
    }};
}
pub(crate) use set_field;

impl Id {
    /// The id behind a program's pointer.
    ///
    /// # Safety
    /// `id` is NULL or came from this library and is not destroyed while the reference is used.
    pub unsafe fn from_raw<'a>(id: *mut rdma_cm_id) -> Result<&'a Id> {
        // SAFETY: ids are made by `make` only, with `public` at their start.
        unsafe { id.cast::<Id>().as_ref() }.ok_or(Errno::INVAL)
    }

    pub fn public(&self) -> *mut rdma_cm_id {
        self.public.get()
    }

    pub fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub fn is_datagram(&self) -> bool {
        field!(self, qp_type) == IBV_QPT_UD
    }

    pub fn channel(&self) -> &Channel {
        let channel = field!(self, channel);
        // SAFETY: the program keeps a channel as long as it has ids on it.
        unsafe { Channel::from_raw(channel) }
    }

    /// Makes an id for something the router already knows as `number`, on `channel`.
    pub fn make(
        channel: &Channel,
        number: u32,
        ps: rdma_port_space,
        qp_type: ibv_qp_type,
        context: *mut c_void,
    ) -> *mut Id {
        // SAFETY: pointers, integers and unions of them, for all of which zero is valid.
        let mut public: rdma_cm_id = unsafe { std::mem::zeroed() };
        public.channel = channel.public();
        public.context = context;
        public.ps = ps;
        public.qp_type = qp_type;
        let state = State {
            sync: false,
            reported: 0,
            acked: 0,
            attached: None,
            flags: 0,
            bound: false,
            tos: 0,
            ack_timeout: ACK_TIMEOUT,
            peer: None,
            psn: 0,
            initiator_depth: 0,
            responder_resources: 0,
            retry_count: 7,
            connect_error: false,
            connect_data: Vec::new(),
            accept_qp: None,
            local_ece: (0, 0),
            remote_ece: (0, 0),
            groups: Vec::new(),
        };
        Box::into_raw(Box::new(Id {
            public: UnsafeCell::new(public),
            session: channel.session,
            number,
            state: Mutex::new(state),
            acked: Condvar::new(),
        }))
    }

    /// Attaches the id to the container's device, once.
    pub fn attach(&self) -> Result<Open> {
        if let Some(open) = self.state().attached {
            return Ok(open);
        }
        let (open, pd) = self.session.device.attach()?;
        self.state().attached = Some(open);
        set_field!(self, verbs = open.context);
        set_field!(self, pd = pd);
        set_field!(self, port_num = PORT);
        set_field!(self, route.addr.addr.ibaddr.pkey = 0xffff);
        set_field!(self, route.addr.addr.ibaddr.sgid.raw = self.session.gid);
        Ok(open)
    }

    pub fn set_local(&self, addr: &CmAddr) {
        let src_storage = std::mem::ManuallyDrop::new(address::storage(addr));
        set_field!(self, route.addr.__bindgen_anon_1 = rdma_addr__bindgen_ty_1 { src_storage });
    }

    pub fn set_remote(&self, addr: &CmAddr) {
        let dst_storage = std::mem::ManuallyDrop::new(address::storage(addr));
        set_field!(self, route.addr.__bindgen_anon_2 = rdma_addr__bindgen_ty_2 { dst_storage });
    }

    /// The one path there is to the peer, as a path record.
    pub fn set_path(&self, gid: RawGid) {
        let Some(open) = self.state().attached else { return };
        set_field!(self, route.addr.addr.ibaddr.dgid.raw = gid);
        // SAFETY: integers, for which zero is valid.
        let mut path: ibv_sa_path_rec = unsafe { std::mem::zeroed() };
        path.dgid.raw = gid;
        path.sgid.raw = self.session.gid;
        path.hop_limit = 64;
        path.traffic_class = self.state().tos;
        path.reversible = 1;
        path.numb_path = 1;
        path.pkey = 0xffff;
        // "Exactly", for the three selectors.
        path.mtu_selector = 2;
        path.mtu = open.mtu as u8;
        path.rate_selector = 2;
        path.rate = IBV_RATE_100_GBPS as u8;
        path.packet_life_time_selector = 2;
        path.packet_life_time = ACK_TIMEOUT - 1;
        self.free_path();
        set_field!(self, route.path_rec = Box::into_raw(Box::new(path)));
        set_field!(self, route.num_paths = 1);
    }

    fn free_path(&self) {
        let old = field!(self, route.path_rec);
        if !old.is_null() {
            // SAFETY: only `set_path` writes the field, with a pointer from Box::into_raw.
            drop(unsafe { Box::from_raw(old) });
            set_field!(self, route.path_rec = std::ptr::null_mut());
        }
    }

    /// An event about this id was handed out.
    pub fn report(&self) {
        self.state().reported += 1;
    }

    /// One came back.
    pub fn acknowledge(&self) {
        self.state().acked += 1;
        self.acked.notify_all();
    }

    /// Waits until the program has given all events back.
    pub fn wait_acknowledged(&self) {
        let mut state = self.state();
        while state.acked < state.reported {
            state = self.acked.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// Gives back the event that a synchronous call left in the id.
    pub fn drop_event(&self) {
        let event = field!(self, event);
        if !event.is_null() {
            set_field!(self, event = std::ptr::null_mut());
            // SAFETY: an event of ours that the program reads through the id only.
            unsafe { event::give_back(event) };
        }
    }

    /// Destroys the id: at the router, in the table, and the memory.
    ///
    /// # Safety
    /// `id` came from [`Id::make`] and is not used afterwards.
    pub unsafe fn destroy(id: *mut Id) -> Result<()> {
        // SAFETY: the caller's promise.
        let this = unsafe { &*id };
        if let Ok(mut ids) = this.session.ids() {
            ids.remove(this.number);
            // A router that is gone, or has closed the channel and its ids, has nothing left to destroy.
            if let Ok(dropped) = this.session.call(&CmDestroy { id: this.number }) {
                this.channel().discard(dropped.events);
            }
        }
        this.drop_event();
        if !this.session.is_dead() {
            this.wait_acknowledged();
        }
        // SAFETY: no event leads here any more; the caller gives the id up.
        unsafe { Id::free(id) };
        Ok(())
    }

    /// Frees an id that the router does not know (any more).
    ///
    /// # Safety
    /// As for [`Id::destroy`], and no event about the id is out.
    pub unsafe fn free(id: *mut Id) {
        // SAFETY: made by Box::into_raw in `make`.
        let this = unsafe { Box::from_raw(id) };
        this.free_path();
        if this.state().attached.is_some() && !this.session.is_dead() {
            this.session.device.detach();
        }
        if this.state().sync {
            let channel = field!(&this, channel);
            // SAFETY: a synchronous id's channel is its own.
            unsafe { Channel::destroy(channel) };
        }
    }
}

/// Whether ids of a port space can have queue pairs of a type.
fn fits(ps: rdma_port_space, qp_type: ibv_qp_type) -> bool {
    match ps {
        RDMA_PS_UDP => qp_type == IBV_QPT_UD,
        RDMA_PS_IB => matches!(qp_type, IBV_QPT_RC | IBV_QPT_UC | IBV_QPT_XRC_SEND | IBV_QPT_XRC_RECV),
        _ => qp_type == IBV_QPT_RC,
    }
}

/// The router's name for a port space.
fn space(ps: rdma_port_space) -> Result<u32> {
    match ps {
        RDMA_PS_TCP => Ok(cm_space::TCP),
        RDMA_PS_UDP => Ok(cm_space::UDP),
        RDMA_PS_IB => Ok(cm_space::IB),
        _ => Err(Errno::PROTONOSUPPORT),
    }
}

/// Creates an id on `channel`, or on one of its own if that is NULL.
pub fn create(
    channel: *mut rdma_event_channel,
    context: *mut c_void,
    ps: rdma_port_space,
    qp_type: ibv_qp_type,
) -> Result<*mut Id> {
    let sync = channel.is_null();
    let raw = if sync { Channel::open(Session::current()?)? } else { channel };
    // SAFETY: the program's channel, or the one just opened.
    let channel = unsafe { Channel::from_raw(raw) };
    let entered = enter(channel, context, ps, qp_type);
    match (&entered, sync) {
        // SAFETY: opened above, and no id is on it.
        (Err(_), true) => unsafe { Channel::destroy(raw) },
        // SAFETY: just made, and nobody else has it yet.
        (Ok(id), true) => unsafe { &**id }.state().sync = true,
        _ => {}
    }
    entered
}

fn enter(
    channel: &Channel,
    context: *mut c_void,
    ps: rdma_port_space,
    qp_type: ibv_qp_type,
) -> Result<*mut Id> {
    let (session, space) = (channel.session, space(ps)?);
    if !fits(ps, qp_type) {
        return Err(Errno::OPNOTSUPP);
    }
    let Number { id: number, .. } = session.call(&CmCreate { channel: channel.number, space })?;
    let id = Id::make(channel, number, ps, qp_type, context);
    session.ids()?.insert(number, id);
    Ok(id)
}

pub unsafe extern "C" fn rdma_create_id(
    channel: *mut rdma_event_channel,
    id: *mut *mut rdma_cm_id,
    context: *mut c_void,
    ps: rdma_port_space,
) -> c_int {
    edge::code(|| {
        if id.is_null() {
            return Err(Errno::INVAL);
        }
        let qp_type = if ps == RDMA_PS_UDP || ps == RDMA_PS_IPOIB { IBV_QPT_UD } else { IBV_QPT_RC };
        let made = create(channel, context, ps, qp_type)?;
        // SAFETY: the caller's pointer to fill in.
        unsafe { *id = made.cast() };
        Ok(())
    })
}

pub unsafe extern "C" fn rdma_destroy_id(id: *mut rdma_cm_id) -> c_int {
    edge::code(|| {
        if id.is_null() {
            return Err(Errno::INVAL);
        }
        // SAFETY: the program's id, given up by this call.
        unsafe { Id::destroy(id.cast()) }
    })
}

pub unsafe extern "C" fn rdma_get_src_port(id: *mut rdma_cm_id) -> u16 {
    // SAFETY: the program's id.
    let Ok(id) = (unsafe { Id::from_raw(id) }) else { return 0 };
    let local = field!(id, route.addr.__bindgen_anon_1.src_storage);
    address::port_be(&local)
}

pub unsafe extern "C" fn rdma_get_dst_port(id: *mut rdma_cm_id) -> u16 {
    // SAFETY: the program's id.
    let Ok(id) = (unsafe { Id::from_raw(id) }) else { return 0 };
    let remote = field!(id, route.addr.__bindgen_anon_2.dst_storage);
    address::port_be(&remote)
}
