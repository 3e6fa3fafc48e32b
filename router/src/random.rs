//! Randomness for keys and queue pair numbers, from the kernel.

use std::fs::File;
use std::io::{self, Read};

/// A buffered reader of the kernel's generator.
#[derive(Debug)]
pub struct Random {
    source: File,
    buffer: [u8; 1024],
    used: usize,
}

impl Random {
    pub fn new() -> io::Result<Self> {
        let mut random = Random { source: File::open("/dev/urandom")?, buffer: [0; 1024], used: 0 };
        random.fill()?;
        Ok(random)
    }

    fn fill(&mut self) -> io::Result<()> {
        self.source.read_exact(&mut self.buffer)?;
        self.used = 0;
        Ok(())
    }

    /// 32 random bits. Fails only if the kernel's generator does.
    pub fn next_u32(&mut self) -> io::Result<u32> {
        if self.used == self.buffer.len() {
            self.fill()?;
        }
        let mut bytes = [0; 4];
        bytes.copy_from_slice(&self.buffer[self.used..self.used + 4]);
        self.buffer[self.used..self.used + 4].fill(0);
        self.used += 4;
        Ok(u32::from_ne_bytes(bytes))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_refill_gives_new_bytes() {
        let mut random = Random::new().expect("/dev/urandom");
        let first: Vec<_> = (0..256).map(|_| random.next_u32().expect("random")).collect();
        let second: Vec<_> = (0..256).map(|_| random.next_u32().expect("random")).collect();
        assert_ne!(first, second);
        assert!(first.iter().any(|x| *x != 0));
    }
}
