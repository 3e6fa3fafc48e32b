//! How a process shows a router that it had a number from the router's predecessor.
//!
//! Owns the secret beside the socket, which outlives routers, and the tags made with it. Nothing else is kept: whoever
//! brings a number and its tag was given both.

use std::io::{self, Read, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use ring::hmac;

const FILE: &str = "router.secret";
const LEN: usize = 32;

/// Makes tags. The same ones as every other router in this directory, before and after.
#[derive(Debug, Clone)]
pub struct Proofs(hmac::Key);

impl Proofs {
    /// With the secret in `dir`, made if there is none.
    pub fn beside(dir: &Path) -> io::Result<Self> {
        let path = dir.join(FILE);
        let secret = match read(&path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => make(&path)?,
            // Cut short by a full disk: nobody has a tag of it.
            Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => make(&path)?,
            other => other?,
        };
        Ok(Proofs(hmac::Key::new(hmac::HMAC_SHA256, &secret)))
    }

    #[cfg(test)]
    pub fn of_a_test() -> Self {
        Proofs(hmac::Key::new(hmac::HMAC_SHA256, &[7; LEN]))
    }

    /// The tag of a number of `kind` that a client of a container has. The container's name and tenant are the router's
    /// own, without NUL.
    pub fn tag(&self, (name, tenant): (&str, &str), kind: u32, client: u32, number: u32) -> u64 {
        let mut context = hmac::Context::with_key(&self.0);
        for part in [name.as_bytes(), &[0], tenant.as_bytes(), &[0]] {
            context.update(part);
        }
        [kind, client, number].iter().for_each(|n| context.update(&n.to_le_bytes()));
        let tag = context.sign();
        let mut short = [0; 8];
        short.copy_from_slice(&tag.as_ref()[..8]);
        u64::from_le_bytes(short)
    }
}

fn read(path: &Path) -> io::Result<[u8; LEN]> {
    let mut secret = [0; LEN];
    std::fs::File::open(path)?.read_exact(&mut secret)?;
    Ok(secret)
}

fn make(path: &Path) -> io::Result<[u8; LEN]> {
    let mut secret = [0; LEN];
    std::fs::File::open("/dev/urandom")?.read_exact(&mut secret)?;
    let aside = path.with_extension("new");
    let mut options = std::fs::OpenOptions::new();
    options.write(true).create(true).truncate(true).mode(0o600).open(&aside)?.write_all(&secret)?;
    std::fs::rename(&aside, path)?;
    Ok(secret)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_later_router_knows_what_an_earlier_one_gave() {
        let dir = std::env::temp_dir().join(format!("ff-proof-{}", std::process::id()));
        std::fs::create_dir_all(&dir).expect("scratch directory");
        let tag = |proofs: &Proofs| proofs.tag(("web", "red"), 1, 2, 3);
        let first = Proofs::beside(&dir).expect("new");
        assert_eq!(tag(&Proofs::beside(&dir).expect("again")), tag(&first));
        let others = [(("web", "blue"), 1, 2, 3), (("we", "bred"), 1, 2, 3), (("web", "red"), 2, 2, 3)];
        for (container, kind, client, number) in others {
            assert_ne!(first.tag(container, kind, client, number), tag(&first));
        }
        assert_ne!(first.tag(("web", "red"), 1, 3, 2), tag(&first));
        std::fs::write(dir.join(FILE), "short").expect("damage");
        assert_ne!(tag(&Proofs::beside(&dir).expect("a new one")), tag(&first));
        std::fs::remove_dir_all(&dir).expect("scratch directory");
    }
}
