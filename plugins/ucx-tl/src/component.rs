//! What goes into UCX's lists: a component with its memory domain, a transport, and their tables of variables.
//!
//! Built at the offsets of the UCX that loaded us, and never freed: UCX has no way to take them out again.

use std::ffi::{CStr, c_char, c_int, c_uint, c_void};

use crate::device::{Device, Resource};
use crate::uct::abi::Version;
use crate::uct::symbols::{Level, Parser, Ucx};
use crate::uct::types::Status;
use crate::{iface, md, rkey};

/// Component, transport and prefix of the variables.
const NAME: &[u8] = b"ff";
const PREFIX: &CStr = c"FF_";

/// Zeroed memory that is UCX's from now on, written at offsets.
struct Blob(*mut u8);

impl Blob {
    fn new(size: usize) -> Self {
        Blob(Box::leak(vec![0u64; size.div_ceil(8)].into_boxed_slice()).as_mut_ptr().cast())
    }

    fn put<T: Copy>(&self, offset: usize, value: T) {
        // SAFETY: the tables' offsets lie inside the size they come with, and fields are aligned as in C.
        unsafe { self.0.wrapping_add(offset).cast::<T>().write(value) };
    }

    fn at(&self, offset: usize) -> *mut c_void {
        self.0.wrapping_add(offset).cast()
    }

    /// `ucs_list_head_init`.
    fn put_list_head(&self, offset: usize) {
        let head = self.at(offset);
        self.put(offset, head);
        self.put(offset + 8, head);
    }

    /// `ucs_config_global_list_entry_t`, up to its list.
    fn put_config(
        &self,
        offset: usize,
        name: &'static CStr,
        prefix: &'static CStr,
        table: *const c_void,
        size: usize,
    ) {
        self.put(offset, name.as_ptr());
        self.put(offset + 8, prefix.as_ptr());
        self.put(offset + 16, table);
        self.put(offset + 24, size);
    }
}

/// A variable of ours.
struct Field {
    name: &'static CStr,
    default: &'static CStr,
    doc: Option<&'static CStr>,
    offset: usize,
    parser: Parser,
}

/// A table of `ucs_config_field_t`, ended by an empty one.
fn table(ucx: &Ucx, fields: &[Field]) -> *const c_void {
    let stride = ucx.abi.config_field;
    let blob = Blob::new(stride * (fields.len() + 1));
    for (i, field) in fields.iter().enumerate() {
        let at = i * stride;
        blob.put(at, field.name.as_ptr());
        blob.put(at + 8, field.default.as_ptr());
        blob.put(at + 16, field.doc.map_or(std::ptr::null(), CStr::as_ptr));
        blob.put(at + 24, field.offset);
        let Parser { read, write, clone, release, help, doc, arg } = field.parser;
        let mut words = vec![read, write, clone, release, help];
        words.extend((ucx.abi.version >= Version::V1_17).then_some(doc));
        words.push(arg);
        for (i, word) in words.into_iter().enumerate() {
            blob.put(at + 32 + i * 8, word);
        }
    }
    blob.at(0)
}

/// The kinds of variables, as UCX's headers define them.
struct Parsers<'a>(&'a Ucx);

impl Parsers<'_> {
    fn inherited(&self, table: *const c_void) -> Result<Parser, String> {
        self.0.parser(["sscanf_table", "", "clone_table", "release_table", "help_table"], table)
    }

    fn plain(&self, kind: &str, clone: &str, description: &'static CStr) -> Result<Parser, String> {
        let (read, write, clone) =
            (format!("sscanf_{kind}"), format!("sprintf_{kind}"), format!("clone_{clone}"));
        let names = [read.as_str(), write.as_str(), clone.as_str(), "release_nop", "help_generic"];
        self.0.parser(names, description.as_ptr().cast())
    }

    fn uint(&self) -> Result<Parser, String> {
        self.plain("uint", "uint", c"unsigned integer")
    }

    fn memory(&self) -> Result<Parser, String> {
        self.plain("memunits", "ulong", c"memory units: <number>[b|kb|mb|gb], \"inf\", or \"auto\"")
    }

    fn bandwidth(&self) -> Result<Parser, String> {
        self.plain("bw", "double", c"bandwidth value: <number>[T|G|M|K]B|b[[p|/]s]")
    }

    fn yes_or_no(&self) -> Result<Parser, String> {
        self.plain("bool", "int", c"<y|n>")
    }
}

/// Variables of the memory domain; the first byte is UCX's own empty structure.
#[repr(C)]
struct MdConfig {
    base: u64,
    force: c_int,
}

fn md_table(ucx: &Ucx) -> Result<*const c_void, String> {
    let parsers = Parsers(ucx);
    let fields = [
        Field { name: c"", default: c"", doc: None, offset: 0, parser: parsers.inherited(ucx.md_config_table)? },
        Field {
            name: c"FORCE",
            default: c"n",
            doc: Some(c"Use the transport with a UCX that is newer than those it was tested with.\n(Environment only.)"),
            offset: std::mem::offset_of!(MdConfig, force),
            parser: parsers.yes_or_no()?,
        },
    ];
    Ok(table(ucx, &fields))
}

fn iface_table(ucx: &Ucx) -> Result<*const c_void, String> {
    use std::mem::offset_of;
    let parsers = Parsers(ucx);
    let inherited = parsers.inherited(ucx.iface_config_table)?;
    let fields = [
        Field { name: c"", default: c"ALLOC=md,mmap,heap", doc: None, offset: 0, parser: inherited },
        Field {
            name: c"FIFO_SIZE",
            default: c"128",
            doc: Some(c"Messages that may wait at a receiver, per sender. (A power of two.)"),
            offset: offset_of!(iface::Config, fifo_size),
            parser: parsers.uint()?,
        },
        Field {
            name: c"SEG_SIZE",
            default: c"8256",
            doc: Some(c"Longest active message to a peer of this host; longer ones are sent in fragments or by rendezvous."),
            offset: offset_of!(iface::Config, seg_size),
            parser: parsers.memory()?,
        },
        Field {
            name: c"NET_SEG_SIZE",
            default: c"33024",
            doc: Some(c"The same to a peer of another host."),
            offset: offset_of!(iface::Config, net_seg_size),
            parser: parsers.memory()?,
        },
        Field {
            name: c"POOL_SIZE",
            default: c"256k",
            doc: Some(c"Memory of a receiver for messages that do not fit into the FIFO itself, per sender."),
            offset: offset_of!(iface::Config, pool_size),
            parser: parsers.memory()?,
        },
        Field {
            name: c"RX_QUEUE_LEN",
            default: c"32",
            doc: Some(c"Receives that wait for each sender whose path is not direct."),
            offset: offset_of!(iface::Config, rx_queue_len),
            parser: parsers.uint()?,
        },
        Field {
            name: c"BW",
            default: c"12000MBs",
            doc: Some(c"Bandwidth of one copy, from which UCX computes its thresholds."),
            offset: offset_of!(iface::Config, bandwidth),
            parser: parsers.bandwidth()?,
        },
        Field {
            name: c"NET_BW",
            default: c"1800MBs",
            doc: Some(c"Bandwidth to other hosts, likewise."),
            offset: offset_of!(iface::Config, net_bandwidth),
            parser: parsers.bandwidth()?,
        },
    ];
    Ok(table(ucx, &fields))
}

/// Puts component and transport into UCX's lists.
pub fn register(ucx: Ucx) -> Result<(), String> {
    let ucx: &'static Ucx = Box::leak(Box::new(ucx));
    let (md_table, iface_table) = (md_table(ucx)?, iface_table(ucx)?);
    let component = component(ucx, md_table);
    let tl = transport(ucx, iface_table);
    // SAFETY: laid out as this UCX has it, never freed; UCX registers from one thread (its module loader's lock).
    unsafe { (ucx.call.uct_tl_register)(component, tl) };
    // SAFETY: as above.
    unsafe { (ucx.call.uct_component_register)(component) };
    ucx.log(Level::Debug, &format!("transport ff for UCX {}", ucx.abi.version.name()));
    Ok(())
}

/// The component, with a pointer to its [`Ucx`] in front ([`ucx_of`]).
fn component(ucx: &'static Ucx, md_table: *const c_void) -> *mut c_void {
    const FRONT: usize = 8;
    let layout = &ucx.abi.component;
    let whole = Blob::new(FRONT + layout.size);
    whole.put(0, ucx as *const Ucx);
    let blob = Blob(whole.at(FRONT).cast());
    for (i, byte) in NAME.iter().enumerate() {
        blob.put(i, *byte);
    }
    let unpack = if ucx.abi.version.has_sys_devices() {
        rkey::unpack_with_params as *const c_void
    } else {
        rkey::unpack as *const c_void
    };
    let calls = [
        query_md_resources as *const c_void,
        md::open as *const c_void,
        cm_open as *const c_void,
        unpack,
        rkey::ptr as *const c_void,
        rkey::release as *const c_void,
    ];
    for (i, call) in calls.into_iter().enumerate() {
        blob.put(16 + 8 * i, call);
    }
    if let Some(offset) = layout.rkey_compare {
        blob.put(offset, rkey::compare as *const c_void);
    }
    blob.put_config(layout.md_config, c"FreeFlow memory domain", PREFIX, md_table, size_of::<MdConfig>());
    blob.put_config(layout.cm_config, c"", c"", std::ptr::null(), 0);
    blob.put_list_head(layout.tl_list);
    blob.put(layout.md_vfs_init, vfs_init as *const c_void);
    blob.at(0)
}

/// The UCX that a component of ours is registered with.
///
/// # Safety
/// `component` came from [`register`].
pub unsafe fn ucx_of(component: *const c_void) -> &'static Ucx {
    // SAFETY: component() wrote the pointer in front of it, to a leaked box.
    unsafe { *component.cast::<&'static Ucx>().wrapping_sub(1) }
}

fn transport(ucx: &Ucx, table: *const c_void) -> *mut c_void {
    let blob = Blob::new(ucx.abi.tl.size);
    for (i, byte) in NAME.iter().enumerate() {
        blob.put(i, *byte);
    }
    blob.put(16, query_devices as *const c_void);
    blob.put(24, iface::open as *const c_void);
    blob.put_config(ucx.abi.tl.config, c"FreeFlow transport", PREFIX, table, size_of::<iface::Config>());
    blob.at(0)
}

/// `query_md_resources`: one memory domain, if a router answers.
unsafe extern "C" fn query_md_resources(
    component: *mut c_void,
    resources: *mut *mut c_void,
    count: *mut c_uint,
) -> Status {
    // SAFETY: UCX calls it on what it was registered for.
    let ucx = unsafe { ucx_of(component) };
    match freeflow_core::client::available() {
        // SAFETY: UCX's own function with UCX's own arguments.
        Ok(_) => unsafe { (ucx.call.uct_md_query_single_md_resource)(component, resources, count) },
        Err(error) => {
            ucx.log(Level::Diag, &format!("ff: not available: {error}"));
            // SAFETY: as above.
            unsafe { (ucx.call.uct_md_query_empty_md_resource)(resources, count) }
        }
    }
}

/// `query_devices`.
unsafe extern "C" fn query_devices(
    _md: *mut c_void,
    devices: *mut *mut Resource,
    count: *mut c_uint,
) -> Status {
    // SAFETY: memory that UCX gives to free().
    let list = unsafe { libc::calloc(Device::ALL.len(), size_of::<Resource>()) }.cast::<Resource>();
    if list.is_null() {
        return Status::NO_MEMORY;
    }
    for (i, device) in Device::ALL.into_iter().enumerate() {
        // SAFETY: the list has a place for each.
        unsafe { list.wrapping_add(i).write(Resource::of(device)) };
    }
    // SAFETY: UCX's places for the results.
    unsafe { devices.write(list) };
    // SAFETY: as above.
    unsafe { count.write(Device::ALL.len() as c_uint) };
    Status::OK
}

unsafe extern "C" fn cm_open(
    _: *mut c_void,
    _: *mut c_void,
    _: *const c_void,
    _: *mut *mut c_void,
) -> Status {
    Status::UNSUPPORTED
}

unsafe extern "C" fn vfs_init(_: *mut c_void) {}

const _: () = assert!(size_of::<c_char>() == 1);
