//! An endpoint: a way to one peer's interface.
//!
//! It starts by asking for a partner; until it has one, everything waits (NO_RESOURCE, and UCX's pending requests). Then
//! its messages go into the peer's FIFO and its puts and gets straight to the peer's memory, or, where that is not mapped
//! here, through the queue pair.

pub mod am;
pub mod atomic;
pub mod neighbours;
pub mod owner;
pub mod pending;
pub mod queue;
pub mod rma;

use std::cell::{Cell, RefCell};
use std::collections::VecDeque;
use std::ffi::{c_int, c_uint, c_void};
use std::rc::Rc;
use std::sync::Arc;
use std::time::{Duration, Instant};

use freeflow_core::client::{Qp, Window};
use freeflow_core::ring::{Fifo, FifoSender, FifoShared, FifoSlot};
use freeflow_core::verbs::{Access, Gid, QpState};

use crate::connect::{connect_rc, make_rc};
use crate::iface::read_address;
use crate::iface::{Event, Iface, pool_offset};
use crate::uct::symbols::Level;
use crate::uct::types::{Completion, EpParams, PendingReq, Status, ep_field};
use crate::wire::{Datagram, IfaceAddress, kind};

/// Requests in a queue pair's hands.
pub const SEND_DEPTH: u32 = 64;
/// Between a request and its repetition: at first, and at most.
const FIRST_WAIT: Duration = Duration::from_millis(1);
const LONGEST_WAIT: Duration = Duration::from_millis(100);
/// Pieces of a peer's memory remembered.
const WINDOWS: usize = 16;
/// `UCT_FLUSH_FLAG_CANCEL`.
const FLUSH_CANCEL: c_uint = 1;

/// What an endpoint can do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Mode {
    /// Waits for an answer.
    Asking,
    /// The peer's FIFO is mapped here.
    Direct,
    /// By requests.
    Queued,
    Failed(Status),
}

/// A `uct_ep_t` of ours: the first word is UCX's.
#[repr(C)]
pub struct Ep {
    iface: *const Iface,
    /// In [`Iface::eps`].
    pub number: usize,
    /// Never used again in this process's interface.
    pub serial: u64,
    qp: Arc<Qp>,
    mode: Cell<Mode>,
    fifo: RefCell<Option<Outgoing>>,
    /// The peer's memory as used lately: UCX unpacks a key anew for each rendezvous. Most recently used last.
    windows: RefCell<Vec<Rc<Window>>>,
    pending: RefCell<VecDeque<*mut PendingReq>>,
    /// UCX's pending requests are being run: they may send.
    dispatching: Cell<bool>,
    /// Operations handed to the queue pair or the copier, and how many of them ended.
    started: Cell<u64>,
    ended: Cell<u64>,
    /// Flushes that wait for so many ended operations.
    flushes: RefCell<VecDeque<(u64, *mut Completion)>>,
    request: Request,
}

/// Asking for a partner.
struct Request {
    to: IfaceAddress,
    said: Datagram,
    next: Cell<Instant>,
    wait: Cell<Duration>,
}

/// The peer's FIFO, as it is mapped here.
struct Outgoing {
    sender: FifoSender,
    /// Holds the mapping.
    window: Window,
    first: *mut u8,
    slots: usize,
    segment: usize,
}

impl Outgoing {
    fn map(qp: &Arc<Qp>, said: &Datagram) -> Option<Self> {
        let slots = said.slots as usize;
        let shape = slots.is_power_of_two()
            && slots <= 65_536
            && said.pool.is_multiple_of(64)
            && said.segment <= 65_535;
        if !shape || !said.addr.is_multiple_of(128) {
            return None;
        }
        let len = (pool_offset(slots) + said.pool as usize) as u64;
        let window = qp.window(said.key, Access::REMOTE_WRITE | Access::REMOTE_READ, said.addr, len).ok()?;
        let first = window.at(said.addr, len)?;
        let sender = FifoSender::new(slots, said.pool);
        Some(Outgoing { sender, window, first, slots, segment: said.segment as usize })
    }

    fn fifo<'a>(&self) -> Fifo<'a> {
        // SAFETY: `window` keeps `first` and what map() asked for mapped, as long as self; only atomics lie there.
        let shared = unsafe { &*self.first.cast::<FifoShared>() };
        let slots = self.first.wrapping_add(size_of::<FifoShared>()).cast::<FifoSlot>();
        // SAFETY: as above.
        let slots = unsafe { std::slice::from_raw_parts(slots, self.slots) };
        Fifo { shared, slots }
    }

    fn pool(&self, place: u32) -> *mut u8 {
        self.first.wrapping_add(pool_offset(self.slots) + place as usize)
    }
}

impl Ep {
    /// # Safety
    /// `ep` came from [`create`] and is not destroyed.
    pub unsafe fn from_raw<'a>(ep: *const c_void) -> &'a Ep {
        // SAFETY: by the caller's promise.
        unsafe { &*ep.cast() }
    }

    pub fn as_raw(&self) -> *mut c_void {
        std::ptr::from_ref(self).cast_mut().cast()
    }

    pub fn iface(&self) -> &Iface {
        // SAFETY: UCX destroys endpoints before it closes their interface.
        unsafe { &*self.iface }
    }

    pub fn qp(&self) -> &Arc<Qp> {
        &self.qp
    }

    /// Where the peer's `[addr, addr+len)` is mapped here, if it is and the key grants `need`.
    pub fn window(&self, key: u32, need: Access, addr: u64, len: u64) -> Option<Rc<Window>> {
        let mut windows = self.windows.borrow_mut();
        let fits = |w: &Rc<Window>| w.key() == key && w.access().contains(need) && w.at(addr, len).is_some();
        if let Some(at) = windows.iter().rposition(fits) {
            windows[at..].rotate_left(1);
            return windows.last().cloned();
        }
        let made = Rc::new(self.qp.window(key, need, addr, len).ok()?);
        if windows.len() == WINDOWS {
            windows.remove(0);
        }
        windows.push(Rc::clone(&made));
        Some(made)
    }

    /// May something new be sent? Not past what waits.
    #[inline]
    fn may_send(&self) -> bool {
        self.dispatching.get() || self.pending.borrow().is_empty()
    }

    /// Why nothing can be sent at all, if so.
    #[cold]
    fn obstacle(&self) -> Status {
        match self.mode.get() {
            Mode::Failed(status) => status,
            _ => Status::NO_RESOURCE,
        }
    }

    /// Asks the peer for a partner, if it is time.
    pub fn ask_again(&self, now: Instant) {
        if self.mode.get() != Mode::Asking || now < self.request.next.get() {
            return;
        }
        let IfaceAddress { gid, qpn, .. } = self.request.to;
        self.iface().send_datagram(&self.request.said, Gid(gid), qpn);
        let wait = self.request.wait.get();
        self.request.next.set(now + wait);
        self.request.wait.set((wait * 2).min(LONGEST_WAIT));
    }

    /// The peer answered.
    pub fn answered(&self, said: &Datagram) {
        if self.mode.get() != Mode::Asking || said.token != self.request.said.token {
            return;
        }
        let connected = said.kind == kind::REPLY && connect_rc(&self.qp, Gid(said.gid), said.qpn).is_ok();
        self.iface().connecting.set(self.iface().connecting.get() - 1);
        if !connected {
            self.mode.set(Mode::Queued);
            return self.fail(Status::NOT_CONNECTED);
        }
        let fifo = Outgoing::map(&self.qp, said);
        let mode = if fifo.is_some() { Mode::Direct } else { Mode::Queued };
        if mode == Mode::Direct {
            neighbours::add(self.request.to.gid, self.request.to.client, &self.qp);
        }
        *self.fifo.borrow_mut() = fifo;
        self.mode.set(mode);
        if mode == Mode::Queued {
            self.iface().queued.set(true);
        }
        self.schedule();
    }

    /// The peer is gone: what waits ends, and UCX hears of it at the next progress.
    pub fn fail(&self, status: Status) {
        if let Mode::Failed(_) = self.mode.get() {
            return;
        }
        queue::cancel(self, status);
        self.iface().failed.borrow_mut().push((self.number, status));
        self.iface().work.set(true);
    }

    /// Is the peer still there?
    pub fn look(&self) {
        if self.qp.state() == QpState::Err {
            self.fail(Status::CONNECTION_RESET);
        }
    }

    /// An operation ended: flushes may have waited for it.
    fn ended(&self) {
        self.ended.set(self.ended.get() + 1);
        loop {
            let due = {
                let mut flushes = self.flushes.borrow_mut();
                let due = flushes.front().is_some_and(|(at, _)| *at <= self.ended.get());
                if due { flushes.pop_front() } else { None }
            };
            let Some((_, comp)) = due else { break };
            // SAFETY: UCX's completion, given to flush() for this.
            unsafe { Completion::done(comp, Status::OK) };
        }
    }
}

/// `ep_create`.
pub unsafe extern "C" fn create(params: *const EpParams, ep: *mut *mut c_void) -> Status {
    const NEEDED: u64 = ep_field::IFACE | ep_field::DEV_ADDR | ep_field::IFACE_ADDR;
    // SAFETY: UCX's structure, of which only the fields in the mask count.
    let params = unsafe { &*params };
    if params.field_mask & NEEDED != NEEDED {
        return Status::INVALID_PARAM;
    }
    // SAFETY: a peer's address as iface_get_address() packed it.
    let Some(to) = (unsafe { read_address::<IfaceAddress>(params.iface_addr) }) else {
        return Status::INVALID_ADDR;
    };
    // SAFETY: an interface of ours.
    let iface = unsafe { Iface::from_raw(params.iface) };
    let made = match make(iface, to) {
        Ok(made) => made,
        Err(error) => {
            iface.md().ucx.log(Level::Error, &format!("ff: cannot make an endpoint: {error}"));
            return Status::NO_RESOURCE;
        }
    };
    let (ucx, number) = (iface.md().ucx, made.number);
    let this = Box::into_raw(made);
    let mut count: c_int = 1;
    // SAFETY: `this` begins with a uct_base_ep_t, one word.
    let status =
        unsafe { (ucx.call.uct_base_ep_t_init)(this.cast(), ucx.ep_class, &mut count, params.iface.cast()) };
    if status != Status::OK {
        iface.eps.borrow_mut().remove(number);
        // SAFETY: made above, seen by nobody.
        drop(unsafe { Box::from_raw(this) });
        return status;
    }
    // SAFETY: made above.
    let made = unsafe { &*this };
    iface.eps.borrow_mut()[made.number] = this;
    iface.connecting.set(iface.connecting.get() + 1);
    made.ask_again(Instant::now());
    // SAFETY: UCX's place for the result.
    unsafe { ep.write(this.cast()) };
    Status::OK
}

fn make(iface: &Iface, to: IfaceAddress) -> freeflow_core::error::Result<Box<Ep>> {
    let md = iface.md();
    let qp = make_rc(&md.pd, &iface.cq, SEND_DEPTH, 1)?;
    let number = iface.eps.borrow_mut().insert(std::ptr::null());
    let serial = iface.serials.get() + 1;
    iface.serials.set(serial);
    let _ = qp.post_recv(Event::Sentinel(number).pack(), &[]);
    let token = serial << 32 | number as u64;
    let said = Datagram { gid: md.context.gid().0, qpn: qp.qpn(), ..Datagram::new(kind::REQUEST, token) };
    let request = Request { to, said, next: Cell::new(Instant::now()), wait: Cell::new(FIRST_WAIT) };
    Ok(Box::new(Ep {
        iface,
        number,
        serial,
        qp,
        mode: Cell::new(Mode::Asking),
        fifo: RefCell::new(None),
        windows: RefCell::default(),
        pending: RefCell::default(),
        dispatching: Cell::new(false),
        started: Cell::new(0),
        ended: Cell::new(0),
        flushes: RefCell::default(),
        request,
    }))
}

/// `ep_destroy`.
pub unsafe extern "C" fn destroy(ep: *mut c_void) {
    // SAFETY: an endpoint of ours.
    let this = unsafe { Ep::from_raw(ep) };
    let iface = this.iface();
    this.say_bye();
    queue::cancel(this, Status::CANCELED);
    iface.eps.borrow_mut().remove(this.number);
    iface.waiting.borrow_mut().retain(|number| *number != this.number);
    iface.failed.borrow_mut().retain(|(number, _)| *number != this.number);
    let ucx = iface.md().ucx;
    // SAFETY: takes its own class apart, all of it.
    unsafe { (ucx.call.ucs_class_call_cleanup_chain)(ucx.ep_class, ep, -1) };
    // SAFETY: from create(), destroyed once; UCX's base has no destructor of Rust's.
    drop(unsafe { Box::from_raw(ep.cast::<Ep>()) });
}

/// `ep_flush`.
pub unsafe extern "C" fn flush(ep: *mut c_void, flags: c_uint, comp: *mut Completion) -> Status {
    // SAFETY: an endpoint of ours.
    let ep = unsafe { Ep::from_raw(ep) };
    if flags & FLUSH_CANCEL != 0 {
        queue::cancel(ep, Status::CANCELED);
        return Status::OK;
    }
    match ep.mode.get() {
        Mode::Failed(status) => return status,
        _ if !ep.may_send() => return Status::NO_RESOURCE,
        _ => {}
    }
    crate::iface::fence_stores();
    if ep.started.get() == ep.ended.get() {
        return Status::OK;
    }
    if !comp.is_null() {
        ep.flushes.borrow_mut().push_back((ep.started.get(), comp));
    }
    Status::INPROGRESS
}

/// `ep_fence`.
pub unsafe extern "C" fn fence(_ep: *mut c_void, _flags: c_uint) -> Status {
    crate::iface::fence_stores();
    Status::OK
}

/// `ep_check`: the router tells of a peer's death; UCX hears of it at the next progress.
pub unsafe extern "C" fn check(ep: *mut c_void, flags: c_uint, comp: *mut Completion) -> Status {
    if flags != 0 || !comp.is_null() {
        return Status::INVALID_PARAM;
    }
    // SAFETY: an endpoint of ours.
    unsafe { Ep::from_raw(ep) }.look();
    Status::OK
}

/// `ep_invalidate`: as if the peer had died (both the flags of old and the parameters of 1.21).
pub unsafe extern "C" fn invalidate(ep: *mut c_void, _how: *const c_void) -> Status {
    // SAFETY: an endpoint of ours.
    unsafe { Ep::from_raw(ep) }.fail(Status::CONNECTION_RESET);
    Status::OK
}

/// `uct_ep_is_connected_params_t`.
#[repr(C)]
pub struct ConnectedParams {
    field_mask: u64,
    device_addr: *const u8,
    iface_addr: *const u8,
}

/// `ep_is_connected` (1.16 and later): does it lead to that interface?
pub unsafe extern "C" fn is_connected(ep: *mut c_void, params: *const ConnectedParams) -> c_int {
    const IFACE: u64 = 1 << 1;
    // SAFETY: UCX's structure.
    let params = unsafe { &*params };
    if params.field_mask & IFACE == 0 {
        return 0;
    }
    // SAFETY: an address as iface_get_address() packed it.
    let to = unsafe { read_address::<IfaceAddress>(params.iface_addr) };
    // SAFETY: an endpoint of ours.
    c_int::from(to.is_some_and(|to| to.is_same(&unsafe { Ep::from_raw(ep) }.request.to)))
}
