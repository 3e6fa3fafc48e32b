//! A forked child has a copy of its own of all moved memory, and its parent loses nothing by forking.

mod mem_util;

use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError, RwLock};

use freeflow_core::client::mem::{MemError, PdMemory, on_fork_child};
use mem_util::*;

/// A fork freezes the memory of all tests of this process: held for writing by one that must not be met by another's.
static FORKS: RwLock<()> = RwLock::new(());

/// Runs `f` in a forked child while `meanwhile` runs here. True when the child ended well.
fn fork_with(f: impl FnOnce(), meanwhile: impl FnOnce()) -> bool {
    let _among_others = FORKS.read().unwrap_or_else(PoisonError::into_inner);
    fork_alone(f, meanwhile)
}

fn fork_alone(f: impl FnOnce(), meanwhile: impl FnOnce()) -> bool {
    // SAFETY: the child uses only what this test gives it, and malloc, and ends with _exit.
    let pid = unsafe { libc::fork() };
    assert!(pid >= 0);
    if pid == 0 {
        let ok = std::panic::catch_unwind(std::panic::AssertUnwindSafe(f)).is_ok();
        // SAFETY: ends the child without the harness's exit handlers.
        unsafe { libc::_exit(i32::from(!ok)) };
    }
    meanwhile();
    let mut status = 0;
    // SAFETY: our child.
    assert_eq!(unsafe { libc::waitpid(pid, &raw mut status, 0) }, pid);
    libc::WIFEXITED(status) && libc::WEXITSTATUS(status) == 0
}

/// Has the other threads stop also when this one panics: a failure must not look like a hang.
struct Stops<'a>(&'a AtomicBool);

impl Drop for Stops<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

/// A byte pipe to order parent and child without sleeping.
struct Gate([i32; 2]);

impl Gate {
    fn new() -> Gate {
        let mut fds = [0; 2];
        // SAFETY: room for two descriptors.
        assert_eq!(unsafe { libc::pipe(fds.as_mut_ptr()) }, 0);
        Gate(fds)
    }
    fn open(&self) {
        // SAFETY: one byte from a live buffer.
        assert_eq!(unsafe { libc::write(self.0[1], [1u8].as_ptr().cast(), 1) }, 1);
    }
    fn pass(&self) {
        let mut b = [0u8];
        // SAFETY: one byte into a live buffer.
        assert_eq!(unsafe { libc::read(self.0[0], b.as_mut_ptr().cast(), 1) }, 1);
    }
}

impl Drop for Gate {
    fn drop(&mut self) {
        for fd in self.0 {
            // SAFETY: ours.
            unsafe { libc::close(fd) };
        }
    }
}

#[test]
fn neither_sees_what_the_other_writes() {
    watchdog();
    let (pd, mut rng) = (pd(), Rng::seeded());
    let m = Map::anon(40 * PAGE);
    m.fill(&mut rng);
    let before = m.bytes().to_vec();
    let regs: Vec<_> = [(3, 4), (9, 1), (10, 1), (20, 15)]
        .map(|(p, n)| pd.register(m.addr() + p * 4096, n * 4096, REMOTE).unwrap())
        .into();
    let (go, done) = (Gate::new(), Gate::new());
    let ok = fork_with(
        || {
            assert_eq!(m.bytes(), before);
            assert!(!is_moved(m.addr() + 3 * 4096));
            m.bytes().fill(0xcc);
            done.open();
            go.pass();
            assert!(m.bytes().iter().all(|b| *b == 0xcc), "the parent's writes reached the child");
        },
        || {
            done.pass();
            assert_eq!(m.bytes(), before, "the child's writes reached the parent");
            m.bytes().fill(0xdd);
            go.open();
        },
    );
    assert!(ok);
    assert!(regs.iter().all(|r| r.still_mapped() && covered(r) > 0));
    let e = regs[0].extents()[0];
    assert!(Map::file(&pd, e.offset, 4096).bytes().iter().all(|b| *b == 0xdd), "shared again");
    drop(regs);
    assert!(m.bytes().iter().all(|b| *b == 0xdd));
    let ok = fork_with(|| m.bytes().fill(1), || ());
    assert!(ok && m.bytes().iter().all(|b| *b == 0xdd), "given back means private");
}

#[test]
fn protections_are_kept() {
    watchdog();
    let _alone = FORKS.write().unwrap_or_else(PoisonError::into_inner);
    let pd = pd();
    let m = Map::anon(2 * PAGE);
    m.bytes().fill(7);
    let r = pd.register(m.addr(), 2 * 4096, REMOTE).unwrap();
    let (ro, none) = (Map { at: m.at, len: PAGE }, Map { at: m.at.wrapping_add(PAGE), len: PAGE });
    ro.protect(libc::PROT_READ);
    none.protect(libc::PROT_NONE);
    let check = || {
        assert!(mapping(ro.addr()).contains("r--"), "{}", mapping(ro.addr()));
        assert!(mapping(none.addr()).contains("---"), "{}", mapping(none.addr()));
        none.protect(libc::PROT_READ);
        assert!(m.bytes().iter().all(|b| *b == 7));
        none.protect(libc::PROT_NONE);
    };
    assert!(fork_alone(check, || ()));
    check();
    drop(r);
    check();
    std::mem::forget((ro, none));
}

#[test]
fn forks_while_others_malloc_and_write() {
    watchdog();
    let pd = pd();
    let mut rng = Rng::seeded();
    let held: Vec<_> = (0..100)
        .map(|i| {
            let v = vec![i as u8; 1 + rng.below(9000) as usize];
            let r = pd.register(v.as_ptr() as u64, v.len() as u64, REMOTE).unwrap();
            (v, r)
        })
        .collect();
    let intact = || held.iter().enumerate().all(|(i, (v, _))| v.iter().all(|b| *b == i as u8));
    let stop = AtomicBool::new(false);
    std::thread::scope(|s| {
        for t in 0..2 {
            let (stop, pd) = (&stop, &pd);
            s.spawn(move || {
                let mut rng = Rng(t);
                let mut mine: Vec<Vec<u8>> = Vec::new();
                while !stop.load(Ordering::Relaxed) {
                    let v = vec![t as u8; 1 + rng.below(9000) as usize];
                    if rng.below(50) == 0 {
                        drop(pd.register(v.as_ptr() as u64, v.len() as u64, REMOTE).unwrap());
                    }
                    mine.push(v);
                    if mine.len() > 300 {
                        assert!(mine.swap_remove(rng.below(300) as usize).iter().all(|b| *b == t as u8));
                    }
                }
            });
        }
        let end = Stops(&stop);
        for round in 0..60u64 {
            let ok = fork_with(
                || {
                    assert!(intact());
                    let mut rng = Rng(round);
                    let mut mine = Vec::new();
                    for _ in 0..500 {
                        mine.push(vec![9u8; 1 + rng.below(9000) as usize]);
                    }
                    mine.truncate(7);
                    assert!(mine.iter().flatten().all(|b| *b == 9) && intact());
                },
                || (),
            );
            assert!(ok, "round {round}");
            assert!(intact());
        }
        drop(end);
    });
}

#[test]
fn what_a_lock_protects_is_whole_in_the_child() {
    watchdog();
    let pd = pd();
    let m = Map::anon(20 * PAGE);
    let r = pd.register(m.addr(), m.len as u64, REMOTE).unwrap();
    // SAFETY: aligned, zeroed memory of this test; only used as atomics.
    let words: &[AtomicU64] = unsafe { std::slice::from_raw_parts(m.at.cast(), m.len / 8) };
    let (lock, stop) = (Mutex::new(()), AtomicBool::new(false));
    let whole =
        || (0..20).all(|p| words[p * 512].load(Ordering::Relaxed) == words[0].load(Ordering::Relaxed));
    std::thread::scope(|s| {
        let writer = s.spawn(|| {
            let mut n = 0u64;
            while !stop.load(Ordering::Relaxed) {
                let _held = lock.lock().unwrap();
                n += 1;
                (0..20).for_each(|p| words[p * 512].store(n, Ordering::Relaxed));
            }
            n
        });
        let end = Stops(&stop);
        for _ in 0..100 {
            let held = lock.lock().unwrap();
            let ok = fork_with(|| assert!(whole()), || drop(held));
            assert!(ok);
        }
        drop(end);
        let n = writer.join().unwrap();
        assert!(whole() && words[0].load(Ordering::Relaxed) == n, "the parent lost writes to a fork");
    });
    let seen = Map::file(&pd, r.extents()[0].offset, m.len);
    assert_eq!(seen.bytes(), m.bytes());
}

/// A peer in another process and a thread here write to the same pages, next to each other, through many forks.
#[test]
fn a_fork_loses_neither_local_nor_remote_writes() {
    watchdog();
    const PAGES: usize = 8;
    let pd = pd();
    let m = Map::anon(PAGES * PAGE);
    let r = pd.register(m.addr(), m.len as u64, REMOTE).unwrap();
    let flags = libc::MAP_SHARED | libc::MAP_ANONYMOUS;
    let common = Map::with(PAGE, libc::PROT_READ | libc::PROT_WRITE, flags, -1, 0);
    let words = |m: &Map, n: usize| -> &'static [AtomicU64] {
        // SAFETY: aligned memory that outlives this test's use of it; only used as atomics.
        unsafe { std::slice::from_raw_parts(m.at.cast(), n) }
    };
    let (peer_stop, peer_sum) = (&words(&common, 2)[0], &words(&common, 2)[1]);
    let bump = |all: &[AtomicU64], first: usize, n: u64| {
        for p in 0..PAGES {
            let w = &all[p * 512 + first];
            assert_eq!(w.load(Ordering::Relaxed), n, "a write was lost in page {p}, word {first}");
            w.store(n + 1, Ordering::Relaxed);
        }
    };
    let among_others = FORKS.read().unwrap_or_else(PoisonError::into_inner);
    // SAFETY: the child touches only what is named below and ends with _exit.
    let peer = unsafe { libc::fork() };
    drop(among_others);
    if peer == 0 {
        let ended = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
            let file = Map::file(&pd, r.extents()[0].offset, PAGES * PAGE);
            let all = words(&file, PAGES * 512);
            let mut n = 0;
            while peer_stop.load(Ordering::Relaxed) == 0 {
                bump(all, 3, n);
                n += 1;
            }
            peer_sum.store(n, Ordering::Relaxed);
        }));
        // SAFETY: ends the child.
        unsafe { libc::_exit(i32::from(ended.is_err())) };
    }
    let stop = AtomicBool::new(false);
    let all = words(&m, PAGES * 512);
    std::thread::scope(|s| {
        let local = s.spawn(|| {
            let mut n = 0;
            while !stop.load(Ordering::Relaxed) {
                bump(all, 4, n);
                n += 1;
            }
            n
        });
        let end = Stops(&stop);
        for _ in 0..100 {
            assert!(fork_with(|| (), || ()));
        }
        drop(end);
        let n = local.join().unwrap();
        peer_stop.store(1, Ordering::Relaxed);
        let mut status = 0;
        // SAFETY: our child.
        unsafe { libc::waitpid(peer, &raw mut status, 0) };
        assert_eq!(status, 0, "the peer lost a write");
        let theirs = peer_sum.load(Ordering::Relaxed);
        println!("{n} local, {theirs} remote rounds");
        // Waits for a fork by another test, during which the peer's last words may not be visible here.
        assert!(r.still_mapped());
        for p in 0..PAGES {
            assert_eq!(all[p * 512 + 4].load(Ordering::Relaxed), n);
            assert_eq!(all[p * 512 + 3].load(Ordering::Relaxed), theirs);
        }
    });
}

static CALLED: AtomicUsize = AtomicUsize::new(0);

#[test]
fn the_child_starts_afresh() {
    watchdog();
    assert!(on_fork_child(|| {
        CALLED.fetch_add(1, Ordering::Relaxed);
    }));
    let pd = pd();
    let m = Map::anon(6 * PAGE);
    m.bytes().fill(1);
    let r = pd.register(m.addr(), 4 * 4096, REMOTE).unwrap();
    let generation = |pd: &Arc<PdMemory>| {
        assert!(matches!(pd.register(m.addr(), 4096, REMOTE), Err(MemError::Forked)));
        let own = PdMemory::new().unwrap();
        let r = own.register(m.addr(), 6 * 4096, REMOTE).unwrap();
        assert_eq!(covered(&r), 6 * 4096);
        (own, r)
    };
    let ok = fork_with(
        || {
            assert_eq!(CALLED.load(Ordering::Relaxed), 1);
            assert!(!r.still_mapped());
            let (own, mine) = generation(&pd);
            m.bytes().fill(2);
            let ok = fork_with(
                || {
                    assert_eq!(CALLED.load(Ordering::Relaxed), 2);
                    drop(generation(&own));
                    m.bytes().fill(3);
                },
                || (),
            );
            assert!(ok && mine.still_mapped());
            assert!(m.bytes().iter().all(|b| *b == 2));
        },
        || (),
    );
    assert!(ok && r.still_mapped());
    let ok = fork_with(|| drop((r, pd)), || ());
    assert!(ok, "dropping what the parent registered does no harm in the child");
    assert_eq!(CALLED.load(Ordering::Relaxed), 0);
    assert!(m.bytes().iter().all(|b| *b == 1));
}

#[test]
fn a_realloced_chunk_is_copied_too() {
    watchdog();
    let pd = pd();
    let big = 256 << 10;
    // SAFETY: plain malloc.
    let p = unsafe { libc::malloc(big) };
    let r = pd.register(p as u64, big as u64, REMOTE).unwrap();
    // SAFETY: a live chunk, grown with mremap.
    let p = unsafe { libc::realloc(p, 4 * big) };
    // SAFETY: all of the grown chunk.
    let bytes = unsafe { std::slice::from_raw_parts_mut(p.cast::<u8>(), 4 * big) };
    bytes.fill(4);
    assert!(fork_with(|| bytes.fill(5), || ()));
    assert!(bytes.iter().all(|b| *b == 4));
    drop(r);
    assert!(fork_with(|| bytes.fill(5), || ()), "still in the file, as nobody gave it back");
    assert!(bytes.iter().all(|b| *b == 4));
    // SAFETY: a live chunk.
    unsafe { libc::free(p) };
}

#[test]
fn spawning_goes_past_all_this() {
    watchdog();
    let pd = pd();
    let m = Map::anon(1 << 20);
    m.bytes().fill(6);
    let r = pd.register(m.addr(), m.len as u64, REMOTE).unwrap();
    for _ in 0..20 {
        assert!(std::process::Command::new("true").status().unwrap().success());
    }
    assert!(r.still_mapped() && m.bytes().iter().all(|b| *b == 6));
}
