//! The connection to the router: where it is, and one request at a time on it.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::Mutex;

use rustix::io::Errno;

use crate::ctl::{self, Hello, HelloReply, Request, Socket, SocketError};
use crate::error::{Error, Result};

use super::fork;

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
    rpc: Mutex<Socket>,
    birth: fork::Birth,
    /// What the router said at the start.
    pub hello: HelloReply,
}

/// A fresh connection: the event socket and the other descriptors of the reply come apart.
#[derive(Debug)]
pub struct Opened {
    pub conn: Conn,
    pub events: Socket,
    pub fds: std::vec::IntoIter<OwnedFd>,
}

impl Conn {
    /// Connects to the first router that answers.
    pub fn open(purpose: u32) -> Result<Opened> {
        let mut last = None;
        for path in socket_candidates() {
            match Socket::connect(&path) {
                Ok(socket) => return Self::hello(socket, purpose),
                Err(errno) => last = Some(Error::NoRouter { socket: path.display().to_string(), errno }),
            }
        }
        Err(last.unwrap_or(Error::Invalid("no router socket to try")))
    }

    fn hello(socket: Socket, purpose: u32) -> Result<Opened> {
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
        let conn = Conn { rpc: Mutex::new(socket), birth: fork::Birth::now(), hello };
        Ok(Opened { conn, events: Socket::new(events), fds })
    }

    /// Is this the copy a forked child has of its parent's connection? Nothing made over it is the child's to touch.
    pub fn is_inherited(&self) -> bool {
        self.birth.is_inherited()
    }

    /// One request, one reply.
    pub fn call<T: Request>(&self, request: &T, fds: &[BorrowedFd<'_>]) -> Result<(T::Reply, Vec<OwnedFd>)> {
        if self.is_inherited() {
            return Err(Error::Disconnected("the context belongs to the parent process".into()));
        }
        let socket = self.rpc.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        socket.call(request, fds).map_err(|e| refused(T::NAME, e))
    }

    /// One request without descriptors.
    pub fn ask<T: Request>(&self, request: &T) -> Result<T::Reply> {
        Ok(self.call(request, &[])?.0)
    }
}

impl Drop for Conn {
    fn drop(&mut self) {
        let socket = self.rpc.get_mut().unwrap_or_else(std::sync::PoisonError::into_inner);
        fork::forget(socket.as_fd());
    }
}

fn refused(request: &'static str, error: SocketError) -> Error {
    match error {
        SocketError::Refused(errno) => Error::Refused { request, errno },
        SocketError::System(what, errno) if errno == Errno::INTR => Error::System { what, errno },
        other => Error::Disconnected(format!("{request}: {other}")),
    }
}
