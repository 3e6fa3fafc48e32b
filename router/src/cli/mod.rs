//! The command line: which subcommands there are, and how an error becomes a message and an exit status.
//!
//! Owns argument parsing and the process's exit status. It must never know verbs or queues: subcommands talk to the
//! router through `freeflow_router::admin` and to programs through their environment.

mod cdi;
mod certs;
mod container;
mod daemonise;
mod doctor;
mod doors;
mod exec;
mod failure;
mod lab;
mod nic;
mod paths;
mod ps;
mod router;
mod run;
mod stop;
mod sys;
mod userns;
mod vars;

use std::process::ExitCode;

use clap::{Parser, Subcommand};

/// RDMA in software for unprivileged containers.
#[derive(Debug, Parser)]
#[command(name = "freeflow", version, propagate_version = true, after_help = vars::HELP)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    Router(router::Args),
    Run(run::Args),
    #[command(subcommand)]
    Container(container::Args),
    Cdi(cdi::Args),
    Certs(certs::Args),
    Exec(exec::Args),
    Lab(lab::Args),
    #[command(name = lab::INNER_COMMAND, hide = true)]
    LabInner(lab::InnerArgs),
    #[command(name = nic::HOOK_COMMAND, hide = true)]
    NicHook(nic::HookArgs),
    Ps(ps::Args),
    Doctor(doctor::Args),
}

pub fn main() -> ExitCode {
    let cli = Cli::parse();
    vars::warn_unknown();
    let result = match cli.command {
        Command::Router(args) => router::main(args),
        Command::Run(args) => run::main(args),
        Command::Container(args) => container::main(args),
        Command::Cdi(args) => cdi::main(&args),
        Command::Certs(args) => certs::main(&args),
        Command::Exec(args) => exec::main(args),
        Command::Lab(args) => lab::main(args),
        Command::LabInner(args) => lab::inner_main(args),
        Command::NicHook(args) => nic::hook_main(args),
        Command::Ps(args) => ps::main(&args),
        Command::Doctor(args) => doctor::main(&args),
    };
    result.unwrap_or_else(|failure| {
        eprintln!("freeflow: {failure}");
        ExitCode::from(failure.status())
    })
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory as _;

    #[test]
    fn the_command_line_is_consistent() {
        super::Cli::command().debug_assert();
    }
}
