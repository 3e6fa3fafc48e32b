//! Streams: bytes in order over a reliable connection, by RDMA WRITE and credits. `window` keeps the books, `hello` and
//! `mapping` are what lies on the wire, `conn` posts, and `socket` is what a program sees.

pub mod conn;
mod hello;
mod mapping;
pub mod socket;
mod window;
