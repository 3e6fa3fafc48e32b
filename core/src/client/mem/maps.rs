//! What `/proc/PID/maps` says, as values. Pure: it never opens a file, never allocates (it also runs inside
//! the fault handler), and knows nothing of what is done with a mapping.

use std::ops::ControlFlow;

/// The part of a mapping's name that decides what may be done with it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Name {
    /// Anonymous without a name, or with one the program gave it (`[anon:...]`).
    Anon,
    Heap,
    Stack,
    /// A file, or one of the kernel's own mappings.
    Other,
}

/// One mapping of this process.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Vma {
    pub start: u64,
    pub end: u64,
    pub offset: u64,
    pub read: bool,
    pub write: bool,
    pub exec: bool,
    pub shared: bool,
    pub dev: (u32, u32),
    pub ino: u64,
    pub name: Name,
    /// Larger pages than the machine's ordinary ones (the text form cannot tell: there hugetlb shows as a file).
    pub huge: bool,
}

impl Vma {
    /// The same mapping, cut to `[start, end)`, with the offset following.
    pub fn clip(&self, start: u64, end: u64) -> Vma {
        let (s, e) = (self.start.max(start), self.end.min(end));
        Vma { start: s, end: e, offset: self.offset.wrapping_add(s - self.start), ..*self }
    }

    /// Private anonymous read-write memory: the only kind whose pages may move.
    pub fn is_plain(&self) -> bool {
        self.read
            && self.write
            && !self.exec
            && !self.shared
            && !self.huge
            && self.ino == 0
            && matches!(self.name, Name::Anon | Name::Heap)
    }
}

pub(super) fn name_of(text: &[u8]) -> Name {
    match text {
        b"" => Name::Anon,
        b"[heap]" => Name::Heap,
        b"[stack]" => Name::Stack,
        t if t.starts_with(b"[anon:") => Name::Anon,
        _ => Name::Other,
    }
}

/// Longest part of a line that matters: numbers take less than 75 bytes, and no name of interest is longer.
const KEPT: usize = 128;

/// Takes the text in pieces of any size and hands out mappings.
pub(super) struct LineParser {
    line: [u8; KEPT],
    len: usize,
}

impl LineParser {
    pub const fn new() -> Self {
        LineParser { line: [0; KEPT], len: 0 }
    }

    /// Feeds `bytes`; a line that does not parse is passed over.
    pub fn feed<F>(&mut self, bytes: &[u8], each: &mut F) -> ControlFlow<()>
    where
        F: FnMut(Vma) -> ControlFlow<()> + ?Sized,
    {
        for &b in bytes {
            if b == b'\n' {
                let vma = parse_line(&self.line[..self.len]);
                self.len = 0;
                if let Some(vma) = vma {
                    each(vma)?;
                }
            } else if self.len < KEPT {
                self.line[self.len] = b;
                self.len += 1;
            }
        }
        ControlFlow::Continue(())
    }
}

fn parse_line(line: &[u8]) -> Option<Vma> {
    let mut fields = line.splitn(6, |b| *b == b' ');
    let (start, end) = pair(fields.next()?, b'-', 16)?;
    let perms = fields.next()?;
    let offset = number(fields.next()?, 16)?;
    let (major, minor) = pair(fields.next()?, b':', 16)?;
    let ino = number(fields.next()?, 10)?;
    let name = fields.next().unwrap_or(b"").trim_ascii_start();
    if perms.len() != 4 || end <= start {
        return None;
    }
    Some(Vma {
        start,
        end,
        offset,
        read: perms[0] == b'r',
        write: perms[1] == b'w',
        exec: perms[2] == b'x',
        shared: perms[3] == b's',
        dev: (u32::try_from(major).ok()?, u32::try_from(minor).ok()?),
        ino,
        name: name_of(name),
        huge: false,
    })
}

fn pair(text: &[u8], sep: u8, radix: u32) -> Option<(u64, u64)> {
    let at = text.iter().position(|b| *b == sep)?;
    Some((number(&text[..at], radix)?, number(&text[at + 1..], radix)?))
}

fn number(text: &[u8], radix: u32) -> Option<u64> {
    if text.is_empty() {
        return None;
    }
    text.iter().try_fold(0u64, |n, b| {
        let digit = char::from(*b).to_digit(radix)?;
        n.checked_mul(u64::from(radix))?.checked_add(u64::from(digit))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    const TEXT: &[u8] = b"55e0-55f0 r-xp 00001000 fe:01 1234                       /usr/bin/a b\n\
        5600-5700 rw-p 00000000 00:00 0                          [heap]\n\
        nonsense\n\
        7f00-7f10 rw-p 00000000 00:00 0 \n\
        7f10-7f20 rw-s 2000000000000000 00:01 99                 /memfd:ff-pd (deleted)\n\
        7f20-7f30 rw-p 00000000 00:00 0                          [anon:pool]\n\
        7f30-7f40 rw-p 00000000 00:00 0                          [stack]\n";

    fn all(piece: usize) -> Vec<Vma> {
        let (mut out, mut p) = (Vec::new(), LineParser::new());
        for part in TEXT.chunks(piece) {
            let _ = p.feed(part, &mut |v| {
                out.push(v);
                ControlFlow::Continue(())
            });
        }
        out
    }

    #[test]
    fn every_split_of_the_text_gives_the_same_mappings() {
        let whole = all(TEXT.len());
        assert_eq!(whole.len(), 6);
        for piece in 1..80 {
            assert_eq!(all(piece), whole, "pieces of {piece}");
        }
    }

    #[test]
    fn kinds_are_told_apart() {
        let v = all(7);
        assert_eq!(
            v.iter().map(|v| v.name).collect::<Vec<_>>(),
            [Name::Other, Name::Heap, Name::Anon, Name::Other, Name::Anon, Name::Stack]
        );
        let plain: Vec<bool> = v.iter().map(Vma::is_plain).collect();
        assert_eq!(plain, [false, true, true, false, true, false]);
        assert_eq!((v[3].offset, v[3].dev, v[3].ino, v[3].shared), (1 << 61, (0, 1), 99, true));
    }

    #[test]
    fn long_lines_and_numbers_do_not_overflow() {
        let mut text = b"1000-2000 rw-p 00000000 00:00 7 /".to_vec();
        text.extend(std::iter::repeat_n(b'x', 5000));
        text.extend(b"\nfffffffffffffffffffff-1 rw-p 0 0:0 0\n3000-4000 rw-p 0 0:0 0\n");
        let (mut out, mut p) = (Vec::new(), LineParser::new());
        let _ = p.feed(&text, &mut |v| {
            out.push((v.start, v.end));
            ControlFlow::Continue(())
        });
        assert_eq!(out, [(0x1000, 0x2000), (0x3000, 0x4000)]);
    }

    #[test]
    fn clipping_moves_the_offset() {
        let v = all(9)[3].clip(0x7f14, 0x7f18);
        assert_eq!((v.start, v.end, v.offset), (0x7f14, 0x7f18, (1 << 61) + 4));
    }
}
