//! Two hosts whose wire is cut again and again, whose routers have no processor for a while, and whose wire falls silent at last.
//!
//! Between the two routers is a relay for each direction of dialing. When it cuts, every connection ends wherever it is, in the
//! middle of messages too: what was acknowledged must not come again, what was not must come, and in order (the workers number
//! their messages). When it loses everything, requests must fail after their queue pairs' own timeout and retries. When a router is only
//! stopped for longer than that, none may.

use std::fs;
use std::io::{Read as _, Write as _};
use std::net::{Ipv4Addr, Shutdown, TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};
use socket2::{SockFilter, SockRef};

use super::Result;
use super::cluster::{both_move_on, free_ports, meet};
use super::dice::Dice;
use super::worker::Worker;
use crate::path::{Host, Tree};

const HOSTS: [&str; 2] = ["h1", "h2"];
const ADDRESSES: [&str; 2] = ["10.78.0.1", "10.78.0.2"];
/// Attributes of the queue pairs that meet silence: 4.096 us * 2^14 * (7 + 1).
const PATIENCE: &str = "patience 14 7";
const OWN_TIME: Duration = Duration::from_micros(536_871);
/// A router is stopped for so long: longer than that, shorter than its neighbour would give up its connections.
const STOPPED: Duration = Duration::from_millis(1_500);
/// A router gives up a silent neighbour in 5 s.
const GIVEN_UP: Duration = Duration::from_secs(30);
/// What a machine at rest may take longer, and so much sooner may the last word have come that was heard.
const SLACK: Duration = Duration::from_millis(200);
const SOONER: Duration = Duration::from_millis(100);

#[derive(Debug, Clone)]
pub struct Options {
    /// Cuts with each kind of link.
    pub rounds: u32,
    pub seed: u64,
    /// Times are reported, not judged.
    pub lenient: bool,
}

/// `ret #0`: a socket with this filter drops what comes, unacknowledged.
const NOTHING: SockFilter = SockFilter::new(0x06, 0, 0, 0);

#[derive(Debug, Default)]
struct Open {
    streams: Vec<TcpStream>,
    silent: bool,
    /// Pumps that hand on what they have read.
    busy: usize,
}

/// A relay between whoever connects and one address.
#[derive(Debug, Clone, Default)]
struct Relay(Arc<(Mutex<Open>, Condvar)>);

impl Relay {
    fn start(listener: TcpListener, to: u16) -> Self {
        let relay = Relay::default();
        let own = relay.clone();
        thread::spawn(move || {
            for from in listener.incoming().map_while(std::result::Result::ok) {
                // Where nobody listens the caller is hung up on, as it would be without us.
                if let Ok(onward) = TcpStream::connect((Ipv4Addr::LOCALHOST, to)) {
                    own.join(&from, &onward);
                }
            }
        });
        relay
    }

    fn lock(&self) -> MutexGuard<'_, Open> {
        self.0.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn wait<'a>(&'a self, open: MutexGuard<'a, Open>) -> MutexGuard<'a, Open> {
        self.0.1.wait(open).unwrap_or_else(PoisonError::into_inner)
    }

    fn join(&self, a: &TcpStream, b: &TcpStream) {
        for (from, to) in [(a, b), (b, a)] {
            let (Ok(from), Ok(to), Ok(known)) = (from.try_clone(), to.try_clone(), from.try_clone()) else {
                return;
            };
            let mut open = self.lock();
            if open.silent {
                lose_all(&known, true);
            }
            open.streams.push(known);
            drop(open);
            let relay = self.clone();
            thread::spawn(move || relay.pump(from, to));
        }
    }

    fn pump(&self, mut from: TcpStream, mut to: TcpStream) {
        let mut bytes = vec![0; 64 << 10];
        while let Ok(n @ 1..) = from.read(&mut bytes) {
            let mut open = self.lock();
            while open.silent {
                open = self.wait(open);
            }
            open.busy += 1;
            drop(open);
            let written = to.write_all(&bytes[..n]);
            self.lock().busy -= 1;
            self.0.1.notify_all();
            if written.is_err() {
                break;
            }
        }
        let _ = to.shutdown(Shutdown::Both); // cut already
    }

    /// Ends every connection.
    fn cut(&self) {
        for stream in self.lock().streams.drain(..) {
            let _ = stream.shutdown(Shutdown::Both); // ended by itself
        }
    }

    /// Nothing of a silent relay's own may be on its way: it would be sent again and again, since the answers are lost, and by that
    /// a router's kernel hears that there is somebody.
    fn be_silent(&self, silent: bool) {
        let mut open = self.lock();
        open.silent = silent;
        while silent && open.busy > 0 {
            open = self.wait(open);
        }
        while silent && open.streams.iter().any(is_unacknowledged) {
            thread::yield_now();
        }
        open.streams.iter().for_each(|stream| lose_all(stream, silent));
        self.0.1.notify_all();
    }
}

/// Has the other side's kernel not acknowledged everything yet? (/proc/net/tcp, proc_net_tcp: `local remote state tx_queue:rx_queue`)
fn is_unacknowledged(stream: &TcpStream) -> bool {
    let (Ok(local), Ok(remote)) = (stream.local_addr(), stream.peer_addr()) else { return false };
    let sockets = fs::read_to_string("/proc/net/tcp").unwrap_or_default();
    sockets.lines().any(|line| {
        let fields: Vec<&str> = line.split_whitespace().collect();
        let [_, from, to, _, queues, ..] = fields[..] else { return false };
        from.ends_with(&format!(":{:04X}", local.port()))
            && to.ends_with(&format!(":{:04X}", remote.port()))
            && !queues.starts_with("00000000:")
    })
}

/// The socket loses all that comes to it, or hears again.
fn lose_all(stream: &TcpStream, lose: bool) {
    let socket = SockRef::from(stream);
    // One that ended has nothing to lose.
    let _ = if lose { socket.attach_filter(&[NOTHING]) } else { socket.detach_filter() };
}

struct Stage {
    dir: PathBuf,
    hosts: Vec<Host>,
    relays: Vec<Relay>,
    program: PathBuf,
}

impl Drop for Stage {
    fn drop(&mut self) {
        self.hosts.clear();
        let _ = fs::remove_dir_all(&self.dir); // it is among temporary files
    }
}

pub fn run(tree: &Tree, target: &Path, options: &Options) -> Result<()> {
    println!("soak wire: {} cuts each, --seed {}", options.rounds, options.seed);
    for secure in [false, true] {
        let stage = Stage::set(tree, target, secure)?;
        stage.story(options, secure).inspect_err(|_| stage.hosts.iter().for_each(Host::show_log))?;
    }
    Ok(())
}

/// Waits until a router has given up its silent neighbour.
fn gives_up(host: &Host) -> Result<()> {
    let start = Instant::now();
    while !host.log().contains("is silent: its connections are ended") {
        if start.elapsed() > GIVEN_UP {
            return Err(format!("a neighbour that says nothing was not given up in {GIVEN_UP:?}"));
        }
        thread::sleep(Duration::from_millis(50));
    }
    Ok(())
}

impl Stage {
    fn set(tree: &Tree, target: &Path, secure: bool) -> Result<Self> {
        let dir = std::env::temp_dir().join(format!("freeflow-wire-{}-{secure}", std::process::id()));
        fs::create_dir_all(&dir).map_err(|e| e.to_string())?;
        let program = super::compile(target, "worker").map_err(|e| e.to_string())?;
        let mut stage = Stage { dir, hosts: vec![], relays: vec![], program };
        if secure {
            stage.certify(tree)?;
        }
        let ports = free_ports::<2>()?;
        let mut ways = vec![];
        for port in ports {
            let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).map_err(|e| e.to_string())?;
            ways.push(listener.local_addr().map_err(|e| e.to_string())?.port());
            stage.relays.push(Relay::start(listener, port));
        }
        // Each reaches the other through that one's relay.
        stage.write_directory(&ways)?;
        for (number, port) in ports.into_iter().enumerate() {
            let config = stage.config(number, port, secure);
            stage.hosts.push(Host::configured(tree, &config).map_err(|e| e.to_string())?);
        }
        Ok(stage)
    }

    fn certify(&self, tree: &Tree) -> Result<()> {
        let mut certs = Command::new(tree.freeflow());
        certs.arg("certs").arg(self.dir.join("ca")).arg("--host").args(HOSTS).stdout(Stdio::null());
        let made = certs.status().is_ok_and(|status| status.success());
        if made { Ok(()) } else { Err("freeflow certs failed".into()) }
    }

    fn write_directory(&self, ways: &[u16]) -> Result<()> {
        let entries = HOSTS.iter().zip(ways).zip(ADDRESSES).map(|((name, port), ip)| {
            format!("[hosts.{name}]\naddress = \"127.0.0.1:{port}\"\ncontainers = [\"default/{ip}\"]\n")
        });
        fs::write(self.dir.join("directory.toml"), entries.collect::<String>()).map_err(|e| e.to_string())
    }

    fn config(&self, number: usize, port: u16, secure: bool) -> String {
        let name = HOSTS[number];
        let tls = self.dir.join("ca").join(name);
        let tls = tls.display();
        let security = if secure {
            format!("tls_ca = \"{tls}/ca.pem\"\ntls_cert = \"{tls}/cert.pem\"\ntls_key = \"{tls}/key.pem\"\n")
        } else {
            "insecure_plain_tcp = true\n".to_owned()
        };
        format!(
            "host = \"{name}\"\ncluster_listen = \"127.0.0.1:{port}\"\ndirectory = \"file:{}\"\n{security}\
             vip_pool = \"100.126.{number}.0/24\"\nmetrics = \"127.0.0.1:0\"\n",
            self.dir.join("directory.toml").display()
        )
    }

    fn worker(&self, host: usize, wait: &str) -> Result<Worker> {
        Worker::at(&self.hosts[host], (HOSTS[host], ADDRESSES[host]), &self.program, &["1", wait])
    }

    fn story(&self, options: &Options, secure: bool) -> Result<()> {
        let mut dice = Dice::new(options.seed);
        let (mut a, mut b) = (self.worker(0, "sleep")?, self.worker(1, "sleep")?);
        for slot in 0..2 {
            meet((&mut a, slot), (&mut b, slot))?;
        }
        let mut slowest = Duration::ZERO;
        for _ in 0..options.rounds {
            thread::sleep(Duration::from_micros(dice.word() % 100_000));
            let start = Instant::now();
            self.relays.iter().for_each(Relay::cut);
            (0..2).try_for_each(|slot| both_move_on((&mut a, slot), (&mut b, slot)))?;
            slowest = slowest.max(start.elapsed());
        }
        let link = if secure { "TLS" } else { "plain TCP" };
        println!("  {link}: {} cuts, all goes on {slowest:?} after them at most", options.rounds);
        a.ask(PATIENCE, "patient")?;
        b.ask(PATIENCE, "patient")?;
        meet((&mut a, 2), (&mut b, 2))?;
        self.starve(&mut a, &mut b)?;
        self.silence(&mut a, &mut b, options, !secure)?;
        a.quit()?;
        b.quit()
    }

    /// Each router in turn has no processor, for longer than the queue pairs' patience: it is not silent to its neighbour, and does
    /// not take its neighbour for silent.
    fn starve(&self, a: &mut Worker, b: &mut Worker) -> Result<()> {
        for host in &self.hosts {
            let pid = i32::try_from(host.pid()).ok().and_then(Pid::from_raw).ok_or("a router has no pid")?;
            let signal = |signal| kill_process(pid, signal).map_err(|e| format!("a router: {e}"));
            signal(Signal::STOP)?;
            thread::sleep(STOPPED);
            signal(Signal::CONT)?;
            (0..3).try_for_each(|slot| both_move_on((a, slot), (b, slot)))?;
        }
        println!("  each router stopped for {STOPPED:?}: all goes on");
        Ok(())
    }

    /// Queue pairs with a patience of half a second meet silence.
    /// With `long` until both routers have given up their connections.
    fn silence(&self, a: &mut Worker, b: &mut Worker, options: &Options, long: bool) -> Result<()> {
        let start = Instant::now();
        self.relays.iter().for_each(|relay| relay.be_silent(true));
        let failed = a.hear("failed 2")?;
        let took = failed.at.duration_since(start);
        if failed.text != "failed 2 transport retry counter exceeded" {
            return Err(format!("silence: {}", failed.text));
        }
        println!("  the wire falls silent: RETRY_EXC_ERR after {took:?}, its own time is {OWN_TIME:?}");
        if took + SOONER < OWN_TIME || (!options.lenient && took > OWN_TIME + SLACK) {
            return Err(format!("a request failed after {took:?}, its own time is {OWN_TIME:?}"));
        }
        b.hear("failed 2")?;
        if long {
            self.hosts.iter().try_for_each(gives_up)?;
        }
        self.relays.iter().for_each(|relay| relay.be_silent(false));
        // Those with more patience go on, and new ones come.
        (0..2).try_for_each(|slot| both_move_on((a, slot), (b, slot)))?;
        meet((a, 3), (b, 3)).map(drop)
    }
}
