//! Drop-in librdmacm.so.1: the connection manager's front door.
//!
//! Owns the C ABI of `rdma_cma.h`: ids, event channels and events as programs see them, and the QP transitions that
//! the real library makes for them. Ports, listeners and handshakes are the router's; it is asked by the messages of
//! `freeflow_core::ctl::cm` on a connection of this library's own. Verbs are called through libibverbs' public API
//! only, found at first use. There is no thread here: a channel's descriptor is a socket the router writes to.

mod address;
mod channel;
mod connect;
mod device;
mod edge;
mod endpoint;
mod event;
mod id;
mod info;
mod modify;
mod multicast;
mod options;
mod queues;
mod resolve;
mod rsocket;
mod session;
mod verbs;

include!(concat!(env!("OUT_DIR"), "/trampolines.rs"));
