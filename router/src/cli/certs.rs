//! `freeflow certs`: certificates for the routers of a small cluster or a lab.

use std::fs::OpenOptions;
use std::io::{ErrorKind, Write as _};
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use clap::Parser;
use freeflow_router::cluster::certs::{Authority, Pair};

use super::failure::{Context as _, Failure, Result};

const PRIVATE: u32 = 0o600;
const PUBLIC: u32 = 0o644;
const CA: &str = "ca.pem";
const CA_KEY: &str = "ca-key.pem";

/// Make certificates for routers: a cluster CA in DIR, and one for each host in DIR/NAME
#[derive(Debug, Parser)]
#[command(after_help = "\
Examples:
  freeflow certs /root/ff-ca --host h1 h2           a new CA, and the files of two hosts
  scp -r /root/ff-ca/h2/. h2:/etc/freeflow/tls/     where h2's router looks for them
  freeflow certs /root/ff-ca --host h3              one more host, by the same CA
  freeflow certs /root/ff-ca --host h2              a new certificate for h2, before the old one expires

Who has ca-key.pem can be any host: keep it off the hosts. A site with a CA of its own does without this: each router
needs a certificate with its host's name as the only DNS name, good for server and client.")]
pub struct Args {
    /// Where the CA is, or will be
    #[arg(value_name = "DIR")]
    dir: PathBuf,
    /// Hosts' names, as `host` in their configuration (unless set there: what uname -n prints)
    #[arg(long = "host", value_name = "NAME", num_args = 1.., required = true)]
    hosts: Vec<String>,
    /// How long a host's certificate is valid
    #[arg(long, value_name = "DAYS", default_value_t = 365, value_parser = clap::value_parser!(u32).range(1..=36500))]
    days: u32,
    /// How long a new CA is valid
    #[arg(long, value_name = "DAYS", default_value_t = 3650, value_parser = clap::value_parser!(u32).range(1..=36500))]
    ca_days: u32,
}

pub fn main(args: &Args) -> Result<ExitCode> {
    let Args { dir, hosts, days, ca_days } = args;
    if issue(dir, hosts, (*days, *ca_days))? {
        let (cert, key) = (dir.join(CA), dir.join(CA_KEY));
        println!("{}: the new cluster's CA; keep {} secret", cert.display(), key.display());
    }
    for host in hosts {
        println!("{}: copy its files to /etc/freeflow/tls on {host}", dir.join(host).display());
    }
    Ok(ExitCode::SUCCESS)
}

/// Makes what the routers of `hosts` need, each in a directory of its own in `dir`; `days` for certificates and a CA. True:
/// the CA is new, too.
pub fn issue(dir: &Path, hosts: &[String], days: (u32, u32)) -> Result<bool> {
    hosts.iter().try_for_each(|host| check_name(host))?;
    let (authority, ca, new) = authority(dir, days.1)?;
    for host in hosts {
        let Pair { cert, key } =
            authority.host(host, days.0).context(format_args!("cannot make a certificate for {host}"))?;
        let own = dir.join(host);
        make_dir(&own)?;
        replace(&own.join("key.pem"), &key, PRIVATE)?;
        replace(&own.join("cert.pem"), &cert, PUBLIC)?;
        replace(&own.join(CA), &ca, PUBLIC)?;
    }
    Ok(new)
}

/// Names become directories here, and DNS names in certificates.
fn check_name(host: &str) -> Result<()> {
    let label = |label: &str| {
        let plain = label.chars().all(|c| c.is_ascii_alphanumeric() || c == '-' || c == '_');
        plain && !label.is_empty() && label.len() <= 63 && !label.starts_with('-') && !label.ends_with('-')
    };
    if host.len() <= 253 && host.split('.').all(label) {
        return Ok(());
    }
    Err(Failure::new(format!("{host:?} is no host's name: letters, digits, '-' and '_', with dots between")))
}

/// The CA in `dir`, made if there is none, its certificate, and whether it is new.
fn authority(dir: &Path, days: u32) -> Result<(Authority, String, bool)> {
    let (cert_path, key_path) = (dir.join(CA), dir.join(CA_KEY));
    match (read(&cert_path)?, read(&key_path)?) {
        (Some(cert), Some(key)) => {
            let authority = Authority::again(&key);
            Ok((authority.context(format_args!("cannot use {}", key_path.display()))?, cert, false))
        }
        (None, None) => {
            let (authority, Pair { cert, key }) = Authority::new(days).context("cannot make a CA")?;
            make_dir(dir)?;
            replace(&key_path, &key, PRIVATE)?;
            replace(&cert_path, &cert, PUBLIC)?;
            Ok((authority, cert, true))
        }
        (Some(_), None) => Err(half(&cert_path, &key_path)),
        (None, Some(_)) => Err(half(&key_path, &cert_path)),
    }
}

fn half(there: &Path, missing: &Path) -> Failure {
    let (there, missing) = (there.display(), missing.display());
    Failure::new(format!(
        "{there} is there, but {missing} is not: put it back, or begin in another directory"
    ))
}

fn read(path: &Path) -> Result<Option<String>> {
    match std::fs::read_to_string(path) {
        Ok(text) => Ok(Some(text)),
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(None),
        Err(error) => Err(Failure::new(format!("cannot read {}: {error}", path.display()))),
    }
}

fn make_dir(dir: &Path) -> Result<()> {
    std::fs::create_dir_all(dir).context(format_args!("cannot make {}", dir.display()))
}

/// A file is whole or as it was; a key is never readable for others.
fn replace(path: &Path, text: &str, mode: u32) -> Result<()> {
    let aside = path.with_extension("new");
    let write = || {
        let mut options = OpenOptions::new();
        let mut file = options.write(true).create(true).truncate(true).mode(mode).open(&aside)?;
        file.write_all(text.as_bytes())?;
        std::fs::rename(&aside, path)
    };
    write().context(format_args!("cannot write {}", path.display()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use freeflow_router::cluster::{Files, Security};
    use std::os::unix::fs::PermissionsExt as _;

    fn certs(dir: &Path, hosts: &[&str]) -> Result<ExitCode> {
        let hosts = hosts.iter().map(|host| (*host).to_owned()).collect();
        main(&Args { dir: dir.into(), hosts, days: 1, ca_days: 2 })
    }

    fn usable(dir: &Path, host: &str) -> bool {
        let own = dir.join(host);
        let files = Files { ca: own.join(CA), cert: own.join("cert.pem"), key: own.join("key.pem") };
        Security::tls(&files, host).is_ok()
    }

    #[test]
    fn hosts_are_added_to_the_ca_that_is_there() {
        let dir = std::env::temp_dir().join(format!("ff-certs-{}", std::process::id()));
        certs(&dir, &["h1", "h2.example"]).expect("new");
        let ca = std::fs::read(dir.join(CA)).expect("CA");
        certs(&dir, &["h3", "h1"]).expect("again");
        assert_eq!(std::fs::read(dir.join("h3").join(CA)).expect("CA"), ca);
        for host in ["h1", "h2.example", "h3"] {
            assert!(usable(&dir, host), "{host}");
            let mode = |file: &str| {
                let metadata = std::fs::metadata(dir.join(host).join(file)).expect("metadata");
                metadata.permissions().mode() & 0o777
            };
            assert_eq!((mode("key.pem"), mode("cert.pem")), (0o600, 0o644));
        }
        std::fs::remove_file(dir.join(CA_KEY)).expect("remove");
        let failure = certs(&dir, &["h4"]).expect_err("half a CA").to_string();
        assert!(failure.contains(CA_KEY), "{failure}");
        std::fs::remove_dir_all(&dir).expect("scratch");
    }

    #[test]
    fn a_hosts_name_is_no_path() {
        for bad in ["", "../h1", "a/b", "-h", "h 1", "h..1", &"x".repeat(64)] {
            certs(Path::new("/nonexistent"), &[bad]).expect_err(bad);
        }
    }
}
