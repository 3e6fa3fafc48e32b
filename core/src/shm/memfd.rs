//! memfds: anonymous files that travel as descriptors and cannot change size once sealed.

use std::os::fd::{AsFd, AsRawFd, OwnedFd};

use rustix::fs::{
    MemfdFlags, Mode, OFlags, SealFlags, fcntl_add_seals, fcntl_get_seals, ftruncate, memfd_create,
};
use rustix::io::Errno;

const SIZE_SEALS: SealFlags = SealFlags::SHRINK.union(SealFlags::GROW);

/// A memfd of `len` bytes whose size is sealed.
pub fn make_memfd(name: &str, len: u64) -> Result<OwnedFd, Errno> {
    let fd = memfd_create(name, MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING)?;
    ftruncate(&fd, len)?;
    // Only its maker may open it anew through /proc: a read-only grant stays one.
    rustix::fs::fchmod(&fd, Mode::RUSR | Mode::WUSR)?;
    seal(&fd)?;
    Ok(fd)
}

/// Seals size and seals.
pub fn seal(fd: impl AsFd) -> Result<(), Errno> {
    fcntl_add_seals(fd, SIZE_SEALS | SealFlags::SEAL)
}

/// Is it a memfd whose size cannot change under us?
pub fn is_sealed_memfd(fd: impl AsFd) -> bool {
    fcntl_get_seals(fd).is_ok_and(|seals| seals.contains(SIZE_SEALS))
}

/// The same file, for reading only.
pub fn reopen_read_only(fd: impl AsFd) -> Result<OwnedFd, Errno> {
    let path = format!("/proc/self/fd/{}", fd.as_fd().as_raw_fd());
    rustix::fs::open(path, OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty())
}
