//! How images want their programs run, as whoever has an image last said: its mirrors, or its registry. So an image that the node
//! has can be run while nobody answers, and one that has not changed a request sooner.
//!
//! One small JSON file a reference, and one a manifest: a digest never means anything else, whatever the tag means since. Every
//! file can be deleted; it is written again when it is asked for.

use std::path::Path;

use lamina_image::{Digest, Platform, Process};
use lamina_wire::proto::{ProcessRequest, ProcessResponse};
use lamina_wire::{Client, Reference, Version};
use serde::{Deserialize, Serialize};

use crate::image::{find_manifest, image_process};
use crate::remembered::Remembered;
use crate::resolve::within;
use crate::{Node, NodeError};

/// Where they are in a cache directory.
const CONFIGS: &str = "configs";
/// References and manifests that are remembered, some kilobytes each; the oldest are forgotten.
const CONFIGS_MAX: usize = 1024;
/// What a config says of programs is not kept where it is longer than this, in bytes.
const FILE_BYTES_MAX: u64 = 64 << 10;

/// The directory.
#[derive(Clone, Debug)]
struct Configs(Remembered);

/// What a reference meant.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Known {
    reference: String,
    /// The digest of its manifest.
    manifest: String,
    process: Process,
}

impl From<Known> for ProcessResponse {
    fn from(known: Known) -> Self {
        let Process { env, entrypoint, cmd, working_dir, user } = known.process;
        Self { manifest: known.manifest, env, entrypoint, cmd, working_dir, user }
    }
}

impl Node {
    /// What an image wants its programs to be. As it was when last asked, where nobody answers.
    pub async fn process(&self, request: ProcessRequest) -> Result<ProcessResponse, NodeError> {
        let reference: Reference = request.reference.parse()?;
        let sources = self.hosts.sources(&reference, request.plain_http)?;
        let configs = Configs::of(&self.config.cache.directory);
        let before = configs.find(&reference);
        if let (Version::Digest(_), Some(known)) = (&reference.version, &before) {
            return Ok(known.clone().into());
        }
        let (platform, named) = (&self.config.platform, &reference);
        let known = before.as_ref();
        let ask = |client| async move { find(&client, named, platform, known).await };
        let asked = sources.ask(within(self.config.cache.deadline, before.is_some()), ask).await;
        match (asked, before) {
            (Ok((manifest, _)), Some(known)) if known.manifest == manifest.to_string() => Ok(known.into()),
            (Ok((manifest, process)), _) => Ok(configs.remember(&reference, manifest, process).into()),
            (Err(NodeError::Wire(error)), Some(known)) if error.is_passing() => Ok(known.into()),
            (Err(error), _) => Err(error),
        }
    }
}

/// What the image's config says. One request where it means what it did before, two otherwise, and one more of an index.
async fn find(
    client: &Client,
    reference: &Reference,
    platform: &Platform,
    before: Option<&Known>,
) -> Result<(Digest, Process), NodeError> {
    let (digest, manifest, _) = find_manifest(client, reference, platform).await?;
    if let Some(known) = before.filter(|known| known.manifest == digest.to_string()) {
        return Ok((digest, known.process.clone()));
    }
    Ok((digest, image_process(client, reference, &manifest).await?))
}

impl Configs {
    fn of(cache: &Path) -> Self {
        Self(Remembered::new(cache.join(CONFIGS), CONFIGS_MAX, FILE_BYTES_MAX))
    }

    /// What a reference meant when it was last asked for. Blocks for one small read.
    fn find(&self, reference: &Reference) -> Option<Known> {
        let reference = reference.to_string();
        let known: Known = self.0.find(&reference)?;
        Some(known).filter(|known| known.reference == reference)
    }

    /// Remembers it, under its digest as well. A failure costs a request later, and nothing else.
    fn remember(&self, reference: &Reference, manifest: Digest, process: Process) -> Known {
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
