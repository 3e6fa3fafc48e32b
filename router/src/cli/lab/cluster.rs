//! The files that make the routers of a lab one cluster: a directory of all containers, certificates, and each router's
//! configuration.

use std::fmt::Write as _;
use std::fs;
use std::path::{Path, PathBuf};

use super::spec::{HostSpec, Spec};
use crate::cli::failure::{Context as _, Failure, Result};
use crate::cli::{certs, paths};
use freeflow_router::admin::DEFAULT_TENANT;

/// Where routers take connections of routers.
const PORT: u16 = 4790;

/// Makes the certificates by which the routers of a lab know each other.
pub fn certify(spec: &Spec) -> Result<()> {
    let names: Vec<String> = spec.hosts.iter().map(|host| host.name.clone()).collect();
    certs::issue(&certificates(spec), &names, (1, 1)).map(drop)
}

fn certificates(spec: &Spec) -> PathBuf {
    spec.dir.join("certs")
}

/// How the router of `host` knows others.
fn security(spec: &Spec, host: &HostSpec) -> String {
    if spec.plain {
        return "insecure_plain_tcp = true\n".to_owned();
    }
    let own = certificates(spec).join(&host.name);
    let files = [("ca", "ca"), ("cert", "cert"), ("key", "key")];
    files.map(|(key, file)| format!("tls_{key} = \"{}/{file}.pem\"\n", own.display())).concat()
}

/// Writes what the router of `host` needs beside its socket; returns its configuration.
pub fn write(spec: &Spec, host: &HostSpec, socket: &Path) -> Result<PathBuf> {
    let dir = socket.parent().ok_or_else(|| Failure::new("a router's socket without a directory"))?;
    paths::make_dir(dir, 0o755)?;
    let (directory, config) = (dir.join("directory.toml"), dir.join("router.toml"));
    save(&directory, &directory_of(spec))?;
    let text = format!(
        "host = \"{}\"\ncluster_listen = \"{}:{PORT}\"\ndirectory = \"file:{}\"\n{}",
        host.name,
        host.wire,
        directory.display(),
        security(spec, host)
    );
    save(&config, &text)?;
    Ok(config)
}

fn save(path: &Path, text: &str) -> Result<()> {
    fs::write(path, text).context(format_args!("cannot write {}", path.display()))
}

/// The directory file: every host with the containers on it.
fn directory_of(spec: &Spec) -> String {
    let mut text = String::new();
    for host in &spec.hosts {
        let containers = host.containers.iter().map(|c| format!("\"{DEFAULT_TENANT}/{}\"", c.ip));
        let containers = containers.collect::<Vec<_>>().join(", ");
        // Writing to a string cannot fail.
        let _ = write!(
            text,
            "[hosts.{}]\naddress = \"{}:{PORT}\"\ncontainers = [{containers}]\n\n",
            host.name, host.wire
        );
    }
    text
}
