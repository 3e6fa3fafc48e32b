//! C types and constants of libibverbs and librdmacm.
