//! A SEQPACKET socket that carries messages: the only code that sees raw packets and raw ancillary data.

use std::io::{IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::io::Errno;
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, recvmsg, sendmsg,
};
use zerocopy::{FromBytes, IntoBytes};

use super::{Body, Event, Header, MAGIC, MAX_BODY, MAX_FDS, Request, VERSION};

/// What went wrong on a control socket.
#[derive(Debug, Clone, thiserror::Error)]
pub enum SocketError {
    #[error("the other side hung up")]
    Closed,
    #[error("{0}: {1}")]
    System(&'static str, Errno),
    #[error("malformed message: {0}")]
    Malformed(&'static str),
    #[error("refused: {0}")]
    Refused(Errno),
}

/// One message as it came in: header checked against the packet, body not yet judged.
#[derive(Debug)]
pub struct Incoming {
    pub header: Header,
    body: [u8; MAX_BODY],
    /// Descriptors that came along.
    pub fds: Vec<OwnedFd>,
}

impl Incoming {
    /// The bytes after the header.
    pub fn bytes(&self) -> &[u8] {
        &self.body[..self.header.len as usize]
    }

    /// The body as `T`, if its size is exactly T's.
    pub fn body<T: Body>(&self) -> Result<T, SocketError> {
        T::read_from_bytes(self.bytes())
            .map_err(|_| SocketError::Malformed("body size does not match its kind"))
    }

    /// The request of type `T`: size and number of fds are exactly what it declares.
    pub fn request<T: Request>(&self) -> Result<T, SocketError> {
        if self.fds.len() != T::FDS {
            return Err(SocketError::Malformed("number of descriptors does not match the request"));
        }
        self.body()
    }

    /// The event of type `T`, if it is one.
    pub fn event<T: Event>(&self) -> Option<T> {
        (self.header.kind == T::KIND).then(|| self.body().ok()).flatten()
    }
}

/// A connected control or event socket.
#[derive(Debug)]
pub struct Socket(OwnedFd);

impl Socket {
    /// Takes a connected SOCK_SEQPACKET socket.
    pub fn new(fd: OwnedFd) -> Self {
        Socket(fd)
    }

    /// Connects to the router listening at `path`.
    pub fn connect(path: &std::path::Path) -> Result<Self, Errno> {
        use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType, connect, socket_with};
        let fd = socket_with(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None)?;
        connect(&fd, &SocketAddrUnix::new(path)?)?;
        Ok(Socket(fd))
    }

    /// A connected pair.
    pub fn pair() -> Result<(Self, Self), Errno> {
        use rustix::net::{AddressFamily, SocketFlags, SocketType, socketpair};
        let (a, b) = socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None)?;
        Ok((Socket(a), Socket(b)))
    }

    /// Sends one message.
    pub fn send(
        &self,
        kind: u16,
        status: i32,
        body: &[u8],
        fds: &[BorrowedFd<'_>],
        flags: SendFlags,
    ) -> Result<(), SocketError> {
        assert!(body.len() <= MAX_BODY && fds.len() <= MAX_FDS, "message larger than the protocol allows");
        let header = Header { magic: MAGIC, version: VERSION, kind, status, len: body.len() as u32 };
        let parts = [IoSlice::new(header.as_bytes()), IoSlice::new(body)];
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_FDS))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        if !fds.is_empty() {
            control.push(SendAncillaryMessage::ScmRights(fds));
        }
        loop {
            return match sendmsg(&self.0, &parts, &mut control, flags | SendFlags::NOSIGNAL) {
                Ok(_) => Ok(()),
                Err(Errno::INTR) => continue,
                Err(Errno::PIPE | Errno::CONNRESET) => Err(SocketError::Closed),
                Err(e) => Err(SocketError::System("sendmsg", e)),
            };
        }
    }

    /// Sends an event without waiting; a receiver that let its buffer fill up gets an error here.
    pub fn send_event<T: Event>(&self, event: &T) -> Result<(), SocketError> {
        self.send(T::KIND, 0, event.as_bytes(), &[], SendFlags::DONTWAIT)
    }

    /// Answers a request.
    pub fn reply<T: Request>(&self, reply: &T::Reply, fds: &[BorrowedFd<'_>]) -> Result<(), SocketError> {
        self.send(T::KIND, 0, reply.as_bytes(), fds, SendFlags::empty())
    }

    /// Refuses a request.
    pub fn refuse(&self, kind: u16, errno: Errno) -> Result<(), SocketError> {
        self.send(kind, errno.raw_os_error(), &[], &[], SendFlags::empty())
    }

    /// Sends a request and waits for its reply and the reply's descriptors.
    pub fn call<T: Request>(
        &self,
        request: &T,
        fds: &[BorrowedFd<'_>],
    ) -> Result<(T::Reply, Vec<OwnedFd>), SocketError> {
        debug_assert_eq!(fds.len(), T::FDS);
        self.send(T::KIND, 0, request.as_bytes(), fds, SendFlags::empty())?;
        let answer = self.recv(RecvFlags::empty())?;
        if answer.header.kind != T::KIND {
            return Err(SocketError::Malformed("reply of another kind"));
        }
        if answer.header.status != 0 {
            return Err(SocketError::Refused(Errno::from_raw_os_error(answer.header.status)));
        }
        Ok((answer.body()?, answer.fds))
    }

    /// Receives one message: header, fd count and size are checked here, in that order.
    pub fn recv(&self, flags: RecvFlags) -> Result<Incoming, SocketError> {
        let mut header = [0u8; size_of::<Header>()];
        let mut body = [0u8; MAX_BODY];
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_FDS))];
        let mut control = RecvAncillaryBuffer::new(&mut space);
        let got = loop {
            let mut parts = [IoSliceMut::new(&mut header), IoSliceMut::new(&mut body)];
            match recvmsg(&self.0, &mut parts, &mut control, flags | RecvFlags::CMSG_CLOEXEC) {
                Err(Errno::INTR) => continue,
                Err(Errno::CONNRESET) => return Err(SocketError::Closed),
                Err(e) => return Err(SocketError::System("recvmsg", e)),
                Ok(got) => break got,
            }
        };
        let mut fds = Vec::new();
        for message in control.drain() {
            if let RecvAncillaryMessage::ScmRights(rights) = message {
                fds.extend(rights);
            }
        }
        if got.bytes == 0 {
            return Err(SocketError::Closed);
        }
        if got.flags.intersects(ReturnFlags::TRUNC | ReturnFlags::CTRUNC) {
            return Err(SocketError::Malformed("longer than the protocol allows"));
        }
        if got.bytes < header.len() {
            return Err(SocketError::Malformed("shorter than a header"));
        }
        let header = Header::read_from_bytes(&header).map_err(|_| SocketError::Malformed("header"))?;
        if header.magic != MAGIC {
            return Err(SocketError::Malformed("wrong magic"));
        }
        if header.len as usize != got.bytes - size_of::<Header>() {
            return Err(SocketError::Malformed("length field does not match the packet"));
        }
        Ok(Incoming { header, body, fds })
    }
}

impl AsFd for Socket {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}
