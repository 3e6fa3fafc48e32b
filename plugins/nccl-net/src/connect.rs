//! The connecting side: from a handle to a comm that can send, one step whenever connect() is called.

use std::collections::HashMap;
use std::sync::{Arc, PoisonError};
use std::time::{Duration, Instant};

use freeflow_core::client::CmId;
use freeflow_core::ctl::cm::{CmData, CmNext, cm_data, cm_event, cm_reason};
use freeflow_core::error::Error;
use freeflow_core::verbs::Gid;

use crate::device::{Device, Style};
use crate::fault::{Fault, Result};
use crate::handle::{self, Handle};
use crate::link::{Peer, Socket};
use crate::send::Sender;
use crate::slots::{Exposed, Postings, Remote};

/// What both sides tell each other: a number (the listener's nonce) and where to write.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Greeting {
    pub nonce: u64,
    pub memory: Remote,
}

impl Greeting {
    const LEN: usize = 20;

    pub fn encode(&self) -> CmData {
        let mut bytes = [0; Self::LEN];
        bytes[..8].copy_from_slice(&self.nonce.to_le_bytes());
        bytes[8..16].copy_from_slice(&self.memory.addr.to_le_bytes());
        bytes[16..].copy_from_slice(&self.memory.rkey.to_le_bytes());
        CmData::new(&bytes, cm_data::REQUEST).unwrap_or_default()
    }

    pub fn decode(data: &CmData) -> Option<Self> {
        let bytes = data.bytes().get(..Self::LEN)?;
        let nonce = u64::from_le_bytes(bytes[..8].try_into().ok()?);
        let addr = u64::from_le_bytes(bytes[8..16].try_into().ok()?);
        let rkey = u32::from_le_bytes(bytes[16..].try_into().ok()?);
        Some(Greeting { nonce, memory: Remote { addr, rkey } })
    }
}

/// Of a connection that nobody has asked for this long nobody will: it was aborted. (If somebody does, it begins anew.)
const FORGOTTEN: Duration = Duration::from_secs(60);

/// A connection on its way. It does not hold the device, which holds it.
#[derive(Debug)]
struct Connecting {
    handle: Handle,
    style: Style,
    id: CmId,
    /// What the listener was told of.
    asked: Option<(Socket, Exposed<Postings>)>,
    /// When connect() was last called for it.
    wanted: Instant,
}

/// Those of a device, by the number in their handles.
#[derive(Debug, Default)]
pub struct Pending {
    last: u64,
    connections: HashMap<u64, Connecting>,
}

impl Pending {
    /// Keeps it until the next call; returns its number.
    fn park(&mut self, connecting: Connecting) -> u64 {
        self.connections.retain(|_, other| other.wanted.elapsed() < FORGOTTEN);
        self.last += 1;
        self.connections.insert(self.last, connecting);
        self.last
    }
}

/// One call of connect(): a comm, or None while it is being made.
pub fn connect(device: &Arc<Device>, bytes: &mut [u8; handle::LEN], style: Style) -> Result<Option<Sender>> {
    let name = Handle::decode(bytes).ok_or_else(|| Fault::usage("connect: no handle of this plugin"))?;
    let token = handle::token(bytes);
    // Taken out while it is worked on: another thread's connections do not wait.
    let known = device.pending.lock().unwrap_or_else(PoisonError::into_inner).connections.remove(&token);
    let connecting = match known {
        Some(known) if known.handle == name => known,
        _ => Connecting::begin(device, name, style)?,
    };
    handle::set_token(bytes, 0);
    match connecting.step(device)? {
        Step::Connected(sender) => Ok(Some(*sender)),
        Step::Waits(connecting) => {
            let mut pending = device.pending.lock().unwrap_or_else(PoisonError::into_inner);
            handle::set_token(bytes, pending.park(connecting));
            Ok(None)
        }
    }
}

enum Step {
    Waits(Connecting),
    Connected(Box<Sender>),
}

impl Connecting {
    fn begin(device: &Arc<Device>, handle: Handle, style: Style) -> Result<Self> {
        let id = resolve(device, &handle)?;
        Ok(Connecting { handle, style, id, asked: None, wanted: Instant::now() })
    }

    /// Does all that can be done now.
    fn step(mut self, device: &Arc<Device>) -> Result<Step> {
        self.wanted = Instant::now();
        while let Some(event) = self.id.next()? {
            match event.kind {
                cm_event::ADDR_RESOLVED => self.id.resolve_route()?,
                cm_event::ROUTE_RESOLVED => self.ask(device)?,
                cm_event::CONNECT_RESPONSE => return self.answered(device, &event),
                // The listener is there and has not looked yet: TCP would let us wait, too.
                cm_event::UNREACHABLE => self.id = resolve(device, &self.handle)?,
                cm_event::REJECTED => return Err(self.rejected(event.status)),
                kind => {
                    let why = format!("connection manager event {kind}, status {}", event.status);
                    return Err(self.failed(why));
                }
            }
        }
        Ok(Step::Waits(self))
    }

    fn ask(&mut self, device: &Device) -> Result<()> {
        let (socket, postings) = match self.asked.take() {
            Some(asked) => asked,
            None => (Sender::socket(device)?, Exposed::new(&device.pd)?),
        };
        let greeting = Greeting { nonce: self.handle.nonce, memory: postings.remote() };
        self.id.connect(socket.params(), greeting.encode())?;
        self.asked = Some((socket, postings));
        Ok(())
    }

    fn answered(mut self, device: &Arc<Device>, event: &CmNext) -> Result<Step> {
        let greeting = Greeting::decode(&event.data).filter(|greeting| greeting.nonce == self.handle.nonce);
        let (Some(greeting), Some((socket, postings))) = (greeting, self.asked.take()) else {
            return Err(self.failed("an answer that makes no sense".into()));
        };
        let peer = Peer { gid: Gid(event.gid), qpn: event.params.qpn, memory: greeting.memory };
        let link = socket.connect(device, self.id, &peer, self.style)?;
        link.id()?.establish()?;
        Ok(Step::Connected(Box::new(Sender::new(link, postings, self.style))))
    }

    fn rejected(&self, reason: i32) -> Fault {
        match u32::try_from(reason) {
            Ok(cm_reason::INVALID_SERVICE_ID) => self.failed("nobody listens there any more".into()),
            _ => self.failed(format!("the listener turned it down (reason {reason})")),
        }
    }

    fn failed(&self, why: String) -> Fault {
        let Handle { vip, port, .. } = self.handle;
        Fault::remote(format!("connect to {} port {port}: {why}", vip.ip()))
    }
}

/// Begins at the router; over a new line to it if the old one is broken.
fn resolve(device: &Device, handle: &Handle) -> Result<CmId> {
    match device.cm()?.resolve(handle.vip, handle.port) {
        Err(Error::Disconnected(_) | Error::Away(_)) => {
            device.forget_cm();
            Ok(device.cm()?.resolve(handle.vip, handle.port)?)
        }
        other => Ok(other?),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_greeting_fits_into_a_request() {
        let greeting =
            Greeting { nonce: 1 << 63, memory: Remote { addr: 0x7f00_0000_1000, rkey: 0xdead_0001 } };
        assert_eq!(Greeting::decode(&greeting.encode()), Some(greeting));
        assert_eq!(Greeting::decode(&CmData::new(&[0; 19], 56).unwrap_or_default()), None);
    }
}
