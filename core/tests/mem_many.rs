//! Many registrations, and how fast large ones are.

mod mem_util;

use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use mem_util::*;

/// The number of mappings is the process's: one test at a time.
static ALONE: Mutex<()> = Mutex::new(());

fn alone() -> MutexGuard<'static, ()> {
    ALONE.lock().unwrap_or_else(PoisonError::into_inner)
}

#[test]
fn twenty_thousand_on_the_heap_all_move() {
    watchdog();
    let _alone = alone();
    let pd = pd();
    let start = Instant::now();
    let mut live = Vec::new();
    for i in 0..20_000u32 {
        // SAFETY: a plain chunk; 4 KiB come from the main heap or an arena, with malloc's records in between.
        let p = unsafe { libc::malloc(4096) };
        // SAFETY: 4 KiB of that chunk.
        let bytes = unsafe { std::slice::from_raw_parts_mut(p.cast::<u8>(), 4096) };
        bytes.fill(i as u8);
        let r = pd.register(p as u64, 4096, REMOTE).unwrap();
        live.push((bytes, r));
    }
    let took = start.elapsed();
    let moved = live.iter().filter(|(_, r)| covered(r) == 4096).count();
    println!("20000 registrations of 4 KiB in {took:?}, {moved} moved");
    assert_eq!(moved, 20_000);
    for (i, (bytes, r)) in live.iter().enumerate() {
        assert!(bytes.iter().all(|b| *b == i as u8) && r.still_mapped(), "{i}");
    }
    let start = Instant::now();
    for (i, (bytes, r)) in live.drain(..).enumerate() {
        drop(r);
        assert!(bytes.iter().all(|b| *b == i as u8));
        // SAFETY: the chunk from above.
        unsafe { libc::free(bytes.as_mut_ptr().cast()) };
    }
    println!("and back in {:?}", start.elapsed());
}

#[test]
fn twenty_thousand_apart_stop_at_a_quarter_of_the_mappings() {
    watchdog();
    let _alone = alone();
    let pd = pd();
    let m = Map::anon(40_000 * PAGE);
    m.bytes().fill(1);
    let start = Instant::now();
    let live: Vec<_> = (0..20_000).map(|i| pd.register(m.addr() + i * 8192, 4096, REMOTE).unwrap()).collect();
    let moved = live.iter().filter(|r| covered(r) == 4096).count();
    println!("20000 registrations apart in {:?}, {moved} moved", start.elapsed());
    let limit: usize = std::fs::read_to_string("/proc/sys/vm/max_map_count").unwrap().trim().parse().unwrap();
    assert!(moved > 1000 && moved <= limit / 4, "{moved} of {limit}");
    drop(live);
    assert!(m.bytes().iter().all(|b| *b == 1));
}

/// What this process has used of its processors: other work on the machine does not count.
fn cpu_time() -> Duration {
    let t = rustix::time::clock_gettime(rustix::time::ClockId::ProcessCPUTime);
    Duration::new(t.tv_sec as u64, t.tv_nsec as u32)
}

/// `cargo test --release -p freeflow-core --test mem_many -- --ignored --nocapture`
#[test]
#[ignore = "a measurement"]
fn speed_of_64_mib() {
    let pd = pd();
    let m = Map::anon(64 << 20);
    m.bytes().fill(1);
    let mut copy = vec![1u8; m.len];
    for _ in 0..7 {
        copy.fill(2);
        let start = cpu_time();
        copy.copy_from_slice(m.bytes());
        let plain = cpu_time() - start;
        std::hint::black_box(&mut copy);
        let start = cpu_time();
        let r = pd.register(m.addr(), m.len as u64, REMOTE).unwrap();
        let there = cpu_time() - start;
        assert_eq!(covered(&r), m.len as u64);
        let start = cpu_time();
        // SAFETY: the child ends at once.
        let pid = unsafe { libc::fork() };
        if pid == 0 {
            // SAFETY: as above.
            unsafe { libc::_exit(0) };
        }
        let forked = cpu_time() - start;
        // SAFETY: our child.
        unsafe { libc::waitpid(pid, std::ptr::null_mut(), 0) };
        let start = cpu_time();
        drop(r);
        let back = cpu_time() - start;
        let rate = |t: std::time::Duration| m.len as f64 / t.as_secs_f64() / 1e9;
        println!(
            "64 MiB: memcpy {:.2} GB/s, register {:.2} ({:.2}), deregister {:.2} ({:.2}), fork {forked:?}",
            rate(plain),
            rate(there),
            rate(there) / rate(plain),
            rate(back),
            rate(back) / rate(plain),
        );
    }
}
