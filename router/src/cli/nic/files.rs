//! What the device's files say: the entries of /sys/class/infiniband and /sys/class/infiniband_verbs.
//!
//! Only what is so, in the kernel's own format (Documentation/ABI/stable/sysfs-class-infiniband). What would be a lie is
//! left out: counters (a file cannot count), the node's device number, a provider's ABI version.

use std::path::PathBuf;

use freeflow_core::verbs::{Gid, device};

use super::Nic;

/// A file below /sys/class, with its text, or a symbolic link, with where it leads.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Entry {
    File(PathBuf, String),
    Link(PathBuf, PathBuf),
}

/// The classes that hold them.
pub const CLASSES: [&str; 2] = ["infiniband", "infiniband_verbs"];

/// The file that tells one container's device from another's.
pub fn gid_file() -> PathBuf {
    PathBuf::from(format!("infiniband/{}/ports/{}/gids/0", device::NAME, device::PORT))
}

pub fn gid_text(gid: Gid) -> String {
    line(&groups(&gid.0))
}

/// All of them.
pub fn of(nic: &Nic) -> Vec<Entry> {
    let (class, verbs) =
        (format!("infiniband/{}", device::NAME), format!("infiniband_verbs/{}", device::NODE));
    let guid = groups(&nic.gid.guid());
    let file = |path: String, text: &str| Entry::File(path.into(), line(text));
    let mut entries = vec![
        file(format!("{class}/node_type"), "1: CA"),
        file(format!("{class}/node_guid"), &guid),
        file(format!("{class}/sys_image_guid"), &guid),
        file(format!("{class}/node_desc"), "FreeFlow"),
        file(format!("{class}/fw_ver"), device::FIRMWARE),
        file(format!("{verbs}/ibdev"), device::NAME),
        // The version of the kernel's interface that programs know; each device says itself that it has none.
        file("infiniband_verbs/abi_version".into(), "6"),
        Entry::Link(format!("{verbs}/device").into(), format!("../../{class}/device").into()),
        Entry::Link(
            format!("{class}/device/net/{}", nic.behind()).into(),
            format!("../../../../net/{}", nic.behind()).into(),
        ),
    ];
    entries.extend(
        port(nic)
            .into_iter()
            .map(|(name, text)| file(format!("{class}/ports/{}/{name}", device::PORT), &text)),
    );
    entries
}

/// The port's attributes, as ibv_query_port and its companions answer them.
fn port(nic: &Nic) -> Vec<(String, String)> {
    let mut list: Vec<(String, String)> = [
        ("state", "4: ACTIVE".to_owned()),
        ("phys_state", "5: LinkUp".to_owned()),
        ("link_layer", "Ethernet".to_owned()),
        ("rate", device::RATE.to_owned()),
        ("lid", format!("{:#x}", nic.gid.lid())),
        ("lid_mask_count", "0".to_owned()),
        ("sm_lid", "0x0".to_owned()),
        ("sm_sl", "0".to_owned()),
        ("pkeys/0", format!("{:#x}", device::PKEY)),
    ]
    .map(|(name, text)| (name.to_owned(), text))
    .into();
    for (index, entry) in nic.gid.table().into_iter().enumerate() {
        list.push((format!("gids/{index}"), groups(&entry.unwrap_or_default().0)));
        // An empty entry has no attributes.
        if entry.is_some() {
            list.push((format!("gid_attrs/types/{index}"), "RoCE v2".to_owned()));
            list.extend(nic.interface.iter().map(|name| (format!("gid_attrs/ndevs/{index}"), name.clone())));
        }
    }
    list
}

fn line(text: &str) -> String {
    format!("{text}\n")
}

/// As sysfs writes identifiers: groups of two bytes.
fn groups(bytes: &[u8]) -> String {
    let pairs: Vec<String> = bytes.chunks(2).map(|pair| format!("{:02x}{:02x}", pair[0], pair[1])).collect();
    pairs.join(":")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn text(nic: &Nic, name: &str) -> Option<String> {
        let path = PathBuf::from(name);
        of(nic).into_iter().find_map(|entry| match entry {
            Entry::File(at, text) if at == path => Some(text),
            _ => None,
        })
    }

    #[test]
    fn identifiers_are_written_as_the_kernel_writes_them() {
        let nic = Nic::of([10, 77, 1, 2].into(), Some("eth0".into()));
        let port = "infiniband/ff0/ports/1";
        assert_eq!(gid_file(), PathBuf::from(format!("{port}/gids/0")));
        let gid = text(&nic, &format!("{port}/gids/0"));
        assert_eq!(gid.as_deref(), Some("0000:0000:0000:0000:0000:ffff:0a4d:0102\n"));
        assert_eq!(gid, Some(gid_text(nic.gid)));
        assert_eq!(text(&nic, "infiniband/ff0/node_guid").as_deref(), Some("0200:ffff:0a4d:0102\n"));
        assert_eq!(text(&nic, &format!("{port}/gid_attrs/ndevs/0")).as_deref(), Some("eth0\n"));
        assert_eq!(text(&nic, &format!("{port}/pkeys/0")).as_deref(), Some("0xffff\n"));
    }

    #[test]
    fn an_address_on_no_interface_is_reached_by_loopback() {
        let nic = Nic::of([203, 0, 113, 7].into(), None);
        assert_eq!(text(&nic, "infiniband/ff0/ports/1/gid_attrs/ndevs/0"), None);
        let link = Entry::Link("infiniband/ff0/device/net/lo".into(), "../../../../net/lo".into());
        assert!(of(&nic).contains(&link));
    }
}
