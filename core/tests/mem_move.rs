//! Moving and giving back: contents, alignment, kinds of memory, sharing, and memory replaced behind our back.

mod mem_util;

use freeflow_core::client::mem::{MemError, PdMemory, madvise_moved};
use mem_util::*;

fn errno(r: Result<freeflow_core::client::mem::Registration, MemError>) -> i32 {
    r.err().map_or(0, |e| e.errno().raw_os_error())
}

#[test]
fn bytes_survive_both_ways() {
    watchdog();
    let (pd, mut rng) = (pd(), Rng::seeded());
    let m = Map::anon(50 * PAGE);
    m.fill(&mut rng);
    let before = m.bytes().to_vec();
    let r = pd.register(m.addr(), m.len as u64, REMOTE).unwrap();
    assert_eq!(r.extents().len(), 1);
    let e = r.extents()[0];
    assert_eq!((e.va, e.len), (m.addr(), m.len as u64));
    assert!(is_moved(m.addr()) && r.still_mapped());
    assert_eq!(m.bytes(), before);
    let peer = Map::file(&pd, e.offset, m.len);
    assert_eq!(peer.bytes(), before, "the file has the program's bytes");
    m.bytes()[5000] ^= 0xff;
    assert_eq!(peer.bytes()[5000], before[5000] ^ 0xff, "a peer sees the program's writes");
    peer.bytes()[9000] ^= 0xff;
    assert_eq!(m.bytes()[9000], before[9000] ^ 0xff, "and the reverse");
    let after = m.bytes().to_vec();
    drop(r);
    assert!(!is_moved(m.addr()), "{}", mapping(m.addr()));
    assert_eq!(m.bytes(), after);
    peer.bytes().fill(0xee);
    assert_eq!(m.bytes(), after, "a peer's late write lands nowhere");
}

/// Long runs move by huge pages where they can: whatever lies at their ends, and whatever was never written to.
#[test]
fn long_runs_keep_their_bytes() {
    watchdog();
    let (pd, mut rng) = (pd(), Rng::seeded());
    const HUGE: usize = 2 << 20;
    for (ends, step) in [(0, PAGE), (PAGE, 64 * PAGE), (300 * PAGE, 512 * PAGE), (HUGE - PAGE, 5 * HUGE)] {
        let m = Map::anon(10 * HUGE + 2 * ends);
        for at in (0..m.len).step_by(step) {
            m.bytes()[at..at + PAGE].fill_with(|| rng.next() as u8);
        }
        let mut before = vec![0; m.len];
        for at in (0..m.len).step_by(step) {
            before[at..at + PAGE].copy_from_slice(&m.bytes()[at..at + PAGE]);
        }
        let r = pd.register(m.addr() + 5, m.len as u64 - 9, REMOTE).unwrap();
        assert_eq!((r.extents().len(), covered(&r)), (1, m.len as u64 - 9));
        assert_eq!(mapping(m.addr()), mapping(m.addr() + m.len as u64 - 1), "one mapping");
        assert!(m.bytes() == before, "{ends} {step}: bytes were lost on the way in");
        let peer = Map::file(&pd, r.extents()[0].offset - 5, m.len);
        assert!(peer.bytes() == before, "{ends} {step}: the file has other bytes");
        for at in (100..m.len).step_by(7 * PAGE + 8) {
            (m.bytes()[at], peer.bytes()[at + 1]) = (7, 8);
            (before[at], before[at + 1]) = (7, 8);
        }
        assert!(m.bytes() == before && peer.bytes() == before);
        drop(r);
        assert!(!is_moved(m.addr()) && m.bytes() == before, "{ends} {step}: bytes were lost on the way back");
        assert!(peer.bytes().iter().all(|b| *b == 0));
    }
}

#[test]
fn every_alignment() {
    watchdog();
    let (pd, mut rng) = (pd(), Rng::seeded());
    let m = Map::anon(8 * PAGE);
    m.fill(&mut rng);
    let before = m.bytes().to_vec();
    let edges =
        [0, 1, 7, 63, 64, 2048, 4095, 4096, 4097, 8191, 8192, 12288, 12289, 20000, 8 * 4096 - 1, 8 * 4096];
    for s in edges {
        for e in edges.into_iter().filter(|e| *e > s) {
            for want in [REMOTE, LOCAL, NONE] {
                check_alignment(&pd, &m, s, e, want);
            }
            assert_eq!(m.bytes(), before, "{s}..{e}");
        }
    }
}

fn check_alignment(
    pd: &std::sync::Arc<PdMemory>,
    m: &Map,
    s: usize,
    e: usize,
    want: freeflow_core::client::mem::Want,
) {
    let r = pd.register(m.addr() + s as u64, (e - s) as u64, want).unwrap();
    let inner = (s.next_multiple_of(PAGE), e / PAGE * PAGE);
    let expect = match want {
        w if w == REMOTE => Some((s, e)),
        w if w == LOCAL && inner.0 < inner.1 => Some(inner),
        _ => None,
    };
    let got: Vec<_> = r.extents().iter().map(|x| (x.va, x.len)).collect();
    let expect: Vec<_> = expect.iter().map(|(s, e)| (m.addr() + *s as u64, (e - s) as u64)).collect();
    assert_eq!(got, expect, "{s}..{e} {want:?}");
    for x in r.extents() {
        let peer = Map::file(pd, x.offset, x.len as usize);
        let skip = x.offset as usize % PAGE;
        let at = (x.va - m.addr()) as usize;
        assert_eq!(peer.bytes()[skip..], m.bytes()[at..at + x.len as usize]);
    }
}

#[test]
fn what_may_not_move_stays() {
    watchdog();
    let pd = pd();
    let unmoved = |what: &str, addr: u64, len: u64| {
        let r = pd.register(addr, len, REMOTE).unwrap_or_else(|e| panic!("{what}: {e}"));
        assert!(r.extents().is_empty(), "{what} moved: {:?}", r.extents());
    };
    let local = [7u8; 10000];
    unmoved("own stack", local.as_ptr() as u64, 10000);
    let rw = libc::PROT_READ | libc::PROT_WRITE;
    let shared = Map::with(4 * PAGE, rw, libc::MAP_SHARED | libc::MAP_ANONYMOUS, -1, 0);
    unmoved("shared", shared.addr(), 4096);
    let file = std::fs::File::options().read(true).open("/proc/self/exe").unwrap();
    let file = Map::with(PAGE, rw, libc::MAP_PRIVATE, std::os::fd::AsRawFd::as_raw_fd(&file), 0);
    unmoved("a file", file.addr(), 4096);
    let locked = Map::anon(PAGE);
    // SAFETY: memory of this test.
    assert_eq!(unsafe { libc::mlock(locked.at.cast(), PAGE) }, 0);
    unmoved("locked", locked.addr(), 4096);
    let down = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_GROWSDOWN;
    let down = Map::with(2 * PAGE, rw, down, -1, 0);
    unmoved("growing down", down.addr(), 4096);
    let jit = Map::anon(PAGE);
    jit.protect(rw | libc::PROT_EXEC);
    unmoved("executable", jit.addr(), 4096);
    let other = Map::anon(PAGE);
    let other_pd = mem_util::pd();
    let held = other_pd.register(other.addr(), 4096, REMOTE).unwrap();
    assert_eq!(covered(&held), 4096);
    unmoved("another PD's", other.addr(), 4096);
    let empty = pd.register(other.addr(), 0, REMOTE).unwrap();
    assert!(empty.extents().is_empty());
}

#[test]
fn stacks_of_other_threads_stay() {
    watchdog();
    let pd = pd();
    let (tell, addr) = std::sync::mpsc::channel();
    let (end, wait) = std::sync::mpsc::channel::<()>();
    let t = std::thread::spawn(move || {
        let mine = [1u8; 3 * PAGE];
        tell.send(mine.as_ptr() as u64).unwrap();
        wait.recv().unwrap_err();
        assert!(mine.iter().all(|b| *b == 1));
    });
    let addr = addr.recv().unwrap();
    assert!(pd.register(addr, 3 * PAGE as u64, REMOTE).unwrap().extents().is_empty());
    drop(end);
    t.join().unwrap();
    // Memory right above a stack, which the kernel joins to it, is not a stack.
    let big = Map::anon(1 << 20);
    let r = pd.register(big.addr(), 1 << 20, REMOTE).unwrap();
    assert_eq!(covered(&r), 1 << 20);
}

#[test]
fn bad_ranges_fault() {
    watchdog();
    let pd = pd();
    let m = Map::secluded(6 * PAGE);
    // SAFETY: a page of this test.
    assert_eq!(unsafe { libc::munmap(m.at.wrapping_add(2 * PAGE).cast(), PAGE) }, 0);
    for want in [REMOTE, LOCAL, NONE] {
        assert_eq!(errno(pd.register(m.addr(), 3 * 4096, want)), libc::EFAULT, "a hole");
        assert_eq!(errno(pd.register(m.addr() + 2 * 4096, 10, want)), libc::EFAULT);
        assert_eq!(errno(pd.register(0, 4096, want)), libc::EFAULT);
    }
    assert!(!is_moved(m.addr()), "a failed registration moves nothing");
    let ro = Map { at: m.at.wrapping_add(3 * PAGE), len: PAGE };
    ro.protect(libc::PROT_READ);
    assert_eq!(errno(pd.register(ro.addr(), 10, LOCAL)), libc::EFAULT);
    assert_eq!(errno(pd.register(ro.addr(), 10, NONE)), 0);
    ro.protect(libc::PROT_NONE);
    assert_eq!(errno(pd.register(ro.addr(), 10, NONE)), libc::EFAULT);
    std::mem::forget(ro);
    assert_eq!(errno(pd.register(u64::MAX - 100, 200, NONE)), libc::EINVAL);
}

#[test]
fn overlapping_registrations_share_pages() {
    watchdog();
    let (pd, mut rng) = (pd(), Rng::seeded());
    let m = Map::anon(20 * PAGE);
    m.fill(&mut rng);
    let before = m.bytes().to_vec();
    let page = |n: u64| m.addr() + n * 4096;
    let a = pd.register(page(5), 5 * 4096, REMOTE).unwrap();
    let b = pd.register(page(0), 20 * 4096, REMOTE).unwrap();
    assert_eq!(b.extents().len(), 1, "extended in both directions, contiguously: {:?}", b.extents());
    assert_eq!(b.extents()[0].offset + 5 * 4096, a.extents()[0].offset);
    let c = pd.register(page(7), 4096, REMOTE).unwrap();
    let d = pd.register(page(7), 4096, REMOTE).unwrap();
    drop(a);
    assert!(is_moved(page(5)) && b.still_mapped());
    drop(b);
    assert!(!is_moved(page(6)) && is_moved(page(7)) && !is_moved(page(8)));
    drop(c);
    assert!(is_moved(page(7)) && d.still_mapped());
    drop(d);
    assert!(!is_moved(page(7)));
    assert_eq!(m.bytes(), before);
}

#[test]
fn random_registrations_agree_with_a_model() {
    watchdog();
    let (pd, mut rng) = (pd(), Rng::seeded());
    let m = Map::anon(64 * PAGE);
    m.fill(&mut rng);
    let mut expect = m.bytes().to_vec();
    let mut live: Vec<(u64, u64, freeflow_core::client::mem::Registration)> = Vec::new();
    for _ in 0..600 {
        if live.len() > 8 || (!live.is_empty() && rng.below(3) == 0) {
            live.swap_remove(rng.below(live.len() as u64) as usize);
        } else {
            let s = rng.below(63 * 4096);
            let len = 1 + rng.below(64 * 4096 - s);
            live.push((s, len, pd.register(m.addr() + s, len, REMOTE).unwrap()));
        }
        let at = rng.below(m.len as u64) as usize;
        (m.bytes()[at], expect[at]) = (at as u8, at as u8);
        for (s, len, r) in &live {
            assert!(r.still_mapped());
            assert!(r.extents().len() > 1 || covered(r) == *len);
            for e in r.extents() {
                assert!(e.va >= m.addr() + s && e.va + e.len <= m.addr() + s + len);
            }
        }
        for p in 0..64u64 {
            let held = live.iter().any(|(s, l, _)| s / 4096 <= p && (s + l - 1) / 4096 >= p);
            assert!(held || !is_moved(m.addr() + p * 4096), "page {p} was not given back");
        }
    }
    assert_eq!(m.bytes(), expect);
    drop(live);
    assert_eq!(m.bytes(), expect);
}

#[test]
fn heap_neighbours_merge() {
    watchdog();
    let pd = pd();
    let mut live = Vec::new();
    for i in 0..200u8 {
        let v = vec![i; 3000];
        let r = pd.register(v.as_ptr() as u64, 3000, REMOTE).unwrap();
        assert_eq!(covered(&r), 3000);
        live.push((v, r));
    }
    for (i, (v, r)) in live.iter().enumerate() {
        assert!(r.still_mapped() && v.iter().all(|b| *b == i as u8));
    }
    while let Some((v, r)) = live.pop() {
        drop(r);
        assert!(v.iter().all(|b| *b == live.len() as u8));
    }
}

#[test]
fn memory_mapped_anew_is_moved_anew() {
    watchdog();
    let pd = pd();
    let m = Map::anon(4 * PAGE);
    m.bytes().fill(1);
    let old = pd.register(m.addr(), 4 * 4096, REMOTE).unwrap();
    // SAFETY: replaces memory of this test, as free and malloc do.
    let again = unsafe {
        libc::mmap(
            m.at.cast(),
            2 * PAGE,
            libc::PROT_READ | libc::PROT_WRITE,
            libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_FIXED,
            -1,
            0,
        )
    };
    assert_eq!(again, m.at.cast());
    m.bytes()[..2 * PAGE].fill(2);
    assert!(!old.still_mapped());
    let new = pd.register(m.addr(), 4 * 4096, REMOTE).unwrap();
    assert_eq!(covered(&new), 4 * 4096);
    assert!(new.still_mapped() && !old.still_mapped());
    assert_ne!(new.extents()[0].offset, old.extents()[0].offset);
    let stale = Map::file(&pd, old.extents()[0].offset, PAGE);
    stale.bytes().fill(9);
    assert!(
        m.bytes()[..2 * PAGE].iter().all(|b| *b == 2),
        "a write through the dead entry reached new memory"
    );
    drop(old);
    assert!(new.still_mapped());
    assert!(m.bytes()[2 * PAGE..].iter().all(|b| *b == 1));
    drop(new);
    assert!(!is_moved(m.addr()) && !is_moved(m.addr() + 3 * 4096));
    assert!(m.bytes()[..2 * PAGE].iter().all(|b| *b == 2));
}

#[test]
fn unmapped_memory_can_be_deregistered() {
    watchdog();
    let pd = pd();
    let m = Map::anon(4 * PAGE);
    let r = pd.register(m.addr(), 4 * 4096, REMOTE).unwrap();
    let e = r.extents()[0];
    drop(m);
    assert!(!r.still_mapped());
    drop(r);
    let seen = Map::file(&pd, e.offset, PAGE);
    assert!(seen.bytes().iter().all(|b| *b == 0), "its bytes are gone from the file too");
}

#[test]
fn realloc_beside_another_registration() {
    watchdog();
    let pd = pd();
    let big = 256 << 10;
    for _ in 0..8 {
        let [a, b, c] = [(); 3].map(|()| {
            // SAFETY: plain malloc of sizes that glibc maps one by one, side by side.
            unsafe { libc::malloc(big) }
        });
        let bytes = |p: *mut libc::c_void, n: usize| {
            // SAFETY: n bytes of the chunk at p.
            unsafe { std::slice::from_raw_parts_mut(p.cast::<u8>(), n) }
        };
        let regs: Vec<_> = [a, b, c].map(|p| pd.register(p as u64, big as u64, REMOTE).unwrap()).into();
        assert!(regs.iter().all(|r| covered(r) == big as u64));
        for (p, v) in [(a, 1), (b, 2), (c, 3)] {
            bytes(p, big).fill(v);
        }
        // SAFETY: b is a live chunk; glibc grows it with mremap.
        let grown = unsafe { libc::realloc(b, 4 * big) };
        assert!(bytes(grown, big).iter().all(|x| *x == 2));
        bytes(grown, 4 * big).fill(0xbb);
        assert!(bytes(a, big).iter().all(|x| *x == 1), "a aliases the grown chunk");
        assert!(bytes(c, big).iter().all(|x| *x == 3), "c aliases the grown chunk");
        let again = pd.register(grown as u64, 4 * big as u64, REMOTE).unwrap();
        assert_eq!(covered(&again), 4 * big as u64);
        drop(regs);
        assert!(again.still_mapped());
        assert!(bytes(grown, 4 * big).iter().all(|x| *x == 0xbb));
        drop(again);
        assert!(bytes(grown, 4 * big).iter().all(|x| *x == 0xbb));
        for p in [a, c, grown] {
            // SAFETY: live chunks.
            unsafe { libc::free(p) };
        }
    }
}

#[test]
fn discarded_memory_reads_zero() {
    watchdog();
    let pd = pd();
    let m = Map::anon(8 * PAGE);
    m.bytes().fill(5);
    // SAFETY: memory of this test.
    let advise = |addr: u64, len: u64| unsafe { madvise_moved(addr, len, libc::MADV_DONTNEED) };
    assert!(advise(m.addr(), 4096).is_none(), "nothing has moved: the real madvise does it");
    let r = pd.register(m.addr() + 4096, 4 * 4096, REMOTE).unwrap();
    advise(m.addr() + 3 * 4096, 3 * 4096).unwrap().unwrap();
    let zero = |n: usize| m.bytes()[n * PAGE..(n + 1) * PAGE].iter().all(|b| *b == 0);
    let five = |n: usize| m.bytes()[n * PAGE..(n + 1) * PAGE].iter().all(|b| *b == 5);
    assert!(five(1) && five(2) && zero(3) && zero(4) && zero(5) && five(6));
    assert!(r.still_mapped());
    drop(r);
    assert!(five(1) && zero(3) && zero(5));
    // SAFETY: memory of this test; advice that concerns nothing moved.
    assert!(unsafe { madvise_moved(m.addr(), 4096, libc::MADV_NORMAL) }.is_none());
}
