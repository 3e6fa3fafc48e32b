//! Who a router on another host is: TLS 1.3 with certificates on both sides, or plain TCP by the operator's word.
//!
//! Owns the handshake of a connection between routers, and the words for everything that can be wrong with it. When it is
//! done both sides have accepted each other: the accepting side says so in a greeting that the other waits for. It must
//! never know what is said afterwards.

use std::io::{self, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use rustls::crypto::CryptoProvider;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use rustls::server::WebPkiClientVerifier;
use rustls::version::TLS13;
use rustls::{
    AlertDescription, CertificateError, ClientConfig, ClientConnection, Connection, InvalidMessage,
    RootCertStore, ServerConfig, ServerConnection,
};

use super::stream::Stream;

/// A peer that takes longer to say who it is is cut off.
const HANDSHAKE: Duration = Duration::from_secs(5);
/// First words inside TLS, from the accepting side.
const WELCOME: &[u8; 16] = b"freeflow tls 1\r\n";
/// First words of plain TCP, from both sides; then the length of the name, and the name.
const PLAIN: &[u8; 16] = b"freeflow plain1\n";

/// Where the files of a host's identity are.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Files {
    pub ca: PathBuf,
    pub cert: PathBuf,
    pub key: PathBuf,
}

#[derive(Debug, thiserror::Error)]
pub enum SecurityError {
    #[error("cannot use {what} {}: {why}", path.display())]
    File { what: &'static str, path: PathBuf, why: String },
    #[error(
        "the certificate {} is for {found:?}, not for this host's name {wanted:?}: make another (freeflow certs), or set `host`",
        path.display()
    )]
    NotOurs { path: PathBuf, found: Vec<String>, wanted: String },
    #[error("{0:?} cannot be a host's name in a certificate")]
    Name(String),
    #[error("{peer}: {why}")]
    Handshake { peer: SocketAddr, why: String },
}

/// How connections between routers are secured; made once, from the configuration.
#[derive(Debug, Clone)]
pub enum Security {
    Tls {
        client: Arc<ClientConfig>,
        server: Arc<ServerConfig>,
    },
    /// Nothing is: anybody who reaches the port can read, forge, and claim to be any host.
    Plain {
        name: Arc<str>,
    },
}

impl Security {
    /// TLS 1.3 with the identity in `files`, which must be `host`'s.
    pub fn tls(files: &Files, host: &str) -> Result<Self, SecurityError> {
        let roots = Arc::new(roots(&files.ca)?);
        let chain = certificates("the certificate", &files.cert)?;
        check_ours(&chain, &files.cert, host)?;
        let bad = |what, path: &Path, why: &dyn std::fmt::Display| SecurityError::File {
            what,
            path: path.to_owned(),
            why: why.to_string(),
        };
        let key = PrivateKeyDer::from_pem_file(&files.key);
        let key = key.map_err(|e| bad("the private key", &files.key, &pem_words(e)))?;
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let of_pair = |e: rustls::Error| bad("the certificate and key in", &files.cert, &e);
        let client = client_config(&provider, roots.clone(), chain.clone(), key.clone_key());
        let server = server_config(&provider, roots, chain, key).map_err(of_pair)?;
        Ok(Security::Tls { client: Arc::new(client.map_err(of_pair)?), server: Arc::new(server) })
    }

    /// Plain TCP; `host` is what this router calls itself.
    pub fn plain(host: &str) -> Self {
        Security::Plain { name: host.into() }
    }

    /// Makes sure that the router at the other end is `host`'s and accepts us.
    pub fn connect(&self, tcp: TcpStream, host: &str) -> Result<Stream, SecurityError> {
        self.within_limits(tcp, |tcp| match self {
            Security::Tls { client, .. } => {
                let name = ServerName::try_from(host.to_owned());
                let name = name.map_err(|_| Wrong::Words(format!("{host:?} is not a host's name")))?;
                let session = ClientConnection::new(client.clone(), name)?;
                let mut stream = Stream::tls(tcp, session.into(), host.into());
                stream.handshake()?;
                let mut welcome = [0; WELCOME.len()];
                stream.read_exact(&mut welcome)?;
                if welcome != *WELCOME {
                    return Err(Wrong::Words("it speaks TLS, but is no router of this version".into()));
                }
                Ok(stream)
            }
            Security::Plain { name } => {
                let found = exchange_names(&tcp, name)?;
                if found != host {
                    return Err(Wrong::Words(format!("the router there says it is {found:?}, not {host:?}")));
                }
                Ok(Stream::plain(tcp, host.into()))
            }
        })
    }

    /// Finds out whose router connected; [`Stream::peer`] is then its host's name.
    pub fn accept(&self, tcp: TcpStream) -> Result<Stream, SecurityError> {
        self.within_limits(tcp, |tcp| match self {
            Security::Tls { server, .. } => {
                let session = Connection::from(ServerConnection::new(server.clone())?);
                let mut stream = Stream::tls(tcp, session, "".into());
                stream.handshake()?;
                stream.set_peer(certified_name(&stream)?);
                stream.write_all(WELCOME)?;
                stream.flush()?;
                Ok(stream)
            }
            Security::Plain { name } => {
                let found = exchange_names(&tcp, name)?;
                Ok(Stream::plain(tcp, found.into()))
            }
        })
    }

    /// Runs a handshake on a socket that blocks, but not for ever; afterwards it does not block.
    fn within_limits(
        &self,
        tcp: TcpStream,
        handshake: impl FnOnce(TcpStream) -> Result<Stream, Wrong>,
    ) -> Result<Stream, SecurityError> {
        let peer = tcp.peer_addr().unwrap_or(SocketAddr::from(([0, 0, 0, 0], 0)));
        let done = limit(&tcp).map_err(Wrong::from).and_then(|()| handshake(tcp));
        let done = done.and_then(|stream| settle(stream.socket()).map(|()| stream).map_err(Wrong::from));
        done.map_err(|wrong| SecurityError::Handshake { peer, why: self.words(&wrong) })
    }

    fn words(&self, wrong: &Wrong) -> String {
        match (self, wrong) {
            (_, Wrong::Words(words)) => words.clone(),
            (Security::Plain { .. }, Wrong::Io(error)) if error.kind() == io::ErrorKind::InvalidData => {
                format!("{error}; this router is configured for plain TCP (insecure_plain_tcp)")
            }
            (_, Wrong::Io(error)) => match error.get_ref().and_then(|e| e.downcast_ref::<rustls::Error>()) {
                Some(tls) => tls_words(tls),
                None => io_words(error),
            },
            (_, Wrong::Tls(tls)) => tls_words(tls),
        }
    }
}

fn limit(tcp: &TcpStream) -> io::Result<()> {
    tcp.set_nonblocking(false)?;
    tcp.set_read_timeout(Some(HANDSHAKE))?;
    tcp.set_write_timeout(Some(HANDSHAKE))
}

/// How a stream is given to its user.
fn settle(tcp: &TcpStream) -> io::Result<()> {
    tcp.set_read_timeout(None)?;
    tcp.set_write_timeout(None)?;
    tcp.set_nodelay(true)?;
    tcp.set_nonblocking(true)
}

/// What went wrong, before it is put into words.
enum Wrong {
    Words(String),
    Io(io::Error),
    Tls(rustls::Error),
}

impl From<io::Error> for Wrong {
    fn from(error: io::Error) -> Self {
        Wrong::Io(error)
    }
}

impl From<rustls::Error> for Wrong {
    fn from(error: rustls::Error) -> Self {
        Wrong::Tls(error)
    }
}

fn io_words(error: &io::Error) -> String {
    match error.kind() {
        io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut => {
            format!("it did not say who it is within {HANDSHAKE:?}")
        }
        io::ErrorKind::UnexpectedEof | io::ErrorKind::ConnectionReset => {
            "it hung up before it said who it is (its router's log says why)".into()
        }
        _ => error.to_string(),
    }
}

fn tls_words(error: &rustls::Error) -> String {
    use CertificateError as Cert;
    use rustls::Error as E;
    match error {
        E::InvalidCertificate(Cert::UnknownIssuer | Cert::BadSignature) => {
            "its certificate is not signed by this cluster's CA (tls_ca)".into()
        }
        E::InvalidCertificate(Cert::Expired | Cert::ExpiredContext { .. }) => {
            "its certificate has expired: make it another (freeflow certs), or set the clocks".into()
        }
        E::InvalidCertificate(Cert::NotValidYet | Cert::NotValidYetContext { .. }) => {
            "its certificate is not valid yet: are the clocks right?".into()
        }
        E::InvalidCertificate(Cert::NotValidForNameContext { expected, presented }) => {
            format!("its certificate is for {presented:?}, not for {expected:?}, which the directory names")
        }
        E::InvalidCertificate(why) => format!("its certificate is refused: {why}"),
        E::NoCertificatesPresented => "it has no certificate".into(),
        E::PeerIncompatible(why) => format!("it does not speak TLS 1.3 as this router does: {why:?}"),
        E::AlertReceived(AlertDescription::UnknownCA | AlertDescription::DecryptError) => {
            "it refuses this router's certificate: its CA (tls_ca) is another".into()
        }
        E::AlertReceived(AlertDescription::CertificateExpired) => {
            "it refuses this router's certificate, which has expired".into()
        }
        E::AlertReceived(AlertDescription::ProtocolVersion | AlertDescription::HandshakeFailure) => {
            "it does not speak TLS 1.3 as this router does".into()
        }
        E::AlertReceived(alert) => format!("it refuses this router: {alert:?}"),
        E::InvalidMessage(InvalidMessage::InvalidContentType | InvalidMessage::UnknownProtocolVersion) => {
            "it does not speak TLS: is its router configured for plain TCP (insecure_plain_tcp)?".into()
        }
        other => other.to_string(),
    }
}

fn pem_words(error: rustls::pki_types::pem::Error) -> String {
    match error {
        rustls::pki_types::pem::Error::Io(error) => error.to_string(),
        other => format!("{other:?}"),
    }
}

fn certificates(what: &'static str, path: &Path) -> Result<Vec<CertificateDer<'static>>, SecurityError> {
    let failed = |why: String| SecurityError::File { what, path: path.to_owned(), why };
    let found = CertificateDer::pem_file_iter(path).and_then(Iterator::collect::<Result<Vec<_>, _>>);
    match found {
        Ok(list) if list.is_empty() => Err(failed("there is no certificate in it".into())),
        Ok(list) => Ok(list),
        Err(error) => Err(failed(pem_words(error))),
    }
}

fn roots(path: &Path) -> Result<RootCertStore, SecurityError> {
    let what = "the cluster's CA";
    let mut store = RootCertStore::empty();
    for cert in certificates(what, path)? {
        let failed =
            |e: rustls::Error| SecurityError::File { what, path: path.to_owned(), why: e.to_string() };
        store.add(cert).map_err(failed)?;
    }
    Ok(store)
}

fn client_config(
    provider: &Arc<CryptoProvider>,
    roots: Arc<RootCertStore>,
    chain: Vec<CertificateDer<'static>>,
    key: PrivateKeyDer<'static>,
) -> Result<ClientConfig, rustls::Error> {
    ClientConfig::builder_with_provider(provider.clone())
        .with_protocol_versions(&[&TLS13])?
        .with_root_certificates(roots)
        .with_client_auth_cert(chain, key)
}

fn server_config(
    provider: &Arc<CryptoProvider>,
    roots: Arc<RootCertStore>,
    chain: Vec<CertificateDer<'static>>,
    key: PrivateKeyDer<'static>,
) -> Result<ServerConfig, rustls::Error> {
    let verifier = WebPkiClientVerifier::builder_with_provider(roots, provider.clone());
    let verifier = verifier.build().map_err(|e| rustls::Error::General(e.to_string()))?;
    let mut config = ServerConfig::builder_with_provider(provider.clone())
        .with_protocol_versions(&[&TLS13])?
        .with_client_cert_verifier(verifier)
        .with_single_cert(chain, key)?;
    // Connections between routers are few and long: nobody comes back for a ticket.
    config.send_tls13_tickets = 0;
    Ok(config)
}

/// The DNS names in a certificate.
fn names(cert: &CertificateDer<'_>) -> Vec<String> {
    let parsed = webpki::EndEntityCert::try_from(cert);
    parsed.map_or(vec![], |cert| cert.valid_dns_names().map(str::to_owned).collect())
}

fn check_ours(chain: &[CertificateDer<'_>], path: &Path, host: &str) -> Result<(), SecurityError> {
    ServerName::try_from(host).map_err(|_| SecurityError::Name(host.into()))?;
    let found = chain.first().map(names).unwrap_or_default();
    if found.iter().any(|name| name == host) {
        return Ok(());
    }
    Err(SecurityError::NotOurs { path: path.to_owned(), found, wanted: host.into() })
}

/// The name for which the cluster's CA vouches. More than one would let a host choose who it is.
fn certified_name(stream: &Stream) -> Result<Arc<str>, Wrong> {
    let cert = stream.certificate().ok_or(rustls::Error::NoCertificatesPresented)?;
    match &names(cert)[..] {
        [name] => Ok(name.as_str().into()),
        other => {
            Err(Wrong::Words(format!("its certificate must have one DNS name, its host's; it has {other:?}")))
        }
    }
}

/// Both sides of plain TCP say what they are called; nobody checks.
fn exchange_names(tcp: &TcpStream, ours: &str) -> Result<String, Wrong> {
    let length =
        u8::try_from(ours.len()).map_err(|_| Wrong::Words(format!("{ours:?} is too long a name")))?;
    let mut tcp = tcp;
    tcp.write_all(&[&PLAIN[..], &[length], ours.as_bytes()].concat())?;
    let mut start = [0; PLAIN.len() + 1];
    tcp.read_exact(&mut start[..1])?;
    // A TLS record: its sender waits for an answer, and not for us to read on.
    if start[0] != PLAIN[0] {
        return Err(io::Error::new(io::ErrorKind::InvalidData, "it does not speak plain TCP").into());
    }
    tcp.read_exact(&mut start[1..])?;
    if start[..PLAIN.len()] != *PLAIN {
        return Err(io::Error::new(io::ErrorKind::InvalidData, "it is no router of this version").into());
    }
    let mut name = vec![0; start[PLAIN.len()].into()];
    tcp.read_exact(&mut name)?;
    String::from_utf8(name).map_err(|_| Wrong::Words("its name is not text".into()))
}
