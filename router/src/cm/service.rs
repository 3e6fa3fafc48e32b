//! The connection manager at work: the sockets of its channels, one clock, one lock.
//!
//! Owns the sending ends of the channels' sockets. What the requests mean is [`Manager`]'s business.

use std::collections::HashMap;
use std::os::fd::AsFd;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use freeflow_core::ctl::cm::*;
use freeflow_core::ctl::{Done, Id, Incoming, Socket, SocketError};
use rustix::io::Errno;
use rustix::net::SendFlags;
use zerocopy::IntoBytes;

use super::{Answer, Call, Directory, FarOutput, Home, HostName, Input, Manager, Output};

/// The router's end of a channel.
#[derive(Debug)]
struct Channel {
    socket: Socket,
    /// Tickets that found the socket full. While there are any the socket is readable, so its owner will fetch
    /// events, and each fetch tries again.
    owed: u32,
}

impl Channel {
    fn pay(&mut self, channel: u32) {
        while self.owed > 0 && self.socket.send_event(&CmTicket { channel }).is_ok() {
            self.owed -= 1;
        }
    }
}

struct Inner {
    manager: Manager,
    channels: HashMap<u32, Channel>,
    ended: bool,
    post: Post,
}

impl std::fmt::Debug for Inner {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Inner")
            .field("manager", &self.manager)
            .field("channels", &self.channels.len())
            .finish()
    }
}

#[derive(Debug)]
struct Shared {
    inner: Mutex<Inner>,
    /// Told whenever the nearest deadline may have changed, and at the end.
    timer: Condvar,
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Runs `work` under the lock; wakes the timer thread if it has to look at another deadline now.
    fn run<T>(&self, work: impl FnOnce(&mut Inner) -> T) -> T {
        let mut inner = self.lock();
        let before = inner.manager.deadline();
        let result = work(&mut inner);
        if inner.manager.deadline() != before {
            self.timer.notify_one();
        }
        result
    }
}

/// The one connection manager of a router. Its timer thread ends with it.
#[derive(Debug)]
pub struct Service(Arc<Shared>);

/// How messages get to other hosts' managers. It must not wait.
pub type Post = Box<dyn Fn(&FarOutput) + Send>;

impl Drop for Service {
    fn drop(&mut self) {
        self.0.lock().ended = true;
        self.0.timer.notify_one();
    }
}

impl Service {
    /// Starts the service and the thread that keeps its time. `seed` decides which free ports come first.
    pub fn start(directory: Box<dyn Directory>, seed: u16, post: Post) -> std::io::Result<Self> {
        let manager = Manager::new(directory, seed);
        let inner = Mutex::new(Inner { manager, channels: HashMap::new(), ended: false, post });
        let shared = Arc::new(Shared { inner, timer: Condvar::new() });
        let service = Service(Arc::clone(&shared));
        std::thread::Builder::new().name("cm-timer".into()).spawn(move || keep_time(&shared))?;
        Ok(service)
    }

    /// A connection with purpose CM has said hello.
    pub fn join(&self, client: u32, home: Home) {
        self.0.lock().process(Input::Join { client, home });
    }

    /// It is gone.
    pub fn leave(&self, client: u32) {
        self.0.run(|inner| inner.process(Input::Leave { client }));
    }

    /// Another host's manager says something.
    pub fn far(&self, host: HostName, bytes: Vec<u8>) {
        self.0.run(|inner| inner.process(Input::Far { host, bytes }));
    }

    /// Another host's manager is gone.
    pub fn host_gone(&self, host: HostName) {
        self.0.run(|inner| inner.process(Input::HostGone { host }));
    }

    /// Ports of a container that have a listener, for `container ls`.
    pub fn cm_ports(&self, home: &Home) -> Vec<u16> {
        self.0.lock().manager.ports(home)
    }

    /// Answers `message` on `socket` if it is a cm request; `Ok(false)` if it is none.
    pub fn handle(&self, client: u32, message: &Incoming, socket: &Socket) -> Result<bool, SocketError> {
        let call = match Call::parse(message) {
            None => return Ok(false),
            Some(call) => call?,
        };
        let kind = call.kind();
        let (answer, socket_end) = self.0.run(|inner| inner.answer(client, call));
        match answer {
            // Without waiting, here and below: who does not read its replies has no more room for one.
            Err(errno) => socket.send(kind, errno.raw_os_error(), &[], &[], SendFlags::DONTWAIT)?,
            Ok(answer) => reply(socket, kind, answer, socket_end.as_ref())?,
        }
        Ok(true)
    }
}

/// Sends `answer` as a reply of `kind`; `end` is the client's end of a new channel.
fn reply(socket: &Socket, kind: u16, answer: Answer, end: Option<&Socket>) -> Result<(), SocketError> {
    let fds: Vec<_> = end.iter().map(|end| end.as_fd()).collect();
    let send = |body: &[u8]| socket.send(kind, 0, body, &fds, SendFlags::DONTWAIT);
    match answer {
        Answer::Done => send(Done::default().as_bytes()),
        Answer::Id(id) | Answer::Channel(id) => send(Id { id, ..Id::default() }.as_bytes()),
        Answer::Dropped { dropped, .. } => send(dropped.as_bytes()),
        Answer::Addr(addr) => send(addr.as_bytes()),
        Answer::Next { event, .. } => send(event.as_bytes()),
    }
}

impl Inner {
    /// Runs an input and does what it asks for; the caller sends the answer.
    fn process(&mut self, input: Input) -> Output {
        let output = self.manager.process(input, Instant::now());
        for channel in &output.tickets {
            if let Some(found) = self.channels.get_mut(channel) {
                found.owed += 1;
                found.pay(*channel);
            }
        }
        for channel in &output.closed {
            self.channels.remove(channel);
        }
        output.far.iter().for_each(|message| (self.post)(message));
        output
    }

    fn answer(&mut self, client: u32, call: Call) -> (Result<Answer, Errno>, Option<Socket>) {
        // A channel needs its sockets before it exists.
        let pair = match call {
            Call::OpenChannel(_) => match Socket::pair() {
                Ok(pair) => Some(pair),
                Err(errno) => return (Err(errno), None),
            },
            _ => None,
        };
        let output = self.process(Input::Call { client, call });
        let mut answer = output.answer.unwrap_or(Err(Errno::INVAL));
        match (&mut answer, pair) {
            (Ok(Answer::Channel(channel)), Some((socket, end))) => {
                self.channels.insert(*channel, Channel { socket, owed: 0 });
                return (answer, Some(end));
            }
            (Ok(Answer::Dropped { channel, dropped }), _) => {
                // Tickets that were never sent need not be taken out by the caller.
                if let Some(found) = self.channels.get_mut(channel) {
                    let unsent = found.owed.min(dropped.events);
                    found.owed -= unsent;
                    dropped.events -= unsent;
                }
            }
            (Ok(Answer::Next { channel, .. }), _) => {
                if let Some(found) = self.channels.get_mut(channel) {
                    found.pay(*channel);
                }
            }
            _ => {}
        }
        (answer, None)
    }
}

/// Wakes at each deadline of the manager until the service is gone.
fn keep_time(shared: &Shared) {
    let mut inner = shared.lock();
    while !inner.ended {
        let now = Instant::now();
        inner = match inner.manager.deadline() {
            Some(deadline) if deadline <= now => {
                inner.process(Input::Tick);
                inner
            }
            Some(deadline) => {
                let waited = shared.timer.wait_timeout(inner, deadline - now);
                waited.unwrap_or_else(PoisonError::into_inner).0
            }
            None => shared.timer.wait(inner).unwrap_or_else(PoisonError::into_inner),
        };
    }
}
