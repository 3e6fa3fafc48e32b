//! A byte stream between two routers, after the handshake: TLS or the bare socket, with one set of rules.
//!
//! It never blocks: what cannot be done now is WouldBlock. With TLS, bytes may wait on either side of the session: [`Stream::wants_write`]
//! says that ciphertext waits for the socket (poll for OUT, then flush), [`Stream::has_buffered`] that plaintext is here
//! which no poll shows. It must never know what the bytes mean.

use std::io::{self, IoSlice, Read, Write};
use std::net::TcpStream;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;

use rustls::Connection;
use rustls::pki_types::CertificateDer;

/// Ciphertext that may wait for the socket before a write says WouldBlock.
const BUFFER: usize = 256 << 10;

#[derive(Debug)]
pub struct Stream {
    tcp: TcpStream,
    tls: Option<Box<Connection>>,
    peer: Arc<str>,
    /// Plaintext that the session holds.
    buffered: usize,
}

impl Stream {
    pub(crate) fn plain(tcp: TcpStream, peer: Arc<str>) -> Self {
        Stream { tcp, tls: None, peer, buffered: 0 }
    }

    pub(super) fn tls(tcp: TcpStream, mut session: Connection, peer: Arc<str>) -> Self {
        session.set_buffer_limit(Some(BUFFER));
        Stream { tcp, tls: Some(Box::new(session)), peer, buffered: 0 }
    }

    pub(super) fn set_peer(&mut self, peer: Arc<str>) {
        self.peer = peer;
    }

    /// The other host's name: certified with TLS, claimed without.
    pub fn peer(&self) -> &Arc<str> {
        &self.peer
    }

    /// The socket itself, where nothing is between it and the bytes.
    pub fn as_plain(&self) -> Option<BorrowedFd<'_>> {
        self.tls.is_none().then(|| self.tcp.as_fd())
    }

    pub fn socket(&self) -> &TcpStream {
        &self.tcp
    }

    pub fn wants_write(&self) -> bool {
        self.tls.as_ref().is_some_and(|tls| tls.wants_write())
    }

    pub fn has_buffered(&self) -> bool {
        self.buffered > 0
    }

    pub(super) fn handshake(&mut self) -> io::Result<()> {
        let Some(tls) = &mut self.tls else { return Ok(()) };
        while tls.is_handshaking() {
            tls.complete_io(&mut self.tcp)?;
        }
        // The last flight of the handshake.
        while tls.wants_write() {
            tls.write_tls(&mut self.tcp)?;
        }
        Ok(())
    }

    pub(super) fn certificate(&self) -> Option<&CertificateDer<'static>> {
        self.tls.as_ref()?.peer_certificates()?.first()
    }

    /// Says goodbye, so that the other side knows that nothing was cut off.
    pub fn close(&mut self) {
        if let Some(tls) = &mut self.tls {
            tls.send_close_notify();
            // A peer that is gone does not hear it.
            let _ = self.flush();
        }
        let _ = self.tcp.shutdown(std::net::Shutdown::Write);
    }
}

/// Takes what the socket has into the session.
fn take_in(tls: &mut Connection, tcp: &mut TcpStream) -> io::Result<usize> {
    let read = tls.read_tls(tcp)?;
    let state = tls.process_new_packets();
    if state.is_err() {
        // The alert that says why; the peer may be gone.
        let _ = tls.write_tls(tcp);
    }
    state.map_err(|e| io::Error::new(io::ErrorKind::InvalidData, e))?;
    Ok(read)
}

impl Read for Stream {
    fn read(&mut self, to: &mut [u8]) -> io::Result<usize> {
        let Some(tls) = &mut self.tls else { return self.tcp.read(to) };
        loop {
            match tls.reader().read(to) {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                read => {
                    let state = tls.process_new_packets();
                    self.buffered = state.map_or(0, |state| state.plaintext_bytes_to_read());
                    return read;
                }
            }
            take_in(tls, &mut self.tcp)?;
        }
    }
}

impl Stream {
    /// Gives the socket what it takes; true when nothing waits any more.
    fn drain(&mut self) -> io::Result<bool> {
        let Some(tls) = &mut self.tls else { return Ok(true) };
        while tls.wants_write() {
            match tls.write_tls(&mut self.tcp) {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(false),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
                Ok(_) => {}
            }
        }
        Ok(true)
    }
}

impl Write for Stream {
    fn write(&mut self, from: &[u8]) -> io::Result<usize> {
        self.write_vectored(&[IoSlice::new(from)])
    }

    fn write_vectored(&mut self, from: &[IoSlice<'_>]) -> io::Result<usize> {
        let Some(tls) = &mut self.tls else { return self.tcp.write_vectored(from) };
        let taken = tls.writer().write_vectored(from)?;
        let drained = self.drain()?;
        if taken > 0 || from.iter().all(|part| part.is_empty()) {
            return Ok(taken);
        }
        if !drained {
            return Err(io::ErrorKind::WouldBlock.into());
        }
        match &mut self.tls {
            Some(tls) => tls.writer().write_vectored(from),
            None => Ok(0),
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        if self.drain()? { Ok(()) } else { Err(io::ErrorKind::WouldBlock.into()) }
    }
}

impl AsFd for Stream {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.tcp.as_fd()
    }
}
