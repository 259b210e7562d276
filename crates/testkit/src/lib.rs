//! What tests and benches stand on, and nothing that ships.
//!
//! - [`image`]: container images described in code, written as OCI layouts;
//! - [`noise()`]: contents that do not compress;
//! - [`library`]: ELF libraries described in code;
//! - [`link`]: two network namespaces with a link of a set rate and delay between them;
//! - [`compare`]: every difference between two directory trees;
//! - [`s3`]: a real S3 server over a directory;
//! - [`process`] and [`mounts`]: children and mounts that do not outlive their test.
//!
//! Everything that touches a kernel needs root. Nothing here uses a network but the one it made.

pub mod compare;
pub mod image;
pub mod library;
pub mod link;
pub mod mounts;
mod noise;
pub mod process;
pub mod s3;

pub use noise::noise;
