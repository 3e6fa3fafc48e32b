//! `freeflow`: the router daemon and its faces. Everything is in `cli`; this file only starts it.

mod cli;

fn main() -> std::process::ExitCode {
    cli::main()
}
