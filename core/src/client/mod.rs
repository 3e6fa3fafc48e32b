//! client
pub mod mem;
