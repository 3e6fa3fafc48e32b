//! OpenMPI over UCX's own verbs transports, which look for the device's files: two ranks in a container, and no other way
//! allowed, so that right data says which way it went.

use std::process::Command;
use std::time::Duration;

use super::clients::{Check, Client};
use super::examples::OpenDir;
use super::labs::{self, Place};
use crate::layout;
use crate::process::{self, Echo};

/// For a compiler.
const LIMIT: Duration = Duration::from_secs(60);

/// Transports, as UCX_TLS names them, with what each check is called. UCX connects rc_verbs by datagrams: rc_v is both.
pub const CHECKS: [(&str, &str); 2] =
    [("rc_v", "mpi over UCX's rc_verbs"), ("ud_verbs", "mpi over UCX's ud_verbs")];

/// How OpenMPI is told to go by UCX whatever it thinks of the device. Windows go by messages: UCX would register the memory that
/// ranks of one host share for atomics, and such memory cannot move.
const MPIRUN: &str = "mpirun.openmpi --allow-run-as-root --oversubscribe --bind-to none --mca pml ucx --mca osc ^ucx \
                      --mca opal_common_ucx_tls any --mca opal_common_ucx_devices any -np 2";

pub fn openmpi(transport: &str) -> Result<(), String> {
    let dir = OpenDir::make()?;
    let program = dir.0.join("check");
    let mut cc = Command::new("mpicc.openmpi");
    cc.args(["-O2", "-o"]).arg(&program).arg(layout::root().join("examples/mpi/check.c"));
    let built = process::run(&mut cc, LIMIT, Echo::Quiet).map_err(|failure| failure.to_string())?;
    if !built.success() {
        return Err(format!("{}\n{}", built.how(), built.tail()));
    }
    let command = format!("UCX_TLS={transport},self timeout 60 {MPIRUN} {}", program.display());
    labs::run_client(
        &Client::alone(&command, &[Check::Says("check: 2 ranks, all data right")]),
        Place::OneHost,
    )
}
