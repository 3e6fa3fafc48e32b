//! freeflow: the router daemon and its command line.

pub mod admin;
mod admin_server;
pub mod cluster;
mod cm;
mod cm_hook;
pub mod config;
mod copy;
pub mod daemon;
mod directory;
mod host;
mod identity;
mod limiter;
#[cfg(not(fuzzing))]
mod link;
#[cfg(fuzzing)]
pub mod link;
mod listener;
mod metrics;
mod proof;
mod ps;
mod quota;
mod random;
mod refusal;
mod remembered;
mod requests;
mod session;
mod shared;
mod state;
