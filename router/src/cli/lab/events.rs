//! What the inner process waits for: signals, and the ends of the router and the commands.

use std::process::{Child, ExitStatus};
use std::sync::mpsc::Sender;

use rustix::process::Signal;

#[derive(Debug)]
pub enum Event {
    Signal(Signal),
    Ended(Watched, ExitStatus),
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Watched {
    Router,
    /// A command, by its place in the list.
    Run(usize),
}

/// Reports the end of `child`.
pub fn watch(mut child: Child, what: Watched, events: Sender<Event>) {
    std::thread::spawn(move || {
        if let Ok(status) = child.wait() {
            // Nobody listens any more when the lab is ending.
            events.send(Event::Ended(what, status)).ok();
        }
    });
}
