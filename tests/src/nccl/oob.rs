//! How ranks tell each other things: a star of TCP connections around rank 0, as NCCL's bootstrap is.

use std::io::{self, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

/// One rank's end.
#[derive(Debug)]
pub struct Oob {
    pub rank: usize,
    pub ranks: usize,
    /// Rank 0: to each other rank. Others: to rank 0.
    lines: Mutex<Vec<TcpStream>>,
}

/// A rank that is gone must not hang the others.
const PATIENCE: Duration = Duration::from_secs(120);

impl Oob {
    /// Rank 0 listens at `address`, the others connect there.
    pub fn join(address: &str, rank: usize, ranks: usize) -> io::Result<Self> {
        let lines = if rank == 0 { serve(address, ranks)? } else { vec![dial(address, rank)?] };
        for line in &lines {
            line.set_nodelay(true)?;
            line.set_read_timeout(Some(PATIENCE))?;
        }
        Ok(Oob { rank, ranks, lines: Mutex::new(lines) })
    }

    /// Everybody's `mine`, by rank.
    pub fn all(&self, mine: &[u8]) -> io::Result<Vec<Vec<u8>>> {
        let mut lines = self.lines.lock().unwrap_or_else(PoisonError::into_inner);
        if self.rank != 0 {
            put(&mut lines[0], mine)?;
            return (0..self.ranks).map(|_| get(&mut lines[0])).collect();
        }
        let mut all = vec![mine.to_vec()];
        for line in lines.iter_mut() {
            all.push(get(line)?);
        }
        for line in lines.iter_mut() {
            all.iter().try_for_each(|one| put(line, one))?;
        }
        Ok(all)
    }

    /// Waits for everybody.
    pub fn barrier(&self) -> io::Result<()> {
        self.all(&[]).map(drop)
    }
}

fn serve(address: &str, ranks: usize) -> io::Result<Vec<TcpStream>> {
    if ranks == 1 {
        return Ok(Vec::new());
    }
    let listener = TcpListener::bind(address)?;
    println!("# listening on {}", listener.local_addr()?.port());
    let mut lines: Vec<Option<TcpStream>> = (1..ranks).map(|_| None).collect();
    listener.set_nonblocking(true)?;
    let start = Instant::now();
    while lines.iter().any(Option::is_none) {
        let mut line = match listener.accept() {
            Ok((line, _)) => line,
            Err(error) if error.kind() == io::ErrorKind::WouldBlock && start.elapsed() < PATIENCE => {
                // A rank that dies before it gets here is no event for a listener.
                std::thread::sleep(Duration::from_millis(10));
                continue;
            }
            Err(error) => return Err(error),
        };
        line.set_nonblocking(false)?;
        let mut rank = [0; 8];
        line.read_exact(&mut rank)?;
        let place = usize::try_from(u64::from_le_bytes(rank)).ok().and_then(|rank| rank.checked_sub(1));
        let slot = place.and_then(|place| lines.get_mut(place));
        *slot.ok_or_else(|| io::Error::other("a rank that is none"))? = Some(line);
    }
    Ok(lines.into_iter().flatten().collect())
}

/// Rank 0 may not listen yet.
fn dial(address: &str, rank: usize) -> io::Result<TcpStream> {
    let start = Instant::now();
    loop {
        match TcpStream::connect(address) {
            Ok(mut line) => {
                line.write_all(&(rank as u64).to_le_bytes())?;
                return Ok(line);
            }
            Err(error) if start.elapsed() > PATIENCE => return Err(error),
            // There is no event for a port that somebody begins to listen on.
            Err(_) => std::thread::sleep(Duration::from_millis(10)),
        }
    }
}

fn put(line: &mut TcpStream, bytes: &[u8]) -> io::Result<()> {
    line.write_all(&(bytes.len() as u32).to_le_bytes())?;
    line.write_all(bytes)
}

fn get(line: &mut TcpStream) -> io::Result<Vec<u8>> {
    let mut len = [0; 4];
    line.read_exact(&mut len)?;
    let mut bytes = vec![0; u32::from_le_bytes(len) as usize];
    line.read_exact(&mut bytes)?;
    Ok(bytes)
}
