//! `freeflow ps`: containers, their QPs and counters, as a table or as JSON.

use std::fmt::Write as _;
use std::path::PathBuf;
use std::process::ExitCode;

use clap::Parser;
use freeflow_router::admin::{self, Ps, PsContainer, PsQp};

use super::failure::{Context as _, Result};
use super::{lab, paths};

/// Show containers with their processes, QPs and counters.
#[derive(Debug, Parser)]
#[command(after_help = "\
Examples:
  freeflow ps
  freeflow ps --lab
  freeflow ps --json | jq '.containers[].qps[].path'")]
pub struct Args {
    #[arg(long)]
    json: bool,
    /// Socket of the router to ask
    #[arg(long, visible_alias = "socket", value_name = "SOCK")]
    router: Option<PathBuf>,
    /// Ask the router of the running lab instead
    #[arg(long, conflicts_with = "router")]
    lab: bool,
}

pub fn main(args: &Args) -> Result<ExitCode> {
    let sockets =
        if args.lab { lab::running_routers()? } else { vec![paths::router_socket(args.router.as_deref())?] };
    let mut ps = Ps::default();
    for socket in sockets {
        let host = admin::Client::connect(&socket)?.ps()?;
        ps.version = host.version;
        ps.containers.extend(host.containers);
    }
    if args.json {
        println!("{}", serde_json::to_string_pretty(&ps).context("cannot print")?);
    } else {
        print!("{}", table(&ps));
    }
    Ok(ExitCode::SUCCESS)
}

fn table(ps: &Ps) -> String {
    let mut out = String::new();
    let mut line = |cells: [&str; 9]| {
        let [name, kind, state, path, peer, procs, tx, rx, errors] = cells;
        let row = format!(
            "{name:<16} {kind:<10} {state:<7} {path:<9} {peer:<28} {procs:>5} {tx:>12} {rx:>12} {errors:>6}"
        );
        // Writing to a String cannot fail.
        writeln!(out, "{}", row.trim_end()).ok();
    };
    line(["NAME", "QP", "STATE", "PATH", "PEER / VIP", "PROCS", "TX", "RX", "ERRORS"]);
    for c in &ps.containers {
        container_row(c, &mut line);
        for qp in &c.qps {
            qp_row(qp, &mut line);
        }
    }
    out
}

fn container_row(c: &PsContainer, line: &mut impl FnMut([&str; 9])) {
    let vip = format!("{} ({})", c.vip, c.tenant);
    let (procs, errors) = (c.pids.len().to_string(), c.errors.to_string());
    line([&c.name, "", "", "", &vip, &procs, &bytes(c.tx_bytes), &bytes(c.rx_bytes), &errors]);
}

fn qp_row(qp: &PsQp, line: &mut impl FnMut([&str; 9])) {
    let kind = format!("{} {}", qp.transport, qp.qpn);
    let peer = qp.peer.as_ref().map_or(String::new(), |p| format!("{} qp {}", p.vip, p.qpn));
    let path = qp.path.as_deref().unwrap_or("-");
    let errors = qp.errors.to_string();
    line(["", &kind, &qp.state, path, &peer, "", &bytes(qp.tx_bytes), &bytes(qp.rx_bytes), &errors]);
}

/// A byte count in the largest binary unit that keeps it at or above 1.
fn bytes(n: u64) -> String {
    const UNITS: [&str; 5] = ["KiB", "MiB", "GiB", "TiB", "PiB"];
    let mut unit = None;
    let mut value = n as f64;
    for name in UNITS {
        if value < 1024.0 {
            break;
        }
        value /= 1024.0;
        unit = Some(name);
    }
    unit.map_or_else(|| format!("{n} B"), |unit| format!("{value:.1} {unit}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn byte_counts_are_short() {
        assert_eq!(bytes(0), "0 B");
        assert_eq!(bytes(1023), "1023 B");
        assert_eq!(bytes(1536), "1.5 KiB");
        assert_eq!(bytes(3 << 30), "3.0 GiB");
    }

    #[test]
    fn a_table_shows_each_container_and_qp() {
        let qp = PsQp {
            qpn: 42,
            transport: "RC".into(),
            state: "RTS".into(),
            path: Some("direct".into()),
            peer: Some(admin::PsPeer { tenant: "t".into(), vip: [10, 0, 0, 2].into(), qpn: 43 }),
            traffic_class: 0,
            tx_bytes: 2048,
            rx_bytes: 0,
            errors: 0,
        };
        let container = PsContainer {
            name: "c1".into(),
            tenant: "t".into(),
            vip: [10, 0, 0, 1].into(),
            pids: vec![1, 2],
            mr_bytes: 0,
            qps: vec![qp],
            tx_bytes: 4096,
            rx_bytes: 0,
            errors: 1,
        };
        let text = table(&Ps { version: 1, containers: vec![container] });
        let lines: Vec<_> = text.lines().collect();
        assert_eq!(lines.len(), 3, "{text}");
        assert!(lines[1].starts_with("c1 ") && lines[1].contains("10.0.0.1 (t)"), "{text}");
        assert!(lines[2].contains("RC 42") && lines[2].contains("10.0.0.2 qp 43"), "{text}");
    }
}
