//! Events: fetched from the router, turned into what programs expect to see, given back.
//!
//! Owns `rdma_cm_event` and the steps that the real library does while an event passes through: attaching the device,
//! making the id of a connection request, taking the QP to RTS when the answer comes.

use std::ffi::{CStr, c_char, c_int, c_void};

use freeflow_core::ctl::cm::{CmEstablish, CmNext, CmNextEvent, CmReject, cm_event};
use freeflow_verbs_abi::*;

use crate::channel::{Channel, TICKET, migrate};
use crate::edge::{self, Errno, Result};
use crate::id::{Id, Peer, field, set_field};
use crate::session::Session;
use crate::{modify, multicast};

/// Room for any private data, and then some for programs that read what `RDMA_MAX_PRIVATE_DATA` promised.
const DATA: usize = 256;

/// An event. `public` comes first: the program's pointer is a pointer to this.
#[repr(C)]
struct Event {
    public: rdma_cm_event,
    /// Whose count it is in: the id's, or for connection requests the listener's.
    counted: *const Id,
    data: [u8; DATA],
}

/// Waits for the next event that the program is to see.
pub fn next(channel: &Channel) -> Result<*mut rdma_cm_event> {
    loop {
        channel.session.alive()?;
        channel.wait()?;
        if let Some(event) = take(channel)? {
            return Ok(event);
        }
    }
}

/// The event a ticket stood for, if it is still there and the program is to see it.
fn take(channel: &Channel) -> Result<Option<*mut rdma_cm_event>> {
    let Some((id, event)) = fetch(channel)? else { return Ok(None) };
    let public = pass(id, &event);
    if public.is_none() {
        id.acknowledge();
    }
    Ok(public.map(|public| hand_out(id, public, &event)))
}

/// Fetches an event and counts it, so that its id stays. `None` if the ticket's event is gone meanwhile.
fn fetch(channel: &Channel) -> Result<Option<(&'static Id, CmNext)>> {
    let ids = channel.session.ids()?;
    let event = channel.session.call(&CmNextEvent { channel: channel.number })?;
    if event.kind == cm_event::NONE {
        return Ok(None);
    }
    let number = if event.kind == cm_event::CONNECT_REQUEST { event.listener } else { event.id };
    let Some(id) = ids.get(number) else { return Ok(None) };
    id.report();
    let id: *const Id = id;
    // SAFETY: destroying the id waits until the event counted above is acknowledged.
    Ok(Some((unsafe { &*id }, event)))
}

/// What an event means for its id; `None` if the program does not get to see it.
fn pass(id: &Id, event: &CmNext) -> Option<rdma_cm_event> {
    let mut public = plain(id, event);
    match event.kind {
        cm_event::ADDR_RESOLVED => {
            if let Err(errno) = id.attach() {
                public.event = RDMA_CM_EVENT_ADDR_ERROR;
                public.status = -errno.raw_os_error();
            }
            id.set_local(&event.local);
            id.set_remote(&event.remote);
            set_field!(id, route.addr.addr.ibaddr.dgid.raw = event.gid);
        }
        cm_event::ROUTE_RESOLVED => id.set_path(event.gid),
        cm_event::CONNECT_REQUEST => return request(id, public, event),
        cm_event::CONNECT_RESPONSE => response(id, &mut public, event),
        cm_event::ESTABLISHED if id.is_datagram() => {
            let peer = Peer { gid: event.gid, params: event.params };
            id.state().peer = Some(peer);
            public.param.ud = ud_param(&peer, event);
        }
        cm_event::MULTICAST_JOIN => multicast::joined(id, event.gid, &mut public)?,
        cm_event::REJECTED => {
            if id.state().connect_error {
                return None;
            }
            // The QP may be in a state that cannot fail any more; the program learns of the rejection anyway.
            let _ = modify::to_error(id);
        }
        cm_event::DISCONNECTED if id.state().connect_error => return None,
        _ => {}
    }
    Some(public)
}

/// The event as it is for most kinds.
fn plain(id: &Id, event: &CmNext) -> rdma_cm_event {
    // SAFETY: pointers and integers, for which zero is valid.
    let mut public: rdma_cm_event = unsafe { std::mem::zeroed() };
    public.id = id.public();
    public.event = event.kind;
    public.status = event.status;
    if !id.is_datagram() {
        public.param.conn = conn_param(event);
    }
    public
}

fn conn_param(event: &CmNext) -> rdma_conn_param {
    rdma_conn_param {
        private_data: std::ptr::null(),
        private_data_len: event.data.bytes().len() as u8,
        responder_resources: event.params.responder_resources,
        initiator_depth: event.params.initiator_depth,
        flow_control: event.params.flow_control,
        retry_count: event.params.retry_count,
        rnr_retry_count: event.params.rnr_retry_count,
        srq: event.params.srq,
        qp_num: event.params.qpn,
    }
}

fn ud_param(peer: &Peer, event: &CmNext) -> rdma_ud_param {
    rdma_ud_param {
        private_data: std::ptr::null(),
        private_data_len: event.data.bytes().len() as u8,
        ah_attr: modify::ah_attr(peer.gid, 0),
        qp_num: event.params.qpn,
        qkey: event.params.qkey,
    }
}

/// Makes the id of a connection request. If that fails nobody can answer: the request is rejected here.
fn request(listener: &Id, mut public: rdma_cm_event, event: &CmNext) -> Option<rdma_cm_event> {
    let (ps, qp_type) = (field!(listener, ps), field!(listener, qp_type));
    let made = Id::make(listener.channel(), event.id, ps, qp_type, field!(listener, context));
    // SAFETY: just made; nobody else has it yet.
    let id = unsafe { &*made };
    if let Err(errno) = introduce(id, listener, made, event) {
        let reject = CmReject { id: event.id, reason: 0, ..Default::default() };
        let _ = listener.session.call(&reject);
        // SAFETY: made above; the program has not seen it.
        let _ = unsafe { Id::destroy(made) };
        edge::set_errno(errno);
        return None;
    }
    public.listen_id = listener.public();
    public.id = id.public();
    if id.is_datagram() {
        public.param.ud = ud_param(&Peer { gid: event.gid, params: event.params }, event);
    }
    Some(public)
}

fn introduce(id: &Id, listener: &Id, made: *mut Id, event: &CmNext) -> Result<()> {
    id.session.ids()?.insert(event.id, made);
    {
        let mut state = id.state();
        state.peer = Some(Peer { gid: event.gid, params: event.params });
        state.initiator_depth = event.params.initiator_depth;
        state.responder_resources = event.params.responder_resources;
        state.retry_count = event.params.retry_count;
        state.remote_ece = (event.params.ece_vendor, event.params.ece_options);
        state.bound = true;
    }
    id.set_local(&event.local);
    id.set_remote(&event.remote);
    if listener.state().sync {
        migrate(id, std::ptr::null_mut())?;
    }
    id.attach()?;
    id.set_path(event.gid);
    Ok(())
}

/// The answer to our request: with a QP of ours it goes to RTS and the connection stands; without one the program
/// does that itself and calls rdma_establish.
fn response(id: &Id, public: &mut rdma_cm_event, event: &CmNext) {
    {
        let mut state = id.state();
        state.peer = Some(Peer { gid: event.gid, params: event.params });
        state.initiator_depth = state.initiator_depth.min(event.params.initiator_depth);
        state.responder_resources = state.responder_resources.min(event.params.responder_resources);
        state.remote_ece = (event.params.ece_vendor, event.params.ece_options);
    }
    if field!(id, qp).is_null() {
        return;
    }
    let ready = modify::to_rts(id)
        .and_then(|()| id.session.call(&CmEstablish { id: id.number, _pad: 0 }).map(|_| ()));
    match ready {
        Ok(()) => public.event = RDMA_CM_EVENT_ESTABLISHED,
        Err(errno) => {
            let _ = modify::to_error(id);
            id.state().connect_error = true;
            public.event = RDMA_CM_EVENT_CONNECT_ERROR;
            public.status = -errno.raw_os_error();
        }
    }
}

/// Puts an event and its private data where the program finds them.
fn hand_out(counted: &Id, public: rdma_cm_event, event: &CmNext) -> *mut rdma_cm_event {
    let mut whole = Box::new(Event { public, counted, data: [0; DATA] });
    let bytes = event.data.bytes();
    whole.data[..bytes.len()].copy_from_slice(bytes);
    let data: *const c_void = whole.data.as_ptr().cast();
    // `private_data` and its length are at the same place in both members.
    const _: () = assert!(
        std::mem::offset_of!(rdma_conn_param, private_data)
            == std::mem::offset_of!(rdma_ud_param, private_data)
    );
    if !bytes.is_empty() {
        whole.public.param.conn.private_data = data;
    }
    Box::into_raw(whole).cast()
}

/// Takes an event back from the program.
///
/// # Safety
/// `event` came from [`next`] and is not used afterwards.
pub unsafe fn give_back(event: *mut rdma_cm_event) {
    // SAFETY: made by Box::into_raw in `hand_out`.
    let whole = unsafe { Box::from_raw(event.cast::<Event>()) };
    // SAFETY: the id waits for this acknowledgement before it goes.
    unsafe { &*whole.counted }.acknowledge();
}

/// In synchronous mode, waits for the event that the call before leads to.
pub fn complete(id: &Id) -> Result<()> {
    if !id.state().sync {
        return Ok(());
    }
    id.drop_event();
    let event = next(id.channel())?;
    set_field!(id, event = event);
    // SAFETY: just handed out; the structure is plain data.
    let seen = unsafe { event.read() };
    match seen.status {
        0 => Ok(()),
        _ if seen.event == RDMA_CM_EVENT_REJECTED => Err(Errno::CONNREFUSED),
        status => Err(Errno::from_raw_os_error(status.abs())),
    }
}

mod cancellable {
    //! The two places where a thread may be cancelled, declared so that unwinding may pass.
    use std::ffi::{c_int, c_void};
    unsafe extern "C-unwind" {
        pub fn recv(fd: c_int, buf: *mut c_void, len: usize, flags: c_int) -> isize;
        pub fn poll(fds: *mut libc::pollfd, count: libc::nfds_t, timeout: c_int) -> c_int;
    }
}

/// Waits for a ticket as read(2) would: EINTR, EAGAIN and cancellation are the program's. Nothing in this frame needs
/// dropping, so cancellation may unwind through it. Says whether there is one; else errno is set.
unsafe fn wait(channel: *mut rdma_event_channel, session: &'static Session) -> bool {
    // SAFETY: the program's channel.
    let fd = unsafe { (*channel).fd };
    let mut ticket = [0u8; TICKET];
    // SAFETY: the buffer is as long as said.
    let got = unsafe { cancellable::recv(fd, ticket.as_mut_ptr().cast(), TICKET, 0) };
    if got != 0 {
        return got > 0;
    }
    // The router's end is closed. Either another thread has destroyed the channel: then this one waits on, as a
    // reader of a closed descriptor does. Or the router is gone, and its connection ends, too, if not at once.
    let mut rpc = libc::pollfd { fd: session.connection(), events: 0, revents: 0 };
    while !session.is_dead() && rpc.revents == 0 {
        // SAFETY: one structure; the descriptor is open as long as the session is not dead.
        let _ = unsafe { cancellable::poll(&mut rpc, 1, -1) };
    }
    edge::set_errno(Errno::NODEV);
    false
}

pub unsafe extern "C-unwind" fn rdma_get_cm_event(
    channel: *mut rdma_event_channel,
    event: *mut *mut rdma_cm_event,
) -> c_int {
    if channel.is_null() || event.is_null() {
        edge::set_errno(Errno::INVAL);
        return -1;
    }
    // SAFETY: the program's channel.
    let session = unsafe { Channel::from_raw(channel) }.session;
    loop {
        // Tickets of an inherited channel are the parent's.
        if session.is_dead() {
            edge::set_errno(Errno::NODEV);
            return -1;
        }
        // SAFETY: the program's channel.
        if !unsafe { wait(channel, session) } {
            return -1;
        }
        let mut got = std::ptr::null_mut();
        let code = edge::code(|| {
            // SAFETY: the program's channel.
            got = take(unsafe { Channel::from_raw(channel) })?.unwrap_or(std::ptr::null_mut());
            Ok(())
        });
        if code != 0 {
            return code;
        }
        if !got.is_null() {
            // SAFETY: the caller's pointer to fill in.
            unsafe { *event = got };
            return 0;
        }
    }
}

pub unsafe extern "C" fn rdma_ack_cm_event(event: *mut rdma_cm_event) -> c_int {
    edge::code(|| {
        if event.is_null() {
            return Err(Errno::INVAL);
        }
        // SAFETY: the program's event, given back by this call.
        unsafe { give_back(event) };
        Ok(())
    })
}

pub extern "C" fn rdma_event_str(event: rdma_cm_event_type) -> *const c_char {
    let text: &'static CStr = match event {
        RDMA_CM_EVENT_ADDR_RESOLVED => c"RDMA_CM_EVENT_ADDR_RESOLVED",
        RDMA_CM_EVENT_ADDR_ERROR => c"RDMA_CM_EVENT_ADDR_ERROR",
        RDMA_CM_EVENT_ROUTE_RESOLVED => c"RDMA_CM_EVENT_ROUTE_RESOLVED",
        RDMA_CM_EVENT_ROUTE_ERROR => c"RDMA_CM_EVENT_ROUTE_ERROR",
        RDMA_CM_EVENT_CONNECT_REQUEST => c"RDMA_CM_EVENT_CONNECT_REQUEST",
        RDMA_CM_EVENT_CONNECT_RESPONSE => c"RDMA_CM_EVENT_CONNECT_RESPONSE",
        RDMA_CM_EVENT_CONNECT_ERROR => c"RDMA_CM_EVENT_CONNECT_ERROR",
        RDMA_CM_EVENT_UNREACHABLE => c"RDMA_CM_EVENT_UNREACHABLE",
        RDMA_CM_EVENT_REJECTED => c"RDMA_CM_EVENT_REJECTED",
        RDMA_CM_EVENT_ESTABLISHED => c"RDMA_CM_EVENT_ESTABLISHED",
        RDMA_CM_EVENT_DISCONNECTED => c"RDMA_CM_EVENT_DISCONNECTED",
        RDMA_CM_EVENT_DEVICE_REMOVAL => c"RDMA_CM_EVENT_DEVICE_REMOVAL",
        RDMA_CM_EVENT_MULTICAST_JOIN => c"RDMA_CM_EVENT_MULTICAST_JOIN",
        RDMA_CM_EVENT_MULTICAST_ERROR => c"RDMA_CM_EVENT_MULTICAST_ERROR",
        RDMA_CM_EVENT_ADDR_CHANGE => c"RDMA_CM_EVENT_ADDR_CHANGE",
        RDMA_CM_EVENT_TIMEWAIT_EXIT => c"RDMA_CM_EVENT_TIMEWAIT_EXIT",
        _ => c"UNKNOWN EVENT",
    };
    text.as_ptr()
}
