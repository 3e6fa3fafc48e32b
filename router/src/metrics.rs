//! The Prometheus endpoint: what `ps` shows, per container, over HTTP.
//!
//! Owns the text format and the little HTTP it takes. One connection at a time and a deadline for each: a slow reader
//! delays other scrapes for a moment, and nothing else.

use std::fmt::Write as _;
use std::io::{self, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use crate::admin::{Ps, PsContainer};
use crate::listener::{Stop, accept_loop};
use crate::shared::Shared;

/// For a whole request.
const DEADLINE: Duration = Duration::from_secs(2);
/// Longest request head that is read.
const MAX_HEAD: usize = 8 << 10;

/// One family of values: name, type, help, and its value for a container.
type Family = (&'static str, &'static str, &'static str, fn(&PsContainer) -> u64);

const FAMILIES: [Family; 6] = [
    ("freeflow_tx_bytes_total", "counter", "Payload bytes sent.", |c| c.tx_bytes),
    ("freeflow_rx_bytes_total", "counter", "Payload bytes received.", |c| c.rx_bytes),
    ("freeflow_errors_total", "counter", "Work requests that completed with an error.", |c| c.errors),
    ("freeflow_processes", "gauge", "Processes connected to the router.", |c| c.pids.len() as u64),
    ("freeflow_qps", "gauge", "Queue pairs.", |c| c.qps.len() as u64),
    ("freeflow_mr_bytes", "gauge", "Registered bytes.", |c| c.mr_bytes),
];

/// Serves at `address` until stopped.
pub fn start(address: SocketAddr, shared: Arc<Shared>, stop: Arc<Stop>) -> io::Result<JoinHandle<()>> {
    let listener = TcpListener::bind(address)?;
    listener.set_nonblocking(true)?;
    let listener = OwnedFd::from(listener);
    let serve = move || {
        accept_loop(&listener, &stop, |connection| {
            // Whoever asked is gone or too slow: nobody is left to be told.
            answer(TcpStream::from(connection), || page(&shared.with(|state| state.ps()))).ok();
        })
    };
    std::thread::Builder::new().name("metrics".into()).spawn(serve)
}

fn answer(mut stream: TcpStream, page: impl FnOnce() -> String) -> io::Result<()> {
    let head = read_head(&mut stream)?;
    let (status, body) = match head.split(' ').collect::<Vec<_>>().as_slice() {
        ["GET", "/metrics", ..] => ("200 OK", page()),
        ["GET", ..] => ("404 Not Found", "the metrics are at /metrics\n".to_owned()),
        _ => ("400 Bad Request", "not a GET\n".to_owned()),
    };
    stream.set_write_timeout(Some(DEADLINE))?;
    let length = body.len();
    write!(
        stream,
        "HTTP/1.1 {status}\r\nContent-Type: text/plain; version=0.0.4; charset=utf-8\r\nContent-Length: {length}\r\n\
         Connection: close\r\n\r\n{body}"
    )
}

/// Reads up to the empty line that ends a request's head.
fn read_head(stream: &mut TcpStream) -> io::Result<String> {
    let end = Instant::now() + DEADLINE;
    let mut head = Vec::new();
    let mut piece = [0; 1024];
    while !head.windows(4).any(|four| four == b"\r\n\r\n") {
        let left = end.saturating_duration_since(Instant::now());
        if left.is_zero() || head.len() > MAX_HEAD {
            return Err(io::ErrorKind::TimedOut.into());
        }
        stream.set_read_timeout(Some(left))?;
        match stream.read(&mut piece)? {
            0 => return Err(io::ErrorKind::UnexpectedEof.into()),
            n => head.extend_from_slice(&piece[..n]),
        }
    }
    Ok(String::from_utf8_lossy(&head).into_owned())
}

/// The page in Prometheus' text format. Names of containers and tenants have no character that would need escaping.
fn page(ps: &Ps) -> String {
    let version = env!("CARGO_PKG_VERSION");
    let mut out = format!(
        "# HELP freeflow_info The router.\n# TYPE freeflow_info gauge\nfreeflow_info{{version=\"{version}\"}} 1\n"
    );
    for (name, kind, help, value) in FAMILIES {
        // Writing to a String cannot fail.
        writeln!(out, "# HELP {name} {help}\n# TYPE {name} {kind}").ok();
        for c in &ps.containers {
            let (container, tenant, vip, value) = (&c.name, &c.tenant, c.vip, value(c));
            writeln!(out, "{name}{{container=\"{container}\",tenant=\"{tenant}\",vip=\"{vip}\"}} {value}")
                .ok();
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::Settings;

    fn ask(address: SocketAddr, request: &str) -> String {
        let mut stream = TcpStream::connect(address).expect("connect");
        stream.write_all(request.as_bytes()).expect("write");
        let mut said = String::new();
        stream.read_to_string(&mut said).expect("read");
        said
    }

    #[test]
    fn a_scrape_gets_the_page_and_others_an_error() {
        let address =
            TcpListener::bind("127.0.0.1:0").and_then(|free| free.local_addr()).expect("a free port");
        let shared =
            Arc::new(Shared::new(Settings::default(), crate::proof::Proofs::of_a_test()).expect("state"));
        let stop = Arc::new(Stop::new().expect("eventfd"));
        let thread = start(address, shared, stop.clone()).expect("start");
        let page = ask(address, "GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n");
        assert!(page.starts_with("HTTP/1.1 200 OK\r\n") && page.contains("\nfreeflow_info{"), "{page}");
        assert!(ask(address, "GET / HTTP/1.1\r\n\r\n").contains(" 404 "));
        assert!(ask(address, "nonsense\r\n\r\n").contains(" 400 "));
        drop(TcpStream::connect(address).expect("one that says nothing and goes"));
        assert!(ask(address, "GET /metrics HTTP/1.0\r\n\r\n").contains(" 200 "));
        stop.set();
        thread.join().expect("it ends");
    }

    #[test]
    fn each_container_has_a_line_in_each_family() {
        let container = PsContainer {
            name: "c1".into(),
            tenant: "red".into(),
            vip: [10, 0, 0, 1].into(),
            pids: vec![7],
            mr_bytes: 4096,
            qps: vec![],
            tx_bytes: 11,
            rx_bytes: 12,
            errors: 13,
        };
        let text = page(&Ps { version: 1, containers: vec![container] });
        let labels = "{container=\"c1\",tenant=\"red\",vip=\"10.0.0.1\"}";
        for (name, value) in [("tx_bytes_total", 11), ("rx_bytes_total", 12), ("errors_total", 13)] {
            assert!(text.contains(&format!("\nfreeflow_{name}{labels} {value}\n")), "{text}");
        }
        assert_eq!(text.matches(labels).count(), FAMILIES.len());
        assert_eq!(text.matches("# TYPE ").count(), FAMILIES.len() + 1);
    }
}
