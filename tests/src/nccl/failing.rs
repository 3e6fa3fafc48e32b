//! Ranks that abort, die, or lose their router; and plugins that are unloaded and loaded again.

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use freeflow_nccl_abi::result;

use super::memory::Buffer;
use super::plugin::{Handle, Plugin};
use super::rank::{Mesh, PATIENCE, Rank};
use super::traffic::{Kind, Op, Plan, Receiving, STEPS, Sending, Step, exchange};
use super::{Dice, Outcome, ensure};

/// Within this time a dead peer or router must be an error.
const NOTICED: Duration = Duration::from_secs(30);

/// Everything that a rank holds while traffic runs.
struct Load {
    mesh: Mesh,
    registered: Vec<(Handle, Handle)>,
    /// Freed after deregistration, and looked at before.
    buffers: Vec<Arc<Buffer>>,
    ops: Vec<Box<dyn Op>>,
}

impl Load {
    /// Traffic between all ranks that does not end by itself.
    fn start(rank: &Rank, round: u64, size: usize) -> Outcome<Self> {
        let me = rank.rank();
        let mesh = rank.mesh(|from, to| from != to)?;
        let mut load = Load { mesh, registered: Vec::new(), buffers: Vec::new(), ops: Vec::new() };
        for peer in 0..rank.ranks() {
            for (comm, from, to) in [(load.mesh.send[peer], me, peer), (load.mesh.recv[peer], peer, me)] {
                let Some(comm) = comm else { continue };
                let seed = Dice::of(&[rank.seed, round, from as u64, to as u64]).roll();
                let plan = Plan {
                    seed,
                    kind: Kind::Sizes(vec![size, 8, 0, size / 2]),
                    groups: u64::MAX,
                    window: STEPS,
                };
                let buffer = Arc::new(plan.buffer());
                let (plugin, shared) = (Arc::clone(&rank.plugin), Arc::clone(&buffer));
                let mhandle = rank.service.run(move || plugin.reg_buffer(comm, &shared));
                let mhandle = mhandle.map_err(|code| format!("regMr: {code}"))?;
                load.registered.push((comm, mhandle));
                load.buffers.push(Arc::clone(&buffer));
                load.ops.push(if from == me {
                    Box::new(Sending::new(plan, comm, buffer, mhandle))
                } else {
                    Box::new(Receiving::new(plan, comm, buffer, mhandle))
                });
            }
        }
        Ok(load)
    }

    /// Steps until `stop` or until an operation fails; says how.
    fn run(&mut self, plugin: &Plugin, stop: &AtomicBool) -> Option<String> {
        let ops = &mut self.ops;
        while !stop.load(Ordering::Relaxed) {
            let mut moved = false;
            for op in ops.iter_mut() {
                match op.step(plugin) {
                    Ok(step) => moved |= step != Step::Idle,
                    Err(why) => return Some(why),
                }
            }
            if !moved {
                std::thread::yield_now();
            }
        }
        None
    }

    /// What NCCL does on abort: deregisters with operations in flight, closes, and waits for nobody.
    fn abort(self, plugin: &Plugin) -> Outcome {
        for (comm, mhandle) in &self.registered {
            plugin.dereg(*comm, *mhandle).map_err(|code| format!("deregMr: {code}"))?;
        }
        let sums: Vec<u64> = self.buffers.iter().map(|buffer| buffer.sum()).collect();
        for comm in self.mesh.send.iter().flatten() {
            plugin.close_send(*comm).map_err(|code| format!("closeSend: {code}"))?;
        }
        for (buffer, sum) in self.buffers.iter().zip(sums) {
            ensure(buffer.sum() == sum, || "a buffer changed after deregistration".into())?;
        }
        for comm in self.mesh.recv.iter().flatten() {
            plugin.close_recv(*comm).map_err(|code| format!("closeRecv: {code}"))?;
        }
        Ok(())
    }
}

/// Rounds that end at a random instant, while connections are made or while traffic runs.
pub fn aborts(rank: &Rank, rounds: u64) -> Outcome {
    for round in 0..rounds {
        abort_connecting(rank, round).map_err(|why| format!("round {round}: {why}"))?;
        abort_traffic(rank, round).map_err(|why| format!("round {round}: {why}"))?;
    }
    Ok(())
}

/// Every rank gives up after some turns of its own; what another one has begun with it may become an error.
fn abort_connecting(rank: &Rank, round: u64) -> Outcome {
    let turns = Dice::of(&[rank.seed, round, rank.rank() as u64, 10]).below(60);
    match rank.mesh_within(turns, |_, _| true) {
        Ok(mesh) => rank.close(mesh)?,
        Err(why) => ensure(is_expected(&why), || why)?,
    }
    rank.barrier()
}

/// One rank ends the traffic; the others hear of it as an error and end, too.
fn abort_traffic(rank: &Rank, round: u64) -> Outcome {
    let mut dice = Dice::of(&[rank.seed, round, 5]);
    let first = dice.below(rank.ranks() as u64) as usize == rank.rank();
    let after = Duration::from_micros(dice.below(40_000));
    let size = [64, 8192, 600_000][dice.below(3) as usize];
    let mut load = Load::start(rank, round, size)?;
    rank.barrier()?;
    let stop = Arc::new(AtomicBool::new(false));
    let (plugin, stopped) = (Arc::clone(&rank.plugin), Arc::clone(&stop));
    let traffic = rank.progress.start(move || {
        let failed = load.run(&plugin, &stopped);
        (load, failed)
    });
    if first {
        std::thread::sleep(after);
        stop.store(true, Ordering::Relaxed);
    }
    let (load, failed) = traffic.wait();
    if let Some(why) = failed {
        ensure(is_expected(&why), || why)?;
    }
    let plugin = Arc::clone(&rank.plugin);
    rank.service.run(move || load.abort(&plugin))?;
    rank.barrier()
}

/// Only a remote or system error may come of what others do.
fn is_expected(why: &str) -> bool {
    [result::REMOTE_ERROR, result::SYSTEM_ERROR].iter().any(|code| why.ends_with(&format!(": {code}")))
}

/// Rank 1 kills itself under load; the others must get an error in time, and end in good order.
pub fn killed(rank: &Rank) -> Outcome {
    let mut load = Load::start(rank, 0, 300_000)?;
    rank.barrier()?;
    let plugin = Arc::clone(&rank.plugin);
    let traffic = rank.progress.start(move || {
        let failed = load.run(&plugin, &AtomicBool::new(false));
        (load, failed)
    });
    let wait = Duration::from_micros(Dice::of(&[rank.seed, 6]).below(100_000));
    std::thread::sleep(wait);
    if rank.rank() == 1 {
        let own = rustix::process::getpid();
        return rustix::process::kill_process(own, rustix::process::Signal::KILL).map_err(|e| e.to_string());
    }
    fails_in_time(rank, traffic.wait(), NOTICED, wait)
}

/// The router dies (the caller kills it when told): what is idle must become an error in time.
pub fn orphaned(rank: &Rank) -> Outcome {
    let mesh = rank.mesh(|from, to| from != to)?;
    // Who has not yet met its peer when the router dies waits for the peer, not for the router.
    let greeting = Plan { seed: 0, kind: Kind::Sizes(vec![64]), groups: 1, window: 1 };
    exchange(rank, &mesh, &greeting)?;
    // From now on everybody receives and nobody sends.
    let recv = mesh.recv.iter().flatten().next().copied().ok_or("no peer")?;
    let plan = Plan { seed: 0, kind: Kind::Sizes(vec![64]), groups: u64::MAX, window: STEPS };
    let buffer = Arc::new(plan.buffer());
    let mhandle = rank.plugin.reg_buffer(recv, &buffer).map_err(|code| format!("regMr: {code}"))?;
    let ops: Vec<Box<dyn Op>> = vec![Box::new(Receiving::new(plan, recv, Arc::clone(&buffer), mhandle))];
    let mut load = Load { mesh, registered: vec![(recv, mhandle)], buffers: vec![buffer], ops };
    rank.barrier()?;
    println!("# idle");
    let plugin = Arc::clone(&rank.plugin);
    let ended = rank.progress.run(move || {
        let failed = load.run(&plugin, &AtomicBool::new(false));
        (load, failed)
    });
    fails_in_time(rank, ended, Duration::from_secs(60), Duration::ZERO)
}

fn fails_in_time(
    rank: &Rank,
    (load, failed): (Load, Option<String>),
    limit: Duration,
    before: Duration,
) -> Outcome {
    let start = Instant::now();
    let why = failed.ok_or("no error")?;
    ensure(is_expected(&why), || why.clone())?;
    println!("# noticed: {why}");
    let plugin = Arc::clone(&rank.plugin);
    rank.service.run(move || load.abort(&plugin))?;
    ensure(start.elapsed() + before < limit + NOTICED, || "closing took too long".into())
}

/// Loads, uses and unloads the plugin again and again, all ranks at once: traffic flows between all of them, and nothing of
/// the plugin's runs on or stays open afterwards.
pub fn reloads(mut rank: Rank, path: &Path, times: u64) -> Outcome {
    let (version, class, seed) = (rank.plugin.version, rank.plugin.traffic_class(), rank.seed);
    let mut first = None;
    for time in 0..times {
        let mesh = rank.mesh(|_, _| true)?;
        let plan = Plan { seed: time, kind: Kind::Mixed { max: 100_000 }, groups: 200, window: STEPS };
        exchange(&rank, &mesh, &plan).map_err(|why| format!("load {time}: {why}"))?;
        rank.barrier()?;
        rank.close(mesh)?;
        let oob = rank.unload().map_err(|why| format!("load {time}: {why}"))?;
        let open = count("fd");
        let before = *first.get_or_insert(open);
        ensure(open <= before, || {
            format!("after load {time} there are {open} descriptors, after the first {before}")
        })?;
        // Up to v10 nobody says that it is over: the device stays open.
        let most = if version < 11 { 2 } else { 1 };
        ensure(are_threads(most), || format!("after load {time} there are {} threads", count("task")))?;
        rank = Rank::open(path, version, class, oob, seed)?;
    }
    rank.unload().map(drop)
}

fn count(what: &str) -> usize {
    std::fs::read_dir(format!("/proc/self/{what}")).map_or(0, Iterator::count)
}

/// Are there at most so many threads? One that was joined may be in /proc for some moments more.
fn are_threads(most: usize) -> bool {
    let start = Instant::now();
    while count("task") > most {
        if start.elapsed() > PATIENCE {
            return false;
        }
        std::thread::yield_now();
    }
    true
}
