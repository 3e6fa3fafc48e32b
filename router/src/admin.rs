//! The router's admin protocol: one JSON value per line over `admin.sock`, beside the router's own socket.
//!
//! This module owns the request and answer types and the client side. It must never know how the router keeps its
//! containers, nor what the command line prints. The socket serves root and the router's own user only; the router
//! checks that by peer credentials, not this module.

use std::io::{self, BufRead, BufReader, Read, Write};
use std::net::IpAddr;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::Duration;

use rustix::process::Pid;
use serde::{Deserialize, Serialize};

use crate::identity::credentials;

/// Longest line either side accepts: `ps` of a host with thousands of QPs fits many times over.
pub const MAX_LINE: u64 = 64 << 20;
/// Name of the admin socket, in the directory of the router's own socket.
pub const SOCKET_NAME: &str = "admin.sock";
/// Name of a container's own socket in the directory prepared for it.
pub const CONTAINER_SOCKET_NAME: &str = "router.sock";
/// Tenant of a container whose operator named none.
pub const DEFAULT_TENANT: &str = "default";
/// `ps`'s format version.
pub const PS_VERSION: u32 = 1;

/// How long a call may take before the router counts as hung.
const CALL_TIMEOUT: Duration = Duration::from_secs(10);

/// What an operator can ask of a running router.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum Request {
    /// Creates a container, or finds it when it is there already with the same attributes.
    Add(Add),
    /// Removes a container: its processes' objects are destroyed as if the processes had died.
    Rm { name: String },
    /// Lists the containers.
    Ls {},
    /// Lists containers with their processes, QPs and counters.
    Ps {},
    /// Asks whether the router lives, and which versions it speaks.
    Ping {},
}

#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Add {
    pub name: String,
    /// The container's vIP; `None` takes one from the router's pool.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ip: Option<IpAddr>,
    /// `None` is [`DEFAULT_TENANT`].
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tenant: Option<String>,
    /// Existing absolute directory that shall hold the container's `router.sock`; `None` lets the router choose.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub dir: Option<PathBuf>,
}

/// One answer line. `Error` can answer any request.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Answer {
    Added(Container),
    Removed {},
    Containers(Vec<Container>),
    Ps(Ps),
    Pong(Pong),
    Error { message: String },
}

/// A container as `ls` shows it. Unknown fields are ignored, so that a newer router can say more.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Container {
    pub name: String,
    pub tenant: String,
    pub vip: IpAddr,
    /// The socket that is this container's identity.
    pub socket: PathBuf,
    /// Processes connected now, by the router's view of pids.
    #[serde(default)]
    pub pids: Vec<u32>,
    /// Ports on which rdma_cm ids of this container listen.
    #[serde(default)]
    pub cm_ports: Vec<u16>,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Pong {
    /// Version of the control protocol that client libraries must speak.
    pub protocol: u32,
    /// The router's package version.
    pub version: String,
    pub pid: u32,
}

/// What `freeflow ps --json` prints.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Ps {
    pub version: u32,
    pub containers: Vec<PsContainer>,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PsContainer {
    pub name: String,
    pub tenant: String,
    pub vip: IpAddr,
    pub pids: Vec<u32>,
    pub mr_bytes: u64,
    pub qps: Vec<PsQp>,
    /// Totals, those of ended QPs included.
    pub tx_bytes: u64,
    pub rx_bytes: u64,
    pub errors: u64,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PsQp {
    pub qpn: u32,
    /// Transport as verbs names it: `RC`, `UD`.
    #[serde(rename = "type")]
    pub transport: String,
    /// `RESET`, `INIT`, `RTR`, `RTS`, `SQD`, `SQE` or `ERR`.
    pub state: String,
    /// `direct`, `routed`, `link:tcp`, ...; none before the QP is connected.
    pub path: Option<String>,
    pub peer: Option<PsPeer>,
    /// Of its address handle.
    pub traffic_class: u8,
    pub tx_bytes: u64,
    pub rx_bytes: u64,
    pub errors: u64,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PsPeer {
    pub tenant: String,
    pub vip: IpAddr,
    pub qpn: u32,
}

#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("no router answers at {}: {source}", path.display())]
    Connect { path: PathBuf, source: io::Error },
    #[error("the router at {} broke off: {source}", path.display())]
    Io { path: PathBuf, source: io::Error },
    #[error("the router at {} does not speak this admin protocol: {source}", path.display())]
    Protocol { path: PathBuf, source: serde_json::Error },
    #[error("the router at {} answered {got} to {asked}", path.display())]
    Unexpected { path: PathBuf, asked: &'static str, got: String },
    #[error("{0}")]
    Refused(String),
}

/// Where the admin socket of the router at `socket` is.
pub fn admin_socket(socket: &Path) -> PathBuf {
    socket.with_file_name(SOCKET_NAME)
}

/// A connection to a router's admin socket; calls are answered in order.
#[derive(Debug)]
pub struct Client {
    path: PathBuf,
    stream: BufReader<UnixStream>,
}

impl Client {
    /// Connects to the admin socket that belongs to the router socket `socket`.
    pub fn connect(socket: &Path) -> Result<Self, Error> {
        let path = admin_socket(socket);
        let stream = UnixStream::connect(&path)
            .and_then(|s| {
                s.set_read_timeout(Some(CALL_TIMEOUT))?;
                s.set_write_timeout(Some(CALL_TIMEOUT))?;
                Ok(s)
            })
            .map_err(|source| Error::Connect { path: path.clone(), source })?;
        Ok(Self { path, stream: BufReader::new(stream) })
    }

    /// Sends one request and waits for its answer; an `Error` answer becomes [`Error::Refused`].
    pub fn call(&mut self, request: &Request) -> Result<Answer, Error> {
        let answer = self.exchange(request)?;
        match answer {
            Answer::Error { message } => Err(Error::Refused(message)),
            other => Ok(other),
        }
    }

    pub fn add(&mut self, add: Add) -> Result<Container, Error> {
        match self.call(&Request::Add(add))? {
            Answer::Added(container) => Ok(container),
            other => Err(self.unexpected("add", &other)),
        }
    }

    pub fn rm(&mut self, name: &str) -> Result<(), Error> {
        match self.call(&Request::Rm { name: name.to_owned() })? {
            Answer::Removed {} => Ok(()),
            other => Err(self.unexpected("rm", &other)),
        }
    }

    pub fn ls(&mut self) -> Result<Vec<Container>, Error> {
        match self.call(&Request::Ls {})? {
            Answer::Containers(containers) => Ok(containers),
            other => Err(self.unexpected("ls", &other)),
        }
    }

    pub fn ps(&mut self) -> Result<Ps, Error> {
        match self.call(&Request::Ps {})? {
            Answer::Ps(ps) => Ok(ps),
            other => Err(self.unexpected("ps", &other)),
        }
    }

    pub fn ping(&mut self) -> Result<Pong, Error> {
        match self.call(&Request::Ping {})? {
            Answer::Pong(pong) => Ok(pong),
            other => Err(self.unexpected("ping", &other)),
        }
    }

    /// The router's process, by the kernel's word, as this process' pid namespace numbers it.
    pub fn router_pid(&self) -> Result<Pid, Error> {
        let credentials = credentials(self.stream.get_ref()).map_err(|e| self.broke_off(e.into()))?;
        let elsewhere = || io::Error::other("it runs in a pid namespace that this process does not see into");
        Pid::from_raw(credentials.pid).ok_or_else(|| self.broke_off(elsewhere()))
    }

    fn broke_off(&self, source: io::Error) -> Error {
        Error::Io { path: self.path.clone(), source }
    }

    fn exchange(&mut self, request: &Request) -> Result<Answer, Error> {
        write_line(self.stream.get_mut(), request).map_err(|e| self.broke_off(e))?;
        let line = read_line(&mut self.stream)
            .and_then(|line| line.ok_or_else(|| io::ErrorKind::UnexpectedEof.into()))
            .map_err(|e| self.broke_off(e))?;
        serde_json::from_str(&line).map_err(|source| Error::Protocol { path: self.path.clone(), source })
    }

    fn unexpected(&self, asked: &'static str, got: &Answer) -> Error {
        Error::Unexpected { path: self.path.clone(), asked, got: format!("{got:?}") }
    }
}

/// Writes `value` as one line. Both sides of the protocol use this.
pub fn write_line<T: Serialize>(to: &mut impl Write, value: &T) -> io::Result<()> {
    let mut line = serde_json::to_vec(value)?;
    line.push(b'\n');
    to.write_all(&line)
}

/// Reads one line of at most [`MAX_LINE`] bytes, or `None` at the end of the stream. Both sides use this.
pub fn read_line(from: &mut impl BufRead) -> io::Result<Option<String>> {
    let mut line = String::new();
    from.take(MAX_LINE).read_line(&mut line)?;
    match line.pop() {
        None => Ok(None),
        Some('\n') => Ok(Some(line)),
        Some(_) => Err(io::Error::new(io::ErrorKind::InvalidData, "line without an end, or over the limit")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::net::UnixListener;

    fn scratch(name: &str) -> PathBuf {
        let dir = std::env::temp_dir().join(format!("ff-admin-{}-{name}", std::process::id()));
        std::fs::create_dir_all(&dir).expect("scratch directory");
        dir
    }

    /// A router that answers one connection's requests by `answer`.
    fn serve(dir: &Path, answer: fn(&str) -> String) -> std::thread::JoinHandle<()> {
        let listener = UnixListener::bind(admin_socket(&dir.join("router.sock"))).expect("bind");
        std::thread::spawn(move || {
            let (stream, _) = listener.accept().expect("accept");
            let mut stream = BufReader::new(stream);
            while let Some(line) = read_line(&mut stream).expect("read") {
                let text = answer(&line);
                stream.get_mut().write_all(text.as_bytes()).expect("write");
            }
        })
    }

    fn with_router<T>(name: &str, answer: fn(&str) -> String, calls: impl FnOnce(&mut Client) -> T) -> T {
        let dir = scratch(name);
        let server = serve(&dir, answer);
        let mut client = Client::connect(&dir.join("router.sock")).expect("connect");
        let result = calls(&mut client);
        drop(client);
        server.join().expect("server thread");
        std::fs::remove_dir_all(&dir).expect("remove scratch");
        result
    }

    #[test]
    fn requests_look_as_documented() {
        let add = Request::Add(Add { name: "c1".into(), ip: Some([10, 0, 0, 1].into()), ..Add::default() });
        assert_eq!(serde_json::to_string(&add).unwrap(), r#"{"add":{"name":"c1","ip":"10.0.0.1"}}"#);
        assert_eq!(serde_json::to_string(&Request::Ls {}).unwrap(), r#"{"ls":{}}"#);
        assert_eq!(
            serde_json::to_string(&Request::Rm { name: "x".into() }).unwrap(),
            r#"{"rm":{"name":"x"}}"#
        );
        serde_json::from_str::<Request>(r#"{"add":{"name":"c1","colour":"red"}}"#)
            .expect_err("unknown field");
    }

    #[test]
    fn ps_has_the_documented_fields() {
        let qp = PsQp {
            qpn: 17,
            transport: "RC".into(),
            state: "INIT".into(),
            path: None,
            peer: None,
            traffic_class: 104,
            tx_bytes: 1,
            rx_bytes: 2,
            errors: 3,
        };
        let json = serde_json::to_value(qp).unwrap();
        for key in ["qpn", "type", "state", "path", "peer", "traffic_class", "tx_bytes", "rx_bytes", "errors"]
        {
            assert!(json.get(key).is_some(), "{key} is missing in {json}");
        }
    }

    #[test]
    fn calls_get_their_answers_in_order() {
        let answer = |line: &str| match line {
            r#"{"ping":{}}"# => {
                "{\"pong\":{\"protocol\":1,\"version\":\"0\",\"pid\":7,\"new\":1}}\n".to_owned()
            }
            _ => "{\"error\":{\"message\":\"no such container: x\"}}\n".to_owned(),
        };
        with_router("order", answer, |client| {
            assert_eq!(client.ping().expect("pong").pid, 7);
            let refused = client.rm("x").expect_err("must be refused");
            assert_eq!(refused.to_string(), "no such container: x");
            assert_eq!(client.ping().expect("pong").protocol, 1);
        });
    }

    #[test]
    fn a_wrong_answer_is_an_error() {
        with_router(
            "wrong",
            |_| "{\"removed\":{}}\n".into(),
            |c| {
                assert!(matches!(c.ping(), Err(Error::Unexpected { .. })));
            },
        );
        with_router(
            "garbage",
            |_| "hello\n".into(),
            |c| {
                assert!(matches!(c.ping(), Err(Error::Protocol { .. })));
            },
        );
    }

    #[test]
    fn nobody_there_names_the_socket() {
        let error = Client::connect(Path::new("/nonexistent/router.sock")).expect_err("nobody there");
        assert!(error.to_string().contains("/nonexistent/admin.sock"), "{error}");
    }
}
