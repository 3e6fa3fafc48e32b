//! Programs' output: whole lines, each behind the name of its container, never two in one.

use std::io::{self, BufRead, BufReader, PipeReader, Read, Write};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;

/// A line longer than this is shown in pieces.
const LONGEST: u64 = 64 << 10;

#[derive(Debug, Clone, Copy)]
pub enum Stream {
    Out,
    Err,
}

#[derive(Debug, Default)]
pub struct Output {
    /// Held while a line is written: the two streams may be one file.
    turn: Arc<Mutex<()>>,
    readers: Mutex<Vec<JoinHandle<()>>>,
}

impl Output {
    /// Shows what comes out of `pipe`; [`Output::finish`] waits for its end.
    pub fn follow(&self, name: &str, stream: Stream, pipe: impl Read + Send + 'static) {
        let reader = self.start(name, stream, pipe);
        self.readers.lock().unwrap_or_else(PoisonError::into_inner).push(reader);
    }

    /// Shows what comes out of `pipe` for as long as this process lasts.
    pub fn follow_to_the_end(&self, name: &str, stream: Stream, pipe: PipeReader) {
        self.start(name, stream, pipe);
    }

    /// Waits until every followed program's output was shown.
    pub fn finish(self) {
        for reader in self.readers.into_inner().unwrap_or_else(PoisonError::into_inner) {
            // A reader that panicked has said so already.
            reader.join().ok();
        }
    }

    fn start(&self, name: &str, stream: Stream, pipe: impl Read + Send + 'static) -> JoinHandle<()> {
        let turn = Arc::clone(&self.turn);
        let prefix = format!("{name}| ");
        std::thread::spawn(move || {
            copy_lines(&prefix, &mut BufReader::new(pipe), |line| {
                let _turn = turn.lock().unwrap_or_else(PoisonError::into_inner);
                // When nobody reads our output any more, the programs shall still run to their end.
                show(stream, line).ok();
            });
        })
    }
}

fn show(stream: Stream, line: &[u8]) -> io::Result<()> {
    match stream {
        Stream::Out => {
            let mut out = io::stdout().lock();
            out.write_all(line)?;
            out.flush()
        }
        Stream::Err => io::stderr().lock().write_all(line),
    }
}

fn copy_lines(prefix: &str, from: &mut impl BufRead, mut show: impl FnMut(&[u8])) {
    loop {
        let mut line = prefix.as_bytes().to_vec();
        match from.by_ref().take(LONGEST).read_until(b'\n', &mut line) {
            Ok(0) | Err(_) => return,
            Ok(_) => {
                if line.last() != Some(&b'\n') {
                    line.push(b'\n');
                }
                show(&line);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shown(text: &[u8]) -> Vec<String> {
        let mut lines = Vec::new();
        copy_lines("c1| ", &mut BufReader::new(text), |l| {
            lines.push(String::from_utf8_lossy(l).into_owned())
        });
        lines
    }

    #[test]
    fn every_line_gets_its_prefix_and_its_end() {
        assert_eq!(shown(b"a\n\nb"), ["c1| a\n", "c1| \n", "c1| b\n"]);
        assert!(shown(b"").is_empty());
    }

    #[test]
    fn a_line_without_end_is_shown_in_pieces() {
        let pieces = shown(&vec![b'x'; 100_000]);
        assert_eq!(pieces.len(), 2);
        assert!(pieces.iter().all(|p| p.starts_with("c1| ") && p.ends_with('\n')));
    }
}
