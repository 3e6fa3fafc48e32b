//! The accepting side: a listener makes comms that can receive, any number of them, one step whenever accept() is called.

use std::collections::hash_map::RandomState;
use std::hash::{BuildHasher as _, Hasher as _};
use std::sync::Arc;

use freeflow_core::client::CmId;
use freeflow_core::ctl::cm::{CmNext, cm_event};
use freeflow_core::error::Error;
use freeflow_core::verbs::Gid;

use crate::connect::Greeting;
use crate::device::{Device, Style};
use crate::fault::{Fault, Result};
use crate::handle::Handle;
use crate::link::{Link, Peer};
use crate::recv::Receiver;
use crate::slots::{Arrivals, Exposed};

/// Connections that may wait to be accepted: as many as the router allows.
const BACKLOG: u32 = 0;

/// A listen comm.
#[derive(Debug)]
pub struct Listener {
    device: Arc<Device>,
    style: Style,
    id: CmId,
    nonce: u64,
    /// Answered, and not yet confirmed.
    pending: Option<Box<Answered>>,
}

#[derive(Debug)]
struct Answered {
    link: Link,
    arrivals: Exposed<Arrivals>,
}

impl Listener {
    pub fn new(device: &Arc<Device>, style: Style) -> Result<(Self, Handle)> {
        let (id, port) = match device.cm()?.listen(BACKLOG) {
            Err(Error::Disconnected(_) | Error::Away(_)) => {
                // The router was there before, and may be there again.
                device.forget_cm();
                device.cm()?.listen(BACKLOG)?
            }
            other => other?,
        };
        let nonce = RandomState::new().build_hasher().finish();
        let handle = Handle { vip: device.gid(), port, nonce };
        Ok((Listener { device: Arc::clone(device), style, id, nonce, pending: None }, handle))
    }

    pub fn device(&self) -> &Arc<Device> {
        &self.device
    }

    /// One call of accept(): a comm, or None while there is none.
    pub fn accept(&mut self) -> Result<Option<Receiver>> {
        while self.pending.is_none() {
            let Some(event) = self.id.next()? else { return Ok(None) };
            if event.kind == cm_event::CONNECT_REQUEST {
                self.pending = self.answer(&event)?;
            }
        }
        self.confirmed()
    }

    /// None: the request was not for this listener, and is turned down by dropping its id.
    fn answer(&self, event: &CmNext) -> Result<Option<Box<Answered>>> {
        let id = self.id.requested(event);
        let Some(greeting) = Greeting::decode(&event.data).filter(|greeting| greeting.nonce == self.nonce)
        else {
            return Ok(None);
        };
        let (socket, arrivals) = (Receiver::socket(&self.device)?, Exposed::new(&self.device.pd)?);
        let params = socket.params();
        let peer = Peer { gid: Gid(event.gid), qpn: event.params.qpn, memory: greeting.memory };
        let link = socket.connect(&self.device, id, &peer, self.style)?;
        link.id()?.accept(params, Greeting { nonce: self.nonce, memory: arrivals.remote() }.encode())?;
        Ok(Some(Box::new(Answered { link, arrivals })))
    }

    /// The connecting side must have its QP ready before anything is written to it.
    fn confirmed(&mut self) -> Result<Option<Receiver>> {
        let Some(pending) = self.pending.take() else { return Ok(None) };
        match pending.link.id()?.next()? {
            None => {
                self.pending = Some(pending);
                Ok(None)
            }
            Some(event) if event.kind == cm_event::ESTABLISHED => {
                let Answered { link, arrivals } = *pending;
                Ok(Some(Receiver::new(link, arrivals)))
            }
            Some(event) => {
                let (kind, status) = (event.kind, event.status);
                Err(Fault::remote(format!(
                    "accept: the connecting side gave up (event {kind}, status {status})"
                )))
            }
        }
    }
}
