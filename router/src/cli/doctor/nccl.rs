//! Would NCCL load our plugin, and use it? Tried as NCCL tries it: the same names, the same dlopen.

use std::ffi::{OsStr, OsString};
use std::os::unix::fs::MetadataExt as _;
use std::path::Path;

use super::Finding;
use crate::cli::doors::{NCCL_LIBRARY, NCCL_PLUGIN};
use crate::cli::paths::Dist;
use crate::cli::sys::Library;

const CHECK: &str = "NCCL plugin";
/// Versions of the interface that the plugin has; NCCL takes the newest that it knows.
const VERSIONS: std::ops::RangeInclusive<u32> = 6..=12;

pub fn check() -> Vec<Finding> {
    let (variable, ours) = NCCL_PLUGIN;
    let advice = format!(
        "start it with freeflow run or the flags of freeflow container add, or set {variable}={ours}"
    );
    let Some(named) = std::env::var_os(variable).filter(|value| !value.is_empty()) else {
        return vec![Finding::bad(
            CHECK,
            format!("{variable} is not set: NCCL would not look for it"),
            advice,
        )];
    };
    let mut findings = vec![loads(&named, &advice), selected(std::env::var_os("NCCL_NET").as_deref())];
    findings.extend(same_host());
    findings
}

/// What NCCL gives to dlopen, in its order: the comma list's names as they are, and as part of a file's name.
fn candidates(named: &OsStr) -> Vec<OsString> {
    let text = named.to_string_lossy();
    let names = text.split(',').map(str::trim).filter(|name| !name.is_empty());
    names.flat_map(|name| [name.into(), format!("libnccl-net-{name}.so").into()]).collect()
}

fn loads(named: &OsStr, advice: &str) -> Finding {
    let mut refused = Vec::new();
    for name in candidates(named) {
        match Library::open(&name) {
            Ok(library) => return opened(&library, &name, advice),
            Err(why) => refused.push(why),
        }
    }
    let why = format!("NCCL_NET_PLUGIN={}: {}", named.display(), refused.join("; "));
    Finding::bad(
        CHECK,
        why,
        format!("LD_LIBRARY_PATH must lead to the directory of {NCCL_LIBRARY}: {advice}"),
    )
}

fn opened(library: &Library, name: &OsStr, advice: &str) -> Finding {
    let versions: Vec<u32> =
        VERSIONS.filter(|v| library.file_of(&format!("ncclNetPlugin_v{v}")).is_some()).collect();
    let Some(file) = versions.last().and_then(|v| library.file_of(&format!("ncclNetPlugin_v{v}"))) else {
        return Finding::bad(CHECK, format!("{} has no network plugin in it", name.display()), advice);
    };
    let ours = Dist::find().is_ok_and(|dist| is_same(&file, &dist.libraries.join(NCCL_LIBRARY)));
    if !ours {
        return Finding::bad(CHECK, format!("NCCL would load another one: {}", file.display()), advice);
    }
    let listed: Vec<String> = versions.iter().map(|v| format!("v{v}")).collect();
    Finding::ok(CHECK, format!("{} loads, with {}", file.display(), listed.join(", ")))
}

fn is_same(a: &Path, b: &Path) -> bool {
    let id = |path: &Path| std::fs::metadata(path).map(|m| (m.dev(), m.ino())).ok();
    id(a).is_some() && id(a) == id(b)
}

/// NCCL_NET chooses by the plugin's name. Without it NCCL takes another network, in silence, if ours fails to start.
fn selected(net: Option<&OsStr>) -> Finding {
    const CHECK: &str = "NCCL_NET";
    match net.and_then(OsStr::to_str) {
        Some(name) if name.eq_ignore_ascii_case("freeflow") => {
            Finding::ok(CHECK, "FreeFlow: NCCL stops if the plugin does not start")
        }
        Some(name) if !name.is_empty() => Finding::bad(
            CHECK,
            format!("{name}: NCCL uses that network, and not FreeFlow"),
            "set NCCL_NET=FreeFlow, or unset it",
        ),
        _ => Finding::note(
            CHECK,
            "not set: if the plugin does not start, NCCL falls back to sockets in silence",
            "set NCCL_NET=FreeFlow to make that an error; NCCL_DEBUG=INFO shows a NET/FreeFlow line",
        ),
    }
}

/// Ranks of one host and one container talk through memory of NCCL's own, which is as it should be.
fn same_host() -> Option<Finding> {
    let off = |name: &str| std::env::var_os(name).is_some_and(|value| value == "1");
    (off("NCCL_SHM_DISABLE") && off("NCCL_P2P_DISABLE")).then(|| {
        Finding::note(
            "NCCL_SHM_DISABLE",
            "ranks of one container use FreeFlow, too, and not NCCL's own shared memory",
            "unset NCCL_SHM_DISABLE and NCCL_P2P_DISABLE unless this is a test",
        )
    })
}

#[cfg(test)]
mod tests {
    use super::super::Level;
    use super::*;

    #[test]
    fn names_are_tried_as_nccl_tries_them() {
        assert_eq!(candidates(OsStr::new("freeflow")), ["freeflow", "libnccl-net-freeflow.so"]);
        assert_eq!(candidates(OsStr::new("/x/y.so, b"))[..2], ["/x/y.so", "libnccl-net-/x/y.so.so"]);
    }

    #[test]
    fn what_does_not_load_says_why() {
        let finding = loads(OsStr::new("no-such-plugin"), "do something");
        assert_eq!(finding.level, Level::Bad);
        assert!(finding.found.contains("libnccl-net-no-such-plugin.so"), "{}", finding.found);
    }

    #[test]
    fn a_library_without_a_plugin_is_bad() {
        let finding = loads(OsStr::new("libc.so.6"), "do something");
        assert!(
            finding.level == Level::Bad && finding.found.contains("no network plugin"),
            "{}",
            finding.found
        );
    }

    #[test]
    fn another_network_is_bad() {
        let level = |net| selected(net).level;
        assert_eq!(level(Some(OsStr::new("FreeFlow"))), Level::Ok);
        assert_eq!(level(Some(OsStr::new("Socket"))), Level::Bad);
        assert_eq!(level(None), Level::Note);
    }
}
