//! The transport's two devices: one leads to the peers of this host, one to those of other hosts.
//!
//! UCX asks an interface, not an endpoint, how fast it is and how long its messages are. So each kind of peer has an interface with
//! figures of its own, and is reachable by that one only. An interface that was opened without the other (a program of UCT, or
//! UCX_NET_DEVICES) serves all peers.

use std::ffi::{CStr, c_uint};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use crate::wire::reach;

/// `UCT_DEVICE_TYPE_NET`, `UCS_SYS_DEVICE_ID_UNKNOWN`.
const DEVICE_NET: c_uint = 0;
const ANY_SYS_DEVICE: u8 = u8::MAX;
const NAME_MAX: usize = 32;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Device {
    /// Leads to this host. Its name is the one that verbs programs know, with its port.
    Here,
    /// Leads to other hosts.
    Far,
}

impl Device {
    pub const ALL: [Device; 2] = [Device::Here, Device::Far];

    pub fn name(self) -> &'static CStr {
        match self {
            Device::Here => c"ff0:1",
            Device::Far => c"ff0:net",
        }
    }

    pub fn named(name: &CStr) -> Option<Self> {
        Device::ALL.into_iter().find(|device| device.name() == name)
    }
}

/// `uct_tl_device_resource_t`.
#[repr(C)]
pub struct Resource {
    name: [u8; NAME_MAX],
    kind: c_uint,
    sys_device: u8,
}

const _: () = assert!(size_of::<Resource>() == 40);

impl Resource {
    pub fn of(device: Device) -> Self {
        let mut name = [0; NAME_MAX];
        let bytes = device.name().to_bytes();
        name[..bytes.len()].copy_from_slice(bytes);
        Resource { name, kind: DEVICE_NET, sys_device: ANY_SYS_DEVICE }
    }
}

/// How many interfaces of a memory domain are open on each device.
#[derive(Debug, Default)]
pub struct Opened([AtomicU32; 2]);

impl Opened {
    fn has_both(&self) -> bool {
        self.0.iter().all(|count| count.load(Ordering::Relaxed) > 0)
    }
}

/// An interface on a device, counted while it is there.
#[derive(Debug)]
pub struct Presence {
    pub device: Device,
    opened: Arc<Opened>,
}

impl Presence {
    pub fn new(device: Device, opened: &Arc<Opened>) -> Self {
        opened.0[device as usize].fetch_add(1, Ordering::Relaxed);
        Presence { device, opened: Arc::clone(opened) }
    }

    /// Which peers it is for, as addresses say it.
    pub fn reach(&self) -> u32 {
        match self.device {
            _ if !self.opened.has_both() => reach::ALL,
            Device::Here => reach::HERE,
            Device::Far => reach::FAR,
        }
    }
}

impl Drop for Presence {
    fn drop(&mut self) {
        self.opened.0[self.device as usize].fetch_sub(1, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_is_alone_serves_all() {
        let opened = Arc::default();
        let here = Presence::new(Device::Here, &opened);
        assert_eq!(here.reach(), reach::ALL);
        let far = Presence::new(Device::Far, &opened);
        assert_eq!((here.reach(), far.reach()), (reach::HERE, reach::FAR));
        drop(here);
        assert_eq!(far.reach(), reach::ALL);
    }

    #[test]
    fn devices_have_names_of_their_own() {
        for device in Device::ALL {
            assert_eq!(Device::named(device.name()), Some(device));
        }
        assert_eq!(Device::named(c"mlx5_0:1"), None);
    }
}
