//! The sockets of this process by number.
//!
//! A forked child starts with none: the parent's queue pairs are not its own. No lock is taken: a program may leave any call for
//! good by longjmp(3), and one that held a lock of all sockets would take them all along.

use std::os::fd::RawFd;
use std::sync::atomic::{AtomicPtr, Ordering};
use std::sync::{Arc, OnceLock};

use arc_swap::ArcSwapOption;

use super::service::Service;
use super::socket::Socket;
use crate::edge::{Errno, Result};

/// Descriptors of one page, and pages: 2^20, the most that Linux gives a process unless fs.nr_open was raised.
const PAGE: usize = 1024;
const PAGES: usize = 1024;

type Page = [ArcSwapOption<Socket>; PAGE];

/// What this process has.
#[derive(Debug)]
struct Process {
    pages: [OnceLock<Box<Page>>; PAGES],
    service: OnceLock<Service>,
}

impl Process {
    fn new() -> Box<Self> {
        Box::new(Process { pages: [const { OnceLock::new() }; PAGES], service: OnceLock::new() })
    }

    /// Where the socket of that number is, if any has been near it.
    fn place(&self, number: RawFd) -> Option<&ArcSwapOption<Socket>> {
        let number = usize::try_from(number).ok()?;
        Some(&self.pages.get(number / PAGE)?.get()?[number % PAGE])
    }

    fn make_place(&self, number: RawFd) -> Option<&ArcSwapOption<Socket>> {
        let page = self.pages.get(usize::try_from(number).ok()? / PAGE)?;
        page.get_or_init(|| Box::new([const { ArcSwapOption::const_empty() }; PAGE]));
        self.place(number)
    }
}

/// Never freed: a thread may be using it while another one forks.
static CURRENT: AtomicPtr<Process> = AtomicPtr::new(std::ptr::null_mut());

fn process() -> &'static Process {
    let current = CURRENT.load(Ordering::Acquire);
    // SAFETY: NULL or a process's sockets; those are never freed.
    if let Some(process) = unsafe { current.as_ref() } {
        return process;
    }
    let fresh = Box::into_raw(Process::new());
    // Pairs with the Acquire above: whoever sees the pointer sees the tables.
    match CURRENT.compare_exchange(current, fresh, Ordering::AcqRel, Ordering::Acquire) {
        // SAFETY: never freed once it is current.
        Ok(_) => unsafe { &*fresh },
        Err(winner) => {
            // SAFETY: made by Box::into_raw above and seen by nobody else.
            drop(unsafe { Box::from_raw(fresh) });
            // SAFETY: never freed once it is current.
            unsafe { &*winner }
        }
    }
}

/// In a forked child: the parent's sockets are left as they are, for ever.
pub fn forget() {
    CURRENT.store(std::ptr::null_mut(), Ordering::Release);
}

/// Gives the program a socket; says by which number.
pub fn add(socket: &Arc<Socket>) -> Result<RawFd> {
    let number = socket.number()?;
    let place = process().make_place(number).ok_or(Errno::MFILE)?;
    place.store(Some(Arc::clone(socket)));
    Ok(number)
}

pub fn remove(number: RawFd) -> Result<Arc<Socket>> {
    process().place(number).and_then(|place| place.swap(None)).ok_or(Errno::BADF)
}

/// The socket of that number.
pub fn find(number: RawFd) -> Result<Arc<Socket>> {
    process().place(number).and_then(ArcSwapOption::load_full).ok_or(Errno::BADF)
}

/// The thread that answers for this process's sockets, started when first needed.
pub fn service() -> Result<&'static Service> {
    let process = process();
    match process.service.get() {
        Some(service) => Ok(service),
        // A second one that loses the race ends at once.
        None => Service::start().map(|fresh| process.service.get_or_init(|| fresh)),
    }
}
