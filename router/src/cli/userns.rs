//! User namespaces: a lab without root lives in one in which this user is root, with the user's subordinate ids if there are
//! any; a program that is shown the device's files may need one, too.

use std::fs;
use std::io::Write as _;
use std::process::{Child, Command, Stdio};

use rustix::process::{getegid, geteuid};
use rustix::thread::UnshareFlags;
use serde_json::{Value, json};

use crate::cli::failure::{Context as _, Failure, Result};
use crate::cli::paths::find_program;
use crate::cli::sys;

/// First host id of containers when the lab runs as root, and how many they get.
const ROOT_FIRST: u32 = 100_000;
const COUNT: u32 = 65_536;

/// Puts this process, which must have one thread, into a new user namespace as its root.
pub fn enter() -> Result<()> {
    let (uid, gid) = (geteuid().as_raw(), getegid().as_raw());
    let helper = MapHelper::start(uid, gid)?;
    sys::unshare(UnshareFlags::NEWUSER).map_err(|error| {
        Failure::new(format!(
            "cannot make a user namespace: {error}. Run the lab as root, or allow user namespaces \
             (user.max_user_namespaces, kernel.unprivileged_userns_clone, kernel.apparmor_restrict_unprivileged_userns)"
        ))
    })?;
    match helper {
        Some(helper) => helper.finish(),
        // Containers then run as their own root, without capabilities.
        None => map_self(0, 0, uid, gid),
    }
}

/// Maps this process's user and group alone, in the user namespace that it has just made: the ids it has in there, and
/// those it had outside.
pub fn map_self(uid: u32, gid: u32, outer_uid: u32, outer_gid: u32) -> Result<()> {
    let write = |file: &str, text: String| fs::write(file, text).context(format_args!("cannot write {file}"));
    write("/proc/self/setgroups", "deny".into())?;
    write("/proc/self/uid_map", format!("{uid} {outer_uid} 1"))?;
    write("/proc/self/gid_map", format!("{gid} {outer_gid} 1"))
}

/// newuidmap and newgidmap must run outside the namespace they map, so a shell waits there until told to go on.
struct MapHelper(Child);

impl MapHelper {
    /// `None` when this user has no subordinate ids, or the programs are not there.
    fn start(uid: u32, gid: u32) -> Result<Option<Self>> {
        let (Some(newuidmap), Some(newgidmap)) = (find_program("newuidmap"), find_program("newgidmap"))
        else {
            return Ok(None);
        };
        let (Some(uids), Some(gids)) = (subordinate("/etc/subuid", uid), subordinate("/etc/subgid", uid))
        else {
            return Ok(None);
        };
        let script = format!(
            "read -r go && '{}' {pid} 0 {uid} 1 1 {} {} && exec '{}' {pid} 0 {gid} 1 1 {} {}",
            newuidmap.display(),
            uids.0,
            uids.1,
            newgidmap.display(),
            gids.0,
            gids.1,
            pid = std::process::id(),
        );
        let child = Command::new("sh")
            .args(["-c", &script])
            .stdin(Stdio::piped())
            .spawn()
            .context("cannot start sh for newuidmap")?;
        Ok(Some(Self(child)))
    }

    fn finish(mut self) -> Result<()> {
        let go = self.0.stdin.take().map(|mut pipe| pipe.write_all(b"go\n"));
        go.transpose().context("cannot reach newuidmap's shell")?;
        let status = self.0.wait().context("cannot wait for newuidmap")?;
        if status.success() {
            return Ok(());
        }
        Err(Failure::new(format!(
            "newuidmap or newgidmap failed ({status}): see /etc/subuid and /etc/subgid"
        )))
    }
}

/// First subordinate range of this user in `file`: (first id, count).
fn subordinate(file: &str, uid: u32) -> Option<(u32, u32)> {
    let user = std::env::var("USER").unwrap_or_default();
    subordinate_in(&fs::read_to_string(file).ok()?, &user, uid)
}

fn subordinate_in(text: &str, user: &str, uid: u32) -> Option<(u32, u32)> {
    text.lines().find_map(|line| {
        let mut fields = line.split(':');
        let owner = fields.next()?;
        let ours = owner == uid.to_string() || (!user.is_empty() && owner == user);
        let range = (fields.next()?.parse().ok()?, fields.next()?.trim().parse().ok()?);
        ours.then_some(range)
    })
}

/// The user of a container's processes and its id mappings, as far as the lab's own ids reach.
pub struct ContainerIds {
    pub user: u32,
    /// OCI's uidMappings; gidMappings are the same.
    pub mappings: Value,
}

impl ContainerIds {
    pub fn new(rootless: bool) -> Result<Self> {
        let map = fs::read_to_string("/proc/self/uid_map").context("cannot read /proc/self/uid_map")?;
        let first = if rootless { 1 } else { ROOT_FIRST };
        let size = if rootless { COUNT - 1 } else { COUNT };
        let mapping = |host: u32, size: u32| json!([{"containerID": 0, "hostID": host, "size": size}]);
        Ok(if covers(&map, first, 1001) {
            let size = if covers(&map, first, size) { size } else { 1001 };
            Self { user: 1000, mappings: mapping(first, size) }
        } else {
            Self { user: 0, mappings: mapping(0, 1) }
        })
    }
}

/// Whether one line of a uid_map has all of `first .. first + count`.
fn covers(map: &str, first: u32, count: u32) -> bool {
    map.lines().any(|line| {
        let mut fields = line.split_whitespace().map(|f| f.parse::<u64>().unwrap_or(0));
        let (inside, _outside, size) = (fields.next(), fields.next(), fields.next());
        let (Some(inside), Some(size)) = (inside, size) else { return false };
        inside <= u64::from(first) && u64::from(first) + u64::from(count) <= inside + size
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn subordinate_ids_are_found_by_name_and_by_number() {
        let text = "alice:100000:65536\n1001:200000:65536\nbad\n";
        assert_eq!(subordinate_in(text, "alice", 7), Some((100_000, 65_536)));
        assert_eq!(subordinate_in(text, "", 1001), Some((200_000, 65_536)));
        assert_eq!(subordinate_in(text, "bob", 7), None);
    }

    #[test]
    fn only_a_wide_enough_line_covers() {
        let host = "         0          0 4294967295\n";
        assert!(covers(host, ROOT_FIRST, COUNT));
        let rootless = "         0       1000          1\n         1     100000      65536\n";
        assert!(covers(rootless, 1, 65_535));
        assert!(!covers(rootless, ROOT_FIRST, COUNT));
        assert!(!covers("         0       1000          1\n", 1, 2));
    }
}
