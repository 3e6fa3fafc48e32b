//! The router killed and started again at random instants, under load.
//!
//! Three workers, each in a container of its own, are linked with each other. While no router is there their queue pairs go
//! on; a new one is told by them what they have, and serves new connections at once. In some rounds a worker dies while
//! nobody is there to see it: its peers must hear of that from the next router.

use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

use rustix::process::Signal;

use super::Result;
use super::dice::Dice;
use super::worker::{Worker, link};
use crate::path::{Host, Tree};

/// What the issue promises: new connections work within this time of the router's return.
const PROMISE: Duration = Duration::from_secs(1);
/// The router waits so long for those that do not come back.
const RETURN: Duration = Duration::from_secs(5);
/// IBV_EVENT_QP_FATAL.
const QP_FATAL: &str = "1";
/// Slots between each two workers; the third is for connections that are made after the restart.
const LINKS: [(usize, usize, usize, &str); 4] =
    [(0, 1, 0, "load"), (1, 2, 1, "load"), (2, 0, 2, "load"), (0, 1, FAR, "far")];
/// Slot whose memory cannot move: the router copies for it.
const FAR: usize = 7;
/// Slot of the connections that are made after a restart.
const NEW: usize = 5;

#[derive(Debug, Clone)]
pub struct Options {
    pub rounds: u32,
    pub seed: u64,
    /// How long new connections take is reported, not judged.
    pub lenient: bool,
}

struct Stage {
    host: Host,
    program: PathBuf,
    dice: Dice,
    trio: Vec<Worker>,
    /// Longest time from the router's readiness to the first bytes over a new connection.
    slowest: Duration,
    deaths: u32,
    /// Longest time from the router's readiness to the news of a death that it did not see.
    told: Duration,
}

pub fn run(tree: &Tree, target: &Path, options: &Options) -> Result<()> {
    println!("soak restart: {} rounds, --seed {}", options.rounds, options.seed);
    let host = Host::start(tree).map_err(|e| e.to_string())?;
    let program = super::compile(target, "worker").map_err(|e| e.to_string())?;
    let mut dice = Dice::new(options.seed);
    let names = ["a", "b", "c"];
    let trio: Result<Vec<_>> = names.iter().map(|name| start(&host, &program, name, &mut dice)).collect();
    let (slowest, deaths, told) = (Duration::ZERO, 0, Duration::ZERO);
    let mut stage = Stage { host, program, dice, trio: trio?, slowest, deaths, told };
    for round in 0..options.rounds {
        let done = stage.round().inspect_err(|_| stage.host.show_log());
        done.map_err(|why| format!("round {round}: {why}"))?;
    }
    println!(
        "  {} restarts, new connections {:.1} ms after them at most; {} deaths unseen by a router, told {:.1} s after it at most",
        options.rounds,
        stage.slowest.as_secs_f64() * 1e3,
        stage.deaths,
        stage.told.as_secs_f64()
    );
    stage.trio.into_iter().try_for_each(Worker::quit)?;
    if stage.told > RETURN + PROMISE {
        return Err(format!("an unseen death was told after {:?}", stage.told));
    }
    if !options.lenient && stage.slowest > PROMISE {
        return Err(format!("a new connection took {:?}", stage.slowest));
    }
    Ok(())
}

fn start(host: &Host, program: &Path, name: &str, dice: &mut Dice) -> Result<Worker> {
    let seed = dice.word().to_string();
    let wait = *dice.pick(&["sleep", "sleep", "spin"]);
    Worker::start(host, name, program, &[&seed, wait])
}

impl Stage {
    fn pair(&mut self, a: usize, b: usize) -> Result<[&mut Worker; 2]> {
        self.trio.get_disjoint_mut([a, b]).map_err(|e| e.to_string())
    }

    fn link(&mut self, (a, b, slot, kind): (usize, usize, usize, &str)) -> Result<()> {
        let [one, other] = self.pair(a, b)?;
        link((one, slot, kind), (other, slot, kind))
    }

    fn round(&mut self) -> Result<()> {
        LINKS.iter().try_for_each(|between| self.link(*between))?;
        // A queue pair finds its peer with its first request, and needs a router for that.
        for (a, b, slot, _) in LINKS {
            self.pair(a, b)?.into_iter().try_for_each(|worker| worker.moves_on(slot))?;
        }
        thread::sleep(Duration::from_micros(self.dice.roll(20_000)));
        self.host.kill_router().map_err(|e| e.to_string())?;
        // Without a router: all that needs none goes on.
        for (a, b, slot, _) in LINKS.into_iter().filter(|(_, _, slot, _)| *slot != FAR) {
            self.pair(a, b)?.into_iter().try_for_each(|worker| worker.moves_on(slot))?;
        }
        let victim = (self.dice.roll(4) == 0).then(|| self.dice.roll(3) as usize);
        if let Some(victim) = victim {
            self.trio[victim].signal(Signal::KILL)?;
            self.deaths += 1;
        }
        thread::sleep(Duration::from_micros(self.dice.roll(300_000)));
        self.host.start_router_again().map_err(|e| e.to_string())?;
        let ready = Instant::now();
        let (a, b) = match victim {
            Some(victim) => ((victim + 1) % 3, (victim + 2) % 3),
            None => (0, 1),
        };
        self.link((a, b, NEW, "load"))?;
        self.pair(a, b)?.into_iter().try_for_each(|worker| worker.moves_on(NEW))?;
        self.slowest = self.slowest.max(ready.elapsed());
        for (a, b, slot, _) in
            LINKS.into_iter().filter(|(a, b, _, _)| ![Some(*a), Some(*b)].contains(&victim))
        {
            self.pair(a, b)?.into_iter().try_for_each(|worker| worker.moves_on(slot))?;
        }
        if let Some(victim) = victim {
            self.hear_of_death(victim, ready)?;
        }
        self.clear(victim, (a, b))
    }

    /// The peers of the dead are told, once it is clear that it does not come back.
    fn hear_of_death(&mut self, victim: usize, ready: Instant) -> Result<()> {
        for (a, b, slot, _) in LINKS.into_iter().filter(|(a, b, _, _)| [*a, *b].contains(&victim)) {
            let survivor = if a == victim { b } else { a };
            let event = self.trio[survivor].hear(&format!("event {slot} {QP_FATAL}"))?;
            self.trio[survivor].hear(&format!("flushed {slot}"))?;
            self.told = self.told.max(event.at.saturating_duration_since(ready));
        }
        Ok(())
    }

    /// Nothing failed that should not have; then everything goes, and a dead worker comes back.
    fn clear(&mut self, victim: Option<usize>, new: (usize, usize)) -> Result<()> {
        for w in (0..3).filter(|w| Some(*w) != victim) {
            let failed = self.trio[w].heard("failed");
            let to_victim = |line: &String| {
                let slot = line.split(' ').nth(1).and_then(|slot| slot.parse().ok());
                LINKS.iter().any(|(a, b, of, _)| Some(*of) == slot && [Some(*a), Some(*b)].contains(&victim))
            };
            if let Some(line) = failed.iter().find(|line| !to_victim(line)) {
                return Err(format!("{} said {line:?}", self.trio[w].name));
            }
            let mine = LINKS.iter().filter(|(a, b, _, _)| [*a, *b].contains(&w)).map(|(_, _, slot, _)| *slot);
            let slots: Vec<usize> = mine.chain([new.0, new.1].contains(&w).then_some(NEW)).collect();
            slots.into_iter().try_for_each(|slot| self.trio[w].break_up(slot))?;
            self.trio[w].forget();
        }
        if let Some(victim) = victim {
            let name = self.trio[victim].name.clone();
            let new = start(&self.host, &self.program, &name, &mut self.dice)?;
            std::mem::replace(&mut self.trio[victim], new).kill()?;
        }
        Ok(())
    }
}
