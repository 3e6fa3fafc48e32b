//! `freeflow cdi`: the containers of the router as devices of the Container Device Interface, which podman, docker 25 and
//! Kubernetes' runtimes read from /etc/cdi and /var/run/cdi.

use std::path::PathBuf;
use std::process::ExitCode;

use clap::Parser;
use freeflow_router::admin::{self, Container};
use serde_json::{Value, json};

use super::container::{INSIDE, environment, hook, inside_doors};
use super::failure::{Context as _, Result};
use super::nic;
use super::paths::{self, Dist};

/// Name of a device: `freeflow.io/nic=NAME`.
const KIND: &str = "freeflow.io/nic";

/// Print the containers that freeflow container add prepared as CDI devices.
#[derive(Debug, Parser)]
#[command(after_help = "\
Examples:
  freeflow container add web --ip 10.9.0.1
  freeflow cdi >/etc/cdi/freeflow.json
  podman run --device freeflow.io/nic=web IMAGE CMD")]
pub struct Args {
    /// Socket of the router to ask
    #[arg(long, visible_alias = "socket", value_name = "SOCK")]
    router: Option<PathBuf>,
}

pub fn main(args: &Args) -> Result<ExitCode> {
    let dist = Dist::find()?;
    let socket = paths::router_socket(args.router.as_deref())?;
    let containers = admin::Client::connect(&socket)?.ls()?;
    let devices: Vec<Value> = containers.iter().filter_map(|c| device(&dist, c)).collect();
    let spec = json!({ "cdiVersion": "0.5.0", "kind": KIND, "devices": devices });
    println!("{}", serde_json::to_string_pretty(&spec).context("cannot print")?);
    Ok(ExitCode::SUCCESS)
}

/// None for containers of `freeflow run`: there are no libraries in their directories.
fn device(dist: &Dist, container: &Container) -> Option<Value> {
    let dir = container.socket.parent().filter(|dir| dir.join("lib/freeflow").is_dir())?;
    let doors = inside_doors(dist, &container.name, |_| None);
    let options = ["bind", "ro", "nosuid", "nodev"];
    let mount = json!({ "hostPath": dir, "containerPath": INSIDE, "options": options });
    let node = json!({ "path": nic::node(), "hostPath": nic::NODE_SOURCE });
    let mut edits = json!({ "env": environment(&doors), "mounts": [mount], "deviceNodes": [node] });
    if let Some(mut hook) = hook(dist, dir, container.vip) {
        hook["hookName"] = "createContainer".into();
        edits["hooks"] = json!([hook]);
    }
    Some(json!({ "name": container.name, "containerEdits": edits }))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_prepared_containers_are_devices() {
        let base = std::env::temp_dir().join(format!("ff-cdi-{}", std::process::id()));
        let dist = Dist { binary: base.join("bin/freeflow"), libraries: base.join("lib/freeflow") };
        let container = Container {
            name: "web".into(),
            tenant: "default".into(),
            vip: [10, 9, 0, 1].into(),
            socket: base.join("router.sock"),
            pids: vec![],
            cm_ports: vec![],
        };
        assert_eq!(device(&dist, &container), None);
        std::fs::create_dir_all(base.join("lib/freeflow")).unwrap();
        let device = device(&dist, &container).expect("prepared");
        assert_eq!(device["name"], "web");
        assert_eq!(device["containerEdits"]["mounts"][0]["containerPath"], "/run/freeflow");
        let env = device["containerEdits"]["env"].as_array().expect("a list");
        assert!(env.contains(&json!("FREEFLOW_NAME=web")), "{env:?}");
        std::fs::remove_dir_all(&base).unwrap();
    }
}
