//! Copies between the memories of two processes, for bytes the direct path cannot reach.
//!
//! The caller's thread copies in pieces; before each, key, PD, rights and bounds hold, and a revoked region waits only for
//! the piece that is in its own memory. What /proc/PID/mem ignores (page protection) is decided by these checks alone.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::time::{Duration, Instant};

use freeflow_core::ctl::{CopyMem, copy_kind};
use freeflow_core::ring::{MrEntry, MrView};
use freeflow_core::verbs::{Access, Gid, limits};

use crate::refusal::{Refusal, Result};
use crate::shared::Shared;
use crate::state::{CopyPlan, Owner};

/// How long a deregistration waits for the router's copies on the region. Only the caller's own memory can hold one up.
const DEREG_WAIT: Duration = Duration::from_secs(2);
/// Bytes per piece.
const PIECE: usize = 256 << 10;

/// Serves a CopyMem of `owner`.
pub fn copy(shared: &Shared, owner: Owner, request: &CopyMem) -> Result<()> {
    let right = right(request.kind)?;
    if request.len > limits::MESSAGE {
        return Err(Refusal::Range { what: "bytes to copy", got: request.len, limit: limits::MESSAGE });
    }
    let (qpn, dest, gid) = (request.qpn, request.dest_qpn, Gid(request.dgid));
    let plan = shared.with(|state| {
        let client = state.client_mut(owner.client)?;
        if !client.key_failures.open(Instant::now()) {
            return Err(Refusal::TooOften(client.key_failures_total));
        }
        state.plan_copy(owner, qpn, dest, gid)
    })?;
    let result = check(&plan, request, right).and_then(|(view, va)| pieces(shared, &plan, request, view, va));
    if let Err(Refusal::Access(why)) = result {
        note_failure(shared, owner, request.key, why);
    }
    result
}

/// Serves a DeregMr: when it returns, nothing lands in the region any more.
pub fn deregister(shared: &Shared, owner: Owner, key: u32) -> Result<()> {
    shared.with(|state| state.revoke_mr(owner, key))?;
    if !shared.wait_until(DEREG_WAIT, |state| state.revoke_mr(owner, key) != Ok(false)) {
        return Err(Refusal::Busy { what: "memory region", id: key, by: "copy that does not end" });
    }
    shared.with(|state| state.forget_mr(owner, key))
}

fn right(kind: u32) -> Result<Access> {
    match kind {
        copy_kind::WRITE => Ok(Access::REMOTE_WRITE),
        copy_kind::READ => Ok(Access::REMOTE_READ),
        copy_kind::RECV => Ok(Access::LOCAL_WRITE),
        _ => Err(Refusal::Invalid("direction of a copy")),
    }
}

/// Failures with keys may be guesses: they are counted, logged and limited per client.
fn note_failure(shared: &Shared, owner: Owner, key: u32, why: &'static str) {
    let (total, pid) = shared.with(|state| {
        let Ok(client) = state.client_mut(owner.client) else { return (0, 0) };
        client.key_failures_total += 1;
        let _ = client.key_failures.pass(Instant::now());
        (client.key_failures_total, client.pid)
    });
    shared.log(owner.container, || {
        format!(
            "process {pid} failed to access a peer's memory with key {key:#x} ({why}); failure number {total}"
        )
    });
}

/// The peer's entry for the key, copied once and judged, and the peer's virtual address of the range.
fn check(plan: &CopyPlan, request: &CopyMem, right: Access) -> Result<(MrView, u64)> {
    let view = read_entry(plan, request.key)?;
    let window = right != Access::LOCAL_WRITE && plan.windows.contains(&view.pd);
    if !window && !plan.peer_pds.contains(&view.pd) {
        return Err(Refusal::Access("the region is in another protection domain"));
    }
    if !view.access.contains(right) {
        return Err(Refusal::Access("the region does not grant this"));
    }
    let va = view.translate(request.remote, request.len).ok_or(Refusal::Access("outside of the region"))?;
    va.checked_add(request.len).ok_or(Refusal::Access("outside of the region"))?;
    request.local.checked_add(request.len).ok_or(Refusal::LocalFault(request.local))?;
    Ok((view, va))
}

fn read_entry(plan: &CopyPlan, key: u32) -> Result<MrView> {
    let offset = freeflow_core::ring::mr::slot_of(key) * size_of::<MrEntry>();
    let entry = plan.table.map.get::<MrEntry>(offset as u64);
    entry.and_then(|entry| entry.read(key)).ok_or(Refusal::Access("no such key"))
}

fn pieces(shared: &Shared, plan: &CopyPlan, request: &CopyMem, view: MrView, va: u64) -> Result<()> {
    let mut buffer = vec![0; PIECE.min(request.len as usize)];
    let mut at = 0;
    while at < request.len {
        let part = &mut buffer[..PIECE.min((request.len - at) as usize)];
        let (local, remote) = (request.local + at, va + at);
        if request.kind == copy_kind::READ {
            let in_flight = InFlight::enter(shared, plan, &view)?;
            read(&plan.remote, part, remote).map_err(|()| Refusal::RemoteFault(remote))?;
            drop(in_flight);
            write(&plan.local, part, local).map_err(|()| Refusal::LocalFault(local))?;
        } else {
            read(&plan.local, part, local).map_err(|()| Refusal::LocalFault(local))?;
            let _in_flight = InFlight::enter(shared, plan, &view)?;
            write(&plan.remote, part, remote).map_err(|()| Refusal::RemoteFault(remote))?;
        }
        at += part.len() as u64;
    }
    Ok(())
}

/// Holds a region's deregistration up while a piece is in its memory.
struct InFlight<'a> {
    shared: &'a Shared,
    client: u32,
    key: u32,
}

impl<'a> InFlight<'a> {
    fn enter(shared: &'a Shared, plan: &CopyPlan, view: &MrView) -> Result<Self> {
        let (client, key) = (plan.peer_client, view.key);
        shared.with(|state| state.enter_copy(client, key, &plan.peer_pds))?;
        let guard = InFlight { shared, client, key };
        // After entering: an owner that killed the entry and then deregisters now waits for this piece, or is seen here.
        let now = read_entry(plan, key)?;
        if (now.pd, now.access, now.iova, now.addr, now.len)
            != (view.pd, view.access, view.iova, view.addr, view.len)
        {
            return Err(Refusal::Access("the region changed"));
        }
        Ok(guard)
    }
}

impl Drop for InFlight<'_> {
    fn drop(&mut self) {
        if self.shared.with(|state| state.leave_copy(self.client, self.key)) {
            self.shared.something_ended();
        }
    }
}

fn read(memory: &File, bytes: &mut [u8], at: u64) -> std::result::Result<(), ()> {
    memory.read_exact_at(bytes, at).map_err(|_| ())
}

fn write(memory: &File, bytes: &[u8], at: u64) -> std::result::Result<(), ()> {
    memory.write_all_at(bytes, at).map_err(|_| ())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::Settings;
    use crate::state::testing::World;

    #[test]
    fn deregistration_waits_for_the_copy_in_flight() {
        let mut w = World::new();
        let container = w.container("a", [10, 0, 0, 1], "red");
        let me = w.owner_of_new_client(container);
        let pd = w.pd(me);
        let key = w.state.reg_mr(me, pd, 0, 10).expect("mr");
        let shared = Shared::new(Settings::default(), crate::proof::Proofs::of_a_test()).expect("shared");
        shared.with(|state| *state = w.state);

        shared.with(|state| state.enter_copy(me.client, key, &[pd])).expect("alive");
        let copy = InFlight { shared: &shared, client: me.client, key };
        std::thread::scope(|scope| {
            let waiting = scope.spawn(|| deregister(&shared, me, key));
            // Once no copy can begin, deregistration is under way; it must not end before the copy.
            while shared.with(|state| {
                let entered = state.enter_copy(me.client, key, &[pd]).is_ok();
                entered && !state.leave_copy(me.client, key)
            }) {
                std::thread::yield_now();
            }
            assert!(!waiting.is_finished());
            drop(copy);
            waiting.join().expect("no panic").expect("the copy ended");
        });
        assert!(matches!(deregister(&shared, me, key), Err(Refusal::NoSuch { .. })));
    }
}
