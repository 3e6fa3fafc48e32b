//! A replay of what NCCL does with a network plugin, with its threads, on any plugin there is.
//!
//! NCCL drives a plugin from three threads: the application's (init, devices, getProperties, finalize), a service thread
//! (listen, connect, accept, regMr, deregMr, close) and a progress thread (isend, irecv, test, iflush). A [`rank::Rank`]
//! has the same. The scenarios know the contract and nothing of the plugin; ranks are processes, or threads of one, and
//! exchange handles over TCP.

pub mod bench;
pub mod contract;
pub mod failing;
pub mod launch;
pub mod memory;
pub mod mixed;
pub mod oob;
pub mod plugin;
pub mod rank;
pub mod traffic;

/// A scenario's outcome: what went wrong, in words.
pub type Outcome<T = ()> = Result<T, String>;

/// Fails with words unless `good`.
pub fn ensure(good: bool, why: impl FnOnce() -> String) -> Outcome {
    if good { Ok(()) } else { Err(why()) }
}

/// Numbers that look random and are the same on every rank: splitmix64.
#[derive(Debug, Clone, Copy)]
pub struct Dice(pub u64);

impl Dice {
    /// A stream of its own for each purpose.
    pub fn of(parts: &[u64]) -> Self {
        Dice(parts.iter().fold(0x9e37_79b9, |state, part| Dice(state ^ part).roll()))
    }

    pub fn roll(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// Below `limit`, which is not 0.
    pub fn below(&mut self, limit: u64) -> u64 {
        self.roll() % limit
    }
}
