//! What stands for the RDMA device outside the libraries: /dev/infiniband/uverbs0 and /sys/class/infiniband, in a mount
//! namespace of the program's own. Some programs (UCX's verbs transports, rdma-core's tests) skip a device without them.
//!
//! Two ways lead here: `freeflow run` makes the namespace itself, and containers are shown the files by a hook of their
//! runtime. Neither ever keeps a program from running: verbs themselves need none of this.

mod files;
mod hook;
mod mounts;

use std::net::IpAddr;
use std::path::Path;

use freeflow_core::ctl::{self, Hello, purpose};
use freeflow_core::verbs::{Gid, device};

use super::failure::{Context as _, Result};
use super::sys;

pub use hook::{Args as HookArgs, COMMAND as HOOK_COMMAND, main as hook_main, oci_hook};

/// What the device's node is: it can be opened, and whatever is written to it fails, as nothing here speaks the kernel's
/// side of verbs.
pub const NODE_SOURCE: &str = "/dev/full";
/// The interface whose addresses lead to the device of every container.
const LOOPBACK: &str = "lo";

/// Where programs look for the device's node.
pub fn node() -> String {
    format!("/dev/infiniband/{}", device::NODE)
}

/// The device as a program's files describe it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Nic {
    gid: Gid,
    /// The interface that has the device's address.
    interface: Option<String>,
}

impl Nic {
    /// The device that the router at `socket` gives to who connects there.
    fn at(socket: &Path) -> Result<Self> {
        let connection = ctl::Socket::connect(socket).context("no router answers")?;
        let hello = Hello { min_version: ctl::VERSION, max_version: ctl::VERSION, purpose: purpose::CM };
        let (reply, _) = connection.call(&hello, &[]).context("the router turns this process away")?;
        Ok(Self::of(Gid(reply.vip).ip(), None))
    }

    /// The device with that address. Its interface is looked up, unless it is named because it will come later.
    fn of(vip: IpAddr, interface: Option<String>) -> Self {
        Self { gid: Gid::of(vip), interface: interface.or_else(|| sys::interface_of(vip)) }
    }

    /// An interface whose addresses lead to the device.
    fn behind(&self) -> &str {
        self.interface.as_deref().unwrap_or(LOOPBACK)
    }
}

/// Gives this process, which must have one thread, a view of /dev and /sys that has the device of `socket` in it.
pub fn enter(socket: &Path) -> Result<()> {
    let nic = Nic::at(socket)?;
    let root = Path::new("/");
    if mounts::is_shown(root, &nic) {
        return Ok(());
    }
    mounts::own_namespace()?;
    mounts::show_device(root, &nic).context("cannot add to /sys/class")?;
    mounts::show_node(root).context("cannot add to /dev")
}

/// Whether programs that look for the device's files find them here.
pub fn is_present() -> bool {
    Path::new(&node()).exists() && Path::new("/sys/class/infiniband").join(device::NAME).exists()
}
