//! Sources and manifests keep to the layers of docs/architecture.md.

#[test]
fn arrows_point_down_only() {
    let found = freeflow_tests::layers::violations(freeflow_tests::root()).expect("the sources can be read");
    assert!(found.is_empty(), "{}", found.join("\n"));
}
