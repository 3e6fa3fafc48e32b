//! One file for each version of the interface: the structure that NCCL looks up by name.

mod v10;
mod v11;
mod v12;
mod v6;
mod v7;
mod v8;
mod v9;

/// The plugin's name, which NCCL_NET selects.
const NAME: *const std::ffi::c_char = c"FreeFlow".as_ptr();
