//! Putting the device's files in place: a directory of the system is made anew aside, everything that was in it bound at
//! its place, and then laid over the old one in one step. So a program sees all of the old directory or all of the new.

use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};

use freeflow_core::verbs::device;
use rustix::mount::{
    MountFlags, MountPropagationFlags, UnmountFlags, mount, mount_bind_recursive, mount_change,
    mount_remount, unmount,
};
use rustix::process::{getegid, geteuid};
use rustix::thread::UnshareFlags;

use super::files::{self, Entry};
use super::{NODE_SOURCE, Nic};
use crate::cli::failure::{Context as _, Result};
use crate::cli::{sys, userns};

/// Hidden for as long as it takes to make a directory anew; every /sys has it.
const ASIDE: &str = "sys/kernel";
const CLASS: &str = "sys/class";
const DEV: &str = "dev";
const VERBS: &str = "infiniband";

/// Whether the files there already are this device's.
pub fn is_shown(root: &Path, nic: &Nic) -> bool {
    let gid = fs::read_to_string(root.join(CLASS).join(files::gid_file()));
    gid.is_ok_and(|text| text == files::gid_text(nic.gid))
}

/// Takes this process off the system's mount namespace, in a user namespace of its own if it has no right to mount.
/// What gets mounted outside from now on is seen here as well, but not the other way round.
pub fn own_namespace() -> Result<()> {
    if sys::unshare(UnshareFlags::NEWNS).is_err() {
        let (uid, gid) = (geteuid().as_raw(), getegid().as_raw());
        sys::unshare(UnshareFlags::NEWNS | UnshareFlags::NEWUSER).context("cannot make a mount namespace")?;
        userns::map_self(uid, gid, uid, gid)?;
    }
    mount_change("/", MountPropagationFlags::DOWNSTREAM | MountPropagationFlags::REC)
        .context("cannot keep mounts apart from the system's")
}

/// Adds the device to /sys/class of `root`, which then cannot be written.
pub fn show_device(root: &Path, nic: &Nic) -> io::Result<()> {
    let class = root.join(CLASS);
    remake(root, &class, &files::CLASSES, |aside| {
        files::of(nic).into_iter().try_for_each(|entry| put(aside, entry))
    })?;
    Ok(mount_remount(&class, MountFlags::BIND | MountFlags::RDONLY | flags(), "")?)
}

/// Adds the device's node to /dev of `root`, alone in its directory: another device's would not be what it seems.
pub fn show_node(root: &Path) -> io::Result<()> {
    remake(root, &root.join(DEV), &[VERBS], |aside| {
        let node = aside.join(VERBS).join(device::NODE);
        make_parent(&node)?;
        File::create(&node)?;
        Ok(rustix::mount::mount_bind(NODE_SOURCE, &node)?)
    })
}

fn flags() -> MountFlags {
    MountFlags::NOSUID | MountFlags::NODEV | MountFlags::NOEXEC
}

/// Lays over `dir` what is in it now, except what is `replaced`, and what `add` puts there.
fn remake(
    root: &Path,
    dir: &Path,
    replaced: &[&str],
    add: impl FnOnce(&Path) -> io::Result<()>,
) -> io::Result<()> {
    let aside = Aside::make(root)?;
    for entry in fs::read_dir(dir)? {
        let entry = entry?;
        if !replaced.iter().any(|name| entry.file_name() == *name) {
            bind(&entry, &aside.0.join(entry.file_name()))?;
        }
    }
    add(&aside.0)?;
    Ok(mount_bind_recursive(&aside.0, dir)?)
}

/// An empty file system on a directory that nobody looks into meanwhile.
struct Aside(PathBuf);

impl Aside {
    fn make(root: &Path) -> io::Result<Self> {
        let place = root.join(ASIDE);
        mount("freeflow", &place, "tmpfs", MountFlags::NOSUID | MountFlags::NODEV, c"mode=0755")?;
        Ok(Self(place))
    }
}

impl Drop for Aside {
    fn drop(&mut self) {
        // What was bound elsewhere stays; and there is nothing to do about one that cannot be taken away.
        unmount(&self.0, UnmountFlags::DETACH).ok();
    }
}

/// The same thing at another place.
fn bind(entry: &fs::DirEntry, to: &Path) -> io::Result<()> {
    let kind = entry.file_type()?;
    if kind.is_symlink() {
        return std::os::unix::fs::symlink(fs::read_link(entry.path())?, to);
    }
    if kind.is_dir() {
        fs::create_dir(to)?;
    } else {
        File::create(to)?;
    }
    Ok(mount_bind_recursive(entry.path(), to)?)
}

fn put(class: &Path, entry: Entry) -> io::Result<()> {
    let (Entry::File(path, _) | Entry::Link(path, _)) = &entry;
    let path = class.join(path);
    make_parent(&path)?;
    match entry {
        Entry::File(_, text) => fs::write(path, text),
        Entry::Link(_, to) => std::os::unix::fs::symlink(to, path),
    }
}

fn make_parent(path: &Path) -> io::Result<()> {
    path.parent().map_or(Ok(()), fs::create_dir_all)
}
