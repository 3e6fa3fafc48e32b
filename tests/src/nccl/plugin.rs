//! A plugin, opened as NCCL opens it, with one face for all versions of the interface.
#![allow(clippy::multiple_unsafe_ops_per_block, reason = "one call, of whichever version")]
#![allow(clippy::not_unsafe_ptr_arg_deref, reason = "a plugin must refuse what is not registered")]

use std::ffi::{CStr, c_char, c_int, c_ulong, c_void};
use std::mem::MaybeUninit;
use std::path::Path;
use std::ptr::null_mut;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{LazyLock, Mutex};

use freeflow_nccl_abi::{
    CommConfig, DebugLogger, HANDLE_MAXSIZE, NcclResult, OPTIONAL_RECV_COMPLETION, ptr, result, v6, v7, v8,
    v9, v10, v11, v12,
};

/// Versions that can be replayed, newest first: the order in which NCCL tries them.
pub const VERSIONS: [u32; 7] = [12, 11, 10, 9, 8, 7, 6];

/// A listen, send or receive comm, a registration, a request: the plugin's pointers.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Handle(pub *mut c_void);

// SAFETY: NCCL passes them between its threads; the plugin has to cope.
unsafe impl Send for Handle {}
// SAFETY: as above.
unsafe impl Sync for Handle {}

/// The number of a call that failed.
pub type Result<T> = std::result::Result<T, NcclResult>;

/// The buffer that carries a listener's name.
pub type Name = [u8; HANDLE_MAXSIZE];

/// What getProperties said, as far as all versions say it; v8's and v9's fields with their meaning before.
#[derive(Debug, Clone, PartialEq)]
pub struct Properties {
    pub name: String,
    pub pci_path: bool,
    pub guid: u64,
    pub ptr_support: c_int,
    pub speed: c_int,
    pub port: c_int,
    pub latency: f32,
    pub max_comms: c_int,
    pub max_recvs: c_int,
    pub reg_is_global: bool,
    pub net_device_type: c_int,
    /// (ndevs, first dev)
    pub v_props: (c_int, c_int),
    pub max_p2p_bytes: usize,
    pub max_coll_bytes: usize,
}

#[derive(Clone, Copy)]
enum Net {
    V6(v6::Net),
    V7(v7::Net),
    V8(v8::Net),
    V9(v9::Net),
    V10(v10::Net),
    V11(v11::Net),
    V12(v12::Net),
}

/// Runs `$body` with the structure of whatever version it is.
macro_rules! each {
    ($net:expr, $n:ident => $body:expr) => {
        match &$net {
            Net::V6($n) => $body,
            Net::V7($n) => $body,
            Net::V8($n) => $body,
            Net::V9($n) => $body,
            Net::V10($n) => $body,
            Net::V11($n) => $body,
            Net::V12($n) => $body,
        }
    };
}

/// An opened and initialised plugin.
pub struct Plugin {
    net: Net,
    ctx: Handle,
    pub version: u32,
    config: CommConfig,
    // Unloaded last.
    library: libloading::Library,
}

impl std::fmt::Debug for Plugin {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Plugin").field("version", &self.version).finish_non_exhaustive()
    }
}

/// What the plugin has logged. As NCCL's, the logger is one function for everybody.
static LOG: Mutex<Vec<(c_int, String)>> = Mutex::new(Vec::new());

/// The lines logged so far, and forgets them.
pub fn take_log() -> Vec<(c_int, String)> {
    std::mem::take(&mut LOG.lock().expect("log"))
}

/// Variadic in C; on x86-64 the first arguments of a variadic call are where any call's are.
unsafe extern "C" fn logger(
    level: c_int,
    _subsystems: c_ulong,
    _file: *const c_char,
    _line: c_int,
    format: *const c_char,
    text: *const c_char,
) {
    // SAFETY: NCCL's logger gets a format.
    let format = unsafe { CStr::from_ptr(format) };
    let line = if format == c"%s" {
        // SAFETY: what %s stands for.
        unsafe { CStr::from_ptr(text) }
    } else {
        format
    };
    LOG.lock().expect("log").push((level, line.to_string_lossy().into_owned()));
}

fn the_logger() -> DebugLogger {
    let logger: unsafe extern "C" fn(c_int, c_ulong, *const c_char, c_int, *const c_char, *const c_char) =
        logger;
    // SAFETY: on x86-64 callers of a variadic function pass its first six arguments as for any function.
    unsafe { std::mem::transmute::<_, DebugLogger>(logger) }
}

type Counter = unsafe extern "C" fn() -> c_ulong;

/// What counts this thread's allocations, if `tests/nccl/allocations.c` is preloaded.
static COUNTER: LazyLock<Option<Counter>> = LazyLock::new(|| {
    let program = libloading::os::unix::Library::this();
    // SAFETY: a function of that type, by its name.
    unsafe { program.get::<Counter>(b"allocations_of_this_thread") }.ok().map(|counter| *counter)
});
static ALLOCATIONS: AtomicU64 = AtomicU64::new(0);

/// Allocations inside isend, irecv and test so far. None: nobody counts.
pub fn allocations() -> Option<u64> {
    COUNTER.map(|_| ALLOCATIONS.load(Ordering::Relaxed))
}

/// A call of the data path.
#[inline]
fn counted<T>(call: impl FnOnce() -> T) -> T {
    let Some(counter) = *COUNTER else { return call() };
    // SAFETY: it only reads a number.
    let before = unsafe { counter() };
    let result = call();
    // SAFETY: the same.
    ALLOCATIONS.fetch_add(unsafe { counter() } - before, Ordering::Relaxed);
    result
}

fn checked(code: NcclResult) -> Result<()> {
    if code == result::SUCCESS { Ok(()) } else { Err(code) }
}

impl Plugin {
    /// dlopen with RTLD_NOW and RTLD_LOCAL, the symbol of `version`, init.
    pub fn open(path: &Path, version: u32, traffic_class: c_int) -> std::result::Result<Plugin, String> {
        use libloading::os::unix::{Library, RTLD_LOCAL, RTLD_NOW};
        // SAFETY: loading a plugin runs its initialisers, which is what is tested.
        let library = unsafe { Library::open(Some(path), RTLD_NOW | RTLD_LOCAL) };
        let library: libloading::Library =
            library.map_err(|e| format!("dlopen of {}: {e}", path.display()))?.into();
        let name = format!("ncclNetPlugin_v{version}");
        let missing = |e| format!("{}: no {name}: {e}", path.display());
        macro_rules! symbol {
            ($($number:literal $variant:ident $module:ident),*) => {
                match version {
                    $(
                        // SAFETY: the symbol is data of that type, by its name.
                        $number => unsafe { library.get::<*const $module::Net>(name.as_bytes()) }
                            // SAFETY: as above; copied out while the library is there.
                            .map(|net| Net::$variant(unsafe { **net }))
                            .map_err(missing)?,
                    )*
                    other => return Err(format!("no version {other} of the interface")),
                }
            };
        }
        let net = symbol!(6 V6 v6, 7 V7 v7, 8 V8 v8, 9 V9 v9, 10 V10 v10, 11 V11 v11, 12 V12 v12);
        let config = CommConfig { traffic_class };
        let mut plugin = Plugin { net, ctx: Handle(null_mut()), version, config, library };
        plugin.init().map_err(|code| format!("init: {code} ({:?})", take_log()))?;
        Ok(plugin)
    }

    fn init(&mut self) -> Result<()> {
        let logger = Some(the_logger());
        let mut config = self.config;
        let ctx = &mut self.ctx.0;
        // SAFETY: the arguments that NCCL gives.
        checked(unsafe {
            match &self.net {
                Net::V6(n) => (n.init.expect("init"))(logger),
                Net::V7(n) => (n.init.expect("init"))(logger),
                Net::V8(n) => (n.init.expect("init"))(logger),
                Net::V9(n) => (n.init.expect("init"))(logger),
                Net::V10(n) => (n.init.expect("init"))(logger, None),
                Net::V11(n) => (n.init.expect("init"))(ctx, 0x1234, &mut config, logger, None),
                Net::V12(n) => (n.init.expect("init"))(ctx, 0x1234, &mut config, logger, None),
            }
        })
    }

    /// What the communicator is configured for.
    pub fn traffic_class(&self) -> c_int {
        self.config.traffic_class
    }

    /// The plugin's name.
    pub fn name(&self) -> String {
        // SAFETY: a string that lives as long as the library.
        each!(self.net, n => unsafe { CStr::from_ptr(n.name) }).to_string_lossy().into_owned()
    }

    pub fn devices(&self) -> Result<c_int> {
        let mut n = -1;
        // SAFETY: an int to fill.
        checked(each!(self.net, net => unsafe { (net.devices.expect("devices"))(&mut n) }))?;
        Ok(n)
    }

    /// Two times, over memory with different bytes in it: a field that was not written differs.
    pub fn properties(&self, dev: c_int) -> Result<Properties> {
        macro_rules! ask {
            ($net:expr, $module:ident, |$p:ident| $rest:expr) => {{
                let mut both = [0xaau8, 0x55].map(|poison| {
                    let mut props = MaybeUninit::<$module::Props>::uninit();
                    // SAFETY: all of it is ours to write.
                    unsafe {
                        props.as_mut_ptr().cast::<u8>().write_bytes(poison, size_of::<$module::Props>())
                    };
                    let get = $net.get_properties.expect("getProperties");
                    // SAFETY: a structure to fill.
                    let code = unsafe { get(dev, props.as_mut_ptr()) };
                    // SAFETY: every bit pattern is one of integers and pointers.
                    checked(code).map(|()| unsafe { props.assume_init() })
                });
                both.reverse();
                let [a, b] = both;
                let convert = |$p: $module::Props| Properties {
                    // SAFETY: a string that stays.
                    name: unsafe { CStr::from_ptr($p.name) }.to_string_lossy().into_owned(),
                    pci_path: !$p.pci_path.is_null(),
                    guid: $p.guid,
                    ptr_support: $p.ptr_support,
                    speed: $p.speed,
                    port: $p.port,
                    latency: $p.latency,
                    max_comms: $p.max_comms,
                    max_recvs: $p.max_recvs,
                    ..$rest
                };
                let (a, b) = (convert(a?), convert(b?));
                if a != b {
                    return Err(-1);
                }
                Ok(a)
            }};
        }
        let rest = |reg_is_global, net_device_type, v_props, max_p2p_bytes, max_coll_bytes| Properties {
            name: String::new(),
            pci_path: false,
            guid: 0,
            ptr_support: 0,
            speed: 0,
            port: 0,
            latency: 0.0,
            max_comms: 0,
            max_recvs: 0,
            reg_is_global,
            net_device_type,
            v_props,
            max_p2p_bytes,
            max_coll_bytes,
        };
        const INT: usize = c_int::MAX as usize;
        match &self.net {
            Net::V6(n) => ask!(n, v6, |p| rest(false, 0, (1, 0), INT, INT)),
            Net::V7(n) => ask!(n, v7, |p| rest(false, p.net_device_type, (1, 0), INT, INT)),
            Net::V8(n) => ask!(n, v8, |p| rest(p.reg_is_global != 0, p.net_device_type, (1, 0), INT, INT)),
            Net::V9(n) => ask!(n, v9, |p| rest(
                p.reg_is_global != 0,
                p.net_device_type,
                (p.v_props.ndevs, p.v_props.devs[0]),
                p.max_p2p_bytes,
                p.max_coll_bytes
            )),
            Net::V10(n) => ask!(n, v10, |p| rest(
                p.reg_is_global != 0,
                p.net_device_type,
                (p.v_props.ndevs, p.v_props.devs[0]),
                p.max_p2p_bytes,
                p.max_coll_bytes
            )),
            Net::V11(n) => ask!(n, v11, |p| rest(
                p.reg_is_global != 0,
                p.net_device_type,
                (p.v_props.ndevs, p.v_props.devs[0]),
                p.max_p2p_bytes,
                p.max_coll_bytes
            )),
            Net::V12(n) => ask!(n, v12, |p| rest(
                p.reg_is_global != 0,
                p.net_device_type,
                (p.v_props.ndevs, p.v_props.devs[0]),
                p.max_p2p_bytes,
                p.max_coll_bytes
            )),
        }
    }

    pub fn listen(&self, dev: c_int) -> Result<(Handle, Name)> {
        let (mut comm, mut name) = (null_mut(), [0; HANDLE_MAXSIZE]);
        let handle = name.as_mut_ptr().cast();
        let ctx = self.ctx.0;
        // SAFETY: the arguments that NCCL gives.
        checked(unsafe {
            match &self.net {
                Net::V6(n) => (n.listen.expect("listen"))(dev, handle, &mut comm),
                Net::V7(n) => (n.listen.expect("listen"))(dev, handle, &mut comm),
                Net::V8(n) => (n.listen.expect("listen"))(dev, handle, &mut comm),
                Net::V9(n) => (n.listen.expect("listen"))(dev, handle, &mut comm),
                Net::V10(n) => (n.listen.expect("listen"))(dev, handle, &mut comm),
                Net::V11(n) => (n.listen.expect("listen"))(ctx, dev, handle, &mut comm),
                Net::V12(n) => (n.listen.expect("listen"))(ctx, dev, handle, &mut comm),
            }
        })?;
        Ok((Handle(comm), name))
    }

    /// One try; None: not yet. `name` must be the same buffer on each.
    pub fn connect(&self, dev: c_int, name: &mut Name) -> Result<Option<Handle>> {
        let handle = name.as_mut_ptr().cast();
        let (mut comm, mut device) = (null_mut(), null_mut());
        let mut config = self.config;
        let ctx = self.ctx.0;
        // SAFETY: the arguments that NCCL gives.
        checked(unsafe {
            match &self.net {
                Net::V6(n) => (n.connect.expect("connect"))(dev, handle, &mut comm),
                Net::V7(n) => (n.connect.expect("connect"))(dev, handle, &mut comm, &mut device),
                Net::V8(n) => (n.connect.expect("connect"))(dev, handle, &mut comm, &mut device),
                Net::V9(n) => (n.connect.expect("connect"))(dev, handle, &mut comm, &mut device),
                Net::V10(n) => {
                    (n.connect.expect("connect"))(dev, &mut config, handle, &mut comm, &mut device)
                }
                Net::V11(n) => (n.connect.expect("connect"))(ctx, dev, handle, &mut comm, &mut device),
                Net::V12(n) => (n.connect.expect("connect"))(ctx, dev, handle, &mut comm, &mut device),
            }
        })?;
        Ok((!comm.is_null()).then_some(Handle(comm)))
    }

    /// One try; None: not yet.
    pub fn accept(&self, listener: Handle) -> Result<Option<Handle>> {
        let (mut comm, mut device) = (null_mut(), null_mut());
        // SAFETY: the arguments that NCCL gives.
        checked(unsafe {
            match &self.net {
                Net::V6(n) => (n.accept.expect("accept"))(listener.0, &mut comm),
                Net::V7(n) => (n.accept.expect("accept"))(listener.0, &mut comm, &mut device),
                Net::V8(n) => (n.accept.expect("accept"))(listener.0, &mut comm, &mut device),
                Net::V9(n) => (n.accept.expect("accept"))(listener.0, &mut comm, &mut device),
                Net::V10(n) => (n.accept.expect("accept"))(listener.0, &mut comm, &mut device),
                Net::V11(n) => (n.accept.expect("accept"))(listener.0, &mut comm, &mut device),
                Net::V12(n) => (n.accept.expect("accept"))(listener.0, &mut comm, &mut device),
            }
        })?;
        Ok((!comm.is_null()).then_some(Handle(comm)))
    }

    /// # Safety
    /// `[data, data+size)` stays until deregistration.
    pub unsafe fn reg(&self, comm: Handle, data: *mut c_void, size: usize, kind: c_int) -> Result<Handle> {
        let mut mhandle = null_mut();
        // SAFETY: the caller's promise.
        checked(unsafe {
            match &self.net {
                Net::V6(n) => (n.reg_mr.expect("regMr"))(comm.0, data, size as c_int, kind, &mut mhandle),
                Net::V7(n) => (n.reg_mr.expect("regMr"))(comm.0, data, size as c_int, kind, &mut mhandle),
                Net::V8(n) => (n.reg_mr.expect("regMr"))(comm.0, data, size, kind, &mut mhandle),
                Net::V9(n) => (n.reg_mr.expect("regMr"))(comm.0, data, size, kind, &mut mhandle),
                Net::V10(n) => (n.reg_mr.expect("regMr"))(comm.0, data, size, kind, &mut mhandle),
                Net::V11(n) => (n.reg_mr.expect("regMr"))(comm.0, data, size, kind, &mut mhandle),
                Net::V12(n) => (n.reg_mr.expect("regMr"))(comm.0, data, size, kind, &mut mhandle),
            }
        })?;
        Ok(Handle(mhandle))
    }

    pub fn reg_buffer(&self, comm: Handle, buffer: &super::memory::Buffer) -> Result<Handle> {
        // SAFETY: the scenarios deregister before they free.
        unsafe { self.reg(comm, buffer.at(0), buffer.len(), ptr::HOST) }
    }

    pub fn dereg(&self, comm: Handle, mhandle: Handle) -> Result<()> {
        // SAFETY: a registration of this plugin's.
        checked(each!(self.net, n => unsafe { (n.dereg_mr.expect("deregMr"))(comm.0, mhandle.0) }))
    }

    /// None: not now. A buffer that `mhandle` does not cover is refused.
    pub fn isend(
        &self,
        comm: Handle,
        data: *mut c_void,
        size: usize,
        tag: c_int,
        mhandle: Handle,
    ) -> Result<Option<Handle>> {
        // A plugin must write the request in any case.
        let mut request = NOT_WRITTEN as *mut c_void;
        let r = &mut request;
        let (comm, mh, int) = (comm.0, mhandle.0, size as c_int);
        // SAFETY: the arguments that NCCL gives.
        checked(counted(|| unsafe {
            match &self.net {
                Net::V6(n) => (n.isend.expect("isend"))(comm, data, int, tag, mh, r),
                Net::V7(n) => (n.isend.expect("isend"))(comm, data, int, tag, mh, r),
                Net::V8(n) => (n.isend.expect("isend"))(comm, data, int, tag, mh, r),
                Net::V9(n) => (n.isend.expect("isend"))(comm, data, size, tag, mh, r),
                Net::V10(n) => (n.isend.expect("isend"))(comm, data, size, tag, mh, null_mut(), r),
                Net::V11(n) => (n.isend.expect("isend"))(comm, data, size, tag, mh, null_mut(), r),
                Net::V12(n) => (n.isend.expect("isend"))(comm, data, size, tag, mh, null_mut(), r),
            }
        }))?;
        assert_ne!(request as usize, NOT_WRITTEN, "isend left *request as it was");
        Ok((!request.is_null()).then_some(Handle(request)))
    }

    /// None: not now. `optional`: NCCL does not need to hear of the completion.
    pub fn irecv(&self, comm: Handle, group: &Group<'_>, optional: bool) -> Result<Option<Handle>> {
        let mut request = if optional { OPTIONAL_RECV_COMPLETION } else { NOT_WRITTEN } as *mut c_void;
        let before = request;
        let r = &mut request;
        let n = group.sizes.len() as c_int;
        // In arrays, as NCCL has them: an allocation would be in every latency.
        let mut data = list(group.data, null_mut(), |data| data);
        let mut sizes = list(group.sizes, 0, |size| size);
        let mut ints = list(group.sizes, 0, |size| size as c_int);
        let mut tags = list(group.tags, 0, |tag| tag);
        let mut mhandles = list(group.mhandles, null_mut(), |mhandle| mhandle.0);
        let mut phandles = [null_mut(); MAX_MEMBERS];
        let (d, s, i) = (data.as_mut_ptr(), sizes.as_mut_ptr(), ints.as_mut_ptr());
        let (t, m, p) = (tags.as_mut_ptr(), mhandles.as_mut_ptr(), phandles.as_mut_ptr());
        // SAFETY: the arguments that NCCL gives.
        checked(counted(|| unsafe {
            match &self.net {
                Net::V6(net) => (net.irecv.expect("irecv"))(comm.0, n, d, i, t, m, r),
                Net::V7(net) => (net.irecv.expect("irecv"))(comm.0, n, d, i, t, m, r),
                Net::V8(net) => (net.irecv.expect("irecv"))(comm.0, n, d, i, t, m, r),
                Net::V9(net) => (net.irecv.expect("irecv"))(comm.0, n, d, s, t, m, r),
                Net::V10(net) => (net.irecv.expect("irecv"))(comm.0, n, d, s, t, m, p, r),
                Net::V11(net) => (net.irecv.expect("irecv"))(comm.0, n, d, s, t, m, p, r),
                Net::V12(net) => (net.irecv.expect("irecv"))(comm.0, n, d, s, t, m, p, r),
            }
        }))?;
        assert_ne!(request, before, "irecv left *request as it was");
        Ok((!request.is_null()).then_some(Handle(request)))
    }

    /// What NCCL does after a receive into a GPU's memory; for host memory it may be called, too.
    pub fn iflush(
        &self,
        comm: Handle,
        data: *mut c_void,
        size: c_int,
        mhandle: Handle,
    ) -> Result<Option<Handle>> {
        let (mut data, mut size, mut mhandle, mut request) =
            (data, size, mhandle.0, NOT_WRITTEN as *mut c_void);
        // SAFETY: lists of one.
        checked(each!(self.net, n => unsafe {
            (n.iflush.expect("iflush"))(comm.0, 1, &mut data, &mut size, &mut mhandle, &mut request)
        }))?;
        assert_ne!(request as usize, NOT_WRITTEN, "iflush left *request as it was");
        Ok((!request.is_null()).then_some(Handle(request)))
    }

    /// Is it done? Then `sizes` (room for the group, or none) is filled.
    pub fn test(&self, request: Handle, sizes: Option<&mut [c_int]>) -> Result<bool> {
        let mut done = -1;
        let sizes = sizes.map_or(null_mut(), <[c_int]>::as_mut_ptr);
        let d = &mut done;
        // SAFETY: a request that is not done, and room for its group.
        checked(each!(self.net, n => counted(|| unsafe { (n.test.expect("test"))(request.0, d, sizes) })))?;
        assert!(done == 0 || done == 1, "test left *done as it was");
        Ok(done == 1)
    }

    pub fn close_send(&self, comm: Handle) -> Result<()> {
        // SAFETY: nobody uses it any more.
        checked(each!(self.net, n => unsafe { (n.close_send.expect("closeSend"))(comm.0) }))
    }

    pub fn close_recv(&self, comm: Handle) -> Result<()> {
        // SAFETY: nobody uses it any more.
        checked(each!(self.net, n => unsafe { (n.close_recv.expect("closeRecv"))(comm.0) }))
    }

    pub fn close_listen(&self, comm: Handle) -> Result<()> {
        // SAFETY: nobody uses it any more.
        checked(each!(self.net, n => unsafe { (n.close_listen.expect("closeListen"))(comm.0) }))
    }

    /// finalize where there is one, then dlclose.
    pub fn close(self) -> std::result::Result<(), String> {
        // SAFETY: the context that init gave.
        let code = unsafe {
            match &self.net {
                Net::V11(n) => (n.finalize.expect("finalize"))(self.ctx.0),
                Net::V12(n) => (n.finalize.expect("finalize"))(self.ctx.0),
                _ => result::SUCCESS,
            }
        };
        checked(code).map_err(|code| format!("finalize: {code}"))?;
        self.library.close().map_err(|e| format!("dlclose: {e}"))
    }
}

/// Members of a group at the interface's limit.
pub const MAX_MEMBERS: usize = 8;

/// In front of a call, where a plugin must write a request or NULL.
const NOT_WRITTEN: usize = 0xbad;

/// A list of a group as C has it; more than fit are left out, and refused by their number.
fn list<T: Copy, C: Copy>(all: &[T], none: C, convert: impl Fn(T) -> C) -> [C; MAX_MEMBERS] {
    std::array::from_fn(|i| all.get(i).map_or(none, |one| convert(*one)))
}

/// The lists of a grouped receive.
#[derive(Debug)]
pub struct Group<'a> {
    pub data: &'a [*mut c_void],
    pub sizes: &'a [usize],
    pub tags: &'a [c_int],
    pub mhandles: &'a [Handle],
}
