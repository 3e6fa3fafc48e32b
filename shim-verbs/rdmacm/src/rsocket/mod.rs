//! rsockets: sockets over RDMA, with the calls of `<rdma/rsocket.h>`. An unmodified program gets here through
//! librspreload.so.
//!
//! A socket is a number, options, and one of two bodies: `stream` (bytes over a reliable connection) or `datagram`
//! (messages over UD). Bodies never wait; `wait` does, for one socket or for many beside other descriptors, and `service`
//! is the thread that answers for listeners. `api`, `data`, `options` and `polling` are the C boundary. What a peer can
//! write is copied out once, then judged: nonsense ends that connection.

mod api;
mod cm;
mod completions;
mod data;
mod datagram;
mod iomap;
mod options;
mod polling;
mod preload;
mod region;
mod service;
mod socket;
mod stream;
mod table;
mod wait;

pub use api::*;
pub use data::*;
pub use iomap::*;
pub use options::{rfcntl, rgetsockopt, rsetsockopt};
pub use polling::*;
pub use table::forget;
