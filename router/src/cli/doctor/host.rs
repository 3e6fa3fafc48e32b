//! What this machine and this process' limits allow.

use std::fs;

use rustix::fs::{MemfdFlags, SealFlags};
use rustix::process::{Resource, getrlimit};

use super::Finding;
use crate::cli::paths::find_program;

/// The kernel's default; a program with many memory regions needs it.
const MAP_COUNT: u64 = 65_530;
const OPEN_FILES: u64 = 1024;
const MEMLOCK: u64 = 64 << 20;

pub fn check() -> Vec<Finding> {
    vec![memfd(), map_count(), open_files(), memlock(), fault_signals()]
}

/// What `freeflow lab` needs.
pub fn lab() -> Vec<Finding> {
    vec![user_namespaces(), lab_program("runc"), lab_program("ip")]
}

fn memfd() -> Finding {
    const CHECK: &str = "shared memory";
    let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
    let sealed = rustix::fs::memfd_create("freeflow-doctor", flags)
        .and_then(|fd| rustix::fs::fcntl_add_seals(&fd, SealFlags::SHRINK | SealFlags::GROW));
    match sealed {
        Ok(()) => Finding::ok(CHECK, "memfds can be made and sealed"),
        Err(error) => Finding::bad(
            CHECK,
            format!("no sealed memfd: {error}"),
            "allow memfd_create and fcntl in the container's seccomp profile; Linux 3.17 or newer",
        ),
    }
}

fn sysctl(path: &str) -> Option<u64> {
    fs::read_to_string(path).ok()?.trim().parse().ok()
}

fn map_count() -> Finding {
    const CHECK: &str = "max_map_count";
    match sysctl("/proc/sys/vm/max_map_count") {
        Some(count) if count >= MAP_COUNT => Finding::ok(CHECK, count.to_string()),
        Some(count) => Finding::note(
            CHECK,
            format!("{count}: programs with many memory regions may meet it"),
            format!("sysctl vm.max_map_count={MAP_COUNT}"),
        ),
        None => Finding::bad(CHECK, "cannot read /proc/sys/vm/max_map_count", "mount /proc"),
    }
}

/// A soft limit; no limit is shown as the largest number.
fn limit(resource: Resource) -> u64 {
    getrlimit(resource).current.unwrap_or(u64::MAX)
}

fn open_files() -> Finding {
    const CHECK: &str = "open files";
    match limit(Resource::Nofile) {
        n if n >= OPEN_FILES => Finding::ok(CHECK, n.to_string()),
        n => Finding::note(CHECK, format!("{n}: few connections fit"), format!("ulimit -n {OPEN_FILES}")),
    }
}

/// FreeFlow pins nothing; programs that call mlock themselves still need the limit.
fn memlock() -> Finding {
    const CHECK: &str = "memlock";
    match limit(Resource::Memlock) {
        u64::MAX => Finding::ok(CHECK, "unlimited"),
        n if n >= MEMLOCK => Finding::ok(CHECK, format!("{} MiB", n >> 20)),
        n => Finding::note(
            CHECK,
            format!("{} KiB: FreeFlow needs none, but a program that calls mlock may fail", n >> 10),
            "ulimit -l unlimited, or docker run --ulimit memlock=-1",
        ),
    }
}

/// Registration freezes pages for a moment and catches the faults of other threads.
fn fault_signals() -> Finding {
    const CHECK: &str = "fault signals";
    let status = fs::read_to_string("/proc/self/status").unwrap_or_default();
    match disabled_fault_signals(&status) {
        None => Finding::bad(CHECK, "cannot read /proc/self/status", "mount /proc"),
        Some(names) if names.is_empty() => Finding::ok(CHECK, "SIGSEGV and SIGBUS can be caught"),
        Some(names) => Finding::bad(
            CHECK,
            format!("{} blocked or ignored by whoever started this process", names.join(" and ")),
            "start programs from a shell or service manager that leaves these signals alone",
        ),
    }
}

/// The fault signals that `status` (of /proc/PID/status) has in SigBlk or SigIgn.
fn disabled_fault_signals(status: &str) -> Option<Vec<&'static str>> {
    let mask = |name: &str| {
        let line = status.lines().find_map(|l| l.strip_prefix(name))?;
        u64::from_str_radix(line.trim(), 16).ok()
    };
    let mask = mask("SigBlk:")? | mask("SigIgn:")?;
    let set = |signal: i32| mask & (1 << (signal - 1)) != 0;
    let fault = [(libc::SIGSEGV, "SIGSEGV"), (libc::SIGBUS, "SIGBUS")];
    Some(fault.into_iter().filter(|&(number, _)| set(number)).map(|(_, name)| name).collect())
}

fn user_namespaces() -> Finding {
    const CHECK: &str = "user namespaces";
    match sysctl("/proc/sys/user/max_user_namespaces") {
        Some(n) if n > 0 => Finding::ok(CHECK, format!("up to {n}")),
        _ => {
            Finding::note(CHECK, "none allowed: no lab without root", "sysctl user.max_user_namespaces=10000")
        }
    }
}

fn lab_program(name: &'static str) -> Finding {
    match find_program(name) {
        Some(path) => Finding::ok("lab", path.display().to_string()),
        None => Finding::note(
            "lab",
            format!("no {name}: freeflow lab cannot run"),
            "apt-get install runc iproute2",
        ),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ignored_and_blocked_fault_signals_are_named() {
        let status = "Name:\tx\nSigBlk:\t0000000000000400\nSigIgn:\t0000000000000040\n";
        assert_eq!(disabled_fault_signals(status), Some(vec!["SIGSEGV", "SIGBUS"]));
        assert_eq!(disabled_fault_signals("SigBlk:\t0\nSigIgn:\t0\n"), Some(vec![]));
        assert_eq!(disabled_fault_signals(""), None);
    }
}
