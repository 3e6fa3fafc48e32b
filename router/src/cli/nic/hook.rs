//! The hook by which a container's runtime shows its programs the device's files: `createContainer` of the OCI runtime
//! specification, which runs in the container's namespaces, before its root becomes `/`.

use std::io::Read as _;
use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use clap::Parser;
use serde_json::{Value, json};

use super::{Nic, mounts};
use crate::cli::failure::{Context as _, Failure, Result};

/// Name of the hidden subcommand that the hook is.
pub const COMMAND: &str = "nic-hook";

/// Shows a container the device's files; started by its runtime only.
#[derive(Debug, Parser)]
pub struct Args {
    #[arg(long)]
    vip: IpAddr,
    /// The interface that will have the address, where it comes later
    #[arg(long)]
    interface: Option<String>,
}

/// The hook as config.json and CDI's files have it, but for its name there.
pub fn oci_hook(binary: &Path, vip: IpAddr, interface: Option<&str>) -> Value {
    let mut args = vec!["freeflow".to_owned(), COMMAND.to_owned(), format!("--vip={vip}")];
    args.extend(interface.map(|name| format!("--interface={name}")));
    json!({ "path": binary, "args": args })
}

/// A runtime would not start the container if this failed: it starts without the files then, and `freeflow doctor` in
/// it says so.
pub fn main(args: Args) -> Result<ExitCode> {
    if let Err(failure) = show(args) {
        eprintln!("freeflow: no {}: {failure}", super::node());
    }
    Ok(ExitCode::SUCCESS)
}

fn show(args: Args) -> Result<()> {
    let root = root_of_container()?;
    mounts::show_device(&root, &Nic::of(args.vip, args.interface)).context("cannot add to its /sys/class")
}

/// From the state that the runtime writes to its hooks' standard input.
fn root_of_container() -> Result<PathBuf> {
    let mut text = String::new();
    std::io::stdin().read_to_string(&mut text).context("cannot read the container's state")?;
    let state: Value = serde_json::from_str(&text).context("the container's state")?;
    let bundle = Path::new(state["bundle"].as_str().ok_or_else(|| Failure::new("a state without a bundle"))?);
    let path = bundle.join("config.json");
    let config = std::fs::read(&path).context(format_args!("cannot read {}", path.display()))?;
    let config: Value = serde_json::from_slice(&config).context(format_args!("{}", path.display()))?;
    let root = config["root"]["path"].as_str().ok_or_else(|| Failure::new("a container without a root"))?;
    Ok(bundle.join(root))
}
