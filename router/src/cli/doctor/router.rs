//! Does a router answer, and does it speak our protocol?

use std::path::Path;

use freeflow_core::ctl;
use freeflow_router::admin::{self, Pong};
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType};

use super::Finding;
use crate::cli::paths;

const START: &str = "start one: freeflow router --detach (freeflow run does it by itself)";

pub fn check(given: Option<&Path>) -> Vec<Finding> {
    let socket = match paths::router_socket(given) {
        Ok(socket) => socket,
        Err(failure) => return vec![Finding::bad("router", failure.to_string(), START)],
    };
    let admin = admin::admin_socket(&socket);
    if !admin.exists() && socket.exists() {
        return vec![inside_a_container(&socket)];
    }
    match admin::Client::connect(&socket).and_then(|mut client| client.ping()) {
        Ok(pong) => {
            let found = format!("version {}, pid {}, at {}", pong.version, pong.pid, socket.display());
            vec![Finding::ok("router", found), protocol(&pong)]
        }
        Err(error) => vec![Finding::bad("router", error.to_string(), START)],
    }
}

fn protocol(pong: &Pong) -> Finding {
    const CHECK: &str = "protocol";
    let ours = u32::from(ctl::VERSION);
    if pong.protocol == ours {
        return Finding::ok(CHECK, format!("version {ours} on both sides"));
    }
    Finding::bad(
        CHECK,
        format!("the router speaks version {}, these libraries {ours}", pong.protocol),
        "install router and libraries of one FreeFlow version, and restart the router",
    )
}

/// A container has its own socket but no admin socket: all one can ask is whether somebody listens.
fn inside_a_container(socket: &Path) -> Finding {
    const CHECK: &str = "router";
    let connect = || -> rustix::io::Result<()> {
        let address = SocketAddrUnix::new(socket)?;
        let fd =
            rustix::net::socket_with(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None)?;
        rustix::net::connect(&fd, &address)
    };
    match connect() {
        Ok(()) => Finding::ok(CHECK, format!("listens at {}", socket.display())),
        Err(error) => Finding::bad(
            CHECK,
            format!("nobody listens at {}: {error}", socket.display()),
            "is the host's router running, and was the container added to it (freeflow container ls)?",
        ),
    }
}
