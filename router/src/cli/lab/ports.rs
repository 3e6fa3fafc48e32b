//! Which TCP sockets listen in a container, from its init's /proc/PID/net. The kernel has no event for a new one, so
//! the caller polls.

use std::collections::BTreeSet;
use std::fs;

use rustix::process::Pid;

/// Inodes of the listening sockets: unlike ports, they tell a new listener from an old one.
pub fn listening(pid: Pid) -> BTreeSet<u64> {
    let table = |file: &str| fs::read_to_string(format!("/proc/{}/net/{file}", pid.as_raw_nonzero()));
    ["tcp", "tcp6"].iter().filter_map(|file| table(file).ok()).flat_map(|text| listeners(&text)).collect()
}

fn listeners(table: &str) -> Vec<u64> {
    const STATE: usize = 3;
    const INODE: usize = 9;
    const LISTEN: &str = "0A";
    let rows = table.lines().skip(1).map(|line| line.split_whitespace().collect::<Vec<_>>());
    rows.filter(|row| row.get(STATE) == Some(&LISTEN))
        .filter_map(|row| row.get(INODE)?.parse().ok())
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_listeners_count() {
        let table = "\
  sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt   uid  timeout inode
   0: 00000000:4C73 00000000:0000 0A 00000000:00000000 00:00000000 00000000  1000        0 33577 1 0 100 0 0 10 0
   1: 01014D0A:9D3A 02014D0A:4C73 01 00000000:00000000 00:00000000 00000000  1000        0 33578 1 0 20 4 30 10 -1
";
        assert_eq!(listeners(table), [33577]);
    }
}
