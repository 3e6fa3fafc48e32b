//! A hostile neighbour of the same tenant: its peers may get errors and nothing worse, everybody else gets nothing.

use std::path::Path;
use std::time::{Duration, Instant};

use freeflow_router::admin;

use super::Result;
use super::dice::Dice;
use super::process::Held;
use super::worker::{Worker, link};
use crate::path::{Host, Tree};

#[derive(Debug, Clone)]
pub struct Options {
    pub time: Duration,
    pub seed: u64,
}

/// The neighbour's descriptors are the router's, too, until it is gone: enough for one of its lives.
const QUOTAS: &str = "max_qp = 64\nmax_slab = 256\nmax_pd = 256\nmax_channel = 256\nmax_cq = 256\n";
/// Rounds a neighbour lives: it starts anew before it has used up its quotas.
const LIFE: u32 = 40;
/// One round of scribbling, while its peers send and receive.
const ROUND: Duration = Duration::from_millis(100);
const NEIGHBOUR: &str = "neighbour";
/// Slot of a worker whose memory cannot move.
const FAR: usize = 7;

#[derive(Debug, Default)]
struct Figures {
    rounds: u32,
    deeds: u64,
    /// What the neighbour's peers completed, and how many of their queue pairs failed.
    completed: u64,
    failed: u64,
    slowest_break: Duration,
}

/// The peers of the neighbour: worker, slot there, kind of load, slot at the neighbour.
const LINKS: [(usize, usize, &str, usize); 4] =
    [(0, 0, "load", 0), (0, FAR, "far", 1), (1, 0, "load", 2), (1, 1, "load", 3)];

struct Stage {
    host: Host,
    dice: Dice,
    /// One sleeps in completion channels, one polls.
    peers: [Worker; 2],
    /// A pair under load, whose data is checked, and one that pings.
    bystanders: [Worker; 4],
    figures: Figures,
}

pub fn run(tree: &Tree, target: &Path, options: &Options) -> Result<()> {
    println!("soak hostile: {} s, --seed {}", options.time.as_secs(), options.seed);
    let mut stage = Stage::set(tree, target, options.seed)?;
    // Its container stays, with a listener.
    drop(stage.neighbour()?);
    stage.neighbour_is_buried()?;
    let router = Held::of(stage.host.pid())?;
    let (start, mut said) = (Instant::now(), Instant::now());
    let mut neighbour = None;
    while start.elapsed() < options.time {
        if stage.figures.rounds % LIFE == 0 {
            drop(neighbour.take());
        }
        let current = match neighbour.take() {
            Some(current) => current,
            None => stage.neighbour()?,
        };
        let round = stage.round(current);
        neighbour = Some(round.map_err(|why| {
            format!("round {}: {why}\nrouter's log:\n{}", stage.figures.rounds, stage.host.log())
        })?);
        if said.elapsed() > Duration::from_secs(20) {
            said = Instant::now();
            println!("  {} s: {}", start.elapsed().as_secs(), stage.figures.text());
        }
    }
    drop(neighbour);
    stage.close(&router)
}

impl Stage {
    fn set(tree: &Tree, target: &Path, seed: u64) -> Result<Self> {
        let host = Host::configured(tree, QUOTAS).map_err(|e| e.to_string())?;
        let worker = super::compile(target, "worker").map_err(|e| e.to_string())?;
        let mut dice = Dice::new(seed);
        let mut start = |name: &str, args: &[&str]| {
            let seed = dice.word().to_string();
            Worker::start(&host, name, &worker, &[&[seed.as_str()], args].concat())
        };
        let peers = [start("asleep", &["sleep", "wary"])?, start("awake", &["spin", "wary"])?];
        let mut bystanders = [
            start("x", &["sleep"])?,
            start("y", &["sleep"])?,
            start("d", &["sleep"])?,
            start("e", &["sleep"])?,
        ];
        let [x, y, d, e] = &mut bystanders;
        link((x, 0, "load"), (y, 0, "load"))?;
        link((x, FAR, "far"), (y, FAR, "far"))?;
        link((d, 0, "ping"), (e, 0, "echo"))?;
        Ok(Stage { host, dice, peers, bystanders, figures: Figures::default() })
    }

    fn neighbour(&mut self) -> Result<Worker> {
        let own = std::env::current_exe().map_err(|e| format!("where this binary is: {e}"))?;
        let program = own.with_file_name("hostile");
        if !program.is_file() {
            return Err(format!("{} is not there: cargo xtask soak builds it", program.display()));
        }
        Worker::start(&self.host, NEIGHBOUR, &program, &[&self.dice.word().to_string()])
    }

    fn neighbour_is_buried(&self) -> Result<()> {
        let deadline = Instant::now() + Duration::from_secs(30);
        loop {
            let ps = self.ps()?;
            let pids =
                ps.containers.iter().filter(|c| c.name == NEIGHBOUR).map(|c| c.pids.len()).sum::<usize>();
            if pids == 0 {
                return Ok(());
            }
            if Instant::now() > deadline {
                return Err("the router does not bury the neighbour".to_owned());
            }
            // The end of its session is no event for anybody but the router.
            std::thread::yield_now();
        }
    }

    fn ps(&self) -> Result<admin::Ps> {
        let ps = admin::Client::connect(&self.host.socket()).and_then(|mut client| client.ps());
        ps.map_err(|e| format!("freeflow ps: {e}"))
    }

    fn round(&mut self, mut neighbour: Worker) -> Result<Worker> {
        for (peer, slot, kind, at) in LINKS {
            link((&mut self.peers[peer], slot, kind), (&mut neighbour, at, "load"))?;
        }
        // A wild one ends its connections at once; a slow one gets deeper.
        let pace = *self.dice.pick(&[0, 1, 4, 64]);
        let deeds = neighbour.ask(&format!("scribble {} {pace}", ROUND.as_millis()), "scribbled")?;
        self.figures.deeds += deeds.parse::<u64>().map_err(|e| format!("{deeds}: {e}"))?;
        // They answer: nothing hangs. What they have to say of their queue pairs is theirs.
        for peer in &mut self.peers {
            self.figures.completed += peer.counts()?.iter().sum::<u64>();
            self.figures.failed += peer.heard("failed").len() as u64;
        }
        self.bystanders[0].moves_on(0)?;
        self.bystanders[1].moves_on(FAR)?;
        self.bystanders[2].moves_on(0)?;
        self.ps()?;
        let before = Instant::now();
        for (peer, slot, ..) in LINKS {
            self.peers[peer].break_up(slot)?;
        }
        self.figures.slowest_break = self.figures.slowest_break.max(before.elapsed());
        for (.., at) in LINKS {
            neighbour.break_up(at)?;
        }
        self.peers.iter_mut().for_each(Worker::forget);
        self.figures.rounds += 1;
        Ok(neighbour)
    }

    fn close(mut self, router: &Held) -> Result<()> {
        let gap = self.bystanders[2].ask("gap", "gap")?;
        println!("  {}; the bystanders' longest wait {gap} us", self.figures.text());
        let said: Vec<String> = self.bystanders.iter_mut().flat_map(|w| w.heard("failed")).collect();
        if !said.is_empty() {
            return Err(format!("the bystanders said {said:?}"));
        }
        if self.figures.completed == 0 || self.figures.failed == 0 {
            return Err("the neighbour was too wild or too tame to show anything".to_owned());
        }
        router.again("the router", self.host.pid())?;
        let [a, b] = self.peers;
        let [x, y, d, e] = self.bystanders;
        [a, b, x, y, d, e].into_iter().try_for_each(Worker::quit)
    }
}

impl Figures {
    fn text(&self) -> String {
        format!(
            "{} rounds, {} deeds; its peers completed {} requests, {} of their queue pairs failed; giving those back took \
             {:?} at most",
            self.rounds, self.deeds, self.completed, self.failed, self.slowest_break
        )
    }
}
