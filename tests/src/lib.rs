//! Conformance suite and third-party clients as judges.
