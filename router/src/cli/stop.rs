//! `freeflow router --stop`: ends the router of a socket and waits until it has cleaned up.

use std::path::Path;
use std::process::ExitCode;
use std::time::Duration;

use freeflow_router::admin;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{PidfdFlags, Signal, pidfd_open, pidfd_send_signal};

use super::failure::{Context as _, Failure, Result};

/// Longer than the router waits for its sessions.
const LIMIT: Duration = Duration::from_secs(20);

pub fn stop(socket: &Path) -> Result<ExitCode> {
    let mut client = admin::Client::connect(socket)?;
    let pid = client.router_pid()?;
    let number = pid.as_raw_nonzero();
    let process =
        pidfd_open(pid, PidfdFlags::empty()).context(format_args!("cannot reach process {number}"))?;
    // It still answers: so it had this pid when the descriptor was made.
    client.ping()?;
    pidfd_send_signal(&process, Signal::TERM).context(format_args!("cannot stop process {number}"))?;
    // It waits for its admin connections, too.
    drop(client);
    let limit = Timespec::try_from(LIMIT).ok();
    match poll(&mut [PollFd::new(&process, PollFlags::IN)], limit.as_ref()) {
        Ok(0) => Err(Failure::new(format!(
            "the router, process {number}, did not end within {LIMIT:?}: see its log; kill -KILL {number} ends it"
        ))),
        Ok(_) => Ok(ExitCode::SUCCESS),
        Err(error) => Err(Failure::new(format!("cannot wait for process {number}: {error}"))),
    }
}
