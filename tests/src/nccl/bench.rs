//! Figures: bandwidth with eight steps in flight, latency, memcpy of the same buffers, and processor time.
//!
//! Ranks work in pairs: 0 receives from 1, 2 from 3. One rank prints `NAME VALUE` lines.

use std::collections::VecDeque;
use std::sync::{Arc, LazyLock};
use std::time::{Duration, Instant};

use rustix::time::{ClockId, clock_gettime};

use super::Outcome;
use super::memory::Buffer;
use super::plugin::{Group, Handle, Plugin};
use super::rank::Rank;
use super::traffic::STEPS;

/// One end's comm and registered slots.
struct End {
    comm: Handle,
    buffer: Buffer,
    mhandle: Handle,
    size: usize,
}

impl End {
    fn new(plugin: &Plugin, comm: Handle, size: usize) -> Outcome<Self> {
        let buffer = Buffer::new(size * STEPS);
        buffer.fill(0, buffer.len(), 1);
        let mhandle = plugin.reg_buffer(comm, &buffer).map_err(|code| format!("regMr: {code}"))?;
        Ok(End { comm, buffer, mhandle, size })
    }

    fn isend(&self, plugin: &Plugin, step: usize) -> Option<Handle> {
        let data = self.buffer.at(step % STEPS * self.size);
        plugin
            .isend(self.comm, data, self.size, 0, self.mhandle)
            .unwrap_or_else(|code| panic!("isend: {code}"))
    }

    fn irecv(&self, plugin: &Plugin, step: usize) -> Option<Handle> {
        let data = self.buffer.at(step % STEPS * self.size);
        let lists = (&[data], &[self.size], &[0], &[self.mhandle]);
        let group = Group { data: lists.0, sizes: lists.1, tags: lists.2, mhandles: lists.3 };
        plugin.irecv(self.comm, &group, false).unwrap_or_else(|code| panic!("irecv: {code}"))
    }
}

fn done(plugin: &Plugin, request: Handle) -> bool {
    plugin.test(request, None).unwrap_or_else(|code| panic!("test: {code}"))
}

/// `count` messages with a window in flight, tested in order, from whatever starts one.
fn stream(plugin: &Plugin, count: usize, start: impl Fn(usize) -> Option<Handle>) {
    let mut flying = VecDeque::with_capacity(STEPS);
    let (mut begun, mut ended) = (0, 0);
    while ended < count {
        let before = (begun, ended);
        if begun < count
            && flying.len() < STEPS
            && let Some(request) = start(begun)
        {
            flying.push_back(request);
            begun += 1;
        }
        if flying.front().is_some_and(|request| done(plugin, *request)) {
            flying.pop_front();
            ended += 1;
        }
        if before == (begun, ended) {
            std::thread::yield_now();
        }
    }
}

/// Processor time of this process.
fn spent() -> Duration {
    let time = clock_gettime(ClockId::ProcessCPUTime);
    Duration::new(time.tv_sec as u64, time.tv_nsec as u32)
}

/// GB/s of all pairs together, and processor seconds of all ranks per GB.
pub fn bandwidth(rank: &Rank, size: usize, total: usize) -> Outcome {
    let me = rank.rank();
    let mesh = rank.mesh(|from, to| from == to + 1 && to % 2 == 0)?;
    let comm =
        mesh.send.iter().chain(&mesh.recv).flatten().next().copied().ok_or("an odd number of ranks")?;
    let end = End::new(&rank.plugin, comm, size)?;
    let count = (total / size).max(4 * STEPS);
    let plugin = Arc::clone(&rank.plugin);
    let one = |count: usize| {
        if me.is_multiple_of(2) {
            stream(&plugin, count, |step| end.irecv(&plugin, step));
        } else {
            stream(&plugin, count, |step| end.isend(&plugin, step));
        }
    };
    one(count / 8);
    rank.barrier()?;
    let (start, before) = (Instant::now(), spent());
    one(count);
    let mine = (spent() - before).as_secs_f64();
    rank.barrier()?;
    let seconds = start.elapsed().as_secs_f64();
    let all = rank.oob.all(&mine.to_le_bytes()).map_err(|e| e.to_string())?;
    let cpu: f64 = all.iter().filter_map(|bytes| Some(f64::from_le_bytes(bytes[..].try_into().ok()?))).sum();
    let gigabytes = (rank.ranks() / 2 * count * size) as f64 / 1e9;
    // A sender: of two hosts' ranks the one that was started last, which a bench reads.
    if me == rank.ranks() - 1 {
        println!("bandwidth {:.4}", gigabytes / seconds);
        println!("cpu {:.5}", cpu / gigabytes);
    }
    end_of(rank, end)?;
    rank.close(mesh)
}

/// Keeps this thread, and those that it starts, on one processor.
pub fn pin(rank: usize) -> Outcome {
    // Asked once: who is pinned has only one.
    static PROCESSORS: LazyLock<usize> =
        LazyLock::new(|| std::thread::available_parallelism().map_or(1, usize::from));
    let mut set = rustix::thread::CpuSet::new();
    set.set(rank % *PROCESSORS);
    rustix::thread::sched_setaffinity(None, &set).map_err(|e| format!("sched_setaffinity: {e}"))
}

/// memcpy of the same buffers as [`bandwidth`] has, registered like them: made where each rank makes its own, and copied
/// by one thread where the sender is.
pub fn memcpy(rank: &Rank, size: usize, total: usize, pinned: bool) -> Outcome {
    let mesh = rank.mesh(|from, to| from == to)?;
    let comm = mesh.send[rank.rank()].ok_or("no connection with itself")?;
    let to = End::new(&rank.plugin, comm, size)?;
    if pinned {
        pin(1)?;
    }
    let from = End::new(&rank.plugin, comm, size)?;
    let count = (total / size).max(4 * STEPS);
    let copy = |count: usize| {
        for step in 0..count {
            let at = step % STEPS * size;
            to.buffer.copy(at, &from.buffer, at, size);
        }
    };
    copy(count / 8);
    let start = Instant::now();
    copy(count);
    println!("memcpy {:.4}", (count * size) as f64 / 1e9 / start.elapsed().as_secs_f64());
    end_of(rank, from)?;
    end_of(rank, to)?;
    rank.close(mesh)
}

/// Round trips between two looks at the clock, which costs as much as a good part of one.
const BATCH: usize = 16;

/// Half a round trip in us: the median over batches of them.
pub fn latency(rank: &Rank, size: usize, count: usize) -> Outcome {
    let n = rank.ranks();
    let mesh = rank.mesh(|from, to| n == 2 && from != to)?;
    let peer = 1 - rank.rank();
    let (Some(send), Some(recv)) = (mesh.send[peer], mesh.recv[peer]) else {
        return Err("two ranks are needed".into());
    };
    let (out, into) = (End::new(&rank.plugin, send, size)?, End::new(&rank.plugin, recv, size)?);
    let mut batches = ping_pong(rank, &out, &into, count.div_ceil(BATCH))?;
    batches.sort_unstable();
    if rank.rank() == 0 {
        let median = batches[batches.len() / 2].as_secs_f64() * 1e6;
        println!("latency {:.4}", median / BATCH as f64 / 2.0);
    }
    end_of(rank, out)?;
    end_of(rank, into)?;
    rank.close(mesh)
}

/// How long each batch took. Receives are posted well ahead, as NCCL posts them: while the other side has the ball.
fn ping_pong(rank: &Rank, out: &End, into: &End, batches: usize) -> Outcome<Vec<Duration>> {
    let plugin = &rank.plugin;
    let first = rank.rank() == 0;
    let post = |step| into.irecv(plugin, step).ok_or_else(|| "irecv is busy".to_owned());
    let mut receives = (0..STEPS).map(post).collect::<Outcome<VecDeque<Handle>>>()?;
    rank.barrier()?;
    let send = |step| {
        loop {
            if let Some(request) = out.isend(plugin, step) {
                break request;
            }
        }
    };
    let round_trip = |step: usize, receives: &mut VecDeque<Handle>| -> Outcome {
        let mut sent = first.then(|| send(step));
        while !done(plugin, receives[0]) {}
        receives.pop_front();
        sent = sent.or_else(|| Some(send(step)));
        receives.push_back(post(step + STEPS)?);
        while sent.is_some_and(|sent| !done(plugin, sent)) {}
        Ok(())
    };
    let mut times = Vec::with_capacity(batches);
    for batch in 0..batches {
        let start = Instant::now();
        (batch * BATCH..(batch + 1) * BATCH).try_for_each(|step| round_trip(step, &mut receives))?;
        times.push(start.elapsed());
    }
    // Receives are left over at both ends: closing copes.
    rank.barrier()?;
    Ok(times)
}

fn end_of(rank: &Rank, end: End) -> Outcome {
    rank.plugin.dereg(end.comm, end.mhandle).map_err(|code| format!("deregMr: {code}"))
}
