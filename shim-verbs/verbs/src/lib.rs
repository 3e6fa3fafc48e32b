//! Drop-in libibverbs.so.1.
