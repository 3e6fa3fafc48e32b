//! Does a router answer, and does it speak our protocol?

use std::path::Path;

use freeflow_core::ctl::{self, Hello, SocketError, purpose};
use freeflow_core::verbs::Gid;
use freeflow_router::admin::{self, Pong};
use rustix::io::Errno;

use super::Finding;
use crate::cli::container::INSIDE;
use crate::cli::{failure, paths};

const PROTOCOL: &str = "protocol";
const START: &str = "start one: freeflow router --detach (freeflow run does it by itself)";

pub fn check(given: Option<&Path>) -> Vec<Finding> {
    let socket = match paths::router_socket(given) {
        Ok(socket) => socket,
        Err(failure) => return vec![Finding::bad("router", failure.to_string(), START)],
    };
    if is_inside(Some(&socket)) {
        return inside_a_container(&socket);
    }
    match admin::Client::connect(&socket).and_then(|mut client| client.ping()) {
        Ok(pong) => {
            let found = format!("version {}, pid {}, at {}", pong.version, pong.pid, socket.display());
            vec![Finding::ok("router", found), protocol(&pong)]
        }
        Err(error) => {
            let advice = failure::advice(&error).unwrap_or("restart it with this version of freeflow");
            vec![Finding::bad("router", error.to_string(), advice)]
        }
    }
}

/// Whether this is a container: at most its own socket is there, beside the binary it was given.
pub fn is_inside(given: Option<&Path>) -> bool {
    let given_here = std::env::current_exe().is_ok_and(|exe| exe.starts_with(INSIDE));
    let socket = paths::router_socket(given);
    socket.is_ok_and(|socket| (given_here || socket.exists()) && !admin::admin_socket(&socket).exists())
}

fn protocol(pong: &Pong) -> Finding {
    let ours = u32::from(ctl::VERSION);
    if pong.protocol == ours {
        return Finding::ok(PROTOCOL, format!("version {ours} on both sides"));
    }
    Finding::bad(
        PROTOCOL,
        format!("the router speaks version {}, these libraries {ours}", pong.protocol),
        "install router and libraries of one FreeFlow version, and restart the router",
    )
}

/// A container has its own socket but no admin socket: what it can do is what its programs do, connect and say hello.
fn inside_a_container(socket: &Path) -> Vec<Finding> {
    const CHECK: &str = "router";
    let silent = |errno| {
        Finding::bad(
            CHECK,
            format!("nobody listens at {}: {errno}", socket.display()),
            "is the host's router running, and was the container added to it (freeflow container ls)?",
        )
    };
    let connection = match ctl::Socket::connect(socket) {
        Ok(connection) => connection,
        Err(errno) => return vec![silent(errno)],
    };
    let ours = ctl::VERSION;
    let hello = Hello { min_version: ours, max_version: ours, purpose: purpose::CM };
    match connection.call(&hello, &[]) {
        Ok((reply, _)) => {
            let found = format!("serves this container as {} at {}", Gid(reply.vip).ip(), socket.display());
            vec![Finding::ok(CHECK, found), Finding::ok(PROTOCOL, format!("version {ours} on both sides"))]
        }
        Err(SocketError::Refused(Errno::PROTONOSUPPORT)) => vec![Finding::bad(
            PROTOCOL,
            format!("the router does not speak version {ours}, which these libraries do"),
            "add the container again with the freeflow that runs as router: it puts its libraries there",
        )],
        Err(error) => vec![Finding::bad(
            CHECK,
            format!("it listens at {}, but turns this process away: {error}", socket.display()),
            "the router's log says why: max_clients is reached, or the router does not see this pid namespace",
        )],
    }
}
