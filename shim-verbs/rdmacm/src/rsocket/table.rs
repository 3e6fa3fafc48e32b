//! The sockets of this process by number.
//!
//! A forked child starts with none: the parent's queue pairs are not its own.

use std::collections::HashMap;
use std::os::fd::RawFd;
use std::sync::atomic::{AtomicPtr, Ordering};
use std::sync::{Arc, OnceLock, PoisonError, RwLock};

use super::service::Service;
use super::socket::Socket;
use crate::edge::{Errno, Result};

/// What this process has.
#[derive(Debug, Default)]
struct Process {
    sockets: RwLock<HashMap<RawFd, Arc<Socket>>>,
    service: OnceLock<Service>,
}

/// Never freed: a thread may be using it while another one forks.
static CURRENT: AtomicPtr<Process> = AtomicPtr::new(std::ptr::null_mut());

fn process() -> &'static Process {
    let current = CURRENT.load(Ordering::Acquire);
    // SAFETY: NULL or a process's sockets; those are never freed.
    if let Some(process) = unsafe { current.as_ref() } {
        return process;
    }
    let fresh = Box::into_raw(Box::<Process>::default());
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
    let mut sockets = process().sockets.write().unwrap_or_else(PoisonError::into_inner);
    sockets.insert(number, Arc::clone(socket));
    Ok(number)
}

pub fn remove(number: RawFd) -> Result<Arc<Socket>> {
    let mut sockets = process().sockets.write().unwrap_or_else(PoisonError::into_inner);
    sockets.remove(&number).ok_or(Errno::BADF)
}

/// The socket of that number.
pub fn find(number: RawFd) -> Result<Arc<Socket>> {
    let sockets = process().sockets.read().unwrap_or_else(PoisonError::into_inner);
    sockets.get(&number).cloned().ok_or(Errno::BADF)
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
