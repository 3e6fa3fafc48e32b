//! The C types and constants of `<infiniband/verbs.h>` and `<rdma/rdma_cma.h>` that both libraries share.
//!
//! Owns layouts, nothing else: no function, no policy, no link to any C library. `bindings.rs` is made by
//! `regenerate.sh` from Debian's rdma-core 44 headers and checked in, with bindgen's layout assertions, so that
//! building needs neither headers nor libclang. What the headers write as macros is spelled out here.
#![no_std]

#[allow(non_camel_case_types, non_upper_case_globals, non_snake_case, dead_code, unused_imports)]
#[allow(
    clippy::all,
    clippy::undocumented_unsafe_blocks,
    clippy::multiple_unsafe_ops_per_block,
    unnecessary_transmutes
)]
mod bindings;
mod macros;

pub use bindings::*;
pub use macros::*;
