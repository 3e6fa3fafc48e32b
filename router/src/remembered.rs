//! Containers that outlive the router: a file beside its socket.
//!
//! Owns that file. Running containers have their directory mounted and go on expecting a socket in it, so a router that
//! starts again must serve them under the same name, tenant and address.

use std::io;
use std::io::Write as _;
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};

use crate::admin::Add;

const FILE: &str = "containers.json";

#[derive(Debug)]
pub struct Remembered(PathBuf);

impl Remembered {
    pub fn beside(socket_dir: &Path) -> Self {
        Remembered(socket_dir.join(FILE))
    }

    pub fn path(&self) -> &Path {
        &self.0
    }

    /// What the last router saved; nothing where there was none.
    pub fn load(&self) -> io::Result<Vec<Add>> {
        match std::fs::read(&self.0) {
            Ok(bytes) => Ok(serde_json::from_slice(&bytes)?),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(vec![]),
            Err(error) => Err(error),
        }
    }

    /// Replaces the file as a whole; no containers, no file.
    pub fn save(&self, containers: &[Add]) -> io::Result<()> {
        if containers.is_empty() {
            return match std::fs::remove_file(&self.0) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
                _ => Ok(()),
            };
        }
        let aside = self.0.with_extension("new");
        let mut options = std::fs::OpenOptions::new();
        let mut file = options.write(true).create(true).truncate(true).mode(0o600).open(&aside)?;
        file.write_all(&serde_json::to_vec_pretty(containers)?)?;
        std::fs::rename(&aside, &self.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_saved_is_loaded_and_nothing_leaves_no_file() {
        let dir = std::env::temp_dir().join(format!("ff-remembered-{}", std::process::id()));
        std::fs::create_dir_all(&dir).expect("scratch directory");
        let file = Remembered::beside(&dir);
        assert_eq!(file.load().expect("no file"), []);
        file.save(&[]).expect("nothing to remove");
        let add = Add { name: "c1".into(), dir: Some("/d".into()), ..Add::default() };
        file.save(std::slice::from_ref(&add)).expect("save");
        assert_eq!(file.load().expect("load"), [add]);
        std::fs::write(file.path(), "[").expect("damage");
        file.load().expect_err("damaged");
        file.save(&[]).expect("remove");
        std::fs::remove_dir(&dir).expect("nothing was left in it");
    }
}
