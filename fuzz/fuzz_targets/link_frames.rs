//! Messages of another router: see `freeflow_router::link::hostile`.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| freeflow_router::link::hostile::frames(bytes));
