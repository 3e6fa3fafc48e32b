//! Linker options of the plugin.

fn main() {
    println!("cargo:rerun-if-changed=build.rs");
    println!("cargo:rustc-cdylib-link-arg=-Wl,-soname,libnccl-net-freeflow.so");
    // NCCL closes the library with the last communicator. Registered memory may still lie in files of ours then, whose
    // faults and forks are handled by code in here.
    println!("cargo:rustc-cdylib-link-arg=-Wl,-z,nodelete");
}
