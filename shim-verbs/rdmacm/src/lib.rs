//! Drop-in librdmacm.so.1.
