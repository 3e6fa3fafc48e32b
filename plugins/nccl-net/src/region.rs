//! Registered memory, and what registering the same range again costs: a look into a table.
//!
//! A comm registers a range once and hands out the same memory region while anybody holds it. An entry whose memory the
//! program has unmapped and mapped anew meanwhile, without deregistering, is dead: it gets a new region. With the last
//! deregistration the region ends for good, because nothing may land in it afterwards, and nobody could tell that the
//! program gave the memory back. Comms do not share regions: each one's key ends with it.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError, Weak};

use freeflow_core::client::{Mr, Pd};
use freeflow_core::error::Error;
use freeflow_core::verbs::Access;
use freeflow_nccl_abi::result;

use crate::fault::{Fault, Result};
use crate::slots::SPACE;

/// What a registration hands out.
#[derive(Debug)]
pub struct Region {
    mr: Arc<Mr>,
    addr: u64,
    len: u64,
    /// May data be received into it?
    writable: bool,
}

impl Region {
    /// The key for `[addr, addr+len)`, if that is inside.
    #[inline]
    pub fn key(&self, addr: u64, len: u64) -> Option<u32> {
        let from = addr.checked_sub(self.addr)?;
        (from <= self.len && len <= self.len - from).then(|| self.mr.key())
    }

    /// The same, to receive into.
    #[inline]
    pub fn writable_key(&self, addr: u64, len: u64) -> Option<u32> {
        self.key(addr, len).filter(|_| self.writable)
    }
}

/// The ranges that a comm has registered.
#[derive(Debug, Default)]
pub struct Regions(Mutex<HashMap<Range, Known>>);

/// Address and length.
type Range = (u64, u64);

#[derive(Debug)]
struct Known {
    mr: Weak<Mr>,
    writable: bool,
}

impl Regions {
    pub fn register(&self, pd: &Arc<Pd>, addr: u64, len: u64) -> Result<Region> {
        if addr.checked_add(len).is_none_or(|end| end > SPACE) {
            return Err(Fault::usage(format!("{len} bytes at {addr:#x} are beyond 48-bit addresses")));
        }
        let mut table = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let known = table.get(&(addr, len)).and_then(|known| Some((known.mr.upgrade()?, known.writable)));
        if let Some((mr, writable)) = known.filter(|(mr, _)| mr.is_still_mapped()) {
            return Ok(Region { mr, addr, len, writable });
        }
        table.retain(|_, known| known.mr.strong_count() > 0);
        let (mr, writable) = register(pd, addr, len)?;
        table.insert((addr, len), Known { mr: Arc::downgrade(&mr), writable });
        Ok(Region { mr, addr, len, writable })
    }
}

/// Memory that is not writable can still be sent from.
fn register(pd: &Arc<Pd>, addr: u64, len: u64) -> Result<(Arc<Mr>, bool)> {
    match pd.reg_mr(addr, len, addr, Access::LOCAL_WRITE | Access::REMOTE_WRITE) {
        Ok(mr) => Ok((mr, true)),
        Err(error) if is_bad_address(&error) => match pd.reg_mr(addr, len, addr, Access::empty()) {
            Ok(mr) => Ok((mr, false)),
            Err(error) if is_bad_address(&error) => {
                Err(Fault { code: result::INVALID_USAGE, text: error.to_string() })
            }
            Err(error) => Err(error.into()),
        },
        Err(error) => Err(error.into()),
    }
}

fn is_bad_address(error: &Error) -> bool {
    error.errno().raw_os_error() == libc::EFAULT
}
