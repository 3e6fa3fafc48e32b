//! `freeflow exec`: a program in a container, or on a host, of a running lab.

use std::ffi::{OsStr, OsString};
use std::process::{Command, ExitCode};

use clap::Parser;
use rustix::process::Signal;

use super::failure::{Context as _, OWN_FAILURE, Result};
use super::lab;
use super::sys::{self, ChildSetup};

/// Run a program in a lab container; exit status is the program's.
#[derive(Debug, Parser)]
#[command(after_help = "\
After `--` the words are the program and its arguments. Without `--` they are joined and given to `sh -c`, as rsh and
ssh do, so that mpirun can use `freeflow exec` as its rsh agent. mpirun itself runs on a host of the lab, which all
containers reach.

Examples:
  freeflow exec c2 -- ibv_devinfo -v
  freeflow exec c1 'ls /run/freeflow; env'
  freeflow exec --host c1 -- mpirun --mca plm_rsh_agent 'freeflow exec' --host c1,c2 hostname")]
pub struct Args {
    /// On the container's host instead: the program joins the host's network, and keeps this machine's files
    #[arg(long)]
    host: bool,
    name: String,
    /// Program and its arguments
    #[arg(required = true, trailing_var_arg = true, allow_hyphen_values = true, value_name = "CMD")]
    command: Vec<OsString>,
}

pub fn main(args: Args) -> Result<ExitCode> {
    exec(&args).map_err(|failure| failure.with_status(OWN_FAILURE))
}

fn exec(args: &Args) -> Result<ExitCode> {
    let words = program(args, std::env::args_os().skip(2));
    let lab = lab::find_container(&args.name)?;
    let mut command = if args.host {
        lab.enter_host()?;
        Command::new(&words[0])
    } else {
        let mut command = lab.exec_command(&args.name)?;
        command.arg(&words[0]);
        lab.enter()?;
        command
    };
    command.args(&words[1..]);
    let setup = ChildSetup { on_parent_death: Some(Signal::TERM), ..ChildSetup::default() };
    let status = setup.apply(&mut command).status();
    let status = status.context(format_args!("cannot start {}", command.get_program().display()))?;
    Ok(ExitCode::from(sys::exit_code(status)))
}

/// The program's words, or a shell's for them; `given` is the command line behind `exec`.
fn program(args: &Args, mut given: impl Iterator<Item = OsString>) -> Vec<OsString> {
    let name = given.find(|word| !word.as_encoded_bytes().starts_with(b"-"));
    debug_assert_eq!(name.as_deref(), Some(OsStr::new(&args.name)));
    if given.next().is_some_and(|word| word == "--") {
        return args.command.clone();
    }
    vec!["sh".into(), "-c".into(), args.command.join(OsStr::new(" "))]
}

#[cfg(test)]
mod tests {
    use super::*;

    fn words(line: &str) -> Vec<String> {
        let given: Vec<OsString> = line.split(' ').map(OsString::from).collect();
        let args = Args::parse_from(std::iter::once("exec".into()).chain(given.clone()));
        let program = program(&args, given.into_iter());
        program.into_iter().map(|word| word.into_string().expect("of a string")).collect()
    }

    #[test]
    fn words_after_two_dashes_are_the_programs_and_others_a_shells() {
        assert_eq!(words("c1 -- ls -l"), ["ls", "-l"]);
        assert_eq!(words("--host c1 -- ls -l"), ["ls", "-l"]);
        assert_eq!(words("c1 ls -l"), ["sh", "-c", "ls -l"]);
        assert_eq!(words("c1 echo -- c1 -- x"), ["sh", "-c", "echo -- c1 -- x"]);
        assert_eq!(words("--host c1 exec orted --daemonize"), ["sh", "-c", "exec orted --daemonize"]);
    }
}
