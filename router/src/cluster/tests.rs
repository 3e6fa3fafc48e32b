//! Handshakes between routers that should and should not trust each other: who is refused, and in which words.

use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::path::PathBuf;
use std::time::{Duration, SystemTime};

use rustix::net::sockopt::tcp_congestion;

use super::certs::{Authority, Pair};
use super::{ClusterError, Files, Membership, Security, SecurityError, Source, Stream};
use crate::config::Settings;

const DAY: Duration = Duration::from_secs(86_400);

/// Files of one host's identity, removed with it.
struct Identity {
    dir: PathBuf,
    files: Files,
}

impl Identity {
    fn new(what: &str, ca: &Pair, own: &Pair) -> Self {
        let dir = std::env::temp_dir().join(format!("ff-tls-{}-{what}", std::process::id()));
        std::fs::create_dir_all(&dir).expect("scratch directory");
        let file = |name: &str, text: &str| {
            std::fs::write(dir.join(name), text).expect("write");
            dir.join(name)
        };
        let files = Files {
            ca: file("ca.pem", &ca.cert),
            cert: file("cert.pem", &own.cert),
            key: file("key.pem", &own.key),
        };
        Identity { dir, files }
    }

    fn security(&self, host: &str) -> Security {
        Security::tls(&self.files, host).expect("a good identity")
    }
}

impl Drop for Identity {
    fn drop(&mut self) {
        std::fs::remove_dir_all(&self.dir).expect("scratch directory");
    }
}

fn authority() -> (Authority, Pair) {
    Authority::new(30).expect("authority")
}

/// Both ends of a connection, and what each says.
type Met = (Result<Stream, SecurityError>, Result<Stream, SecurityError>);

fn meet(dialer: impl FnOnce(TcpStream) -> Result<Stream, SecurityError>, server: &Security) -> Met {
    let listener = TcpListener::bind("127.0.0.1:0").expect("listen");
    let to = listener.local_addr().expect("address");
    std::thread::scope(|scope| {
        let accepted = scope.spawn(move || server.accept(listener.accept().expect("accept").0));
        let dialed = dialer(TcpStream::connect(to).expect("connect"));
        (dialed, accepted.join().expect("no panic"))
    })
}

fn words<T>(result: Result<T, SecurityError>) -> String {
    result.err().expect("refused").to_string()
}

fn blocking(stream: &Stream) {
    stream.socket().set_nonblocking(false).expect("socket");
}

/// 1 MiB, larger than what the session buffers.
fn talk(mut a: Stream, mut b: Stream) {
    let sent: Vec<u8> = (0..1 << 20).map(|n: u32| (n % 251) as u8).collect();
    [&a, &b].into_iter().for_each(blocking);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            a.write_all(&sent).expect("write");
            a.flush().expect("flush");
        });
        let mut got = vec![0; sent.len()];
        b.read_exact(&mut got).expect("read");
        assert!(got == sent);
    });
    b.close();
    assert_eq!(a.read(&mut [0; 1]).expect("the end, properly said"), 0);
}

#[test]
fn routers_of_one_cluster_meet_and_know_each_other() {
    let (ca, root) = authority();
    let one = Identity::new("good1", &root, &ca.host("h1", 1).expect("cert"));
    let two = Identity::new("good2", &root, &ca.host("h2", 1).expect("cert"));
    let (dialed, accepted) = meet(|tcp| one.security("h1").connect(tcp, "h2"), &two.security("h2"));
    let (dialed, accepted) = (dialed.expect("dial"), accepted.expect("accept"));
    assert_eq!((&**dialed.peer(), &**accepted.peer()), ("h2", "h1"));
    assert!(dialed.as_plain().is_none());
    talk(dialed, accepted);
}

#[test]
fn a_stream_that_cannot_go_on_does_not_wait() {
    let (ca, root) = authority();
    let one = Identity::new("wait1", &root, &ca.host("h1", 1).expect("cert"));
    let two = Identity::new("wait2", &root, &ca.host("h2", 1).expect("cert"));
    let (dialed, accepted) = meet(|tcp| one.security("h1").connect(tcp, "h2"), &two.security("h2"));
    let (mut dialed, mut accepted) = (dialed.expect("dial"), accepted.expect("accept"));
    let would_block = |error: std::io::Error| assert_eq!(error.kind(), std::io::ErrorKind::WouldBlock);
    would_block(accepted.read(&mut [0; 1]).expect_err("nothing is there"));
    let mut sent = 0u64;
    let full = loop {
        match dialed.write(&[7; 60_000]) {
            Ok(n) => sent += n as u64,
            Err(error) => break error,
        }
    };
    would_block(full);
    assert!(dialed.wants_write());
    let mut got = 0;
    let mut buffer = [0; 1000];
    while got < sent {
        // What one side takes makes room for what waits on the other.
        let _ = dialed.flush();
        match accepted.read(&mut buffer) {
            Ok(n) => {
                assert!(buffer[..n].iter().all(|byte| *byte == 7));
                got += n as u64;
            }
            Err(error) => would_block(error),
        }
        assert!(got <= sent);
    }
    assert!(!dialed.wants_write() && !accepted.has_buffered());
}

#[test]
fn another_cluster_is_refused_by_both_sides() {
    let ((ca, root), (other_ca, other_root)) = (authority(), authority());
    let one = Identity::new("ca1", &other_root, &other_ca.host("h1", 1).expect("cert"));
    let two = Identity::new("ca2", &root, &ca.host("h2", 1).expect("cert"));
    let (dialed, accepted) = meet(|tcp| one.security("h1").connect(tcp, "h2"), &two.security("h2"));
    assert!(words(dialed).contains("not signed by this cluster's CA"));
    assert!(words(accepted).contains("refuses this router's certificate"));
    // The one that dials trusts us, but we do not trust it.
    let spy = Identity::new("ca3", &root, &other_ca.host("h1", 1).expect("cert"));
    let (dialed, accepted) = meet(|tcp| spy.security("h1").connect(tcp, "h2"), &two.security("h2"));
    assert!(words(accepted).contains("not signed by this cluster's CA"));
    let dialed = words(dialed);
    assert!(dialed.contains("refuses this router's certificate"), "{dialed}");
}

#[test]
fn expired_and_future_certificates_are_refused() {
    let (ca, root) = authority();
    let two = Identity::new("time2", &root, &ca.host("h2", 1).expect("cert"));
    let now = SystemTime::now();
    for (from, word) in [(now - 10 * DAY, "expired"), (now + 10 * DAY, "not valid yet")] {
        let pair = ca.host_from("h1", from, DAY).expect("cert");
        let one = Identity::new("time1", &root, &pair);
        let (dialed, accepted) = meet(|tcp| one.security("h1").connect(tcp, "h2"), &two.security("h2"));
        let why = words(accepted);
        assert!(why.contains(word), "{why}");
        words(dialed);
        let (dialed, _) = meet(|tcp| two.security("h2").connect(tcp, "h1"), &one.security("h1"));
        let why = words(dialed);
        assert!(why.contains(word), "{why}");
    }
}

#[test]
fn a_certificate_is_for_the_host_that_the_directory_names() {
    let (ca, root) = authority();
    let one = Identity::new("name1", &root, &ca.host("h1", 1).expect("cert"));
    let two = Identity::new("name2", &root, &ca.host("h2", 1).expect("cert"));
    let (dialed, _) = meet(|tcp| one.security("h1").connect(tcp, "h3"), &two.security("h2"));
    let why = words(dialed);
    assert!(why.contains("h2") && why.contains("h3"), "{why}");
    let why = words(Security::tls(&one.files, "h9"));
    assert!(why.contains("h1") && why.contains("h9") && why.contains("freeflow certs"), "{why}");
}

#[test]
fn plain_and_tls_do_not_meet() {
    let (ca, root) = authority();
    let one = Identity::new("plain1", &root, &ca.host("h1", 1).expect("cert"));
    let tls = one.security("h1");
    let (dialed, accepted) = meet(|tcp| Security::plain("h2").connect(tcp, "h1"), &tls);
    let (dialed, accepted) = (words(dialed), words(accepted));
    assert!(accepted.contains("does not speak TLS") && accepted.contains("plain TCP"), "{accepted}");
    assert!(dialed.contains("plain TCP"), "{dialed}");
    let (dialed, accepted) = meet(|tcp| tls.connect(tcp, "h2"), &Security::plain("h2"));
    let (dialed, accepted) = (words(dialed), words(accepted));
    assert!(accepted.contains("plain TCP (insecure_plain_tcp)"), "{accepted}");
    assert!(dialed.contains("does not speak TLS"), "{dialed}");
}

#[test]
fn older_tls_is_refused() {
    let (ca, root) = authority();
    let two = Identity::new("old2", &root, &ca.host("h2", 1).expect("cert"));
    // A ClientHello that offers TLS 1.2 and nothing newer: the record's and the hello's versions, a random, no session, one
    // suite, no compression, no extensions.
    let hello = [&[0x03, 0x03][..], &[7; 32], &[0, 0, 2, 0xc0, 0x2f, 1, 0]].concat();
    let message = [&[1, 0, 0, hello.len() as u8][..], &hello].concat();
    let record = [&[0x16, 0x03, 0x01, 0, message.len() as u8][..], &message].concat();
    let (_, accepted) = meet(
        |mut tcp| {
            tcp.write_all(&record).expect("write");
            let mut alert = [0; 7];
            tcp.read_exact(&mut alert).expect("an alert");
            assert_eq!(alert[0], 0x15, "{alert:?}");
            Security::plain("h1").connect(tcp, "h2")
        },
        &two.security("h2"),
    );
    let why = words(accepted);
    assert!(why.contains("TLS 1.3"), "{why}");
}

#[test]
fn plain_routers_meet_by_name() {
    let (one, two) = (Security::plain("h1"), Security::plain("h2"));
    let (dialed, accepted) = meet(|tcp| one.connect(tcp, "h2"), &two);
    let (dialed, accepted) = (dialed.expect("dial"), accepted.expect("accept"));
    assert_eq!((&**dialed.peer(), &**accepted.peer()), ("h2", "h1"));
    assert!(dialed.as_plain().is_some());
    talk(dialed, accepted);
    let (dialed, _) = meet(|tcp| one.connect(tcp, "h3"), &two);
    assert!(words(dialed).contains("\"h2\", not \"h3\""));
}

/// A host of a cluster of its own, by its configuration.
fn member(host: &str, congestion_control: &str) -> Result<Membership, ClusterError> {
    let path = std::env::temp_dir().join(format!("ff-member-{}-{host}.toml", std::process::id()));
    std::fs::write(&path, "").expect("write");
    let membership = Membership::start(&Settings {
        host: host.into(),
        cluster_listen: ([127, 0, 0, 1], 1).into(),
        directory: Source::File(path.clone()),
        insecure_plain_tcp: true,
        congestion_control: congestion_control.into(),
        ..Settings::default()
    });
    std::fs::remove_file(path).expect("its own file");
    membership.map(|member| member.expect("it has a directory"))
}

#[test]
fn connections_between_routers_have_the_congestion_control_of_the_configuration() {
    let member_of = |host| member(host, "reno").expect("every kernel has it");
    let (one, two) = (member_of("cc1"), member_of("cc2"));
    let listener = two.listen(([127, 0, 0, 1], 0).into()).expect("listen");
    let dialed = one.dial(listener.local_addr().expect("address"), DAY).expect("dial");
    let accepted = listener.accept().expect("accept").0;
    assert_eq!([dialed, accepted].map(|tcp| tcp_congestion(tcp).ok()), [(); 2].map(|()| Some("reno".into())));
    let why = member("cc3", "no-such-one").expect_err("nobody has it").to_string();
    assert!(why.contains("\"no-such-one\"") && why.contains("tcp_available_congestion_control"), "{why}");
}
