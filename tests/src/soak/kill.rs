//! Deaths and pauses at random instants under load.
//!
//! Three workers, each in a container of its own, are linked with each other; one of them, the victim, is killed or stopped in
//! most rounds and started anew. Two more, which have nothing to do with them, ping each other all the time. Quotas are so
//! tight that what leaks is missed soon.

use std::io;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

use freeflow_router::admin;
use rustix::process::Signal;

use super::Result;
use super::dice::Dice;
use super::process::Held;
use super::worker::{Worker, link};
use crate::path::{Host, Tree};

/// What the issue promises: a death is known to its peers within this time.
pub const PROMISE: Duration = Duration::from_secs(1);

#[derive(Debug, Clone)]
pub struct Options {
    pub rounds: u32,
    pub seed: u64,
    /// Times and rates are reported, not judged: the machine may be busy with other things.
    pub lenient: bool,
}

/// Twice what the largest container needs at one time: a dead process is buried while its successor starts.
const QUOTAS: &str =
    "max_qp = 8\nmax_cq = 3\nmax_channel = 3\nmax_mr = 8\nmax_pd = 3\nmax_clients = 6\nmax_slab = 4\n";
/// The same worker is the victim for so many rounds: the others live long enough to show what they leak.
const BLOCK: u32 = 25;
/// Rounds after which a worker's and the router's holdings are what they will stay.
const WARM: u32 = 5;
/// Rounds between two looks at what everybody holds.
const LOOK: u32 = 8;
/// Slot whose memory cannot move.
const FAR: usize = 7;
/// IBV_EVENT_QP_FATAL, IBV_EVENT_COMM_EST.
const QP_FATAL: &str = "1";
const COMM_EST: &str = "4";

/// Two of the three workers, a slot of each, and the kind of load.
#[derive(Debug, Clone, Copy)]
struct Link {
    ends: [(usize, usize); 2],
    kind: &'static str,
}

const LINKS: [Link; 4] = [
    Link { ends: [(0, 0), (1, 0)], kind: "load" },
    Link { ends: [(1, 1), (2, 1)], kind: "load" },
    Link { ends: [(2, 2), (0, 2)], kind: "load" },
    Link { ends: [(0, FAR), (1, FAR)], kind: "far" },
];

impl Link {
    fn slot_of(&self, worker: usize) -> Option<usize> {
        self.ends.iter().find(|(w, _)| *w == worker).map(|(_, slot)| *slot)
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Deed {
    Nothing,
    Stop,
    Kill,
}

/// Pings of the bystanders during rounds of one deed.
#[derive(Debug, Clone, Copy, Default)]
struct Pings {
    count: u64,
    seconds: f64,
}

impl Pings {
    fn rate(&self) -> f64 {
        if self.seconds > 0.0 { self.count as f64 / self.seconds } else { 0.0 }
    }
}

/// What came out.
#[derive(Debug, Default)]
struct Figures {
    kills: u32,
    stops: u32,
    /// Longest time from a death to the last event and flush of its peers.
    slowest: Duration,
    /// Longest wait of the bystanders for a pong, in microseconds.
    gap: u64,
    pings: [Pings; 3],
}

struct Stage {
    host: Host,
    worker: PathBuf,
    dice: Dice,
    trio: Vec<Worker>,
    pair: [Worker; 2],
    /// What each of the trio held when it was warm, and in which round it was started.
    warm: [Option<Held>; 3],
    since: [u32; 3],
    /// Round from which on the holdings are compared again.
    next_look: u32,
    router: Option<Held>,
    figures: Figures,
}

pub fn run(tree: &Tree, target: &Path, options: &Options) -> Result<()> {
    println!("soak kill: {} rounds, --seed {}", options.rounds, options.seed);
    let mut stage = Stage::set(tree, target, options.seed).map_err(|e| e.to_string())?;
    for round in 0..options.rounds {
        let done = stage.round(round);
        done.map_err(|why| {
            let waits = super::process::waits(stage.host.pid());
            format!("round {round}: {why}\nrouter's threads:\n{waits}router's log:\n{}", stage.host.log())
        })?;
        if (round + 1) % 50 == 0 {
            println!("  {} of {} rounds; {}", round + 1, options.rounds, stage.figures.text());
        }
    }
    stage.close().and_then(|figures| figures.judge(options.lenient))
}

fn start(host: &Host, worker: &Path, name: &str, dice: &mut Dice) -> Result<Worker> {
    let seed = dice.word().to_string();
    let wait = *dice.pick(&["sleep", "sleep", "spin"]);
    Worker::start(host, name, worker, &[&seed, wait])
}

impl Stage {
    fn set(tree: &Tree, target: &Path, seed: u64) -> io::Result<Self> {
        let host = Host::configured(tree, QUOTAS)?;
        let worker = super::compile(target, "worker")?;
        let mut dice = Dice::new(seed);
        let mut made = |name: &str| start(&host, &worker, name, &mut dice).map_err(io::Error::other);
        let trio = vec![made("a")?, made("b")?, made("c")?];
        let bystander = |name| Worker::start(&host, name, &worker, &["1", "sleep"]).map_err(io::Error::other);
        let mut pair = [bystander("d")?, bystander("e")?];
        let [d, e] = &mut pair;
        link((d, 0, "ping"), (e, 0, "echo")).map_err(io::Error::other)?;
        let (warm, since, next_look, router, figures) = ([None; 3], [0; 3], WARM, None, Figures::default());
        Ok(Stage { host, worker, dice, trio, pair, warm, since, next_look, router, figures })
    }

    fn round(&mut self, round: u32) -> Result<()> {
        // Each of the three in turn, so that whoever connects first, or has memory that cannot move, dies as well.
        let victim = (round / BLOCK) as usize % 3;
        let deed = match self.dice.roll(10) {
            0..2 => Deed::Nothing,
            2..4 => Deed::Stop,
            _ => Deed::Kill,
        };
        for pair in LINKS {
            let [(a, slot_a), (b, slot_b)] = pair.ends;
            let [one, other] = self.trio.get_disjoint_mut([a, b]).map_err(|e| e.to_string())?;
            link((one, slot_a, pair.kind), (other, slot_b, pair.kind))?;
        }
        let (before, start) = (self.pair[0].counts()?[0], Instant::now());
        thread::sleep(Duration::from_micros(self.dice.roll(20_000)));
        match deed {
            Deed::Nothing => thread::sleep(Duration::from_millis(20)),
            Deed::Stop => self.stop(victim)?,
            Deed::Kill => self.kill(victim)?,
        }
        let pings = &mut self.figures.pings[deed as usize];
        pings.count += self.pair[0].counts()?[0] - before;
        pings.seconds += start.elapsed().as_secs_f64();
        self.unlink(victim, deed, round)?;
        // Only after a death: who lives is remembered, with its descriptors and mappings.
        if deed == Deed::Kill && round >= self.next_look {
            self.next_look = round + LOOK;
            self.compare(round)?;
        }
        Ok(())
    }

    /// Those two of the trio who are not the victim.
    fn others(victim: usize) -> impl Iterator<Item = usize> {
        (0..3).filter(move |w| *w != victim)
    }

    fn kill(&mut self, victim: usize) -> Result<()> {
        self.trio[victim].signal(Signal::KILL)?;
        let death = Instant::now();
        self.figures.kills += 1;
        for w in Self::others(victim) {
            for pair in LINKS.iter().filter(|pair| pair.slot_of(victim).is_some()) {
                let Some(slot) = pair.slot_of(w) else { continue };
                let event = self.trio[w].hear(&format!("event {slot} {QP_FATAL}"))?;
                let flushed = self.trio[w].hear(&format!("flushed {slot}"))?;
                let took = event.at.max(flushed.at).saturating_duration_since(death);
                self.figures.slowest = self.figures.slowest.max(took);
            }
        }
        self.survivors_move_on(victim)
    }

    /// The queue pairs between the two others.
    fn survivors_move_on(&mut self, victim: usize) -> Result<()> {
        for pair in LINKS.iter().filter(|pair| pair.slot_of(victim).is_none()) {
            for (w, slot) in pair.ends {
                self.trio[w].moves_on(slot)?;
            }
        }
        Ok(())
    }

    fn stop(&mut self, victim: usize) -> Result<()> {
        self.figures.stops += 1;
        self.trio[victim].signal(Signal::STOP)?;
        let outcome = self.survivors_move_on(victim);
        thread::sleep(Duration::from_millis(self.dice.roll(100)));
        self.trio[victim].signal(Signal::CONT)?;
        outcome?;
        for pair in LINKS {
            for (w, slot) in pair.ends {
                self.trio[w].moves_on(slot)?;
            }
        }
        Ok(())
    }

    /// Nothing may have failed that the deed did not touch; then all queue pairs go, and a dead victim comes back.
    fn unlink(&mut self, victim: usize, deed: Deed, round: u32) -> Result<()> {
        for w in (0..3).filter(|w| deed != Deed::Kill || *w != victim) {
            let mut bad = self.trio[w].heard("failed");
            bad.extend(self.trio[w].heard("event"));
            let excused = |line: &String| {
                let mut words = line.split(' ').skip(1);
                let slot = words.next().and_then(|slot| slot.parse().ok());
                let to_victim =
                    LINKS.iter().any(|l| l.slot_of(w) == slot && l.slot_of(victim).is_some() && w != victim);
                (deed == Deed::Kill && to_victim) || words.next() == Some(COMM_EST)
            };
            bad.retain(|line| !excused(line));
            if !bad.is_empty() {
                return Err(format!(
                    "{deed:?} of {}: {} said {bad:?}",
                    self.trio[victim].name, self.trio[w].name
                ));
            }
        }
        for w in (0..3).filter(|w| deed != Deed::Kill || *w != victim) {
            for slot in LINKS.iter().filter_map(|pair| pair.slot_of(w)) {
                self.trio[w].break_up(slot)?;
            }
            self.trio[w].forget();
        }
        if deed == Deed::Kill {
            let name = self.trio[victim].name.clone();
            let new = start(&self.host, &self.worker, &name, &mut self.dice)?;
            std::mem::replace(&mut self.trio[victim], new).kill()?;
            (self.warm[victim], self.since[victim]) = (None, round + 1);
        }
        Ok(())
    }

    /// Between rounds: nobody holds more than before.
    fn compare(&mut self, round: u32) -> Result<()> {
        self.router_forgets()?;
        for w in 0..3 {
            let (pid, name) = (self.trio[w].pid(), &self.trio[w].name);
            match &self.warm[w] {
                Some(warm) => warm.again(name, pid)?,
                None if round + 1 - self.since[w] >= WARM => self.warm[w] = Some(Held::of(pid)?),
                None => {}
            }
        }
        match &self.router {
            Some(warm) => warm.again("the router", self.host.pid()),
            None => {
                self.router = (round >= WARM).then_some(Held::of(self.host.pid())?);
                Ok(())
            }
        }
    }

    /// Waits until the router knows the living only, and nothing of theirs.
    fn router_forgets(&self) -> Result<()> {
        let deadline = Instant::now() + Duration::from_secs(30);
        loop {
            let ps = admin::Client::connect(&self.host.socket()).and_then(|mut client| client.ps());
            let ps = ps.map_err(|e| format!("freeflow ps: {e}"))?;
            let trio = ps.containers.iter().filter(|c| self.trio.iter().any(|w| w.name == c.name));
            let left: Vec<String> = trio
                .filter(|c| c.pids.len() != 1 || !c.qps.is_empty() || c.mr_bytes != 0)
                .map(|c| format!("{}: pids {:?}, {} QPs, {} bytes", c.name, c.pids, c.qps.len(), c.mr_bytes))
                .collect();
            if left.is_empty() {
                return Ok(());
            }
            if Instant::now() > deadline {
                return Err(format!("the router still has {left:?}"));
            }
            // The end of a dead process's session is no event for anybody but the router.
            thread::yield_now();
        }
    }

    fn close(mut self) -> Result<Figures> {
        let gap = self.pair[0].ask("gap", "gap")?;
        self.figures.gap = gap.parse().map_err(|e| format!("gap {gap}: {e}"))?;
        let failed: Vec<String> = self.pair.iter_mut().flat_map(|w| w.heard("failed")).collect();
        if !failed.is_empty() {
            return Err(format!("the bystanders said {failed:?}"));
        }
        let [d, e] = self.pair;
        for worker in self.trio.into_iter().chain([d, e]) {
            worker.quit()?;
        }
        Ok(self.figures)
    }
}

impl Figures {
    fn text(&self) -> String {
        let [nothing, stop, kill] = self.pings.map(|p| p.rate());
        format!(
            "{} kills, known and flushed after {:.1} ms at most; {} stops; bystanders' pings per second: {nothing:.0} \
             without, {kill:.0} with a kill, {stop:.0} with a stop",
            self.kills,
            self.slowest.as_secs_f64() * 1e3,
            self.stops,
        )
    }

    fn judge(&self, lenient: bool) -> Result<()> {
        println!("  {}; their longest wait {:.1} ms", self.text(), self.gap as f64 / 1e3);
        if lenient {
            return Ok(());
        }
        if self.slowest > PROMISE {
            return Err(format!("a death was known after {:?} only", self.slowest));
        }
        let [nothing, stop, kill] = self.pings.map(|p| p.rate());
        if kill < nothing / 2.0 || stop < nothing / 2.0 {
            return Err("the bystanders fell below half their rate".to_owned());
        }
        Ok(())
    }
}
