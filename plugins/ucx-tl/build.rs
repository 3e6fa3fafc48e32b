//! UCX unloads nothing, but a program may unload UCX: what UCX's lists point to must stay, and so must our helper thread's code.

fn main() {
    println!("cargo::rerun-if-changed=build.rs");
    println!("cargo::rustc-cdylib-link-arg=-Wl,-soname,libuct_ff.so.0");
    println!("cargo::rustc-cdylib-link-arg=-Wl,-z,nodelete");
}
