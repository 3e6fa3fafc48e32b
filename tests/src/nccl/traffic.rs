//! Messages as NCCL's proxy sends them: state machines that one progress thread steps in turn, with a window in flight.
//!
//! Sender and receiver make up the same plan from the same seed, so that every byte can be checked.

use std::ffi::{c_int, c_void};
use std::sync::Arc;
use std::time::Instant;

use super::memory::Buffer;
use super::plugin::{Group, Handle, MAX_MEMBERS, Plugin};
use super::rank::{Mesh, PATIENCE, Rank};
use super::{Dice, Outcome, ensure};

/// Steps in flight on a connection: NCCL_STEPS.
pub const STEPS: usize = 8;
/// Grouped receives of a connection in flight, at the interface's limit.
pub const MAX_GROUPS: usize = 32;

/// What a step did.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Step {
    Idle,
    Moved,
    Done,
}

/// Something the progress thread works on.
pub trait Op: Send {
    fn step(&mut self, plugin: &Plugin) -> Outcome<Step>;
}

/// Steps all of them until they are done, as NCCL's progress thread does: it yields when nothing moved.
pub fn drive(plugin: &Plugin, mut ops: Vec<Box<dyn Op>>) -> Outcome {
    let mut since = Instant::now();
    while !ops.is_empty() {
        let mut moved = false;
        let mut failed = None;
        ops.retain_mut(|op| match op.step(plugin) {
            Ok(step) => {
                moved |= step != Step::Idle;
                step != Step::Done
            }
            Err(why) => {
                failed = Some(why);
                false
            }
        });
        if let Some(why) = failed {
            return Err(why);
        }
        if moved {
            since = Instant::now();
        } else if since.elapsed() > PATIENCE {
            return Err(format!("{} operations hang", ops.len()));
        } else {
            std::thread::yield_now();
        }
    }
    Ok(())
}

/// One message of a group.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Member {
    pub size: usize,
    pub room: usize,
    pub tag: c_int,
}

/// Which messages there are.
#[derive(Debug, Clone)]
pub enum Kind {
    /// One a group, of these sizes in turn.
    Sizes(Vec<usize>),
    /// Groups of any length, sizes up to this, few tags, so that many are double.
    Mixed { max: usize },
}

/// All messages of one connection.
#[derive(Debug, Clone)]
pub struct Plan {
    pub seed: u64,
    pub kind: Kind,
    pub groups: u64,
    /// Groups in flight.
    pub window: usize,
}

impl Plan {
    fn longest(&self) -> usize {
        match &self.kind {
            Kind::Sizes(sizes) => sizes.iter().copied().max().unwrap_or(0),
            Kind::Mixed { max } => *max,
        }
    }

    /// Bytes from one member's place in a buffer to the next: not a multiple of anything.
    fn stride(&self) -> usize {
        self.longest() + GUARD + 8
    }

    fn members(&self) -> usize {
        if matches!(self.kind, Kind::Mixed { .. }) { MAX_MEMBERS } else { 1 }
    }

    pub fn buffer(&self) -> Buffer {
        Buffer::new(self.window * self.members() * self.stride())
    }

    fn place(&self, group: u64, member: usize) -> usize {
        (group as usize % self.window * self.members() + member) * self.stride()
    }

    fn stream(&self, group: u64, member: usize) -> u64 {
        Dice::of(&[self.seed, group, member as u64, 1]).roll()
    }

    /// The members of group number `group`.
    pub fn group(&self, group: u64) -> Vec<Member> {
        match &self.kind {
            Kind::Sizes(sizes) => {
                let size = sizes[group as usize % sizes.len()];
                vec![Member { size, room: size, tag: 7 }]
            }
            Kind::Mixed { max } => {
                let mut dice = Dice::of(&[self.seed, group]);
                let n = if dice.below(2) == 0 { 1 } else { 1 + dice.below(MAX_MEMBERS as u64) };
                let member = |_| {
                    let room = mixed_size(&mut dice, *max);
                    let size = if dice.below(3) == 0 { dice.below(room as u64 + 1) as usize } else { room };
                    Member { size, room, tag: dice.below(4) as c_int - 1 }
                };
                (0..n).map(member).collect()
            }
        }
    }

    /// The order in which the sender sends a group's members, as tags allow it: of a tag's, always the first that is left.
    fn order(&self, group: u64, members: &[Member]) -> Vec<usize> {
        let mut dice = Dice::of(&[self.seed, group, 2]);
        let mut left: Vec<usize> = (0..members.len()).collect();
        let mut order = Vec::new();
        while !left.is_empty() {
            let tag = members[left[dice.below(left.len() as u64) as usize]].tag;
            let at = left.iter().position(|i| members[*i].tag == tag).expect("it is there");
            order.push(left.remove(at));
        }
        order
    }
}

/// Mostly small, now and then up to `max`; never empty buffers only.
fn mixed_size(dice: &mut Dice, max: usize) -> usize {
    let limit = match dice.below(8) {
        0 => 0,
        1..=4 => 256,
        5 | 6 => 8192,
        _ => max,
    };
    dice.below(limit.min(max) as u64 + 1) as usize
}

/// Bytes behind a message that nobody may touch.
const GUARD: usize = 64;

/// The sending end of a plan.
pub struct Sending {
    plan: Plan,
    comm: Handle,
    buffer: Arc<Buffer>,
    mhandle: Handle,
    group: u64,
    members: Vec<Member>,
    order: Vec<usize>,
    at: usize,
    flying: Vec<(Handle, u64, usize, usize)>,
    dice: Dice,
}

impl Sending {
    pub fn new(plan: Plan, comm: Handle, buffer: Arc<Buffer>, mhandle: Handle) -> Self {
        let dice = Dice::of(&[plan.seed, 3]);
        let (members, order) = (Vec::new(), Vec::new());
        let mut new = Sending {
            plan,
            comm,
            buffer,
            mhandle,
            group: 0,
            members,
            order,
            at: 0,
            flying: Vec::new(),
            dice,
        };
        new.begin();
        new
    }

    /// Prepares the members of the group that is next.
    fn begin(&mut self) {
        if self.group == self.plan.groups {
            return;
        }
        self.members = self.plan.group(self.group);
        self.order = self.plan.order(self.group, &self.members);
        self.at = 0;
    }

    /// A place in the buffer is free when what was there the lap before has been sent.
    fn is_free(&self, member: usize) -> bool {
        let lap = self.group.checked_sub(self.plan.window as u64);
        lap.is_none_or(|old| !self.flying.iter().any(|(_, group, m, _)| *group == old && *m == member))
    }

    fn send(&mut self, plugin: &Plugin) -> Outcome<bool> {
        if self.group == self.plan.groups || self.flying.len() == MAX_GROUPS * MAX_MEMBERS {
            return Ok(false);
        }
        let member = self.order[self.at];
        if !self.is_free(member) {
            return Ok(false);
        }
        let Member { size, tag, .. } = self.members[member];
        let place = self.plan.place(self.group, member);
        self.buffer.fill(place, size, self.plan.stream(self.group, member));
        let request = plugin.isend(self.comm, self.buffer.at(place), size, tag, self.mhandle);
        let Some(request) = request.map_err(|code| format!("isend: {code}"))? else { return Ok(false) };
        self.flying.push((request, self.group, member, size));
        self.at += 1;
        if self.at == self.order.len() {
            self.group += 1;
            self.begin();
        }
        Ok(true)
    }

    fn test(&mut self, plugin: &Plugin) -> Outcome<bool> {
        if self.flying.is_empty() {
            return Ok(false);
        }
        let at = self.dice.below(self.flying.len() as u64) as usize;
        let (request, .., size) = self.flying[at];
        let mut sent = [-1];
        if !plugin.test(request, Some(&mut sent)).map_err(|code| format!("test of a send: {code}"))? {
            return Ok(false);
        }
        self.flying.swap_remove(at);
        ensure(sent[0] == size as c_int, || format!("sent {} bytes instead of {size}", sent[0]))?;
        Ok(true)
    }
}

impl Op for Sending {
    fn step(&mut self, plugin: &Plugin) -> Outcome<Step> {
        let sent = self.send(plugin)?;
        let tested = self.test(plugin)?;
        Ok(match (self.group == self.plan.groups && self.flying.is_empty(), sent || tested) {
            (true, _) => Step::Done,
            (_, true) => Step::Moved,
            _ => Step::Idle,
        })
    }
}

/// The receiving end of a plan.
pub struct Receiving {
    plan: Plan,
    comm: Handle,
    buffer: Arc<Buffer>,
    mhandle: Handle,
    posted: u64,
    flying: Vec<(Handle, u64)>,
    dice: Dice,
}

impl Receiving {
    pub fn new(plan: Plan, comm: Handle, buffer: Arc<Buffer>, mhandle: Handle) -> Self {
        let dice = Dice::of(&[plan.seed, 4]);
        Receiving { plan, comm, buffer, mhandle, posted: 0, flying: Vec::new(), dice }
    }

    fn post(&mut self, plugin: &Plugin) -> Outcome<bool> {
        let lap = self.posted.checked_sub(self.plan.window as u64);
        let busy = lap.is_some_and(|old| self.flying.iter().any(|(_, group)| *group == old));
        if self.posted == self.plan.groups || self.flying.len() == self.plan.window || busy {
            return Ok(false);
        }
        let members = self.plan.group(self.posted);
        let places: Vec<usize> = (0..members.len()).map(|m| self.plan.place(self.posted, m)).collect();
        for (place, member) in places.iter().zip(&members) {
            self.buffer.fill(place + member.size, GUARD, GUARD as u64);
        }
        let data: Vec<*mut c_void> = places.iter().map(|place| self.buffer.at(*place)).collect();
        let sizes: Vec<usize> = members.iter().map(|m| m.room).collect();
        let tags: Vec<c_int> = members.iter().map(|m| m.tag).collect();
        let mhandles = vec![self.mhandle; members.len()];
        let group = Group { data: &data, sizes: &sizes, tags: &tags, mhandles: &mhandles };
        let optional = self.dice.below(4) == 0;
        let request = plugin.irecv(self.comm, &group, optional).map_err(|code| format!("irecv: {code}"))?;
        let Some(request) = request else { return Ok(false) };
        self.flying.push((request, self.posted));
        self.posted += 1;
        Ok(true)
    }

    fn test(&mut self, plugin: &Plugin) -> Outcome<bool> {
        if self.flying.is_empty() {
            return Ok(false);
        }
        let at = self.dice.below(self.flying.len() as u64) as usize;
        let (request, group) = self.flying[at];
        let mut sizes = [-1; MAX_MEMBERS + 1];
        if !plugin.test(request, Some(&mut sizes)).map_err(|code| format!("test of a receive: {code}"))? {
            return Ok(false);
        }
        self.flying.swap_remove(at);
        let members = self.plan.group(group);
        ensure(sizes[members.len()] == -1, || "test wrote more sizes than the group has members".into())?;
        for (m, member) in members.iter().enumerate() {
            self.judge(group, m, member, sizes[m])
                .map_err(|why| format!("group {group}, member {m} ({member:?}): {why}"))?;
        }
        Ok(true)
    }

    fn judge(&self, group: u64, m: usize, member: &Member, said: c_int) -> Outcome {
        ensure(said == member.size as c_int, || format!("test says {said} bytes"))?;
        let place = self.plan.place(group, m);
        self.buffer.check(place, member.size, self.plan.stream(group, m))?;
        self.buffer.check(place + member.size, GUARD, GUARD as u64).map_err(|why| format!("behind it: {why}"))
    }
}

impl Op for Receiving {
    fn step(&mut self, plugin: &Plugin) -> Outcome<Step> {
        let posted = self.post(plugin)?;
        let tested = self.test(plugin)?;
        Ok(match (self.posted == self.plan.groups && self.flying.is_empty(), posted || tested) {
            (true, _) => Step::Done,
            (_, true) => Step::Moved,
            _ => Step::Idle,
        })
    }
}

/// Registers, runs `plan` on every connection of `mesh` at once, deregisters.
pub fn exchange(rank: &Rank, mesh: &Mesh, plan: &Plan) -> Outcome {
    let me = rank.rank();
    let mut registered = Vec::new();
    let mut ops: Vec<Box<dyn Op>> = Vec::new();
    for peer in 0..rank.ranks() {
        for (comm, from, to, sends) in [(mesh.send[peer], me, peer, true), (mesh.recv[peer], peer, me, false)]
        {
            let Some(comm) = comm else { continue };
            let seed = Dice::of(&[rank.seed, plan.seed, from as u64, to as u64]).roll();
            let plan = Plan { seed, ..plan.clone() };
            let buffer = Arc::new(plan.buffer());
            let (plugin, shared) = (Arc::clone(&rank.plugin), Arc::clone(&buffer));
            let mhandle = rank.service.run(move || plugin.reg_buffer(comm, &shared));
            let mhandle = mhandle.map_err(|code| format!("regMr: {code}"))?;
            registered.push((comm, mhandle));
            ops.push(if sends {
                Box::new(Sending::new(plan, comm, buffer, mhandle))
            } else {
                Box::new(Receiving::new(plan, comm, buffer, mhandle))
            });
        }
    }
    let plugin = Arc::clone(&rank.plugin);
    rank.progress.run(move || drive(&plugin, ops))?;
    let plugin = Arc::clone(&rank.plugin);
    rank.service
        .run(move || registered.into_iter().try_for_each(|(comm, mhandle)| plugin.dereg(comm, mhandle)))
        .map_err(|code| format!("deregMr: {code}"))
}

/// Every size that has ever mattered, around powers of two, up to `max`.
pub fn sizes(max: usize) -> Vec<usize> {
    let powers =
        std::iter::successors(Some(1usize), |size| size.checked_mul(2)).take_while(|size| *size <= max);
    let mut sizes: Vec<usize> =
        powers.flat_map(|size| [size - 1, size, size + 1]).filter(|size| *size <= max).collect();
    sizes.sort_unstable();
    sizes.dedup();
    sizes
}

/// A ring in which everybody sends to the next: all sizes with eight steps in flight, then mixed groups up to the limit.
pub fn ring(rank: &Rank, max: usize) -> Outcome {
    let n = rank.ranks();
    let mesh = rank.mesh(|from, to| to == (from + 1) % n)?;
    let all = sizes(max.min(1 << 20));
    let groups = all.len() as u64 * 2;
    exchange(rank, &mesh, &Plan { seed: 1, kind: Kind::Sizes(all), groups, window: STEPS })?;
    for size in [4 << 20, 64 << 20, 1 << 30].into_iter().filter(|size| *size <= max) {
        // Three of them, or one of a size that fills memory.
        let (groups, window) = if size > 64 << 20 { (1, 1) } else { (3, 2) };
        exchange(rank, &mesh, &Plan { seed: 2, kind: Kind::Sizes(vec![size]), groups, window })?;
    }
    let limits = Plan { seed: 3, kind: Kind::Mixed { max: 4096 }, groups: 2_000, window: MAX_GROUPS };
    exchange(rank, &mesh, &limits)?;
    rank.barrier()?;
    rank.close(mesh)
}

/// Everybody sends to everybody, itself included.
pub fn all_to_all(rank: &Rank, max: usize) -> Outcome {
    let mesh = rank.mesh(|_, _| true)?;
    exchange(
        rank,
        &mesh,
        &Plan { seed: 4, kind: Kind::Mixed { max: max.min(1 << 20) }, groups: 300, window: STEPS },
    )?;
    rank.barrier()?;
    rank.close(mesh)
}

/// A ring all-reduce: the sum of all ranks' vectors, by scatter-reduce and all-gather.
pub fn all_reduce(rank: &Rank, words: usize) -> Outcome {
    let (n, me) = (rank.ranks(), rank.rank());
    let mesh = rank.mesh(|from, to| to == (from + 1) % n)?;
    let (send, recv) = (mesh.send[(me + 1) % n], mesh.recv[(me + n - 1) % n]);
    let (Some(send), Some(recv)) = (send, recv) else { return Err("no ring".into()) };
    let plugin = Arc::clone(&rank.plugin);
    let value = move |rank: usize, i: usize| (rank as u32 + 1).wrapping_mul(i as u32).wrapping_add(17);
    let reduced = rank.progress.run(move || {
        let mut mine: Vec<u32> = (0..words).map(|i| value(me, i)).collect();
        let slice = words / n * 4;
        let (out, into) = (Buffer::new(slice), Buffer::new(slice));
        let code = |code| format!("all-reduce: {code}");
        let (out_mr, in_mr) =
            (plugin.reg_buffer(send, &out).map_err(code)?, plugin.reg_buffer(recv, &into).map_err(code)?);
        for step in 0..2 * (n - 1) {
            let outgoing = (me + 2 * n - step) % n;
            let incoming = (outgoing + n - 1) % n;
            let piece = |chunk: usize| chunk * (words / n)..(chunk + 1) * (words / n);
            out.put_words(&mine[piece(outgoing)]);
            one_each_way(&plugin, (send, &out, out_mr), (recv, &into, in_mr), slice)?;
            let got = into.words(words / n);
            for (mine, got) in mine[piece(incoming)].iter_mut().zip(got) {
                *mine = if step < n - 1 { mine.wrapping_add(got) } else { got };
            }
        }
        plugin.dereg(send, out_mr).map_err(code)?;
        plugin.dereg(recv, in_mr).map_err(code)?;
        Ok::<_, String>(mine)
    })?;
    for (i, got) in reduced.iter().enumerate().take(words / n * n) {
        let wanted = (0..n).fold(0u32, |sum, rank| sum.wrapping_add(value(rank, i)));
        ensure(*got == wanted, || format!("word {i} of the sum is {got} instead of {wanted}"))?;
    }
    rank.barrier()?;
    rank.close(mesh)
}

type End<'a> = (Handle, &'a Buffer, Handle);

/// Sends a buffer in one direction while another is received, in slices with a window in flight.
fn one_each_way(plugin: &Plugin, send: End<'_>, recv: End<'_>, bytes: usize) -> Outcome {
    const SLICE: usize = 64 << 10;
    let slices: Vec<(usize, usize)> =
        (0..bytes).step_by(SLICE).map(|at| (at, (bytes - at).min(SLICE))).collect();
    let (mut posted, mut sent, mut got, mut gone) = (0, 0, 0, 0);
    let (mut receives, mut sends) = (vec![None; slices.len()], vec![None; slices.len()]);
    let start = Instant::now();
    while got < slices.len() || gone < slices.len() {
        let before = (posted, sent, got, gone);
        if posted < slices.len().min(got + STEPS) {
            let (at, len) = slices[posted];
            let lists = (&[recv.1.at(at)], &[len], &[0], &[recv.2]);
            let group = Group { data: lists.0, sizes: lists.1, tags: lists.2, mhandles: lists.3 };
            receives[posted] =
                plugin.irecv(recv.0, &group, false).map_err(|code| format!("irecv: {code}"))?;
            posted += usize::from(receives[posted].is_some());
        }
        if sent < slices.len().min(gone + STEPS) {
            let (at, len) = slices[sent];
            sends[sent] = plugin
                .isend(send.0, send.1.at(at), len, 0, send.2)
                .map_err(|code| format!("isend: {code}"))?;
            sent += usize::from(sends[sent].is_some());
        }
        let done = |request: Option<Option<Handle>>| match request.flatten() {
            Some(request) => plugin.test(request, None).map_err(|code| format!("test: {code}")),
            None => Ok(false),
        };
        got += usize::from(got < posted && done(receives.get(got).copied())?);
        gone += usize::from(gone < sent && done(sends.get(gone).copied())?);
        if before == (posted, sent, got, gone) {
            ensure(start.elapsed() < PATIENCE, || "an all-reduce step hangs".into())?;
            std::thread::yield_now();
        }
    }
    Ok(())
}
