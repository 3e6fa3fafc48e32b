//! The calls that several versions share, and the halves of those that differ in a type or two.
//!
//! Every function here is called with NCCL's own arguments: its safety section is "NCCL's contract" in `super`.

use std::ffi::{c_int, c_void};
use std::sync::{Arc, Mutex, PoisonError};

use freeflow_nccl_abi::{CommConfig, DebugLogger, NcclResult, NetDeviceHandle, TRAFFIC_CLASS_UNDEF, ptr};

use super::{Comm, ListenComm, Request, Session, Side, code, list, log, put};
use crate::connect;
use crate::device::{self, Device, Properties, Style};
use crate::fault::{Fault, Result};
use crate::handle::LEN;
use crate::listen::Listener;
use crate::region::Region;
use crate::slots::{GROUP, Group, Posting};

// ---- init, devices, getProperties, finalize

/// Up to v10.
pub fn init(version: u32, logger: Option<DebugLogger>) -> NcclResult {
    log::set(logger);
    code("init", || {
        let device = device::keep()?;
        log::greet(&device, version);
        Ok(())
    })
}

/// Since v11.
pub unsafe fn init_ctx(
    version: u32,
    ctx: *mut *mut c_void,
    config: *const CommConfig,
    logger: Option<DebugLogger>,
) -> NcclResult {
    log::set(logger);
    code("init", || {
        let device = device::open()?;
        log::greet(&device, version);
        // SAFETY: NULL or this communicator's configuration.
        let style = styled(unsafe { config.as_ref() });
        let session = Box::into_raw(Box::new(Session { device, style }));
        // SAFETY: NCCL's contract.
        let put = unsafe { put(ctx, session.cast()) };
        // SAFETY: made above; nobody got it.
        put.inspect_err(|_| drop(unsafe { Box::from_raw(session) }))
    })
}

pub unsafe extern "C" fn finalize(ctx: *mut c_void) -> NcclResult {
    code("finalize", || {
        if !ctx.is_null() {
            // SAFETY: NCCL's contract: made by init_ctx, given up by this call.
            drop(unsafe { Box::from_raw(ctx.cast::<Session>()) });
        }
        Ok(())
    })
}

fn styled(config: Option<&CommConfig>) -> Style {
    Style { traffic_class: config.map_or(TRAFFIC_CLASS_UNDEF, |config| config.traffic_class), ..Style::V8 }
}

pub unsafe extern "C" fn devices(ndev: *mut c_int) -> NcclResult {
    code("devices", || {
        device::current()?;
        // SAFETY: NCCL's contract.
        unsafe { put(ndev, 1) }
    })
}

/// `make` has the version's own structure, every field of it: NCCL's is not initialised.
pub unsafe fn properties<P>(dev: c_int, props: *mut P, make: impl FnOnce(&Properties) -> P) -> NcclResult {
    code("getProperties", || {
        let device = numbered(dev, device::current()?)?;
        // SAFETY: NCCL's contract.
        unsafe { put(props, make(&device.properties())) }
    })
}

fn numbered(dev: c_int, device: Arc<Device>) -> Result<Arc<Device>> {
    if dev == 0 { Ok(device) } else { Err(Fault::usage(format!("there is no device {dev}, only 0"))) }
}

// ---- listen, connect, accept, close

pub unsafe extern "C" fn listen(dev: c_int, handle: *mut c_void, comm: *mut *mut c_void) -> NcclResult {
    code("listen", || {
        let device = numbered(dev, device::current()?)?;
        // SAFETY: NCCL's contract.
        unsafe { listen_on(&device, Style::V8, handle, comm) }
    })
}

pub unsafe extern "C" fn listen_ctx(
    ctx: *mut c_void,
    dev: c_int,
    handle: *mut c_void,
    comm: *mut *mut c_void,
) -> NcclResult {
    code("listen", || {
        // SAFETY: NCCL's contract.
        let session = unsafe { session(ctx) }?;
        let device = numbered(dev, Arc::clone(&session.device))?;
        // SAFETY: NCCL's contract.
        unsafe { listen_on(&device, session.style, handle, comm) }
    })
}

unsafe fn session<'a>(ctx: *mut c_void) -> Result<&'a Session> {
    // SAFETY: NULL or a context that init_ctx made.
    unsafe { ctx.cast::<Session>().as_ref() }.ok_or_else(|| Fault::usage("no context"))
}

unsafe fn listen_on(
    device: &Arc<Device>,
    style: Style,
    handle: *mut c_void,
    comm: *mut *mut c_void,
) -> Result<()> {
    let (listener, name) = Listener::new(device, style)?;
    // SAFETY: NCCL's contract: 128 bytes.
    unsafe { put(handle.cast::<[u8; LEN]>(), name.encode()) }?;
    let made = Box::into_raw(Box::new(ListenComm(Mutex::new(listener))));
    // SAFETY: NCCL's contract.
    let put = unsafe { put(comm, made.cast()) };
    // SAFETY: made above; nobody got it.
    put.inspect_err(|_| drop(unsafe { Box::from_raw(made) }))
}

/// Up to v10.
pub unsafe fn connect(
    dev: c_int,
    config: Option<*const CommConfig>,
    style: Style,
    handle: *mut c_void,
    comm: *mut *mut c_void,
) -> NcclResult {
    code("connect", || {
        let device = numbered(dev, device::current()?)?;
        let style = match config {
            // SAFETY: NULL or this communicator's configuration.
            Some(config) => styled(unsafe { config.as_ref() }),
            None => style,
        };
        // SAFETY: NCCL's contract.
        unsafe { connect_on(&device, style, handle, comm) }
    })
}

/// v7 to v9: the plugin offers no device of the GPU's.
pub unsafe fn no_device_handle(handle: *mut *mut NetDeviceHandle) {
    if !handle.is_null() {
        // SAFETY: NCCL's contract.
        unsafe { handle.write(std::ptr::null_mut()) };
    }
}

pub unsafe extern "C" fn connect_ctx(
    ctx: *mut c_void,
    dev: c_int,
    handle: *mut c_void,
    comm: *mut *mut c_void,
    device_handle: *mut *mut NetDeviceHandle,
) -> NcclResult {
    code("connect", || {
        // SAFETY: NCCL's contract.
        unsafe { no_device_handle(device_handle) };
        // SAFETY: NCCL's contract.
        let session = unsafe { session(ctx) }?;
        let device = numbered(dev, Arc::clone(&session.device))?;
        // SAFETY: NCCL's contract.
        unsafe { connect_on(&device, session.style, handle, comm) }
    })
}

unsafe fn connect_on(
    device: &Arc<Device>,
    style: Style,
    handle: *mut c_void,
    comm: *mut *mut c_void,
) -> Result<()> {
    // SAFETY: NCCL's contract.
    unsafe { put(comm, std::ptr::null_mut()) }?;
    // SAFETY: NULL or a handle's buffer, the same one on every try.
    let bytes = unsafe { handle.cast::<[u8; LEN]>().as_mut() };
    let bytes = bytes.ok_or_else(|| Fault::usage("no handle"))?;
    if let Some(sender) = connect::connect(device, bytes, style)? {
        // SAFETY: NCCL's contract.
        unsafe { put(comm, Comm::make(Arc::clone(device), Side::Send(sender))) }?;
    }
    Ok(())
}

pub unsafe extern "C" fn accept(
    listener: *mut c_void,
    comm: *mut *mut c_void,
    device_handle: *mut *mut NetDeviceHandle,
) -> NcclResult {
    // SAFETY: NCCL's contract.
    unsafe { no_device_handle(device_handle) };
    // SAFETY: NCCL's contract.
    unsafe { accept_v6(listener, comm) }
}

pub unsafe extern "C" fn accept_v6(listener: *mut c_void, comm: *mut *mut c_void) -> NcclResult {
    code("accept", || {
        // SAFETY: NCCL's contract.
        unsafe { put(comm, std::ptr::null_mut()) }?;
        // SAFETY: NULL or a listen comm of ours.
        let listener = unsafe { listener.cast::<ListenComm>().as_ref() };
        let listener = listener.ok_or_else(|| Fault::usage("no listen comm"))?;
        let mut listener = listener.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(receiver) = listener.accept()? {
            let device = Arc::clone(listener.device());
            // SAFETY: NCCL's contract.
            unsafe { put(comm, Comm::make(device, Side::Recv(receiver))) }?;
        }
        Ok(())
    })
}

pub unsafe extern "C" fn close_listen(comm: *mut c_void) -> NcclResult {
    code("closeListen", || {
        if !comm.is_null() {
            // SAFETY: NCCL's contract: made by listen_on, given up by this call.
            drop(unsafe { Box::from_raw(comm.cast::<ListenComm>()) });
        }
        Ok(())
    })
}

/// closeSend and closeRecv: whatever is under way ends, and nobody is waited for.
pub unsafe extern "C" fn close(comm: *mut c_void) -> NcclResult {
    code("close", || {
        if !comm.is_null() {
            // SAFETY: NCCL's contract: made by Comm::make, given up by this call.
            drop(unsafe { Box::from_raw(comm.cast::<Comm>()) });
        }
        Ok(())
    })
}

// ---- regMr, deregMr

pub unsafe extern "C" fn reg_mr(
    comm: *mut c_void,
    data: *mut c_void,
    size: usize,
    kind: c_int,
    mhandle: *mut *mut c_void,
) -> NcclResult {
    code("regMr", || {
        // SAFETY: NCCL's contract.
        unsafe { put(mhandle, std::ptr::null_mut()) }?;
        if kind != ptr::HOST {
            return Err(Fault::usage(format!("memory of type {kind}: this plugin takes host memory only")));
        }
        // SAFETY: NCCL's contract.
        let comm = unsafe { Comm::of(comm) }?;
        let region = comm.regions.register(&comm.device.pd, data as u64, size as u64)?;
        // SAFETY: NCCL's contract.
        unsafe { put(mhandle, Box::into_raw(Box::new(region)).cast()) }
    })
}

/// Up to v7.
pub unsafe extern "C" fn reg_mr_int(
    comm: *mut c_void,
    data: *mut c_void,
    size: c_int,
    kind: c_int,
    mhandle: *mut *mut c_void,
) -> NcclResult {
    match usize::try_from(size) {
        // SAFETY: NCCL's contract.
        Ok(size) => unsafe { reg_mr(comm, data, size, kind, mhandle) },
        Err(_) => code("regMr", || Err(Fault::usage(format!("a size of {size}")))),
    }
}

/// Not advertised (ptrSupport); a kind of [`Region`] of its own would carry the descriptor.
pub unsafe extern "C" fn reg_mr_dma_buf(
    _comm: *mut c_void,
    _data: *mut c_void,
    _size: usize,
    _kind: c_int,
    _offset: u64,
    _fd: c_int,
    _mhandle: *mut *mut c_void,
) -> NcclResult {
    code("regMrDmaBuf", || Err(Fault::usage("this plugin takes host memory only")))
}

pub unsafe extern "C" fn dereg_mr(_comm: *mut c_void, mhandle: *mut c_void) -> NcclResult {
    code("deregMr", || {
        if !mhandle.is_null() {
            // SAFETY: NCCL's contract: made by reg_mr, given up by this call.
            drop(unsafe { Box::from_raw(mhandle.cast::<Region>()) });
        }
        Ok(())
    })
}

unsafe fn region<'a>(mhandle: *mut c_void) -> Option<&'a Region> {
    // SAFETY: NCCL's contract: NULL or made by reg_mr and not yet deregistered.
    unsafe { mhandle.cast::<Region>().as_ref() }
}

// ---- isend, irecv, iflush, test

/// A size as a version has it.
pub trait Size: Copy {
    fn bytes(self) -> Result<usize>;
}

impl Size for c_int {
    fn bytes(self) -> Result<usize> {
        usize::try_from(self).map_err(|_| Fault::usage(format!("a size of {self}")))
    }
}

impl Size for usize {
    fn bytes(self) -> Result<usize> {
        Ok(self)
    }
}

#[inline]
pub unsafe fn send<S: Size>(
    comm: *mut c_void,
    data: *mut c_void,
    size: S,
    tag: c_int,
    mhandle: *mut c_void,
    request: *mut *mut c_void,
) -> NcclResult {
    code("isend", || {
        // SAFETY: NCCL's contract.
        unsafe { put(request, std::ptr::null_mut()) }?;
        // SAFETY: NCCL's contract.
        let comm = unsafe { Comm::of(comm) }?;
        // SAFETY: NCCL's contract: one thread at a time.
        let Side::Send(sender) = (unsafe { comm.side() }) else {
            return Err(Fault::usage("a receive comm"));
        };
        // SAFETY: NCCL's contract.
        let region = unsafe { region(mhandle) };
        if let Some(index) = sender.isend(data as u64, size.bytes()?, tag, region)? {
            // SAFETY: NCCL's contract.
            unsafe { put(request, comm.request(index)) }?;
        }
        Ok(())
    })
}

/// Up to v8.
pub unsafe extern "C" fn isend_int(
    comm: *mut c_void,
    data: *mut c_void,
    size: c_int,
    tag: c_int,
    mhandle: *mut c_void,
    request: *mut *mut c_void,
) -> NcclResult {
    // SAFETY: NCCL's contract.
    unsafe { send(comm, data, size, tag, mhandle, request) }
}

/// Since v10.
pub unsafe extern "C" fn isend(
    comm: *mut c_void,
    data: *mut c_void,
    size: usize,
    tag: c_int,
    mhandle: *mut c_void,
    _phandle: *mut c_void,
    request: *mut *mut c_void,
) -> NcclResult {
    // SAFETY: NCCL's contract.
    unsafe { send(comm, data, size, tag, mhandle, request) }
}

#[inline]
pub unsafe fn receive<S: Size>(
    comm: *mut c_void,
    n: c_int,
    data: *mut *mut c_void,
    sizes: *mut S,
    tags: *mut c_int,
    mhandles: *mut *mut c_void,
    request: *mut *mut c_void,
) -> NcclResult {
    code("irecv", || {
        // SAFETY: NCCL's contract. (On entry it may say that nobody will wait for the completion.)
        unsafe { put(request, std::ptr::null_mut()) }?;
        let count = usize::try_from(n).ok().filter(|n| (1..=GROUP).contains(n));
        let n =
            count.ok_or_else(|| Fault::usage(format!("{n} grouped receives: 1 to {GROUP} (maxRecvs)")))?;
        // SAFETY: NCCL's contract.
        let comm = unsafe { Comm::of(comm) }?;
        // SAFETY: NCCL's contract: one thread at a time.
        let Side::Recv(receiver) = (unsafe { comm.side() }) else { return Err(Fault::usage("a send comm")) };
        // SAFETY: NCCL's contract: lists of n.
        let data = unsafe { list(data, n) }?;
        // SAFETY: the same.
        let sizes = unsafe { list(sizes, n) }?;
        // SAFETY: the same.
        let tags = unsafe { list(tags, n) }?;
        // SAFETY: the same.
        let mhandles = unsafe { list(mhandles, n) }?;
        let mut group = Group::new();
        for i in 0..n {
            // SAFETY: NCCL's contract.
            let region = unsafe { region(mhandles[i]) };
            group.push(posting(data[i] as u64, sizes[i].bytes()? as u64, tags[i], region)?);
        }
        if let Some(index) = receiver.irecv(&group)? {
            // SAFETY: NCCL's contract.
            unsafe { put(request, comm.request(index)) }?;
        }
        Ok(())
    })
}

#[inline]
fn posting(addr: u64, len: u64, tag: i32, region: Option<&Region>) -> Result<Posting> {
    let rkey = match region {
        _ if len == 0 => 0,
        Some(region) => region.writable_key(addr, len).ok_or_else(|| {
            Fault::usage(format!("irecv of {len} bytes at {addr:#x}: not inside writable registered memory"))
        })?,
        None => return Err(Fault::usage("irecv without a memory handle")),
    };
    Ok(Posting { addr, len, rkey, tag })
}

/// Up to v8.
pub unsafe extern "C" fn irecv_int(
    comm: *mut c_void,
    n: c_int,
    data: *mut *mut c_void,
    sizes: *mut c_int,
    tags: *mut c_int,
    mhandles: *mut *mut c_void,
    request: *mut *mut c_void,
) -> NcclResult {
    // SAFETY: NCCL's contract.
    unsafe { receive(comm, n, data, sizes, tags, mhandles, request) }
}

/// Since v10.
pub unsafe extern "C" fn irecv(
    comm: *mut c_void,
    n: c_int,
    data: *mut *mut c_void,
    sizes: *mut usize,
    tags: *mut c_int,
    mhandles: *mut *mut c_void,
    _phandles: *mut *mut c_void,
    request: *mut *mut c_void,
) -> NcclResult {
    // SAFETY: NCCL's contract.
    unsafe { receive(comm, n, data, sizes, tags, mhandles, request) }
}

/// What test has seen of host memory is there: nothing to flush.
pub unsafe extern "C" fn iflush(
    _comm: *mut c_void,
    _n: c_int,
    _data: *mut *mut c_void,
    _sizes: *mut c_int,
    _mhandles: *mut *mut c_void,
    request: *mut *mut c_void,
) -> NcclResult {
    // SAFETY: NCCL's contract.
    code("iflush", || unsafe { put(request, std::ptr::null_mut()) })
}

pub unsafe extern "C" fn test(request: *mut c_void, done: *mut c_int, sizes: *mut c_int) -> NcclResult {
    code("test", || {
        // SAFETY: NCCL's contract.
        unsafe { put(done, 0) }?;
        // SAFETY: NULL or a request that is not done.
        let request = unsafe { request.cast::<Request>().as_ref() };
        let request = request.ok_or_else(|| Fault::usage("no request"))?;
        // SAFETY: a request's comm lives as long as it.
        let comm = unsafe { &*request.comm };
        // SAFETY: NCCL's contract: one thread at a time.
        let finished = match unsafe { comm.side() } {
            Side::Send(sender) => {
                let size = sender.test(request.index)?;
                // SAFETY: NCCL's contract: one int.
                size.inspect(|size| unsafe { report(sizes, 0, *size) }).is_some()
            }
            Side::Recv(receiver) => {
                let all = receiver.test(request.index)?;
                for (i, size) in all.iter().flatten().enumerate() {
                    // SAFETY: NCCL's contract: as many ints as the group has receives.
                    unsafe { report(sizes, i, *size) };
                }
                all.is_some()
            }
        };
        // SAFETY: NCCL's contract.
        unsafe { put(done, c_int::from(finished)) }
    })
}

/// # Safety
/// `sizes` is NULL or has more than `index` items.
unsafe fn report(sizes: *mut c_int, index: usize, size: u64) {
    if !sizes.is_null() {
        // SAFETY: the caller's promise.
        let slot = unsafe { sizes.add(index) };
        // SAFETY: the caller's promise.
        unsafe { slot.write(c_int::try_from(size).unwrap_or(c_int::MAX)) };
    }
}
