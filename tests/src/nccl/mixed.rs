//! Any number of mixed operations: connections come and go, groups of all kinds flow on them, and memory is registered and
//! deregistered by the service thread meanwhile. Everything is checked.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use super::memory::Buffer;
use super::plugin::Plugin;
use super::rank::{Mesh, Rank};
use super::traffic::{Kind, MAX_GROUPS, Plan, exchange};
use super::{Dice, Outcome};

/// Runs until each rank has done about `wanted` operations: messages sent or received.
pub fn run(rank: &Rank, wanted: u64) -> Outcome {
    let (mut done, mut registered, mut round) = (0, 0, 0);
    let mut mesh: Option<(Mesh, u64)> = None;
    while done < wanted {
        let mut dice = Dice::of(&[rank.seed, round, 7]);
        if mesh.is_none() || dice.below(4) == 0 {
            if let Some((old, _)) = mesh.take() {
                rank.close(old)?;
            }
            let links = Dice::of(&[rank.seed, round, 8]).roll();
            let n = rank.ranks();
            // A ring, and any others on top.
            let wanted = |from, to| to == (from + 1) % n || links >> (from * n + to) & 1 == 1;
            let pairs = (0..n).flat_map(|from| (0..n).map(move |to| (from, to)));
            let connections = pairs.filter(|(from, to)| wanted(*from, *to)).count() as u64;
            mesh = Some((rank.mesh(wanted)?, connections));
        }
        let Some((mesh, connections)) = &mesh else { continue };
        let max = [64, 4096, 70_000, 600_000][dice.below(4) as usize];
        let groups = 50 + dice.below(6_000_000 / (max as u64 + 2_000));
        let window = 1 + dice.below(MAX_GROUPS as u64) as usize;
        let plan = Plan { seed: round, kind: Kind::Mixed { max }, groups, window };
        registered += registering(rank, mesh, round, || exchange(rank, mesh, &plan))?;
        // Half of the groups have one message, the others 4.5 on average; each connection has two ends. All ranks reckon
        // alike, so that all end in the same round.
        done += 2 * connections * groups * 11 / 4 / rank.ranks() as u64;
        round += 1;
        rank.barrier()?;
        if rank.rank() == 0 && round % 50 == 0 {
            println!("# {done} operations in {round} rounds");
        }
    }
    mesh.map_or(Ok(()), |(mesh, _)| rank.close(mesh))?;
    println!("# {done} operations in {round} rounds, and {registered} registrations meanwhile");
    Ok(())
}

/// Runs `work` while another thread registers and deregisters on the same comms; says how often it did.
fn registering(rank: &Rank, mesh: &Mesh, round: u64, work: impl FnOnce() -> Outcome) -> Outcome<u64> {
    let Some(comm) = mesh.send.iter().chain(&mesh.recv).flatten().next().copied() else {
        return work().map(|()| 0);
    };
    let (stop, plugin) = (Arc::new(AtomicBool::new(false)), Arc::clone(&rank.plugin));
    let (stopped, seed) = (Arc::clone(&stop), rank.seed);
    let registrar =
        std::thread::spawn(move || churn(&plugin, comm, &mut Dice::of(&[seed, round, 9]), &stopped));
    let worked = work();
    stop.store(true, Ordering::Relaxed);
    let churned = registrar.join().map_err(|_| "the registering thread panicked".to_owned())?;
    worked.and(churned)
}

fn churn(plugin: &Plugin, comm: super::plugin::Handle, dice: &mut Dice, stop: &AtomicBool) -> Outcome<u64> {
    let mut count = 0;
    while !stop.load(Ordering::Relaxed) {
        let buffers: Vec<Buffer> =
            (0..1 + dice.below(4)).map(|_| Buffer::new(dice.below(300_000) as usize)).collect();
        let mut handles = Vec::new();
        for buffer in &buffers {
            for _ in 0..1 + dice.below(2) {
                handles.push(
                    plugin.reg_buffer(comm, buffer).map_err(|code| format!("regMr meanwhile: {code}"))?,
                );
            }
        }
        for handle in handles.drain(..) {
            plugin.dereg(comm, handle).map_err(|code| format!("deregMr meanwhile: {code}"))?;
            count += 2;
        }
        std::thread::yield_now();
    }
    Ok(count)
}
