//! Replacing pages of the program, and carrying bytes in and out of the file: single steps, each for memory that
//! the caller has frozen or owns.

use std::os::fd::BorrowedFd;

use libc::c_void;
use rustix::io::Errno;
use rustix::mm::{MapFlags, MprotectFlags, MremapFlags, ProtFlags};

use super::maps::Vma;
use super::os;

fn prot_of(vma: &Vma) -> ProtFlags {
    let mut p = ProtFlags::empty();
    p.set(ProtFlags::READ, vma.read);
    p.set(ProtFlags::WRITE, vma.write);
    p.set(ProtFlags::EXEC, vma.exec);
    p
}

/// Sets the protection of a range of `vma` to read-only (`freeze`) or to what `vma` says.
pub(super) fn protect(start: u64, len: u64, vma: &Vma, freeze: bool) -> Result<(), Errno> {
    let prot = if freeze { ProtFlags::READ } else { prot_of(vma) };
    let prot = MprotectFlags::from_bits_retain(prot.bits());
    // SAFETY: a range of a mapping of the program's that the mover is exchanging; writers wait in the handler.
    unsafe { rustix::mm::mprotect(start as *mut c_void, len as usize, prot) }
}

/// Puts the file's bytes at `off` at this address, in place of what is there.
pub(super) fn map_file(
    start: u64,
    len: u64,
    vma: &Vma,
    how: Sharing,
    fd: BorrowedFd<'_>,
    off: u64,
) -> Result<(), Errno> {
    let (prot, flags) = match how {
        Sharing::Shared => (prot_of(vma), MapFlags::SHARED),
        Sharing::PrivateFrozen => (ProtFlags::READ, MapFlags::PRIVATE),
    };
    let (at, len, flags) = (start as *mut c_void, len as usize, flags | MapFlags::FIXED);
    // SAFETY: the file has the same bytes as the range it replaces, whose writers wait in the handler.
    unsafe { rustix::mm::mmap(at, len, prot, flags, fd, off) }.map(drop)
}

/// Maps the file over address space that we reserved.
pub(super) fn map_aside(start: u64, len: u64, fd: BorrowedFd<'_>, off: u64) -> Result<(), Errno> {
    let (prot, flags) = (ProtFlags::READ | ProtFlags::WRITE, MapFlags::SHARED | MapFlags::FIXED);
    // SAFETY: `[start, start + len)` is a reservation of ours, which nothing refers to.
    unsafe { rustix::mm::mmap(start as *mut c_void, len as usize, prot, flags, fd, off) }.map(drop)
}

#[derive(Clone, Copy)]
pub(super) enum Sharing {
    Shared,
    PrivateFrozen,
}

/// Moves private pages of ours over a range of the program's, in place of what is there.
pub(super) fn move_over(from: u64, start: u64, len: u64) -> Result<(), Errno> {
    let (from, to, len) = (from as *mut c_void, start as *mut c_void, len as usize);
    // SAFETY: `from` is ours and has the same bytes as the range it replaces, whose writers wait in the handler.
    unsafe { rustix::mm::mremap_fixed(from, len, len, MremapFlags::MAYMOVE, to) }.map(drop)
}

pub(super) fn unmap(start: u64, len: u64) {
    // SAFETY: only called on scratch memory of ours, which nothing refers to.
    let _ = unsafe { rustix::mm::munmap(start as *mut c_void, len as usize) };
}

/// Writes memory of the program's (frozen) to the file.
pub(super) fn write_out(start: u64, len: u64, fd: BorrowedFd<'_>, off: u64) -> Result<(), Errno> {
    let mut done = 0;
    while done < len {
        let (at, left) = ((start + done) as *const u8, (len - done) as usize);
        // SAFETY: mapped and readable as the kernel said under the mover's lock, and frozen against writers.
        let bytes = unsafe { std::slice::from_raw_parts(at, left) };
        match rustix::io::pwrite(fd, bytes, off + done)? {
            0 => return Err(Errno::NOSPC),
            n => done += n as u64,
        }
    }
    Ok(())
}

/// Reads the file into scratch memory of ours.
pub(super) fn read_in(scratch: u64, len: u64, fd: BorrowedFd<'_>, off: u64) -> Result<(), Errno> {
    let mut done = 0;
    while done < len {
        let (at, left) = ((scratch + done) as *mut u8, (len - done) as usize);
        // SAFETY: scratch memory mapped by us, that nothing else refers to.
        let bytes = unsafe { std::slice::from_raw_parts_mut(at, left) };
        match rustix::io::pread(fd, bytes, off + done)? {
            0 => return Err(Errno::IO),
            n => done += n as u64,
        }
    }
    Ok(())
}

/// Copies `len` bytes between mappings that do not overlap: all that is in the pages, also what the program has not
/// allocated. memcpy would have a program under AddressSanitizer ended for that, which looks at every call of it.
pub(super) fn copy(from: u64, to: u64, len: u64) {
    #[cfg(target_arch = "x86_64")]
    // SAFETY: `from` is readable and frozen against writers, `to` is a writable mapping of ours; the direction flag is
    // clear between functions. It is what memcpy does with so many bytes.
    unsafe {
        std::arch::asm!(
            "rep movsb",
            inout("rcx") len => _,
            inout("rsi") from => _,
            inout("rdi") to => _,
            options(nostack, preserves_flags)
        );
    }
    #[cfg(not(target_arch = "x86_64"))]
    // SAFETY: as above.
    unsafe {
        std::ptr::copy_nonoverlapping(from as *const u8, to as *mut u8, len as usize);
    }
}

/// Huge pages in place of the small ones of the file here, where the kernel can (6.1) and finds any.
pub(super) fn collapse(start: u64, len: u64) -> Result<(), Errno> {
    os::advise(start, len, libc::MADV_COLLAPSE)
}
