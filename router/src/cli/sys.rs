//! The system calls std has no safe form for: signal masks, what a child does between fork and exec,
//! interfaces and dlopen.
//!
//! Owns all of the command line's `unsafe`. It must never know what the children are.

use std::ffi::CStr;
use std::io;
use std::mem::MaybeUninit;
use std::net::IpAddr;
use std::os::fd::RawFd;
use std::os::unix::process::CommandExt as _;
use std::process::Command;

use rustix::process::Signal;
use rustix::thread::UnshareFlags;

/// Signals that end a lab or a router.
pub const ENDING: [Signal; 4] = [Signal::INT, Signal::TERM, Signal::HUP, Signal::QUIT];

/// A set of signals blocked in this thread, and in those it starts, so that `wait` can take them.
#[derive(Clone, Copy)]
pub struct SignalSet(libc::sigset_t);

impl SignalSet {
    /// Blocks `signals`. To be called before other threads start.
    pub fn block(signals: &[Signal]) -> io::Result<Self> {
        let mut set = empty_set();
        for signal in signals {
            // SAFETY: `set` is an initialised signal set, and the number comes from rustix' list of signals.
            unsafe { libc::sigaddset(&raw mut set, signal.as_raw()) };
        }
        // SAFETY: `set` is initialised, and no old mask is asked for.
        let error = unsafe { libc::pthread_sigmask(libc::SIG_BLOCK, &raw const set, std::ptr::null_mut()) };
        if error == 0 { Ok(Self(set)) } else { Err(io::Error::from_raw_os_error(error)) }
    }

    /// Waits for the next of the set's signals.
    pub fn wait(&self) -> io::Result<Signal> {
        let mut number = 0;
        // SAFETY: the set is initialised, and `number` lives through the call.
        let error = unsafe { libc::sigwait(&raw const self.0, &raw mut number) };
        match (error, Signal::from_named_raw(number)) {
            (0, Some(signal)) => Ok(signal),
            (0, None) => Err(io::Error::other(format!("signal {number} came unasked"))),
            _ => Err(io::Error::from_raw_os_error(error)),
        }
    }
}

fn empty_set() -> libc::sigset_t {
    let mut set = MaybeUninit::uninit();
    // SAFETY: sigemptyset only writes to the set it is given.
    unsafe { libc::sigemptyset(set.as_mut_ptr()) };
    // SAFETY: sigemptyset initialised it; it cannot fail.
    unsafe { set.assume_init() }
}

/// What a child does to itself between fork and exec.
#[derive(Debug, Clone, Copy)]
pub struct ChildSetup {
    /// Sent to the child when the thread that started it ends.
    pub on_parent_death: Option<Signal>,
    /// Namespaces it leaves its parent's for.
    pub unshare: UnshareFlags,
    /// A network namespace it joins; whoever starts the child keeps the descriptor open.
    pub network: Option<RawFd>,
    /// Leaves terminal and session.
    pub new_session: bool,
}

impl Default for ChildSetup {
    fn default() -> Self {
        Self {
            on_parent_death: Some(Signal::KILL),
            unshare: UnshareFlags::empty(),
            network: None,
            new_session: false,
        }
    }
}

impl ChildSetup {
    /// Arranges that `command` sets its child up this way, with no signal blocked.
    pub fn apply(self, command: &mut Command) -> &mut Command {
        // SAFETY: `enter` only makes system calls: no allocation, no lock, nothing of another thread's.
        unsafe { command.pre_exec(move || self.enter()) }
    }

    fn enter(self) -> io::Result<()> {
        let set = empty_set();
        // SAFETY: `set` is initialised, and no old mask is asked for.
        unsafe { libc::pthread_sigmask(libc::SIG_SETMASK, &raw const set, std::ptr::null_mut()) };
        if self.new_session {
            rustix::process::setsid()?;
        }
        rustix::process::set_parent_process_death_signal(self.on_parent_death)?;
        self.network.map_or(Ok(()), join_network)?;
        unshare(self.unshare)
    }
}

fn join_network(fd: RawFd) -> io::Result<()> {
    // SAFETY: changes the calling thread's network namespace, or fails; memory and descriptors stay.
    if unsafe { libc::setns(fd, libc::CLONE_NEWNET) } == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// The network interface that has an address.
pub fn interface_of(ip: IpAddr) -> Option<String> {
    let mut list = std::ptr::null_mut();
    // SAFETY: a place for the list.
    if unsafe { libc::getifaddrs(&raw mut list) } != 0 {
        return None;
    }
    let mut found = None;
    let mut next: *const libc::ifaddrs = list;
    // SAFETY: the list is linked, and whole until it is freed below.
    while let Some(entry) = unsafe { next.as_ref() } {
        // SAFETY: NULL or an address of its family's size.
        if unsafe { address_of(entry.ifa_addr) } == Some(ip) {
            // SAFETY: a name that lasts as long as the list.
            let name = unsafe { CStr::from_ptr(entry.ifa_name) };
            found = name.to_str().ok().map(str::to_owned);
        }
        next = entry.ifa_next;
    }
    // SAFETY: made by getifaddrs, and not used any more.
    unsafe { libc::freeifaddrs(list) };
    found
}

/// # Safety
/// `address` is NULL or a socket address of its family's size.
unsafe fn address_of(address: *const libc::sockaddr) -> Option<IpAddr> {
    // SAFETY: the caller's promise.
    match i32::from(unsafe { address.as_ref() }?.sa_family) {
        libc::AF_INET => {
            // SAFETY: that family's structure.
            let v4 = unsafe { address.cast::<libc::sockaddr_in>().read_unaligned() };
            Some(v4.sin_addr.s_addr.to_ne_bytes().into())
        }
        libc::AF_INET6 => {
            // SAFETY: that family's structure.
            let v6 = unsafe { address.cast::<libc::sockaddr_in6>().read_unaligned() };
            Some(v6.sin6_addr.s6_addr.into())
        }
        _ => None,
    }
}

/// Leaves this process's namespaces for new ones.
pub fn unshare(flags: UnshareFlags) -> io::Result<()> {
    if flags.is_empty() {
        return Ok(());
    }
    // SAFETY: only namespace flags are passed, which leave memory, descriptors and handlers alone.
    Ok(unsafe { rustix::thread::unshare_unsafe(flags) }?)
}

/// Exit status of a child as shells give it: 128+n after signal n.
pub fn exit_code(status: std::process::ExitStatus) -> u8 {
    use std::os::unix::process::ExitStatusExt as _;
    let code = status.code().unwrap_or_else(|| 128 + status.signal().unwrap_or(0));
    u8::try_from(code).unwrap_or(u8::MAX)
}

/// A shared library that was opened to look at, by a name or path as dlopen(3) takes it.
pub struct Library(libloading::Library);

impl Library {
    /// An error is the dynamic linker's own words.
    pub fn open(name: &std::ffi::OsStr) -> Result<Self, String> {
        use libloading::os::unix::{Library, RTLD_LOCAL, RTLD_NOW};
        // SAFETY: its initialisers run, as they would in the program that is to use it.
        let opened = unsafe { Library::open(Some(name), RTLD_NOW | RTLD_LOCAL) };
        opened.map(|library| Self(library.into())).map_err(|error| error.to_string())
    }

    /// The file that has `symbol`, if the library exports it.
    pub fn file_of(&self, symbol: &str) -> Option<std::path::PathBuf> {
        // SAFETY: only the address is used.
        let address = unsafe { self.0.get::<*const libc::c_void>(symbol.as_bytes()) }.ok()?;
        // SAFETY: plain data, for which zero is valid.
        let mut info: libc::Dl_info = unsafe { std::mem::zeroed() };
        // SAFETY: an address in an open library, and a structure to fill.
        let found = unsafe { libc::dladdr(*address, &raw mut info) };
        if found == 0 || info.dli_fname.is_null() {
            return None;
        }
        // SAFETY: a string of the dynamic linker's, as long as the library is open.
        let name = unsafe { CStr::from_ptr(info.dli_fname) };
        let name: &std::ffi::OsStr = std::os::unix::ffi::OsStrExt::from_bytes(name.to_bytes());
        Some(name.into())
    }
}
