//! What a check has found.

use serde::Serialize;

/// What is wrong with an object.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Wrong {
    /// Its bytes are not those that its name says.
    Bytes,
    /// Something names it, and it is not there.
    Missing,
    /// It is a record and does not parse.
    Record,
    /// It contradicts what it names.
    Contents,
}

/// One thing that is damaged.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Damage {
    /// The object's key.
    pub key: String,
    /// What is wrong.
    pub wrong: Wrong,
    /// The same in words.
    pub reason: String,
    /// The images that need it, as `repository:tag`, or `repository@digest` where no tag leads to them.
    pub images: Vec<String>,
    /// What can be done about it, or was.
    pub remedy: String,
    /// It was made good.
    pub repaired: bool,
}

/// What a check has found.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct FsckReport {
    /// Blobs that were hashed.
    pub blobs: u64,
    /// Their bytes.
    pub bytes: u64,
    /// Records that were read.
    pub records: u64,
    /// Manifests in repositories.
    pub manifests: u64,
    /// Blobs that nothing names. They do no harm, and are collected.
    pub garbage_blobs: u64,
    /// Their bytes.
    pub garbage_bytes: u64,
    /// What is damaged.
    pub damaged: Vec<Damage>,
}

impl FsckReport {
    /// What is damaged and was not made good.
    pub fn left(&self) -> usize {
        self.damaged.iter().filter(|damage| !damage.repaired).count()
    }
}
