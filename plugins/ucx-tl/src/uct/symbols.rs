//! The UCX that loaded us: its libraries, its functions, which release it is.
//!
//! Nothing of UCX is linked: some installations rename their libraries, all load them locally, and one process may hold
//! two of them. The caller of our entry point lies in the libucs that counts.

use std::ffi::{CStr, CString, c_char, c_int, c_uint, c_void};
use std::path::Path;

use super::abi::{Abi, MARKS, NEWER, Version};
use super::types::{BaseIface, IfaceAttr, Status, UnmapEvent};

/// A library that is loaded already.
#[derive(Debug, Clone, Copy)]
pub struct Library(*mut c_void);

impl Library {
    /// The loaded object of that file.
    fn loaded(path: &CStr) -> Option<Self> {
        // SAFETY: with RTLD_NOLOAD nothing is loaded and no constructor runs.
        let handle = unsafe { libc::dlopen(path.as_ptr(), libc::RTLD_LAZY | libc::RTLD_NOLOAD) };
        (!handle.is_null()).then_some(Library(handle))
    }

    /// An address in the library or those it depends on.
    pub fn find(self, symbol: &str) -> Option<*mut c_void> {
        let symbol = CString::new(symbol).ok()?;
        // SAFETY: a live handle, never closed.
        let found = unsafe { libc::dlsym(self.0, symbol.as_ptr()) };
        (!found.is_null()).then_some(found)
    }
}

/// The file that an address was loaded from.
fn file_of(address: *const c_void) -> Option<CString> {
    // SAFETY: plain data, overwritten by dladdr.
    let mut info: libc::Dl_info = unsafe { std::mem::zeroed() };
    // SAFETY: dladdr takes any address.
    if unsafe { libc::dladdr(address, &mut info) } == 0 || info.dli_fname.is_null() {
        return None;
    }
    // SAFETY: a string of the loader's, which lives as long as the library.
    Some(unsafe { CStr::from_ptr(info.dli_fname) }.to_owned())
}

/// Files of the loaded objects whose name begins with `prefix`.
fn loaded_files(prefix: &str) -> Vec<CString> {
    unsafe extern "C" fn each(info: *mut libc::dl_phdr_info, _: usize, found: *mut c_void) -> c_int {
        // SAFETY: dl_iterate_phdr hands out a valid structure.
        let name = unsafe { (*info).dlpi_name };
        if !name.is_null() {
            // SAFETY: a string of the loader's.
            let name = unsafe { CStr::from_ptr(name) };
            // SAFETY: the vector below, which nobody else uses meanwhile.
            unsafe { &mut *found.cast::<Vec<CString>>() }.push(name.to_owned());
        }
        0
    }
    let mut all: Vec<CString> = Vec::new();
    // SAFETY: the callback takes `all` as what it is and does not panic.
    unsafe { libc::dl_iterate_phdr(Some(each), (&raw mut all).cast()) };
    all.retain(|path| {
        let path = Path::new(path.to_str().unwrap_or_default());
        path.file_name().and_then(|name| name.to_str()).is_some_and(|name| name.starts_with(prefix))
    });
    all
}

/// The libuct that uses the libucs which `caller` lies in.
fn libuct_of(caller: *const c_void) -> Result<Library, String> {
    const COMMON: &str = "ucs_log_dispatch";
    let file = file_of(caller).ok_or("the caller is in no library")?;
    let ucs = Library::loaded(&file).ok_or_else(|| format!("{} is not loaded", file.to_string_lossy()))?;
    let common = ucs.find(COMMON).ok_or_else(|| format!("{} is no libucs", file.to_string_lossy()))?;
    // Modules are libuct_NAME, the library itself libuct.so or libuct-HASH.so.
    let candidates = ["libuct.", "libuct-"].iter().flat_map(|prefix| loaded_files(prefix));
    let mut libraries = candidates.filter_map(|file| Library::loaded(&file));
    libraries
        .find(|uct| uct.find("uct_component_register").is_some() && uct.find(COMMON) == Some(common))
        .ok_or_else(|| format!("no loaded libuct uses {}", file.to_string_lossy()))
}

/// Which release's internals the library has; in words, why it cannot be used.
fn recognise(uct: Library, forced: bool) -> Result<Version, String> {
    if uct.find("ucs_stats_node_alloc").is_some() {
        return Err("this UCX was built with statistics (--enable-stats), which change its structures".into());
    }
    let newest = MARKS[0].1;
    if uct.find(NEWER).is_some() && !forced {
        return Err(format!(
            "this UCX is newer than {}, the last that the transport was tested with; UCX_FF_FORCE=y tries it anyway",
            newest.name()
        ));
    }
    let found = MARKS.iter().find(|(symbol, _)| uct.find(symbol).is_some());
    Ok(found.map_or(Version::V1_13, |(_, version)| *version))
}

/// `ucs_config_parser_t`'s functions for one type, and the description that goes with it.
#[derive(Debug, Clone, Copy)]
pub struct Parser {
    pub read: *const c_void,
    pub write: *const c_void,
    pub clone: *const c_void,
    pub release: *const c_void,
    pub help: *const c_void,
    pub doc: *const c_void,
    pub arg: *const c_void,
}

type RegisterTl = unsafe extern "C" fn(component: *mut c_void, tl: *mut c_void);
type IfaceInit = unsafe extern "C" fn(
    this: *mut BaseIface,
    class: *mut c_void,
    count: *mut c_int,
    ops: *const c_void,
    internal_ops: *const c_void,
    md: *mut c_void,
    worker: *mut c_void,
    params: *const c_void,
    config: *const c_void,
) -> Status;
type EpInit = unsafe extern "C" fn(
    this: *mut c_void,
    class: *mut c_void,
    count: *mut c_int,
    iface: *mut BaseIface,
) -> Status;
/// What is called when memory is unmapped.
type UnmapHook = unsafe extern "C" fn(kind: c_int, event: *const UnmapEvent, arg: *mut c_void);
type LogDispatch = unsafe extern "C" fn(
    file: *const c_char,
    line: c_uint,
    function: *const c_char,
    level: c_uint,
    component: *mut c_void,
    format: *const c_char,
    ...
);

macro_rules! functions {
    ($($name:ident: $type:ty,)*) => {
        /// UCX's own functions.
        #[derive(Debug, Clone, Copy)]
        #[allow(non_snake_case)]
        pub struct Functions { $(pub $name: $type,)* }

        impl Functions {
            fn find(uct: Library) -> Result<Self, String> {
                Ok(Functions { $($name: {
                    let name = stringify!($name);
                    let found = uct.find(name).ok_or_else(|| format!("this UCX has no {name}"))?;
                    // SAFETY: UCX's function of that name, with the signature that its headers give it in all releases.
                    unsafe { std::mem::transmute::<*mut c_void, $type>(found) }
                },)* })
            }
        }
    };
}

functions! {
    uct_component_register: unsafe extern "C" fn(component: *mut c_void),
    uct_tl_register: RegisterTl,
    uct_base_iface_t_init: IfaceInit,
    uct_base_iface_query: unsafe extern "C" fn(iface: *mut BaseIface, attr: *mut IfaceAttr),
    uct_base_iface_progress_enable: unsafe extern "C" fn(iface: *mut c_void, flags: c_uint),
    uct_base_iface_progress_disable: unsafe extern "C" fn(iface: *mut c_void, flags: c_uint),
    uct_base_ep_t_init: EpInit,
    uct_iface_handle_ep_err: unsafe extern "C" fn(iface: *mut c_void, ep: *mut c_void, status: Status) -> Status,
    uct_md_query_single_md_resource:
        unsafe extern "C" fn(component: *mut c_void, resources: *mut *mut c_void, count: *mut c_uint) -> Status,
    uct_md_query_empty_md_resource: unsafe extern "C" fn(resources: *mut *mut c_void, count: *mut c_uint) -> Status,
    ucs_class_call_cleanup_chain: unsafe extern "C" fn(class: *mut c_void, object: *mut c_void, limit: c_int),
    ucs_log_dispatch: LogDispatch,
    ucm_set_event_handler: unsafe extern "C" fn(events: c_int, priority: c_int, hook: UnmapHook, arg: *mut c_void) -> Status,
    ucm_unset_event_handler: unsafe extern "C" fn(events: c_int, hook: UnmapHook, arg: *mut c_void),
}

/// One UCX in this process.
#[derive(Debug)]
pub struct Ucx {
    library: Library,
    pub abi: &'static Abi,
    pub call: Functions,
    pub iface_class: *mut c_void,
    pub ep_class: *mut c_void,
    pub md_config_table: *const c_void,
    pub iface_config_table: *const c_void,
    /// `ucs_global_opts.log_component`, its first member: a level, then a name.
    log_component: *mut c_uint,
}

impl Ucx {
    /// The one whose libucs `caller` lies in.
    pub fn of(caller: *const c_void, forced: bool) -> Result<Self, String> {
        let uct = libuct_of(caller)?;
        let abi = Abi::of(recognise(uct, forced)?);
        let data = |name: &str| uct.find(name).ok_or_else(|| format!("this UCX has no {name}"));
        Ok(Ucx {
            library: uct,
            abi,
            call: Functions::find(uct)?,
            iface_class: data("uct_base_iface_t_class")?,
            ep_class: data("uct_base_ep_t_class")?,
            md_config_table: data("uct_md_config_table")?,
            iface_config_table: data("uct_iface_config_table")?,
            log_component: data("ucs_global_opts")?.cast(),
        })
    }

    /// The parser that UCX's headers build of `read` and `write` (sscanf, sprintf), `clone` and `help` names.
    pub fn parser(&self, names: [&str; 5], arg: *const c_void) -> Result<Parser, String> {
        let find = |name: &str| match name {
            "" => Ok(std::ptr::null()),
            _ => self
                .library
                .find(&format!("ucs_config_{name}"))
                .map(<*mut c_void>::cast_const)
                .ok_or_else(|| format!("this UCX has no ucs_config_{name}")),
        };
        let [read, write, clone, release, help] = names;
        let doc = self.library.find("ucs_config_doc_nop").map_or(std::ptr::null(), <*mut c_void>::cast_const);
        Ok(Parser {
            read: find(read)?,
            write: find(write)?,
            clone: find(clone)?,
            release: find(release)?,
            help: find(help)?,
            doc,
            arg,
        })
    }

    /// Says something the way UCX does, if its log level lets it.
    pub fn log(&self, level: Level, text: &str) {
        // SAFETY: the level of a running UCX, an aligned word.
        let enabled = unsafe { self.log_component.read_volatile() };
        let Ok(text) = CString::new(text) else { return };
        if level as c_uint > enabled {
            return;
        }
        let (file, function) = (c"ff.rs".as_ptr(), c"ff".as_ptr());
        let component = self.log_component.cast();
        // SAFETY: a printf-like function; the format takes one string.
        unsafe {
            (self.call.ucs_log_dispatch)(
                file,
                0,
                function,
                level as c_uint,
                component,
                c"%s".as_ptr(),
                text.as_ptr(),
            );
        }
    }
}

/// `ucs_log_level_t`.
#[derive(Debug, Clone, Copy)]
pub enum Level {
    Error = 1,
    Diag = 3,
    Debug = 5,
}

/// Says on stderr why a UCX is refused: it is not known well enough to use its log.
pub fn refuse(why: &str) {
    eprintln!("freeflow: the UCX transport ff is not used: {why}");
}
