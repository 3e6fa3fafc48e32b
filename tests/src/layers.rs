//! The architecture's arrows, as two tables, and the reading that holds sources and manifests to them.
//!
//! A package may depend on those named with it, and a module of core on the modules named with it: one that is not in
//! a table fails, so that a new one has to be given its place.

use std::collections::BTreeSet;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

/// The workspace's packages, their folders, and the packages of the workspace that each may depend on.
pub const PACKAGES: [(&str, &str, &[&str]); 13] = [
    ("freeflow-core", "core", &[]),
    ("freeflow-verbs-abi", "shim-verbs/abi", &[]),
    ("freeflow-verbs", "shim-verbs/verbs", &["freeflow-core", "freeflow-verbs-abi"]),
    ("freeflow-rdmacm", "shim-verbs/rdmacm", &["freeflow-core", "freeflow-verbs-abi"]),
    ("freeflow-nccl-abi", "plugins/nccl-net/abi", &[]),
    ("freeflow-nccl-net", "plugins/nccl-net", &["freeflow-core", "freeflow-nccl-abi"]),
    ("freeflow-router", "router", &["freeflow-core"]),
    ("freeflow-ucx", "plugins/ucx-tl", &["freeflow-core"]),
    ("freeflow-ucx-preload", "plugins/ucx-preload", &[]),
    ("freeflow-examples", "examples", &["freeflow-core", "freeflow-verbs-abi"]),
    (
        "freeflow-tests",
        "tests",
        &["freeflow-core", "freeflow-verbs-abi", "freeflow-nccl-abi", "freeflow-router"],
    ),
    ("freeflow-benches", "benches", &["freeflow-core", "freeflow-verbs-abi", "freeflow-router"]),
    ("xtask", "xtask", &[]),
];

/// Core's modules, top first, and the modules of core that each may name.
pub const MODULES: [(&str, &[&str]); 8] = [
    ("client", &["exec", "ring", "ctl", "shm", "verbs", "error", "sync"]),
    ("exec", &["ring", "ctl", "shm", "verbs", "error", "sync"]),
    ("ctl", &["verbs", "error", "sync"]),
    ("shm", &["ring", "verbs", "error", "sync"]),
    ("ring", &["verbs", "error", "sync"]),
    ("verbs", &["error"]),
    ("error", &[]),
    ("sync", &[]),
];

/// Everything in `root` that goes against the tables, one sentence each.
pub fn violations(root: &Path) -> io::Result<Vec<String>> {
    let mut found = package_violations(root)?;
    found.extend(module_violations(&root.join("core/src"))?);
    Ok(found)
}

// ---- packages -----------------------------------------------------------------------------------------------------

fn package_violations(root: &Path) -> io::Result<Vec<String>> {
    let mut found = Vec::new();
    for member in members(root)? {
        let Some((name, _, allowed)) = PACKAGES.iter().find(|(_, folder, _)| *folder == member) else {
            found.push(format!("{member} has no place in tests/src/layers.rs"));
            continue;
        };
        let manifest = manifest(&root.join(&member))?;
        let wanted = dependencies(&manifest);
        let ours = wanted.iter().filter(|dep| PACKAGES.iter().any(|(package, _, _)| package == *dep));
        found.extend(
            ours.filter(|dep| !allowed.contains(&dep.as_str()))
                .map(|dep| format!("package {name} depends on {dep}, which its layer may not")),
        );
    }
    Ok(found)
}

fn manifest(folder: &Path) -> io::Result<toml::Table> {
    let path = folder.join("Cargo.toml");
    let text = fs::read_to_string(&path)?;
    text.parse().map_err(|e| io::Error::other(format!("{}: {e}", path.display())))
}

fn members(root: &Path) -> io::Result<Vec<String>> {
    let workspace = manifest(root)?;
    let members = workspace.get("workspace").and_then(|w| w.get("members")).and_then(toml::Value::as_array);
    let members = members.ok_or_else(|| io::Error::other("the workspace has no members"))?;
    Ok(members.iter().filter_map(toml::Value::as_str).map(str::to_owned).collect())
}

/// Names under every `dependencies` and `build-dependencies` table, of targets too; tests may look anywhere.
fn dependencies(manifest: &toml::Table) -> BTreeSet<String> {
    let mut names = BTreeSet::new();
    for (key, value) in manifest {
        let Some(table) = value.as_table() else { continue };
        if key == "dependencies" || key == "build-dependencies" {
            names.extend(table.iter().map(|(name, dep)| real_name(name, dep)));
        } else if key == "target" {
            names.extend(table.values().filter_map(toml::Value::as_table).flat_map(dependencies));
        }
    }
    names
}

/// `x = { package = "y" }` is a dependency on y.
fn real_name(name: &str, dep: &toml::Value) -> String {
    dep.get("package").and_then(toml::Value::as_str).unwrap_or(name).to_owned()
}

// ---- modules of core ----------------------------------------------------------------------------------------------

fn module_violations(src: &Path) -> io::Result<Vec<String>> {
    let mut found = Vec::new();
    for file in rust_files(src)? {
        let relative = file.strip_prefix(src).unwrap_or(&file).to_owned();
        let module = module_of(&relative);
        if module == "lib" {
            continue;
        }
        let Some((_, allowed)) = MODULES.iter().find(|(name, _)| *name == module) else {
            found.push(format!("core's module {module} has no place in tests/src/layers.rs"));
            continue;
        };
        let text = fs::read_to_string(&file)?;
        let depth = relative.components().count();
        found.extend(
            named_modules(&text, depth)
                .into_iter()
                .filter(|other| *other != module && !allowed.contains(&other.as_str()))
                .map(|other| {
                    format!("core/src/{}: {module} names {other}, which is not below it", relative.display())
                }),
        );
    }
    Ok(found)
}

fn module_of(relative: &Path) -> String {
    let first = relative.components().next().map(|c| c.as_os_str().to_string_lossy().into_owned());
    first.unwrap_or_default().trim_end_matches(".rs").to_owned()
}

fn rust_files(dir: &Path) -> io::Result<Vec<PathBuf>> {
    let mut files = Vec::new();
    for entry in fs::read_dir(dir)? {
        let path = entry?.path();
        if path.is_dir() {
            files.extend(rust_files(&path)?);
        } else if path.extension().is_some_and(|e| e == "rs") {
            files.push(path);
        }
    }
    files.sort();
    Ok(files)
}

/// Modules of the crate that a source names: after `crate::`, in a `crate::{..}` list, or after enough `super::`.
fn named_modules(text: &str, depth: usize) -> BTreeSet<String> {
    let code: String = text.lines().map(without_comment).collect::<Vec<_>>().join(" ");
    let mut names = BTreeSet::new();
    let up = "super::".repeat(depth);
    for prefix in ["crate::", up.as_str()] {
        for (at, _) in code.match_indices(prefix) {
            let rest = &code[at + prefix.len()..];
            match rest.strip_prefix('{') {
                Some(list) => names.extend(top_level_names(list)),
                None => names.extend([first_name(rest)]),
            }
        }
    }
    names.retain(|name| {
        !name.is_empty() && name.chars().next().is_some_and(|c| c.is_lowercase()) && name != "super"
    });
    names
}

fn without_comment(line: &str) -> &str {
    line.split("//").next().unwrap_or_default()
}

fn first_name(text: &str) -> String {
    text.trim_start().chars().take_while(|c| c.is_alphanumeric() || *c == '_').collect()
}

/// The first name of each item in `a::b, c::{d, e}, f}`.
fn top_level_names(list: &str) -> Vec<String> {
    let mut depth = 0;
    let mut names = vec![first_name(list)];
    for (at, c) in list.char_indices() {
        match c {
            '{' => depth += 1,
            '}' if depth == 0 => break,
            '}' => depth -= 1,
            ',' if depth == 0 => names.push(first_name(&list[at + 1..])),
            _ => {}
        }
    }
    names
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(text: &str, depth: usize) -> Vec<String> {
        named_modules(text, depth).into_iter().collect()
    }

    #[test]
    fn every_way_to_name_a_module_is_read() {
        assert_eq!(names("use crate::ring::mr::Entry; let x = crate::shm::map();", 1), ["ring", "shm"]);
        assert_eq!(names("use crate::{ctl::{a, b}, exec,\n    verbs::C};", 1), ["ctl", "exec", "verbs"]);
        assert_eq!(names("use super::super::client::x; use super::own;", 2), ["client"]);
        assert_eq!(names("// crate::client is above\nuse crate::Error;", 1), Vec::<String>::new());
    }

    #[test]
    fn a_dependency_is_found_wherever_it_is_declared() {
        let manifest = "[dependencies]\na.workspace = true\nb = { package = \"c\", path = \"x\" }\n\
                        [target.'cfg(loom)'.build-dependencies]\nd = \"1\"\n[dev-dependencies]\ne = \"1\"\n";
        let found = dependencies(&manifest.parse().expect("valid TOML"));
        assert_eq!(found.into_iter().collect::<Vec<_>>(), ["a", "c", "d"]);
    }

    #[test]
    fn modules_only_look_down() {
        for (at, (name, below)) in MODULES.iter().enumerate() {
            for other in *below {
                let place = MODULES.iter().position(|(m, _)| m == other);
                assert!(place.is_some_and(|p| p > at), "{name} may name {other}, which is not below it");
            }
        }
    }
}
