//! Fixtures, the shaped link, fault wrappers; for tests and benches only.
