//! The link's thread among programs that poll.
//!
//! Each operation between hosts needs it twice, for microseconds at a time, on processors that polling programs keep busy. A
//! thread that asks for short slices preempts them when it wakes (Linux 6.12), instead of when their slices of some
//! milliseconds end; a better nice value helps older kernels. Neither lets it starve anybody.

use std::io;

/// struct sched_attr of sched_setattr(2), its first version.
#[repr(C)]
struct SchedAttr {
    size: u32,
    policy: u32,
    flags: u64,
    nice: i32,
    priority: u32,
    runtime: u64,
    deadline: u64,
    period: u64,
}

/// The shortest slice the kernel grants.
const SLICE: u64 = 100_000;
const NICE: i32 = -15;

/// Makes this thread prompt, as far as that is allowed.
pub fn be_prompt() -> io::Result<()> {
    // A better nice value needs CAP_SYS_NICE; the slice needs nothing.
    set(NICE).or_else(|_| set(0))
}

fn set(nice: i32) -> io::Result<()> {
    let attr = SchedAttr {
        size: size_of::<SchedAttr>() as u32,
        policy: libc::SCHED_OTHER as u32,
        flags: 0,
        nice,
        priority: 0,
        runtime: SLICE,
        deadline: 0,
        period: 0,
    };
    // SAFETY: reads a structure that says its own size and lives through the call; concerns this thread alone.
    let failed = unsafe { libc::syscall(libc::SYS_sched_setattr, 0, &raw const attr, 0) };
    if failed == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

#[cfg(test)]
mod tests {
    #[test]
    fn a_thread_may_ask_for_short_slices() {
        std::thread::spawn(|| super::set(0).expect("allowed to everybody")).join().expect("no panic");
    }
}
