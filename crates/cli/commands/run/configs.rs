//! How images want their programs run, as their registries last said. So an image that the node has can be run while nobody
//! answers, and one that has not changed a request sooner.
//!
//! One small JSON file a reference, and one a manifest: a digest never means anything else, whatever the tag means since. Every
//! file can be deleted; it is written again at the next run.

use std::path::Path;

use lamina_image::{Digest, Process};
use lamina_node::Remembered;
use lamina_wire::{Reference, Version};
use serde::{Deserialize, Serialize};

/// Where they are in a cache directory.
const CONFIGS: &str = "configs";
/// References and manifests that are remembered, some kilobytes each; the oldest are forgotten.
const CONFIGS_MAX: usize = 1024;
/// What a config says of programs is not kept where it is longer than this, in bytes.
const FILE_BYTES_MAX: u64 = 64 << 10;

/// The directory.
pub(super) struct Configs(Remembered);

/// What a reference meant.
#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Known {
    reference: String,
    /// The digest of its manifest.
    pub(super) manifest: String,
    pub(super) process: Process,
}

impl Configs {
    pub(super) fn of(cache: &Path) -> Self {
        Self(Remembered::new(cache.join(CONFIGS), CONFIGS_MAX, FILE_BYTES_MAX))
    }

    /// What a reference meant when it was last run. Blocks for one small read.
    pub(super) fn find(&self, reference: &Reference) -> Option<Known> {
        let reference = reference.to_string();
        let known: Known = self.0.find(&reference)?;
        Some(known).filter(|known| known.reference == reference)
    }

    /// Remembers it, under its digest as well. A failure costs a request later, and nothing else.
    pub(super) fn remember(&self, reference: &Reference, manifest: Digest, process: Process) -> Known {
        let pinned = Reference { version: Version::Digest(manifest), ..reference.clone() };
        let mut known = Known { reference: pinned.to_string(), manifest: manifest.to_string(), process };
        for name in [pinned.to_string(), reference.to_string()] {
            known.reference = name;
            if let Err(error) = self.0.write(&known.reference, &known) {
                tracing::debug!(reference = known.reference, %error, "its config cannot be remembered");
            }
        }
        known
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_remembered_is_found_and_what_is_damaged_is_unknown() {
        let cache = tempfile::tempdir().unwrap();
        let configs = Configs::of(cache.path());
        let reference: Reference = "localhost:5000/a:t".parse().unwrap();
        let other: Reference = "localhost:5000/a:u".parse().unwrap();
        assert_eq!(configs.find(&reference), None);
        let process = Process { cmd: vec!["x".into()], user: "app".into(), ..Process::default() };
        let manifest = Digest::of(b"manifest");
        let known = configs.remember(&reference, manifest, process);
        let pinned: Reference = format!("localhost:5000/a@{manifest}").parse().unwrap();
        assert_eq!(configs.find(&pinned).map(|found| found.process), Some(known.process.clone()));
        assert_eq!(configs.find(&reference), Some(known));
        assert_eq!(configs.find(&other), None);
        for damage in [&b""[..], b"{}", b"\xff"] {
            std::fs::write(configs.0.path(&reference.to_string()), damage).unwrap();
            assert_eq!(configs.find(&reference), None);
        }
    }

    #[test]
    fn a_config_that_is_too_long_is_not_kept() {
        let cache = tempfile::tempdir().unwrap();
        let configs = Configs::of(cache.path());
        let reference: Reference = "localhost:5000/a:t".parse().unwrap();
        let process = Process { cmd: vec!["x".repeat(100_000)], ..Process::default() };
        configs.remember(&reference, Digest::of(b"manifest"), process);
        assert_eq!(configs.find(&reference), None);
    }
}
