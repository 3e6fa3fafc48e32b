//! A copier stopped at every step while the memory it writes to is deregistered.

use std::path::Path;
use std::time::Duration;

use super::Result;
use crate::launch::Group;
use crate::path::{Host, Tree};

#[derive(Debug, Clone)]
pub struct Options {
    /// Steps to stop at, for each kind of operation; 0 is every one.
    pub samples: u32,
    pub seed: u64,
}

/// A stop in the middle of a copy costs the second that deregistration waits for it, and there are some thousand steps: so
/// many owners and copiers share them. They sleep most of the time.
const PARTS: u32 = 32;
const LIMIT: Duration = Duration::from_secs(7200);

pub fn run(tree: &Tree, target: &Path, options: &Options) -> Result<()> {
    println!("soak revoke: {} samples, --seed {}", options.samples, options.seed);
    let host = Host::start(tree).map_err(|e| e.to_string())?;
    let program = super::compile(target, "revoke").map_err(|e| e.to_string())?;
    let parts = match options.samples {
        0 => PARTS,
        samples => samples.min(PARTS),
    };
    let mut group = Group::new(LIMIT);
    for part in 0..parts {
        let mut command = host.run_in(&format!("owner{part}"), &program);
        let numbers =
            [options.samples.to_string(), options.seed.to_string(), part.to_string(), parts.to_string()];
        group.start(command.args(numbers)).map_err(|e| e.to_string())?;
    }
    let ended = group.finish();
    let said: Vec<&str> = ended.lines.iter().map(|line| line.text.as_str()).collect();
    let passed = ended.statuses.iter().all(|status| status.is_some_and(|s| s.success()));
    let revoked: Vec<_> = said.iter().filter(|text| text.starts_with("revoked ")).collect();
    if !passed || revoked.len() != parts as usize {
        return Err(format!("{said:?}, {:?}", ended.statuses));
    }
    revoked.iter().for_each(|text| println!("  {text}"));
    Ok(())
}
