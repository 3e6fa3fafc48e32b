//! The verbs conformance suite over every path there is on one host.

fn main() -> std::process::ExitCode {
    freeflow_tests::suite::main()
}
