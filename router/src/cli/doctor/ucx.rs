//! Would UCX find our transport, and use it? Its variables tell.

use std::path::Path;

use super::Finding;

const CHECK: &str = "ucx";

pub fn check(libraries: &Path, variable: impl Fn(&str) -> Option<String>) -> Vec<Finding> {
    vec![found_by_new(libraries, &variable), found_by_old(libraries, &variable), chosen(&variable)]
}

/// UCX 1.22 and later scans directories.
fn found_by_new(libraries: &Path, variable: &impl Fn(&str) -> Option<String>) -> Finding {
    let ours = libraries.join("ucx");
    let path = variable("UCX_PLUGIN_PATH").unwrap_or_default();
    if path.split(':').any(|dir| Path::new(dir) == ours) {
        return Finding::ok(CHECK, format!("UCX_PLUGIN_PATH has {}", ours.display()));
    }
    Finding::note(
        CHECK,
        format!("UCX_PLUGIN_PATH does not have {}: UCX 1.22 and later will not find ff", ours.display()),
        "start programs with freeflow run, or with the flags of freeflow container add",
    )
}

/// Older ones are helped by a library to preload.
fn found_by_old(libraries: &Path, variable: &impl Fn(&str) -> Option<String>) -> Finding {
    let library = libraries.join("ucx/libucx-ff-preload.so");
    let preload = variable("LD_PRELOAD").unwrap_or_default();
    let preloaded = preload.split([':', ' ']).any(|name| Path::new(name) == library);
    if preloaded && variable("UCX_MODULE_DIR").is_some_and(|dir| !dir.is_empty()) {
        return Finding::ok(CHECK, "LD_PRELOAD and UCX_MODULE_DIR lead UCX before 1.22 to ff");
    }
    Finding::note(
        CHECK,
        format!("UCX before 1.22 needs {} in LD_PRELOAD, and UCX_MODULE_DIR", library.display()),
        "start programs with freeflow run, or with the flags of freeflow container add",
    )
}

/// UCX_TLS is a list of what may be used, or with ^ of what may not.
fn chosen(variable: &impl Fn(&str) -> Option<String>) -> Finding {
    let Some(list) = variable("UCX_TLS").filter(|list| !list.is_empty()) else {
        return Finding::ok(CHECK, "UCX_TLS is not set: UCX takes the fastest of all, ff among them");
    };
    let (excludes, names) = list.strip_prefix('^').map_or((false, list.as_str()), |names| (true, names));
    let named = names
        .split(',')
        .any(|name| matches!(name.trim_start_matches('\\'), "ff" | "all") && !excludes || name == "ff");
    if named != excludes {
        return Finding::ok(CHECK, format!("UCX_TLS={list} lets UCX use ff"));
    }
    Finding::bad(CHECK, format!("UCX_TLS={list} leaves ff out"), "set UCX_TLS=ff,self, or add ff to the list")
}

#[cfg(test)]
mod tests {
    use super::super::Level;
    use super::*;

    #[test]
    fn a_list_without_us_is_bad() {
        let level = |list: &'static str| chosen(&|_: &str| Some(list.to_owned())).level;
        for good in ["ff,self", "tcp,ff", "all", "^tcp", ""] {
            assert_eq!(level(good), Level::Ok, "{good}");
        }
        for bad in ["tcp,self", "^ff", "ffx"] {
            assert_eq!(level(bad), Level::Bad, "{bad}");
        }
    }

    #[test]
    fn what_freeflow_run_sets_is_fine() {
        let set = |name: &str| {
            Some(match name {
                "UCX_PLUGIN_PATH" => "/l/ucx:/other".to_owned(),
                "UCX_MODULE_DIR" => "/l/ucx".to_owned(),
                "LD_PRELOAD" => "/l/libibverbs.so.1:/l/ucx/libucx-ff-preload.so".to_owned(),
                _ => return None,
            })
        };
        assert!(check(Path::new("/l"), set).iter().all(|finding| finding.level == Level::Ok));
        assert!(check(Path::new("/l"), |_| None).iter().any(|finding| finding.level == Level::Note));
    }
}
