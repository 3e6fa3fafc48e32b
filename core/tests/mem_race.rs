//! Writers that race with the mover lose nothing, and a program's own fault handler keeps its faults.

mod mem_util;

use std::sync::Barrier;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use freeflow_core::client::mem::{freeze_stats, madvise_moved};
use mem_util::*;

fn counters(m: &Map) -> &[AtomicU64] {
    // SAFETY: aligned, zeroed memory of this test; only used as atomics.
    unsafe { std::slice::from_raw_parts(m.at.cast(), m.len / 8) }
}

/// Each writer adds to its own counters without atomics, so that a lost page shows as a lost count.
fn hammer(m: &Map, stop: &AtomicBool, start: usize, step: usize) -> Vec<u64> {
    let slots: Vec<usize> = (start..m.len / 8).step_by(step).collect();
    let mut mine = vec![0u64; slots.len()];
    let all = counters(m);
    while !stop.load(Ordering::Relaxed) {
        for (n, slot) in mine.iter_mut().zip(&slots) {
            let seen = all[*slot].load(Ordering::Relaxed);
            assert_eq!(seen, *n, "slot {slot} lost a write");
            *n += 1;
            all[*slot].store(*n, Ordering::Relaxed);
        }
    }
    mine
}

#[test]
fn racing_writers_lose_nothing() {
    race(32, 500);
}

/// The same where huge pages are made ready beforehand.
#[test]
fn racing_writers_lose_nothing_of_long_runs() {
    race(2000, 15);
}

fn race(pages: u64, rounds: usize) {
    watchdog();
    let (pd, mut rng) = (pd(), Rng::seeded());
    let m = Map::anon(pages as usize * PAGE);
    let (stop, before) = (AtomicBool::new(false), freeze_stats());
    let barrier = Barrier::new(4);
    std::thread::scope(|s| {
        let writers: Vec<_> = (0..3)
            .map(|i| {
                let (m, stop, barrier) = (&m, &stop, &barrier);
                s.spawn(move || {
                    barrier.wait();
                    // Far apart, so that every page is written all the time.
                    hammer(m, stop, i, 64)
                })
            })
            .collect();
        barrier.wait();
        let mut waits = 0;
        for round in 0..100_000 {
            let at = rng.below(pages - 1) / 2 * 4096;
            let len = 1 + rng.below(m.len as u64 - at);
            let r = pd.register(m.addr() + at, len, REMOTE).unwrap();
            assert_eq!(covered(&r), len);
            drop(r);
            waits = freeze_stats().waits - before.waits;
            if round >= rounds && waits >= 50 {
                break;
            }
        }
        stop.store(true, Ordering::Relaxed);
        let mut writes = 0;
        for (i, w) in writers.into_iter().enumerate() {
            for (k, n) in w.join().unwrap().into_iter().enumerate() {
                assert_eq!(counters(&m)[i + 64 * k].load(Ordering::Relaxed), n);
                writes += n;
            }
        }
        println!("{writes} writes, {} freezes, {waits} waits", freeze_stats().freezes - before.freezes);
        assert!(waits >= 50, "the race was not run: only {waits} writes met a frozen chunk");
    });
}

#[test]
fn mallocs_go_on_while_their_heap_moves() {
    watchdog();
    let pd = pd();
    let stop = AtomicBool::new(false);
    std::thread::scope(|s| {
        for t in 0..3u64 {
            let stop = &stop;
            s.spawn(move || {
                let mut rng = Rng(t);
                let mut kept: Vec<Vec<u8>> = Vec::new();
                while !stop.load(Ordering::Relaxed) {
                    let n = 1 + rng.below(5000) as usize;
                    kept.push(vec![n as u8; n]);
                    if kept.len() > 200 {
                        let v = kept.swap_remove(rng.below(200) as usize);
                        assert!(v.iter().all(|b| *b == v.len() as u8));
                    }
                }
            });
        }
        let mut rng = Rng::seeded();
        let mut live = Vec::new();
        for i in 0..1500usize {
            let v = vec![i as u8; 1 + rng.below(20_000) as usize];
            let r = pd.register(v.as_ptr() as u64, v.len() as u64, REMOTE).unwrap();
            live.push((v, r, i as u8));
            if live.len() > 20 {
                let (v, r, i) = live.swap_remove(rng.below(20) as usize);
                drop(r);
                assert!(v.iter().all(|b| *b == i));
            }
        }
        stop.store(true, Ordering::Relaxed);
    });
}

#[test]
fn registering_threads_take_turns() {
    watchdog();
    let pd = pd();
    std::thread::scope(|s| {
        for t in 0..4u64 {
            let pd = &pd;
            s.spawn(move || {
                let m = Map::anon(16 * PAGE);
                let mut rng = Rng(t);
                m.fill(&mut rng);
                let before = m.bytes().to_vec();
                for _ in 0..100 {
                    let at = rng.below(m.len as u64 - 1);
                    let r = pd.register(m.addr() + at, 1 + rng.below(m.len as u64 - at), REMOTE).unwrap();
                    assert!(r.still_mapped());
                }
                assert_eq!(m.bytes(), before);
            });
        }
    });
}

/// Discarding beside a mover that never rests: what is discarded reads zero, the rest stays.
#[test]
fn discarding_while_neighbours_move() {
    watchdog();
    let pd = pd();
    let m = Map::anon(3 * PAGE);
    let stop = AtomicBool::new(false);
    std::thread::scope(|s| {
        let (pd, m, stop) = (&pd, &m, &stop);
        s.spawn(move || {
            while !stop.load(Ordering::Relaxed) {
                let r = pd.register(m.addr() + 4096, 2 * 4096, REMOTE).unwrap();
                assert_eq!(covered(&r), 2 * 4096);
            }
        });
        let page = Map { at: m.at, len: PAGE };
        for i in 0..1000 {
            page.bytes().fill(i as u8 | 1);
            // SAFETY: memory of this test.
            if unsafe { madvise_moved(m.addr(), 4096, libc::MADV_DONTNEED) }.is_none() {
                // SAFETY: as above; nothing there has moved.
                assert_eq!(unsafe { libc::madvise(m.at.cast(), PAGE, libc::MADV_DONTNEED) }, 0);
            }
            assert!(page.bytes().iter().all(|b| *b == 0));
        }
        std::mem::forget(page);
        stop.store(true, Ordering::Relaxed);
    });
}

/// What a thread does with SIGSEGV blocked, until it is told to end.
type Work = fn(std::sync::mpsc::Receiver<()>);

/// Registers memory while another thread does `work`: once, and after that has ended once more. How much of it moved?
fn register_beside(work: Work) -> [u64; 2] {
    let (pd, m) = (pd(), Map::anon(PAGE));
    let (tell, ready) = std::sync::mpsc::channel();
    let (end, wait) = std::sync::mpsc::channel();
    let t = std::thread::spawn(move || {
        let mut all = std::mem::MaybeUninit::uninit();
        // SAFETY: initialises the set.
        unsafe { libc::sigfillset(all.as_mut_ptr()) };
        let all: libc::sigset_t = {
            // SAFETY: initialised above.
            unsafe { all.assume_init() }
        };
        // SAFETY: a valid set; changes only this thread's mask.
        unsafe { libc::pthread_sigmask(libc::SIG_BLOCK, &raw const all, std::ptr::null_mut()) };
        tell.send(()).unwrap();
        work(wait);
        // SAFETY: as above.
        unsafe { libc::pthread_sigmask(libc::SIG_UNBLOCK, &raw const all, std::ptr::null_mut()) };
    });
    ready.recv().unwrap();
    let beside = pd.register(m.addr(), 4096, REMOTE).unwrap();
    let moved = covered(&beside);
    assert_eq!(beside.unmoved_because().is_some(), moved == 0);
    drop(beside);
    drop(end);
    t.join().unwrap();
    [moved, covered(&pd.register(m.addr(), 4096, REMOTE).unwrap())]
}

/// The same in a child, for the other tests' sake.
fn beside(work: Work, moved: [u64; 2]) {
    watchdog();
    // SAFETY: the child runs only this test's code and ends with _exit.
    let pid = unsafe { libc::fork() };
    if pid == 0 {
        let ok = std::panic::catch_unwind(|| assert_eq!(register_beside(work), moved));
        // SAFETY: ends the child.
        unsafe { libc::_exit(i32::from(ok.is_err())) };
    }
    let mut status = 0;
    // SAFETY: our child.
    assert_eq!(unsafe { libc::waitpid(pid, &raw mut status, 0) }, pid);
    assert_eq!(status, 0);
}

/// A thread that blocks SIGSEGV cannot be made to wait: nothing moves, and the registration says so.
#[test]
fn a_thread_that_sleeps_with_faults_blocked_stops_the_mover() {
    beside(|end| assert!(end.recv().is_err()), [0, 4096]);
}

#[test]
fn a_thread_that_works_with_faults_blocked_stops_the_mover() {
    beside(|end| while end.try_recv() == Err(std::sync::mpsc::TryRecvError::Empty) {}, [0, 4096]);
}

/// Time that this thread has had a processor.
fn own_time() -> Duration {
    let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: fills in one timespec.
    unsafe { libc::clock_gettime(libc::CLOCK_THREAD_CPUTIME_ID, &raw mut time) };
    Duration::new(time.tv_sec as u64, time.tv_nsec as u32)
}

/// Lets this thread, and those it makes, run on the processor that it is on only.
fn stay_here() {
    // SAFETY: cpu_set_t is plain data: no processor.
    let mut set: libc::cpu_set_t = unsafe { std::mem::zeroed() };
    // SAFETY: no precondition.
    let here = unsafe { libc::sched_getcpu() };
    // SAFETY: a valid set and processor.
    unsafe { libc::CPU_SET(here as usize, &mut set) };
    // SAFETY: a valid set; changes only this thread.
    assert_eq!(unsafe { libc::sched_setaffinity(0, size_of_val(&set), &raw const set) }, 0);
}

/// A thread that is being created on a busy machine blocks SIGSEGV for as long as it has to wait for a processor. Here that is
/// one which gets a three-hundredth of it, beside one that takes the rest, and needs four milliseconds.
#[test]
fn a_thread_that_gets_no_processor_is_waited_for() {
    fn starve(_: std::sync::mpsc::Receiver<()>) {
        let (hungry, begun) = (AtomicBool::new(true), own_time());
        stay_here();
        std::thread::scope(|s| {
            s.spawn(|| {
                while hungry.load(Ordering::Relaxed) {
                    std::hint::spin_loop();
                }
            });
            let lowest = libc::sched_param { sched_priority: 0 };
            // SAFETY: a valid parameter; changes only this thread.
            assert_eq!(unsafe { libc::sched_setscheduler(0, libc::SCHED_IDLE, &raw const lowest) }, 0);
            while own_time() - begun < Duration::from_millis(4) {}
            hungry.store(false, Ordering::Relaxed);
        });
    }
    beside(starve, [4096, 4096]);
}
