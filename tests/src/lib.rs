//! Kiln tests.
