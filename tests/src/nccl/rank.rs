//! A rank as NCCL has it: a service thread and a progress thread, and connections made by polling.

use std::path::Path;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use super::Outcome;
use super::oob::Oob;
use super::plugin::{Handle, Name, Plugin};

type Job = Box<dyn FnOnce() + Send>;

/// A thread that does what it is given, in order.
#[derive(Debug)]
pub struct Worker {
    jobs: Option<Sender<Job>>,
    thread: Option<JoinHandle<()>>,
}

/// What a worker was asked for.
#[derive(Debug)]
pub struct Promise<T>(Receiver<T>);

impl<T> Promise<T> {
    /// Waits for it.
    pub fn wait(self) -> T {
        self.0.recv().expect("the worker panicked")
    }
}

impl Worker {
    pub fn new(name: &str) -> Self {
        let (jobs, todo) = channel::<Job>();
        let run = move || todo.into_iter().for_each(|job| job());
        let thread = std::thread::Builder::new().name(name.into()).spawn(run).expect("a thread");
        Worker { jobs: Some(jobs), thread: Some(thread) }
    }

    /// Has `job` done on the worker.
    pub fn start<T: Send + 'static>(&self, job: impl FnOnce() -> T + Send + 'static) -> Promise<T> {
        let (answer, promise) = channel();
        let job = Box::new(move || drop(answer.send(job())));
        self.jobs.as_ref().expect("until dropped").send(job).expect("the worker lives");
        Promise(promise)
    }

    pub fn run<T: Send + 'static>(&self, job: impl FnOnce() -> T + Send + 'static) -> T {
        self.start(job).wait()
    }
}

impl Drop for Worker {
    fn drop(&mut self) {
        drop(self.jobs.take());
        if let Some(thread) = self.thread.take() {
            // A panic was reported by whoever waited.
            let _ = thread.join();
        }
    }
}

/// One rank.
#[derive(Debug)]
pub struct Rank {
    pub plugin: Arc<Plugin>,
    pub oob: Oob,
    pub service: Worker,
    pub progress: Worker,
    pub seed: u64,
}

/// How long anything that must happen may take; a watchdog, not a measure.
pub const PATIENCE: Duration = Duration::from_secs(100);

/// The connections of a rank: by peer, what it sends on and what it receives on.
#[derive(Debug, Clone)]
pub struct Mesh {
    pub send: Vec<Option<Handle>>,
    pub recv: Vec<Option<Handle>>,
}

impl Rank {
    /// Opens the plugin and starts the threads; the ranks agree on the seed of the first.
    pub fn open(path: &Path, version: u32, traffic_class: i32, oob: Oob, seed: u64) -> Outcome<Self> {
        let plugin = Arc::new(Plugin::open(path, version, traffic_class)?);
        let seeds = oob.all(&seed.to_le_bytes()).map_err(|e| format!("exchange of seeds: {e}"))?;
        let seed = seeds[0][..].try_into().map_or(seed, u64::from_le_bytes);
        let (service, progress) = (Worker::new("service"), Worker::new("progress"));
        Ok(Rank { plugin, oob, service, progress, seed })
    }

    /// Ends the threads, finalizes and unloads the plugin; the line to the others stays.
    pub fn unload(self) -> Outcome<Oob> {
        let Rank { plugin, oob, service, progress, .. } = self;
        drop((service, progress));
        let plugin = Arc::into_inner(plugin).ok_or("somebody still has the plugin")?;
        plugin.close().map(|()| oob)
    }

    pub fn rank(&self) -> usize {
        self.oob.rank
    }

    pub fn ranks(&self) -> usize {
        self.oob.ranks
    }

    /// Everybody connects to all that `wanted(from, to)` names. All connections of a rank are made by its one service
    /// thread, turn by turn: a plugin that blocks in one of them hangs here.
    pub fn mesh(&self, wanted: impl Fn(usize, usize) -> bool) -> Outcome<Mesh> {
        self.mesh_within(u64::MAX, wanted)
    }

    /// The same in so many turns at most: what is not made by then is given up, as on abort.
    pub fn mesh_within(&self, turns: u64, wanted: impl Fn(usize, usize) -> bool) -> Outcome<Mesh> {
        let me = self.rank();
        let all: Vec<(usize, usize)> = (0..self.ranks())
            .flat_map(|from| (0..self.ranks()).map(move |to| (from, to)))
            .filter(|(from, to)| wanted(*from, *to))
            .collect();
        let froms: Vec<usize> = all.iter().filter(|(_, to)| *to == me).map(|(from, _)| *from).collect();
        let tos: Vec<usize> = all.iter().filter(|(from, _)| *from == me).map(|(_, to)| *to).collect();
        let plugin = Arc::clone(&self.plugin);
        let count = froms.len();
        let listeners: Vec<(Handle, Name)> = self
            .service
            .run(move || (0..count).map(|_| plugin.listen(0)).collect::<Result<_, _>>())
            .map_err(|code| format!("listen: {code}"))?;
        // Each rank's names, with whom each is for in front.
        let mut mine = Vec::new();
        for (from, (_, name)) in froms.iter().zip(&listeners) {
            mine.push(*from as u8);
            mine.extend_from_slice(name);
        }
        let names = self.oob.all(&mine).map_err(|e| format!("exchange of handles: {e}"))?;
        let find = |to: usize| -> Outcome<Name> {
            let entry = names[to].chunks_exact(1 + size_of::<Name>()).find(|entry| entry[0] == me as u8);
            entry
                .and_then(|entry| entry[1..].try_into().ok())
                .ok_or_else(|| format!("no handle from rank {to}"))
        };
        let outgoing = tos.iter().map(|to| Ok((*to, find(*to)?, None))).collect::<Outcome<Vec<_>>>()?;
        let incoming =
            froms.iter().zip(listeners).map(|(from, (listener, _))| (*from, listener, None)).collect();
        let making = Making { outgoing, incoming };
        let (plugin, ranks) = (Arc::clone(&self.plugin), self.ranks());
        self.service.run(move || making.run(&plugin, turns, ranks))
    }

    /// Closes them.
    pub fn close(&self, mesh: Mesh) -> Outcome {
        let plugin = Arc::clone(&self.plugin);
        self.service.run(move || mesh.close(&plugin))
    }

    pub fn barrier(&self) -> Outcome {
        self.oob.barrier().map_err(|e| format!("barrier: {e}"))
    }
}

/// A rank's connections on their way.
struct Making {
    outgoing: Vec<(usize, Name, Option<Handle>)>,
    incoming: Vec<(usize, Handle, Option<Handle>)>,
}

impl Making {
    fn run(mut self, plugin: &Plugin, turns: u64, ranks: usize) -> Outcome<Mesh> {
        let start = Instant::now();
        let mut outcome = Ok(());
        for _ in 0..turns {
            outcome = self.turn(plugin);
            if outcome.is_ok() && start.elapsed() > PATIENCE {
                outcome = Err("connections were not made in time".to_owned());
            }
            if outcome.is_err() || self.is_done() {
                break;
            }
            std::thread::yield_now();
        }
        for (_, listener, _) in self.incoming.iter().filter(|(.., comm)| comm.is_none()) {
            plugin.close_listen(*listener).map_err(|code| format!("closeListen: {code}"))?;
        }
        let mut mesh = Mesh { send: vec![None; ranks], recv: vec![None; ranks] };
        self.outgoing.iter().for_each(|(to, _, comm)| mesh.send[*to] = *comm);
        self.incoming.iter().for_each(|(from, _, comm)| mesh.recv[*from] = *comm);
        match outcome {
            Ok(()) => Ok(mesh),
            Err(why) => mesh.close(plugin).and(Err(why)),
        }
    }

    fn is_done(&self) -> bool {
        let (out, into) = (self.outgoing.iter(), self.incoming.iter());
        out.map(|(.., comm)| comm).chain(into.map(|(.., comm)| comm)).all(Option::is_some)
    }

    /// connect and accept once for each that is not there.
    fn turn(&mut self, plugin: &Plugin) -> Outcome {
        for (to, name, comm) in self.outgoing.iter_mut().filter(|(.., comm)| comm.is_none()) {
            *comm = plugin.connect(0, name).map_err(|code| format!("connect to rank {to}: {code}"))?;
        }
        for (from, listener, comm) in self.incoming.iter_mut().filter(|(.., comm)| comm.is_none()) {
            *comm = plugin.accept(*listener).map_err(|code| format!("accept of rank {from}: {code}"))?;
            if comm.is_some() {
                // NCCL closes it at once.
                plugin.close_listen(*listener).map_err(|code| format!("closeListen: {code}"))?;
            }
        }
        Ok(())
    }
}

impl Mesh {
    /// In the order in which NCCL does.
    fn close(self, plugin: &Plugin) -> Outcome {
        let closed = self.send.iter().flatten().try_for_each(|comm| plugin.close_send(*comm));
        let closed =
            closed.and_then(|()| self.recv.iter().flatten().try_for_each(|comm| plugin.close_recv(*comm)));
        closed.map_err(|code| format!("close: {code}"))
    }
}
