//! A container's listening socket: its file, its thread, and the end of both.
//!
//! Owns socket files. Which container a connection belongs to is decided here, by the socket it came through, and
//! nowhere else.

use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::{FileTypeExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::Duration;

use freeflow_core::ctl::Socket;
use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd};
use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;
use rustix::net::sockopt::{Timeout, set_socket_timeout};
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType};

use crate::session;
use crate::shared::Shared;

/// Stack of a session's thread: one message and little else.
const STACK: usize = 256 << 10;
/// A client that takes no reply for so long is cut off.
const SEND_TIMEOUT: Duration = Duration::from_secs(5);

#[derive(Debug, thiserror::Error)]
pub enum ListenError {
    #[error("a router answers on {} already", .0.display())]
    Running(PathBuf),
    #[error("cannot serve {}: another router serves in that directory, which has room for one", .0.display())]
    Taken(PathBuf),
    #[error("{} is in the way: it is not a socket", .0.display())]
    InTheWay(PathBuf),
    #[error("cannot listen on {}: {what}: {errno}", path.display())]
    System { path: PathBuf, what: &'static str, errno: Errno },
}

/// A socket file that is removed with its owner, if it is still the same file.
#[derive(Debug)]
pub struct SocketFile {
    path: PathBuf,
    /// Keeps the inode's number from being given to another file.
    held: OwnedFd,
}

impl SocketFile {
    fn hold(path: &Path) -> Result<Self, Errno> {
        let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let held = rustix::fs::open(path, flags, Mode::empty())?;
        Ok(SocketFile { path: path.to_owned(), held })
    }

    fn is_still_there(&self) -> bool {
        let held = rustix::fs::fstat(&self.held);
        let found = rustix::fs::lstat(&self.path);
        held.is_ok_and(|h| found.is_ok_and(|f| (f.st_dev, f.st_ino) == (h.st_dev, h.st_ino)))
    }
}

impl Drop for SocketFile {
    fn drop(&mut self) {
        if self.is_still_there() {
            // Nothing can be done about a file that cannot be removed; the next router will find it stale.
            let _ = std::fs::remove_file(&self.path);
        }
    }
}

fn errno(error: &std::io::Error) -> Errno {
    Errno::from_io_error(error).unwrap_or(Errno::IO)
}

/// Makes way at `path`: removes a socket nobody answers on.
fn clear_stale(path: &Path) -> Result<(), ListenError> {
    let failed = |what, errno| ListenError::System { path: path.to_owned(), what, errno };
    let Ok(metadata) = std::fs::symlink_metadata(path) else { return Ok(()) };
    if !metadata.file_type().is_socket() {
        return Err(ListenError::InTheWay(path.to_owned()));
    }
    match Socket::connect(path) {
        // EPROTOTYPE: a stream socket that somebody listens on.
        Ok(_) | Err(Errno::PROTOTYPE) => Err(ListenError::Running(path.to_owned())),
        Err(Errno::CONNREFUSED | Errno::NOENT) => match std::fs::remove_file(path) {
            Err(e) if e.kind() != std::io::ErrorKind::NotFound => {
                Err(failed("remove stale socket", errno(&e)))
            }
            _ => Ok(()),
        },
        Err(errno) => Err(failed("connect to the socket that is there", errno)),
    }
}

/// Listens at `path`; the file gets `mode`.
pub fn listen(path: &Path, kind: SocketType, mode: u32) -> Result<(OwnedFd, SocketFile), ListenError> {
    let failed = |what| move |errno| ListenError::System { path: path.to_owned(), what, errno };
    clear_stale(path)?;
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let fd = rustix::net::socket_with(AddressFamily::UNIX, kind, flags, None).map_err(failed("socket"))?;
    let address = SocketAddrUnix::new(path).map_err(failed("address"))?;
    rustix::net::bind(&fd, &address).map_err(failed("bind"))?;
    let file = SocketFile::hold(path).map_err(failed("hold the socket file"))?;
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(mode))
        .map_err(|e| failed("chmod")(errno(&e)))?;
    rustix::net::listen(&fd, 128).map_err(failed("listen"))?;
    Ok((fd, file))
}

/// Something that all waiting threads see once and for ever.
#[derive(Debug)]
pub struct Stop(OwnedFd);

impl Stop {
    pub fn new() -> Result<Self, Errno> {
        Ok(Stop(eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?))
    }

    pub fn set(&self) {
        // The counter never gets near its end, so this cannot fail.
        let _ = rustix::io::write(&self.0, &1u64.to_ne_bytes());
    }

    /// Waits until `fd` is readable (true) or the stop is set (false).
    pub fn wait(&self, fd: impl AsFd, limit: Option<Duration>) -> Result<bool, Errno> {
        let limit = limit.and_then(|d| Timespec::try_from(d).ok());
        loop {
            let mut fds = [PollFd::new(&fd, PollFlags::IN), PollFd::new(&self.0, PollFlags::IN)];
            match rustix::event::poll(&mut fds, limit.as_ref()) {
                Err(Errno::INTR) => continue,
                Err(errno) => return Err(errno),
                Ok(_) => return Ok(fds[1].revents().is_empty()),
            }
        }
    }

    /// Waits for the stop alone, at most `limit`: how a loop that failed takes a breath. False: stopped.
    fn breathe(&self, limit: Duration) -> bool {
        let limit = Timespec::try_from(limit).ok();
        let mut fds = [PollFd::new(&self.0, PollFlags::IN)];
        rustix::event::poll(&mut fds, limit.as_ref()).is_ok_and(|ready| ready == 0)
    }
}

/// Accepts until stopped; `take` gets each connection.
pub fn accept_loop(fd: &OwnedFd, stop: &Stop, mut take: impl FnMut(OwnedFd)) {
    while stop.wait(fd, None) == Ok(true) {
        match rustix::net::accept_with(fd, SocketFlags::CLOEXEC) {
            Ok(connection) => take(connection),
            Err(Errno::AGAIN | Errno::INTR | Errno::CONNABORTED) => {}
            Err(errno) => {
                // Out of descriptors or memory: others may give some back.
                tracing::warn!("cannot accept a connection: {errno}");
                if !stop.breathe(Duration::from_millis(100)) {
                    return;
                }
            }
        }
    }
}

/// The listener of one container.
#[derive(Debug)]
pub struct Listener {
    stop: Arc<Stop>,
    thread: Option<JoinHandle<()>>,
    _file: SocketFile,
}

impl Listener {
    /// Listens at `path` for processes of `container`.
    pub fn start(shared: &Arc<Shared>, container: u32, path: &Path, mode: u32) -> Result<Self, ListenError> {
        let failed = |what| move |errno| ListenError::System { path: path.to_owned(), what, errno };
        let (fd, file) = listen(path, SocketType::SEQPACKET, mode)?;
        let stop = Arc::new(Stop::new().map_err(failed("eventfd"))?);
        let (shared, stopped) = (shared.clone(), stop.clone());
        let run = move || accept_loop(&fd, &stopped, |connection| admit(&shared, container, connection));
        let thread =
            std::thread::Builder::new().name(format!("listen-{container}")).stack_size(STACK).spawn(run);
        let thread = Some(thread.map_err(|e| failed("thread")(errno(&e)))?);
        Ok(Listener { stop, thread, _file: file })
    }
}

impl Drop for Listener {
    fn drop(&mut self) {
        self.stop.set();
        if let Some(thread) = self.thread.take() {
            // It ends by itself; a panic in it was printed where it happened.
            let _ = thread.join();
        }
    }
}

/// Starts a session for a connection, if the container may have one more.
fn admit(shared: &Arc<Shared>, container: u32, connection: OwnedFd) {
    if let Err(errno) = set_socket_timeout(&connection, Timeout::Send, Some(SEND_TIMEOUT)) {
        return tracing::warn!("cannot set up a connection: {errno}");
    }
    let socket = Arc::new(Socket::new(connection));
    let id = match shared.with(|state| state.admit(container, socket.clone())) {
        Ok(id) => id,
        Err(refusal) => return shared.log(container, || format!("connection refused: {refusal}")),
    };
    let worker = shared.clone();
    let serve = move || session::serve(&worker, id, container, socket);
    let thread =
        std::thread::Builder::new().name(format!("client-{container}")).stack_size(STACK).spawn(serve);
    if let Err(error) = thread {
        shared.with(|state| state.dismiss(id));
        tracing::warn!("cannot start a thread for a connection: {error}");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn scratch(name: &str) -> PathBuf {
        let dir = std::env::temp_dir().join(format!("ff-listen-{}-{name}", std::process::id()));
        std::fs::create_dir_all(&dir).expect("scratch directory");
        dir
    }

    #[test]
    fn a_stale_socket_gives_way_a_live_one_and_a_file_do_not() {
        let dir = scratch("stale");
        let path = dir.join("s.sock");
        for kind in [SocketType::SEQPACKET, SocketType::STREAM] {
            let (fd, file) = listen(&path, kind, 0o600).expect("free");
            assert!(matches!(listen(&path, kind, 0o600), Err(ListenError::Running(_))), "{kind:?}");
            drop(fd);
            let (_fd, file2) = listen(&path, kind, 0o600).expect("stale");
            drop(file);
            assert!(path.exists(), "the file is the second one's now");
            drop(file2);
            assert!(!path.exists());
        }
        std::fs::write(&path, "x").expect("write");
        assert!(matches!(listen(&path, SocketType::STREAM, 0o600), Err(ListenError::InTheWay(_))));
        std::fs::remove_dir_all(dir).expect("remove scratch");
    }

    #[test]
    fn a_path_that_is_too_long_is_an_error() {
        let path = std::env::temp_dir().join("x".repeat(120));
        assert!(matches!(
            listen(&path, SocketType::STREAM, 0o600),
            Err(ListenError::System { what: "address", .. })
        ));
    }
}
