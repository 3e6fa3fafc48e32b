//! memfds: anonymous files that travel as descriptors and cannot change size once sealed.

use std::os::fd::{AsFd, AsRawFd, OwnedFd};

use rustix::fs::{
    MemfdFlags, Mode, OFlags, SealFlags, fcntl_add_seals, fcntl_get_seals, ftruncate, memfd_create,
};
use rustix::io::Errno;

/// What statfs(2) says of small-page memfds.
const TMPFS_MAGIC: rustix::fs::FsWord = 0x0102_1994;
const SIZE_SEALS: SealFlags = SealFlags::SHRINK.union(SealFlags::GROW);

/// A memfd of `len` bytes whose size is sealed.
pub fn make_memfd(name: &str, len: u64) -> Result<OwnedFd, Errno> {
    let fd = make_owned_memfd(name, len)?;
    fcntl_add_seals(&fd, SealFlags::SEAL)?;
    Ok(fd)
}

/// The same for a file that only one process writes: that maps it and then calls [`seal_for_owner`].
pub fn make_owned_memfd(name: &str, len: u64) -> Result<OwnedFd, Errno> {
    let fd = memfd_create(name, MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING)?;
    ftruncate(&fd, len)?;
    // Only its maker may open it anew through /proc: a read-only grant stays one.
    rustix::fs::fchmod(&fd, Mode::RUSR | Mode::WUSR)?;
    fcntl_add_seals(&fd, SIZE_SEALS)?;
    Ok(fd)
}

/// From now on nobody can write but through mappings that exist: also root, who may open any file anew for writing, not.
pub fn seal_for_owner(fd: impl AsFd) -> Result<(), Errno> {
    fcntl_add_seals(fd, SealFlags::FUTURE_WRITE | SealFlags::SEAL)
}

/// Is it a memfd whose size cannot change under us, and whose pages come when they are touched? (Huge ones may run out,
/// which is SIGBUS for whoever touches.)
pub fn is_sealed_memfd(fd: impl AsFd) -> bool {
    let plain = rustix::fs::fstatfs(&fd).is_ok_and(|fs| fs.f_type == TMPFS_MAGIC);
    plain && fcntl_get_seals(fd).is_ok_and(|seals| seals.contains(SIZE_SEALS))
}

/// The same file, for reading only.
pub fn reopen_read_only(fd: impl AsFd) -> Result<OwnedFd, Errno> {
    let path = format!("/proc/self/fd/{}", fd.as_fd().as_raw_fd());
    rustix::fs::open(path, OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::shm::Mapping;

    #[test]
    fn an_owned_file_has_no_second_writer() {
        let fd = make_owned_memfd("table", 4096).expect("memfd");
        let read_only = reopen_read_only(&fd).expect("open");
        let _owners = Mapping::new(&fd, 0, 4096, true).expect("mmap");
        seal_for_owner(&fd).expect("seal");
        // What root could do in another process with the descriptor it was given.
        let path = format!("/proc/self/fd/{}", read_only.as_raw_fd());
        let again = rustix::fs::open(path, OFlags::RDWR | OFlags::CLOEXEC, Mode::empty()).expect("open");
        Mapping::new(&again, 0, 4096, false).expect("readers may come");
        assert_eq!(Mapping::new(&again, 0, 4096, true).expect_err("no second writer"), Errno::PERM);
        assert_eq!(rustix::io::pwrite(&again, &[1], 0), Err(Errno::PERM));
        let punch = rustix::fs::FallocateFlags::PUNCH_HOLE | rustix::fs::FallocateFlags::KEEP_SIZE;
        assert_eq!(rustix::fs::fallocate(&again, punch, 0, 4096), Err(Errno::PERM));
        assert_eq!(fcntl_add_seals(&again, SealFlags::WRITE), Err(Errno::PERM));
    }

    #[test]
    fn sealed_files_keep_their_size_and_seals() {
        let fd = make_memfd("slab", 4096).expect("memfd");
        assert!(is_sealed_memfd(&fd));
        assert_eq!(ftruncate(&fd, 0), Err(Errno::PERM));
        assert_eq!(fcntl_add_seals(&fd, SealFlags::FUTURE_WRITE), Err(Errno::PERM));
        let huge = memfd_create("huge", MemfdFlags::ALLOW_SEALING | MemfdFlags::HUGETLB);
        if let Ok(huge) = huge {
            fcntl_add_seals(&huge, SIZE_SEALS).expect("seal");
            assert!(!is_sealed_memfd(&huge), "huge pages can run out");
        }
    }
}
