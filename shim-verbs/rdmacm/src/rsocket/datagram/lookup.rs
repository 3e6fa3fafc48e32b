//! From an address to a queue pair: one question to the socket that is bound there.

use std::os::fd::RawFd;

use freeflow_core::ctl::cm::CmAddr;
use freeflow_verbs_abi::*;

use super::ports::Ports;
use crate::address;
use crate::connect;
use crate::edge::{Errno, Result};
use crate::id::field;
use crate::resolve;
use crate::rsocket::cm::{Cm, Event};
use crate::verbs::{Verbs, verbs};

/// Where messages go.
#[derive(Debug)]
pub struct Dest {
    verbs: &'static Verbs,
    ah: *mut ibv_ah,
    pub qpn: u32,
    pub qkey: u32,
    /// The address of ours that the peer knows us by.
    pub source: [u8; 16],
}

// SAFETY: the handle belongs to this value alone; who has it may use it from any thread.
unsafe impl Send for Dest {}

impl Dest {
    fn new(ports: &Ports, event: &Event, source: [u8; 16]) -> Result<Dest> {
        let (mut attr, qpn, qkey) = event.ud.ok_or(Errno::PROTO)?;
        let verbs = verbs()?;
        Ok(Dest { verbs, ah: verbs.create_ah(ports.pd(), &mut attr)?, qpn, qkey, source })
    }

    /// Valid as long as this value lives.
    pub fn ah(&self) -> *mut ibv_ah {
        self.ah
    }
}

impl Drop for Dest {
    fn drop(&mut self) {
        self.verbs.destroy_ah(self.ah);
    }
}

/// A question on its way.
#[derive(Debug)]
pub struct Lookup(Cm);

impl Lookup {
    pub fn begin(to: CmAddr) -> Result<Lookup> {
        let cm = Cm::create(RDMA_PS_UDP, IBV_QPT_UD)?;
        resolve::resolve_addr(cm.id(), None, to)?;
        Ok(Lookup(cm))
    }

    /// Readable when [`Lookup::progress`] has something to do.
    pub fn fd(&self) -> RawFd {
        self.0.fd()
    }

    /// The answer, once there is one.
    pub fn progress(&mut self, ports: Option<&Ports>) -> Option<Result<Dest>> {
        loop {
            let event = match self.0.next() {
                Ok(None) => return None,
                Ok(Some(event)) => event,
                Err(errno) => return Some(Err(errno)),
            };
            let next = match event.kind {
                RDMA_CM_EVENT_ADDR_RESOLVED => resolve::resolve_route(self.0.id()),
                RDMA_CM_EVENT_ROUTE_RESOLVED => self.ask(),
                RDMA_CM_EVENT_ESTABLISHED => {
                    return Some(self.answered(ports, &event));
                }
                RDMA_CM_EVENT_ADDR_ERROR => Err(Errno::HOSTUNREACH),
                _ => Err(Errno::CONNREFUSED),
            };
            if let Err(errno) = next {
                return Some(Err(errno));
            }
        }
    }

    fn answered(&self, ports: Option<&Ports>, event: &Event) -> Result<Dest> {
        let storage = field!(self.0.id(), route.addr.__bindgen_anon_1.src_storage);
        // SAFETY: a whole sockaddr_storage.
        let source = unsafe { address::read((&raw const storage).cast()) }?;
        Dest::new(ports.ok_or(Errno::NOTCONN)?, event, source.addr)
    }

    fn ask(&self) -> Result<()> {
        // SAFETY: integers and a pointer, for which zero is valid.
        let param: rdma_conn_param = unsafe { std::mem::zeroed() };
        connect::connect(self.0.id(), Some(&param))
    }
}
