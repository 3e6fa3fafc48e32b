//! The FREEFLOW_* variables: every name the product knows, with its meaning, declared once.

use std::process::Command;

pub const SOCKET: &str = "FREEFLOW_SOCKET";
pub const NAME: &str = "FREEFLOW_NAME";
pub const LOG: &str = "FREEFLOW_LOG";
pub const CONFIG: &str = "FREEFLOW_CONFIG";

/// Names and meanings, in the order `--help` shows them.
const KNOWN: [(&str, &str); 4] = [
    (SOCKET, "socket of the router to use"),
    (NAME, "name of the container a program runs in, for messages"),
    (LOG, "what to log, e.g. info or freeflow_router=debug"),
    (CONFIG, "configuration file of the router"),
];

pub const HELP: &str = "\
Variables:
  FREEFLOW_SOCKET  socket of the router to use
  FREEFLOW_NAME    name of the container a program runs in, for messages
  FREEFLOW_LOG     what to log, e.g. info or freeflow_router=debug
  FREEFLOW_CONFIG  configuration file of the router";

/// Warns about each variable that looks like ours and is not: most likely a typing error.
pub fn warn_unknown() {
    for name in unknown(names()) {
        eprintln!("freeflow: warning: unknown variable {name} is ignored (known: {})", known_names());
    }
}

/// Keeps them from a process of our own that would warn a second time.
pub fn forget_unknown(command: &mut Command) -> &mut Command {
    for name in unknown(names()) {
        command.env_remove(name);
    }
    command
}

fn names() -> impl Iterator<Item = String> {
    std::env::vars_os().filter_map(|(name, _)| name.into_string().ok())
}

fn unknown(names: impl Iterator<Item = String>) -> Vec<String> {
    names.filter(|n| n.starts_with("FREEFLOW_") && !KNOWN.iter().any(|(known, _)| known == n)).collect()
}

fn known_names() -> String {
    KNOWN.map(|(name, _)| name).join(", ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_strangers_are_reported() {
        let names = ["PATH", "FREEFLOW_SOCKET", "FREEFLOW_SOKCET", "NOT_FREEFLOW_X"].map(String::from);
        assert_eq!(unknown(names.into_iter()), ["FREEFLOW_SOKCET"]);
    }

    #[test]
    fn the_help_text_is_the_table() {
        for (name, meaning) in KNOWN {
            let line = format!("{name:<16} {meaning}");
            assert!(HELP.contains(&line), "{line}");
        }
    }
}
