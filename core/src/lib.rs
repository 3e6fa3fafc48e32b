//! The virtual RDMA NIC: verbs semantics over shared memory.
