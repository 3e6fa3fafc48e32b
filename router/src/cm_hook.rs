//! Where sessions meet the connection manager: one service per router, and the directory it asks.
//!
//! Lock order: the connection manager's lock, then the state's. Nothing here is called with the state locked.

use std::sync::{Arc, Weak};

use freeflow_core::ctl::{Incoming, RawGid, SocketError};
use freeflow_core::verbs::Gid;

use crate::cm::{Directory, FarOutput, Home, HostName, Service};
use crate::session::Session;
use crate::shared::Shared;
use crate::state::Owner;

/// The containers of this host as the connection manager may see them: its asker's tenant alone.
struct Host(Weak<Shared>);

impl Directory for Host {
    fn locate(&self, from: &Home, addr: &RawGid) -> Option<Home> {
        if Gid(*addr).ip().is_loopback() {
            return Some(from.clone());
        }
        let shared = self.0.upgrade()?;
        let ip = Gid(*addr).ip();
        let here = shared.with(|state| {
            let container = state.directory.find(&from.tenant, ip)?;
            let vip = state.containers.get(&container)?.vip;
            Some(Home { tenant: from.tenant.clone(), vip: Gid::of(vip).0 })
        });
        let far = || shared.cluster.get()?.hosts.find(&from.tenant, ip);
        here.or_else(|| {
            far().map(|_| Home { tenant: from.tenant.clone(), vip: Gid::of(ip.to_canonical()).0 })
        })
    }

    fn host(&self, home: &Home) -> Option<HostName> {
        let shared = self.0.upgrade()?;
        let ip = Gid(home.vip).ip();
        if shared.with(|state| state.directory.find(&home.tenant, ip).is_some()) {
            return None;
        }
        Some(shared.cluster.get()?.hosts.find(&home.tenant, ip)?.name.clone())
    }
}

/// Starts the router's connection manager.
pub fn start(shared: &Arc<Shared>) -> std::io::Result<Service> {
    // Which free ports come first need not be secret, only different from one router to the next.
    let links = Arc::downgrade(shared);
    let post = Box::new(move |message: &FarOutput| {
        if let Some(links) = links.upgrade().as_ref().and_then(|shared| shared.links.get()) {
            links.send_cm(&message.host, &message.bytes);
        }
    });
    Service::start(Box::new(Host(Arc::downgrade(shared))), shared.boot as u16, post)
}

fn home(shared: &Shared, container: u32) -> Option<Home> {
    shared.with(|state| {
        let c = state.containers.get(&container)?;
        Some(Home { tenant: c.tenant.clone(), vip: Gid::of(c.vip).0 })
    })
}

/// A connection with purpose CM said hello.
pub fn join(shared: &Shared, owner: Owner) {
    if let (Some(cm), Some(home)) = (shared.cm.get(), home(shared, owner.container)) {
        cm.join(owner.client, home);
    }
}

/// A client is gone.
pub fn leave(shared: &Shared, client: u32) {
    shared.cm.get().into_iter().for_each(|cm| cm.leave(client));
}

/// Answers a connection manager's request; false if it is none.
pub fn handle(session: &Session, message: &Incoming) -> Result<bool, SocketError> {
    match session.shared.cm.get() {
        Some(cm) => cm.handle(session.owner.client, message, &session.socket),
        None => Ok(false),
    }
}

/// Ports on which a container listens.
pub fn ports(shared: &Shared, container: u32) -> Vec<u16> {
    let home = home(shared, container);
    shared.cm.get().zip(home).map_or(vec![], |(cm, home)| cm.cm_ports(&home))
}
