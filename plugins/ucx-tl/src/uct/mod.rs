//! UCX's transport interface as plain Rust: types that never moved, tables of what did, and the symbols of the UCX that
//! loaded us. Knows nothing of FreeFlow.

pub mod abi;
pub mod symbols;
pub mod types;
