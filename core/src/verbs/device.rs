//! What the device says of itself, wherever it is asked: by verbs calls, and by what stands for it in /sys and /dev.

/// The RDMA device's name.
pub const NAME: &str = "ff0";
/// Its character device under /dev/infiniband, which some programs look for, and its entry in /sys/class/infiniband_verbs.
pub const NODE: &str = "uverbs0";
/// Not an IEEE-assigned number, and none that programs have workarounds for.
pub const VENDOR_ID: u32 = 0x00_4646;
pub const VENDOR_PART_ID: u32 = 1;
pub const FIRMWARE: &str = env!("CARGO_PKG_VERSION");
/// Its one port.
pub const PORT: u8 = 1;
/// The default partition, full membership.
pub const PKEY: u16 = 0xffff;
/// Link width and speed: 4X, HDR; 4 x 50 Gbit/s is the order of what shared memory does.
pub const WIDTH: u8 = 2;
pub const SPEED: u8 = 64;
/// The same, as sysfs writes it.
pub const RATE: &str = "200 Gb/sec (4X HDR)";
