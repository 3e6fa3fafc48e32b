//! The device's files under /dev and /sys, which `freeflow run` shows a program: with root's rights and without.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use super::Outcome;
use crate::layout;
use crate::process::{self, Done, Echo};

pub const NAME: &str = "run: the device's files are the program's own";

/// For a step that hangs.
const LIMIT: Duration = Duration::from_secs(30);

/// What a program sees; the last lines are of what must still be as ever.
const SHOW: &str = r#"
    id -u
    cat /sys/class/infiniband/ff0/ports/1/gids/0 /sys/class/infiniband_verbs/uverbs0/ibdev
    ls /sys/class/infiniband /dev/infiniband /sys/class/infiniband/ff0/device/net
    test -c /dev/infiniband/uverbs0 -a -r /dev/infiniband/uverbs0 -a -w /dev/infiniband/uverbs0 && echo a node
    echo x 2>/dev/null >/dev/infiniband/uverbs0 || echo no kernel verbs
    touch /sys/class/infiniband/x 2>/dev/null || echo not to be written
    cat /sys/class/net/lo/mtu && echo x >/dev/null && ls /dev/shm >/dev/null && echo as ever
"#;
const SEEN: [&str; 8] = [
    "0000:0000:0000:0000:0000:ffff:0a09:0001",
    "ff0",
    "uverbs0",
    "lo",
    "a node",
    "no kernel verbs",
    "not to be written",
    "as ever",
];

pub fn run() -> Outcome {
    let site = Site::make()?;
    site.freeflow(&["router", "--detach"])?;
    site.freeflow(&["container", "add", "a", "--ip", "10.9.0.1", "--dir", &site.path("a")])?;
    let users: &[&[&str]] = match rustix::process::geteuid().is_root() {
        true => &[&[], &["setpriv", "--reuid", "1000", "--regid", "1000", "--clear-groups"]],
        false => &[&[]],
    };
    for user in users {
        site.judge(user)?;
    }
    if Path::new("/sys/class/infiniband/ff0").exists() || Path::new("/dev/infiniband/uverbs0").exists() {
        return Err("others see the files as well".into());
    }
    Ok(())
}

fn finish(command: &mut Command) -> std::result::Result<Done, String> {
    process::run(command, LIMIT, Echo::Quiet).map_err(|e| e.to_string())
}

/// A router with one container, in a directory that every user can reach; both are gone when this is dropped.
struct Site(PathBuf);

impl Site {
    fn make() -> std::result::Result<Self, String> {
        let dir = std::env::temp_dir().join(format!("ff-files-{}", std::process::id()));
        fs::create_dir_all(&dir).map_err(|e| format!("cannot make {}: {e}", dir.display()))?;
        Ok(Self(dir))
    }

    fn path(&self, name: &str) -> String {
        self.0.join(name).display().to_string()
    }

    fn freeflow(&self, args: &[&str]) -> Outcome {
        let mut command = Command::new(layout::freeflow());
        let done = finish(command.args(args).args(["--router", &self.path("r.sock")]))?;
        if done.success() {
            Ok(())
        } else {
            Err(format!("{}: {}\n{}", args.join(" "), done.how(), done.tail()))
        }
    }

    /// The files as a user's program sees them; a user who may not make namespaces sees none, and is told.
    fn judge(&self, user: &[&str]) -> Outcome {
        let program = |words: &[&str]| {
            let all: Vec<&str> = user.iter().chain(words).copied().collect();
            let mut command = Command::new(all[0]);
            command.args(&all[1..]).current_dir("/");
            command
        };
        let (binary, socket) = (self.path("a/bin/freeflow"), self.path("a/router.sock"));
        let done = finish(&mut program(&[&binary, "run", "--router", &socket, "--", "sh", "-c", SHOW]))?;
        let may = finish(&mut program(&["unshare", "--user", "--mount", "true"]))?.success();
        if !may && !done.success() && done.stderr.contains("no /dev/infiniband") {
            println!("      {NAME}: this system lets no other user make namespaces");
            return Ok(());
        }
        let missing = SEEN.iter().find(|line| !done.stdout.lines().any(|said| said == **line));
        match missing {
            None if done.success() => Ok(()),
            _ => Err(format!("{user:?}: {}, missing {missing:?}\n{}", done.how(), done.tail())),
        }
    }
}

impl Drop for Site {
    fn drop(&mut self) {
        if let Err(why) = self.freeflow(&["router", "--stop"]) {
            eprintln!("xtask: {why}");
        }
        if let Err(error) = fs::remove_dir_all(&self.0) {
            eprintln!("xtask: cannot remove {}: {error}", self.0.display());
        }
    }
}
