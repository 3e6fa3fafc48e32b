//! The cgroups runc makes for a lab's containers: their name, and removing them once the processes are gone.

use std::fs;
use std::path::{Path, PathBuf};

const MOUNT: &str = "/sys/fs/cgroup";

/// cgroupsPath of a container; `lab` is the outer process' pid as its directory's name carries it.
pub fn path(lab_dir: &Path, container: &str) -> String {
    let lab = lab_dir.file_name().unwrap_or_default().to_string_lossy();
    format!("/freeflow-{lab}/{container}")
}

/// Removes the cgroups of the lab with outer process `pid` in every hierarchy. A lab that could make none has none.
pub fn remove(pid: u32) {
    for top in tops(Path::new(MOUNT), &format!("freeflow-lab-{pid}")) {
        for child in fs::read_dir(&top).into_iter().flatten().flatten() {
            if child.path().is_dir() {
                report(&child.path());
            }
        }
        report(&top);
    }
}

fn report(dir: &Path) {
    if let Err(error) = fs::remove_dir(dir) {
        eprintln!("freeflow lab: cannot remove {}: {error}", dir.display());
    }
}

/// `name` at the mount itself (cgroup v2) and in each controller's directory (v1), where it exists. A controller may
/// be linked under several names.
fn tops(mount: &Path, name: &str) -> Vec<PathBuf> {
    let hierarchies = fs::read_dir(mount).into_iter().flatten().flatten();
    let hierarchies = hierarchies.filter(|e| e.file_type().is_ok_and(|t| t.is_dir())).map(|e| e.path());
    let mut tops: Vec<_> = std::iter::once(mount.to_owned())
        .chain(hierarchies)
        .map(|dir| dir.join(name))
        .filter(|dir| dir.is_dir())
        .collect();
    tops.sort();
    tops.dedup();
    tops
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_hierarchy_is_found_once() {
        let mount = std::env::temp_dir().join(format!("ff-cgroups-{}", std::process::id()));
        for dir in ["cpu/x/c1", "memory/x", "unified"] {
            fs::create_dir_all(mount.join(dir)).unwrap();
        }
        std::os::unix::fs::symlink("cpu", mount.join("cpuacct")).unwrap();
        assert_eq!(tops(&mount, "x"), [mount.join("cpu/x"), mount.join("memory/x")]);
        fs::remove_dir_all(&mount).unwrap();
    }
}
