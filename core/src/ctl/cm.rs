//! Messages of the connection manager (librdmacm's front door).
