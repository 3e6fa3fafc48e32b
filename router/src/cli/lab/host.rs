//! One host of a lab: its router, its bridge, and its containers, each an OCI bundle that runc runs.
//!
//! A container's init is a shell that reads a pipe nobody writes to: it ends when this process does. Programs are
//! started beside it. Dropping a host kills its containers' inits and asks the router to end.

use std::fs;
use std::io::PipeWriter;
use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::process::Child;
use std::sync::mpsc;

use freeflow_router::admin;
use rustix::process::{Pid, Signal, kill_process};

use super::bundle::Bundle;
use super::events::{Event, Watched, watch};
use super::network::{self, Namespace};
use super::output::{Output, Stream};
use super::spec::{ContainerSpec, HostSpec, Spec};
use super::{cluster, runc, state};
use crate::cli::daemonise::{self, Start};
use crate::cli::failure::{Context as _, Failure, Result};
use crate::cli::sys::ChildSetup;
use crate::cli::userns::ContainerIds;

pub struct Host {
    pub containers: Vec<Container>,
    pub router_socket: PathBuf,
    dir: PathBuf,
    router: Pid,
    _namespace: Namespace,
}

pub struct Container {
    pub name: String,
    pub init: Pid,
    /// Keeps the container's init alive.
    _lifeline: PipeWriter,
}

impl Host {
    /// Starts the host's router and containers; returns when all are there and their interfaces are up.
    pub fn start(
        spec: &Spec,
        host: &HostSpec,
        namespace: Namespace,
        output: &Output,
        events: &mpsc::Sender<Event>,
    ) -> Result<Self> {
        let bridge = network::Bridge::make(&namespace, host.gateway)?;
        let router_socket = state::router_socket(&spec.dir, host_dir(spec, host));
        let router = start_router(spec, host, &router_socket, namespace.setup(), output)?;
        let pid = Pid::from_child(&router);
        watch(router, Watched::Router, events.clone());
        let ids = ContainerIds::new(spec.rootless)?;
        let mut containers = Vec::new();
        let place = Place { socket: &router_socket, bridge: &bridge, ids: &ids };
        for container in &host.containers {
            containers.push(place.start(spec, container)?);
        }
        Ok(Self { containers, router_socket, dir: spec.dir.clone(), router: pid, _namespace: namespace })
    }

    /// Starts a command in a container, its output prefixed with the container's name.
    pub fn run(&self, container: &str, command: &str, output: &Output) -> Result<Child> {
        let mut child = runc::exec(&self.dir, container, &["sh", "-c", command])?;
        if let Some(pipe) = child.stdout.take() {
            output.follow(container, Stream::Out, pipe);
        }
        if let Some(pipe) = child.stderr.take() {
            output.follow(container, Stream::Err, pipe);
        }
        Ok(child)
    }

    /// rdma_cm ports listened on in a container, as the router knows them.
    pub fn cm_ports(&self, container: &str) -> Result<Vec<u16>> {
        let all = admin::Client::connect(&self.router_socket)?.ls()?;
        Ok(all.into_iter().filter(|c| c.name == container).flat_map(|c| c.cm_ports).collect())
    }
}

/// Where containers of a host go.
struct Place<'a> {
    socket: &'a Path,
    bridge: &'a network::Bridge<'a>,
    ids: &'a ContainerIds,
}

impl Place<'_> {
    fn start(&self, spec: &Spec, container: &ContainerSpec) -> Result<Container> {
        let bundle = Bundle::make(spec, container, self.ids)?;
        self.register(&container.name, container.ip, bundle.door_dir())?;
        let (reader, lifeline) = std::io::pipe().context("cannot make a pipe")?;
        let init = runc::start(&spec.dir, bundle.dir(), &container.name, reader.into())?;
        let started = Container { name: container.name.clone(), init, _lifeline: lifeline };
        self.bridge.attach(&started.name, started.init, container.ip)?;
        Ok(started)
    }

    fn register(&self, name: &str, ip: IpAddr, dir: PathBuf) -> Result<()> {
        let add = admin::Add { name: name.to_owned(), ip: Some(ip), tenant: None, dir: Some(dir) };
        let added = admin::Client::connect(self.socket)?.add(add)?;
        if added.vip != ip {
            return Err(Failure::new(format!("the router gave {name} {} instead of {ip}", added.vip)));
        }
        Ok(())
    }
}

impl Container {
    /// Sends a signal to every process in the container except its init, which would not survive it.
    pub fn signal_all(&self, signal: Signal) {
        for pid in members(self.init) {
            // It may have ended since it was found.
            kill_process(pid, signal).ok();
        }
    }
}

/// The other processes in the PID namespace of `init`.
fn members(init: Pid) -> Vec<Pid> {
    let namespace = |pid: Pid| fs::read_link(format!("/proc/{}/ns/pid", pid.as_raw_nonzero())).ok();
    let Some(ours) = namespace(init) else { return Vec::new() };
    let entries = fs::read_dir("/proc").into_iter().flatten().flatten();
    let pids = entries.filter_map(|e| Pid::from_raw(e.file_name().to_str()?.parse().ok()?));
    pids.filter(|&pid| pid != init && namespace(pid).as_ref() == Some(&ours)).collect()
}

impl Drop for Host {
    fn drop(&mut self) {
        for container in &self.containers {
            // Never reaped while this process lives, so the pid is still the container's; it may have ended.
            kill_process(container.init, Signal::KILL).ok();
        }
        kill_process(self.router, Signal::TERM).ok();
    }
}

/// The part of the lab's directory that is one host's of several.
fn host_dir<'a>(spec: &Spec, host: &'a HostSpec) -> Option<&'a str> {
    spec.is_cluster().then_some(&host.name)
}

fn start_router(
    spec: &Spec,
    host: &HostSpec,
    socket: &Path,
    setup: ChildSetup,
    output: &Output,
) -> Result<Child> {
    let name = host_dir(spec, host).map_or_else(|| "router".to_owned(), |host| format!("router {host}"));
    let config = match host_dir(spec, host) {
        None => None,
        Some(_) => Some(cluster::write(spec, host, socket)?),
    };
    let (reader, writer) = std::io::pipe().context("cannot make a pipe")?;
    output.follow_to_the_end(&name, Stream::Err, reader);
    daemonise::spawn(Start { socket, config: config.as_deref(), log: writer.into(), level: "warn", setup })
}
