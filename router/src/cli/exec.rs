//! `freeflow exec`: a program in a container of a running lab.

use std::ffi::OsString;
use std::process::ExitCode;

use clap::Parser;
use rustix::process::Signal;

use super::failure::{Context as _, OWN_FAILURE, Result};
use super::lab;
use super::sys::{self, ChildSetup};

/// Run a program in a lab container; exit status is the program's.
#[derive(Debug, Parser)]
#[command(after_help = "\
After `--` the words are the program and its arguments. Without `--` they are joined and given to `sh -c`, as rsh and
ssh do, so that mpirun can use `freeflow exec` as its rsh agent.

Examples:
  freeflow exec c2 -- ibv_devinfo -v
  freeflow exec c1 'ls /run/freeflow; env'")]
pub struct Args {
    name: String,
    /// Program and its arguments
    #[arg(required = true, trailing_var_arg = true, allow_hyphen_values = true, value_name = "CMD")]
    command: Vec<OsString>,
}

pub fn main(args: Args) -> Result<ExitCode> {
    exec(&args).map_err(|failure| failure.with_status(OWN_FAILURE))
}

fn exec(args: &Args) -> Result<ExitCode> {
    let lab = lab::find_container(&args.name)?;
    let verbatim = std::env::args_os().nth(3).is_some_and(|word| word == "--");
    let mut command = lab.exec_command(&args.name)?;
    if verbatim {
        command.args(&args.command);
    } else {
        command.args(["sh", "-c"]).arg(args.command.join(&OsString::from(" ")));
    }
    let setup = ChildSetup { on_parent_death: Some(Signal::TERM), ..ChildSetup::default() };
    lab.enter()?;
    let status = setup.apply(&mut command).status().context("cannot start runc exec")?;
    Ok(ExitCode::from(sys::exit_code(status)))
}
