//! From a reference to a manifest and its tree's digest.

use lamina_image::{
    Digest, Document, MANIFEST_BYTES_MAX, Manifest, Platform, Process, TreeNames, media_type, parse_config,
};
use lamina_wire::{Client, Reference, Version};

use crate::NodeError;

/// An image that can be mounted.
#[derive(Clone, Debug)]
pub struct Found {
    /// Its manifest's digest.
    pub manifest: Digest,
    /// Its tree's digest.
    pub tree: Digest,
    /// What the tree's blob begins with, where that was said.
    pub names: Option<TreeNames>,
    /// Whether the manifest itself names the tree. Otherwise the registry said so.
    pub bound: bool,
    /// How many requests it took.
    pub requests: u32,
}

/// Finds an image and its tree. One request where the manifest names the tree, two where it is a referrer, and one
/// more where the reference is an index of several platforms.
pub async fn find_image(
    client: &Client,
    reference: &Reference,
    platform: &Platform,
    require_bound: bool,
) -> Result<Found, NodeError> {
    let (digest, manifest, requests) = find_manifest(client, reference, platform).await?;
    let wrong = |error| NodeError::Document { reference: reference.to_string(), error };
    if let Some(tree) = manifest.bound_tree().map_err(wrong)? {
        let names = TreeNames::noted_in(&manifest.annotations);
        return Ok(Found { manifest: digest, tree, names, bound: true, requests });
    }
    if require_bound {
        return Err(NodeError::NotBound(reference.to_string()));
    }
    let (tree, names) = referred_tree(client, reference, digest, &manifest).await?;
    Ok(Found { manifest: digest, tree, names, bound: false, requests: requests + 1 })
}

/// The manifest of an image, its digest, and how many requests it took: two where the reference is an index of several platforms.
pub(crate) async fn find_manifest(
    client: &Client,
    reference: &Reference,
    platform: &Platform,
) -> Result<(Digest, Manifest, u32), NodeError> {
    let repository = &reference.repository;
    let wrong = |error| NodeError::Document { reference: reference.to_string(), error };
    let mut fetched = client.manifest(repository, &reference.version).await?;
    let mut requests = 1;
    let mut document = Document::parse(&fetched.media_type, &fetched.bytes).map_err(wrong)?;
    if let Document::Index(index) = &document {
        let one = index.for_platform(platform).ok_or_else(|| NodeError::Platform {
            reference: reference.to_string(),
            platform: format!("{}/{}", platform.os, platform.architecture),
        })?;
        fetched = client.manifest(repository, &Version::Digest(one.digest)).await?;
        requests += 1;
        document = Document::parse(&fetched.media_type, &fetched.bytes).map_err(wrong)?;
    }
    let Document::Manifest(manifest) = document else {
        return Err(NodeError::NoTree {
            reference: reference.to_string(),
            why: ": it is an index in an index".into(),
        });
    };
    Ok((fetched.digest, manifest, requests))
}

/// How an image wants its programs run, as its config says. One request.
pub async fn image_process(
    client: &Client,
    reference: &Reference,
    manifest: &Manifest,
) -> Result<Process, NodeError> {
    if !manifest.is_image() {
        let kind = &manifest.config.media_type;
        return Err(NodeError::Request(format!("{reference} is an artifact of type {kind}")));
    }
    let bytes = client.blob(&reference.repository, manifest.config.digest, MANIFEST_BYTES_MAX as u64).await?;
    let wrong = |error| NodeError::Document { reference: reference.to_string(), error };
    let config = parse_config(manifest, &bytes).map_err(wrong)?;
    Ok(config.config.unwrap_or_default())
}

async fn referred_tree(
    client: &Client,
    reference: &Reference,
    digest: Digest,
    manifest: &Manifest,
) -> Result<(Digest, Option<TreeNames>), NodeError> {
    let referrers = client.referrers(&reference.repository, digest, media_type::TREE).await?;
    if let Some((hung, tree)) = referrers.iter().find_map(|one| Some((one, one.hung_tree()?))) {
        return Ok((tree, TreeNames::noted_in(&hung.annotations)));
    }
    let why = match manifest.is_image() {
        false => format!(": it is an artifact of type {}", manifest.config.media_type),
        true => match client.image_status(&reference.repository, digest).await {
            Ok(status) => format!(": {}", String::from_utf8_lossy(&status)),
            Err(error) if error.is_not_found() => {
                ", and its registry does not make any; push it there with `lamina push`".into()
            }
            Err(_) => String::new(),
        },
    };
    Err(NodeError::NoTree { reference: reference.to_string(), why })
}
