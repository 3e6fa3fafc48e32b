#!/bin/sh
# Makes src/bindings.rs from Debian's rdma-core 44 headers (libibverbs-dev, librdmacm-dev, libclang) with bindgen-cli 0.73.
set -eu
cd "$(dirname "$0")"
bindgen wrapper.h --output src/bindings.rs \
    --rust-target 1.85 --rust-edition 2024 --use-core --ctypes-prefix libc \
    --generate types,vars --default-enum-style consts --default-non-copy-union-style manually_drop --no-prepend-enum-name --no-doc-comments \
    --no-recursive-allowlist \
    --allowlist-type '(ibv|_ibv|_compat_ibv|verbs_context|verbs_ex_private|rdma)_?.*' \
    --allowlist-type '__be(16|32|64)|__u(8|16|32|64)|ib_uverbs_(qp_attr|ah_attr|global_route|access_flags|advise_mr_advice|advise_mr_flag|query_port_flags|flow_action_esp.*)|ib_user_path_rec' \
    --allowlist-type 'verbs_context|verbs_ex_private' \
    --allowlist-var '(IBV|IB_UVERBS_ACCESS|IB_UVERBS_ADVISE|IB_UVERBS_QPF|RDMA|RAI)_.*' \
    --raw-line '// Made by shim-verbs/abi/regenerate.sh; do not edit.' \
    --raw-line 'use libc::{pthread_cond_t, pthread_mutex_t, sockaddr, sockaddr_in, sockaddr_in6, sockaddr_storage, socklen_t, timespec};'
cargo fmt -p freeflow-verbs-abi
