//! What the mover's tests share: memory to play with, another look at the file, a printed seed, a watchdog.
#![allow(dead_code)]

use std::os::fd::AsRawFd;
use std::sync::Arc;

use freeflow_core::client::mem::{PdMemory, Registration, Want};

pub const PAGE: usize = 4096;
pub const REMOTE: Want = Want { remote: true, local_write: true };
pub const LOCAL: Want = Want { remote: false, local_write: true };
pub const NONE: Want = Want { remote: false, local_write: false };

/// A mapping that is unmapped at the end.
pub struct Map {
    pub at: *mut u8,
    pub len: usize,
}
// SAFETY: plain memory; the tests that share it use atomics or wait for each other.
unsafe impl Send for Map {}
// SAFETY: as above.
unsafe impl Sync for Map {}

impl Map {
    pub fn with(len: usize, prot: i32, flags: i32, fd: i32, off: i64) -> Map {
        // SAFETY: a new mapping where the kernel likes.
        let at = unsafe { libc::mmap(std::ptr::null_mut(), len, prot, flags, fd, off) };
        assert_ne!(at, libc::MAP_FAILED, "{}", std::io::Error::last_os_error());
        Map { at: at.cast(), len }
    }

    /// Private anonymous memory with a hole on either side, so that it is a mapping of its own.
    pub fn anon(len: usize) -> Map {
        let prot = libc::PROT_READ | libc::PROT_WRITE;
        let outer =
            Map::with(len + 2 * PAGE, libc::PROT_NONE, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS, -1, 0);
        let inner = Map { at: outer.at.wrapping_add(PAGE), len };
        inner.protect(prot);
        std::mem::forget(outer);
        inner
    }

    /// Private anonymous memory where the kernel puts nothing of its own accord: a hole made in it stays one, whatever other
    /// threads map meanwhile. One at a time.
    pub fn secluded(len: usize) -> Map {
        const AT: usize = 0x2000_0000_0000;
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_FIXED_NOREPLACE;
        let at = std::ptr::without_provenance_mut(AT);
        // SAFETY: replaces nothing.
        let at = unsafe { libc::mmap(at, len, libc::PROT_READ | libc::PROT_WRITE, flags, -1, 0) };
        assert_eq!(at.addr(), AT, "{}", std::io::Error::last_os_error());
        Map { at: at.cast(), len }
    }

    /// The PD's file, seen as a peer sees it.
    pub fn file(pd: &PdMemory, off: u64, len: usize) -> Map {
        let prot = libc::PROT_READ | libc::PROT_WRITE;
        let (page_off, skip) = (off & !(PAGE as u64 - 1), off as usize % PAGE);
        Map::with(len + skip, prot, libc::MAP_SHARED, pd.fd().as_raw_fd(), page_off as i64)
    }

    pub fn protect(&self, prot: i32) {
        // SAFETY: memory of this test.
        assert_eq!(unsafe { libc::mprotect(self.at.cast(), self.len, prot) }, 0);
    }

    pub fn addr(&self) -> u64 {
        self.at as u64
    }

    #[allow(clippy::mut_from_ref)]
    pub fn bytes(&self) -> &mut [u8] {
        // SAFETY: mapped for as long as self; tests do not overlap their uses.
        unsafe { std::slice::from_raw_parts_mut(self.at, self.len) }
    }

    pub fn fill(&self, rng: &mut Rng) {
        self.bytes().fill_with(|| rng.next() as u8);
    }
}

impl Drop for Map {
    fn drop(&mut self) {
        // SAFETY: mapped by us, borrowed by nobody.
        unsafe { libc::munmap(self.at.cast(), self.len) };
    }
}

pub fn pd() -> Arc<PdMemory> {
    PdMemory::new().expect("a PD's memory")
}

pub fn covered(r: &Registration) -> u64 {
    r.extents().iter().map(|e| e.len).sum()
}

/// What the mapping at `addr` is: its line in maps.
pub fn mapping(addr: u64) -> String {
    let maps = std::fs::read_to_string("/proc/self/maps").unwrap();
    let line = maps.lines().find(|l| {
        let (s, e) = l.split_once(' ').unwrap().0.split_once('-').unwrap();
        (u64::from_str_radix(s, 16).unwrap()..u64::from_str_radix(e, 16).unwrap()).contains(&addr)
    });
    line.unwrap_or("").to_string()
}

pub fn is_moved(addr: u64) -> bool {
    mapping(addr).contains("freeflow-pd")
}

/// splitmix64: the same numbers everywhere for a seed.
pub struct Rng(pub u64);

impl Rng {
    /// FREEFLOW_TEST_SEED or a fixed one; printed, so that a failure can be repeated.
    pub fn seeded() -> Rng {
        let seed =
            std::env::var("FREEFLOW_TEST_SEED").ok().and_then(|s| s.parse().ok()).unwrap_or(20_261_122);
        println!("seed {seed} (FREEFLOW_TEST_SEED)");
        Rng(seed)
    }

    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    pub fn below(&mut self, n: u64) -> u64 {
        self.next() % n
    }
}

/// Ends the process, saying so, when a test hangs.
pub fn watchdog() {
    static ONCE: std::sync::Once = std::sync::Once::new();
    ONCE.call_once(|| {
        // SAFETY: plain call; SIGALRM's default ends the process.
        unsafe { libc::alarm(240) };
    });
}
