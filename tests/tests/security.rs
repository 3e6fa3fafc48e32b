//! docs/security.md promises nothing that no test holds.

#[test]
fn every_promise_has_its_tests() {
    let broken = freeflow_tests::security::broken(freeflow_tests::root()).expect("the sources can be read");
    assert!(broken.is_empty(), "docs/security.md names tests that are not there: {broken:?}");
}
