//! Links: how queue pairs of this host reach those of other hosts.
//!
//! Built is `tcp`: a few connections per pair of hosts, on which the messages of `wire` travel, over the streams of
//! [`crate::cluster`]. docs/link.md says how it works and what another link must do. From the outside a link is [`Links`].

mod alive;
mod clock;
mod conn;
mod endpoint;
mod engine;
mod groups;
mod habit;
mod hold;
#[cfg(any(test, fuzzing))]
pub mod hostile;
mod hosts;
mod inbound;
mod meeting;
pub mod memory;
mod outbound;
#[cfg(test)]
mod pair;
mod place;
mod priority;
mod remote;
mod requester;
mod responder;
#[cfg(any(test, fuzzing))]
mod testing;
#[cfg(test)]
mod tests;
mod thread;
pub mod wire;
mod words;

pub use thread::Links;
