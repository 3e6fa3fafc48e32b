//! The connection to the router: where it is, one request at a time on it, and a new one when the router was restarted.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use rustix::io::Errno;
use rustix::net::sockopt::{Timeout, set_socket_timeout};

use crate::ctl::{self, Hello, HelloReply, Resume, Socket, SocketError};
use crate::error::{Error, Result};

use super::fork;
use super::ledger::{Away, Ledger, Record};

/// How long a request waits for a router that is away. A restart takes a fraction of it.
const PATIENCE: Duration = Duration::from_secs(5);
/// A new router that does not answer for so long is no better than none.
const ANSWER: Duration = Duration::from_secs(2);

/// Candidates for the router's socket, first match wins. Never empty.
pub fn socket_candidates() -> Vec<PathBuf> {
    if let Some(named) = std::env::var_os("FREEFLOW_SOCKET").filter(|v| !v.is_empty()) {
        return vec![named.into()];
    }
    let mut paths = vec![PathBuf::from("/run/freeflow/router.sock")];
    if let Some(dir) = std::env::var_os("XDG_RUNTIME_DIR").filter(|v| !v.is_empty()) {
        paths.push(Path::new(&dir).join("freeflow/router.sock"));
    }
    paths
}

/// The router's end of a context or connection manager.
#[derive(Debug)]
pub struct Conn {
    line: Mutex<Line>,
    /// The line is up again, or never will be.
    back: Condvar,
    path: PathBuf,
    birth: fork::Birth,
    /// What the first router said at the start; what matters of it stays so.
    pub hello: HelloReply,
}

#[derive(Debug)]
struct Line {
    state: State,
    ledger: Ledger,
    /// The MR table that the first router made: the others get to see it.
    table: Option<OwnedFd>,
}

#[derive(Debug)]
enum State {
    Up(Socket),
    /// Somebody looks for a new router.
    Away,
    /// The new one does not take us.
    Over,
}

/// A fresh connection: the event socket and the other descriptors of the reply come apart.
#[derive(Debug)]
pub struct Opened {
    pub conn: Conn,
    pub events: Socket,
    pub fds: std::vec::IntoIter<OwnedFd>,
}

/// What came of looking for a new router.
#[derive(Debug)]
pub enum Return {
    /// There is none yet.
    NotYet,
    /// It knows everything again, but for the queue pairs of these numbers.
    Back { events: Socket, lost: Vec<u32> },
    /// It does not take us.
    Over,
}

impl Conn {
    /// Connects to the first router that answers.
    pub fn open(purpose: u32) -> Result<Opened> {
        let mut last = None;
        for path in socket_candidates() {
            match Socket::connect(&path) {
                Ok(socket) => return Self::hello(socket, path, purpose),
                Err(errno) => last = Some(Error::NoRouter { socket: path.display().to_string(), errno }),
            }
        }
        Err(last.unwrap_or(Error::Invalid("no router socket to try")))
    }

    fn hello(socket: Socket, path: PathBuf, purpose: u32) -> Result<Opened> {
        let hello = Hello { min_version: ctl::VERSION, max_version: ctl::VERSION, purpose };
        let (hello, fds) = socket.call(&hello, &[]).map_err(|e| refused("Hello", e))?;
        if hello.version != ctl::VERSION {
            return Err(Error::Version { router: hello.version, ours: ctl::VERSION });
        }
        let mut fds = fds.into_iter();
        let events =
            fds.next().ok_or_else(|| Error::Disconnected("no event socket came with Hello".into()))?;
        fork::neutralize_in_child(socket.as_fd());
        fork::neutralize_in_child(events.as_fd());
        let line = Line { state: State::Up(socket), ledger: Ledger::default(), table: None };
        let (line, back) = (Mutex::new(line), Condvar::new());
        let conn = Conn { line, back, path, birth: fork::Birth::now(), hello };
        Ok(Opened { conn, events: Socket::new(events), fds })
    }

    /// A later router is to see this table of memory regions.
    pub fn keep_table(&self, table: OwnedFd) {
        self.lock().table = Some(table);
    }

    /// Is this the copy a forked child has of its parent's connection? Nothing made over it is the child's to touch.
    pub fn is_inherited(&self) -> bool {
        self.birth.is_inherited()
    }

    /// Is there a router, as far as is known?
    pub(super) fn is_up(&self) -> bool {
        matches!(self.lock().state, State::Up(_))
    }

    fn lock(&self) -> MutexGuard<'_, Line> {
        self.line.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// One request, one reply.
    pub(super) fn call<T: Record>(
        &self,
        request: &T,
        fds: &[BorrowedFd<'_>],
    ) -> Result<(T::Reply, Vec<OwnedFd>)> {
        if self.is_inherited() {
            return Err(Error::Disconnected("the context belongs to the parent process".into()));
        }
        let mut line = self.lock();
        let patience = if T::AWAY == Away::Wait { PATIENCE } else { Duration::ZERO };
        loop {
            let answer = match &line.state {
                State::Up(socket) => socket.call(request, fds),
                State::Away | State::Over => Err(SocketError::Closed),
            };
            match answer {
                Ok((reply, got)) => {
                    request.record(&reply, fds, &got, &mut line.ledger);
                    return Ok((reply, got));
                }
                Err(error) if is_end(&error) => line.hang_up(),
                Err(error) => return Err(refused(T::NAME, error)),
            }
            // The next router does not know of the request: it is made again.
            let away = |line: &mut Line| matches!(line.state, State::Away);
            let waited = self.back.wait_timeout_while(line, patience, away);
            line = waited.unwrap_or_else(PoisonError::into_inner).0;
            match line.state {
                State::Up(_) => continue,
                State::Away | State::Over => request.missed(&mut line.ledger),
            }
            return Err(line.state.error(T::NAME));
        }
    }

    /// One request without descriptors.
    pub(super) fn ask<T: Record>(&self, request: &T) -> Result<T::Reply> {
        Ok(self.call(request, &[])?.0)
    }

    /// The router hung up: from now on [`Conn::look_for_router`] is asked again and again.
    pub(super) fn lose_router(&self) {
        self.lock().hang_up();
    }

    /// Looks whether a router is there again; if so, tells it everything that its predecessor knew.
    pub(super) fn look_for_router(&self) -> Return {
        let mut line = self.lock();
        let Ok(socket) = Socket::connect(&self.path) else { return Return::NotYet };
        match self.resume(&line, &socket) {
            Ok((events, lost)) => {
                fork::neutralize_in_child(socket.as_fd());
                fork::neutralize_in_child(events.as_fd());
                line.state = State::Up(socket);
                self.back.notify_all();
                Return::Back { events, lost }
            }
            Err(SocketError::Refused(_)) => {
                line.state = State::Over;
                self.back.notify_all();
                Return::Over
            }
            // It ended again, or does not answer.
            Err(_) => Return::NotYet,
        }
    }

    fn resume(&self, line: &Line, socket: &Socket) -> std::result::Result<(Socket, Vec<u32>), SocketError> {
        let limit = |limit| {
            set_socket_timeout(socket, Timeout::Recv, limit).map_err(|e| SocketError::System("timeout", e))
        };
        let table = line.table.as_ref().ok_or(SocketError::Refused(Errno::BADF))?;
        let (client, proof) = (self.hello.client, self.hello.proof);
        let resume = Resume { min_version: ctl::VERSION, max_version: ctl::VERSION, client, proof };
        limit(Some(ANSWER))?;
        let (_, fds) = socket.call(&resume, &[table.as_fd()]).map_err(|error| match error {
            // An attempt that broke off is not over for the router yet.
            SocketError::Refused(Errno::BUSY) => SocketError::Closed,
            error => error,
        })?;
        let events = fds.into_iter().next().ok_or(SocketError::Malformed("no event socket"))?;
        let lost = line.ledger.replay(socket)?;
        limit(None)?;
        Ok((Socket::new(events), lost))
    }
}

impl State {
    /// Why a request fails.
    fn error(&self, request: &'static str) -> Error {
        match self {
            State::Up(_) | State::Away => Error::Away(request),
            State::Over => {
                Error::Disconnected(format!("{request}: another router that does not know this process"))
            }
        }
    }
}

impl Line {
    fn hang_up(&mut self) {
        if let State::Up(socket) = &self.state {
            fork::forget(socket.as_fd());
            self.state = State::Away;
        }
    }
}

impl Drop for Conn {
    fn drop(&mut self) {
        self.line.get_mut().unwrap_or_else(PoisonError::into_inner).hang_up();
    }
}

fn is_end(error: &SocketError) -> bool {
    match error {
        SocketError::Closed => true,
        SocketError::System(_, errno) => matches!(*errno, Errno::PIPE | Errno::CONNRESET | Errno::NOTCONN),
        _ => false,
    }
}

fn refused(request: &'static str, error: SocketError) -> Error {
    match error {
        SocketError::Refused(errno) => Error::Refused { request, errno },
        SocketError::System(what, errno) if errno == Errno::INTR => Error::System { what, errno },
        other => Error::Disconnected(format!("{request}: {other}")),
    }
}
