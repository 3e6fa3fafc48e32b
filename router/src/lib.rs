//! freeflow: the router daemon and its command line.
pub mod cm;
