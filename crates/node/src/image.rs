//! From a reference to a manifest and its tree's digest.

use lamina_image::{
    BOOT_BYTES_MAX, BOOT_HEAD_BYTES, BootPack, CommandKey, Descriptor, Digest, Document, MANIFEST_BYTES_MAX,
    Manifest, Platform, Process, TREE_ANNOTATION, TreeNames, media_type, parse_config,
};
use lamina_wire::{Client, Fetched, PartStream, Prelude, Reference, Version, WireError};

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

/// Which image is wanted, and what for.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Wish<'a> {
    /// Which of those in an index.
    pub(crate) platform: &'a Platform,
    /// Only one whose manifest itself names the tree.
    pub(crate) require_bound: bool,
    /// Whether it is to start now, and was never seen here under that name: then also what its mount begins with, if the registry gives that.
    pub(crate) start: bool,
    /// The command that starts, if that is known.
    pub(crate) command: Option<&'a CommandKey>,
}

/// What the beginning of a mount is made of, and comes already.
pub(crate) struct Begun {
    base: String,
    /// The names of the tree.
    pub(crate) names: Option<PartStream>,
    boot: Option<(Descriptor, PartStream)>,
}

/// A boot pack that comes already, behind the names of the tree.
pub(crate) struct BegunBoot {
    /// Who sends it, as [`Client::base`] has it.
    pub(crate) base: String,
    /// What they say of it, as of an artifact.
    pub(crate) said: Descriptor,
    pub(crate) bytes: PartStream,
}

impl Begun {
    /// The boot pack, once, if one comes.
    pub(crate) fn take_boot(&mut self) -> Option<BegunBoot> {
        let (said, bytes) = self.boot.take()?;
        Some(BegunBoot { base: self.base.clone(), said, bytes })
    }
}

impl std::fmt::Debug for Begun {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let boot = self.boot.as_ref().map(|(boot, _)| boot);
        f.debug_struct("Begun").field("names", &self.names.is_some()).field("boot", &boot).finish()
    }
}

/// Finds an image and its tree. One request where the manifest names the tree, two where it is a referrer, and one
/// more where the reference is an index of several platforms.
pub async fn find_image(
    client: &Client,
    reference: &Reference,
    platform: &Platform,
    require_bound: bool,
) -> Result<Found, NodeError> {
    let wish = Wish { platform, require_bound, start: false, command: None };
    Ok(find_begun(client, reference, wish).await?.0)
}

/// The same, and what comes of it already: one request where it says which tree the image has, whoever else says so.
pub(crate) async fn find_begun(
    client: &Client,
    reference: &Reference,
    wish: Wish<'_>,
) -> Result<(Found, Option<Begun>), NodeError> {
    let (digest, manifest, requests, prelude) = find_with_prelude(client, reference, wish).await?;
    let wrong = |error| NodeError::Document { reference: reference.to_string(), error };
    let parts = prelude.map(|prelude| prelude.split([media_type::TREE, media_type::BOOT]));
    let [mut names_part, boot] = parts.unwrap_or_default();
    // what is of another length than is said of it would not be read to its end, and what cannot be not at all
    names_part
        .take_if(|(part, _)| TreeNames::noted_in(&part.annotations).is_none_or(|it| it.bytes != part.size));
    let boot = boot.filter(|(part, _)| {
        let said = BootPack::named_by(&part.annotations).is_some_and(|it| it.bytes == part.size);
        said && (BOOT_HEAD_BYTES as u64..=BOOT_BYTES_MAX).contains(&part.size)
    });
    let begun = |names: Option<(Descriptor, PartStream)>, tree: Digest| {
        let names =
            names.filter(|(part, _)| part.annotations.get(TREE_ANNOTATION) == Some(&tree.to_string()));
        let names = names.map(|(_, names)| names);
        let is_any = names.is_some() || boot.is_some();
        is_any.then(|| Begun { base: client.base().to_owned(), names, boot })
    };
    if let Some(tree) = manifest.bound_tree().map_err(wrong)? {
        let names = TreeNames::noted_in(&manifest.annotations);
        let found = Found { manifest: digest, tree, names, bound: true, requests };
        return Ok((found, begun(names_part.take(), tree)));
    }
    if wish.require_bound {
        return Err(NodeError::NotBound(reference.to_string()));
    }
    // what hangs on it is the registry's word, and so is this
    let said = names_part.as_ref().and_then(|(part, _)| {
        Some((part.annotations.get(TREE_ANNOTATION)?.parse().ok()?, TreeNames::noted_in(&part.annotations)?))
    });
    if let Some((tree, names)) = said {
        let found = Found { manifest: digest, tree, names: Some(names), bound: false, requests };
        return Ok((found, begun(names_part.take(), tree)));
    }
    let (tree, names) = referred_tree(client, reference, digest, &manifest).await?;
    let found = Found { manifest: digest, tree, names, bound: false, requests: requests + 1 };
    Ok((found, begun(None, tree)))
}

/// The manifest of an image, its digest, and how many requests it took: two where the reference is an index of several platforms.
pub(crate) async fn find_manifest(
    client: &Client,
    reference: &Reference,
    platform: &Platform,
) -> Result<(Digest, Manifest, u32), NodeError> {
    let wish = Wish { platform, require_bound: false, start: false, command: None };
    let (digest, manifest, requests, _) = find_with_prelude(client, reference, wish).await?;
    Ok((digest, manifest, requests))
}

/// The same with what comes behind the manifest.
async fn find_with_prelude(
    client: &Client,
    reference: &Reference,
    wish: Wish<'_>,
) -> Result<(Digest, Manifest, u32, Option<Prelude>), NodeError> {
    let wrong = |error| NodeError::Document { reference: reference.to_string(), error };
    let (mut fetched, mut prelude) = fetch_document(client, reference, &reference.version, wish).await?;
    let mut requests = 1;
    let mut document = Document::parse(&fetched.media_type, &fetched.bytes).map_err(wrong)?;
    if let Document::Index(index) = &document {
        let platform = wish.platform;
        let one = index.for_platform(platform).ok_or_else(|| NodeError::Platform {
            reference: reference.to_string(),
            platform: format!("{}/{}", platform.os, platform.architecture),
        })?;
        (fetched, prelude) = fetch_document(client, reference, &Version::Digest(one.digest), wish).await?;
        requests += 1;
        document = Document::parse(&fetched.media_type, &fetched.bytes).map_err(wrong)?;
    }
    let Document::Manifest(manifest) = document else {
        return Err(NodeError::NoTree {
            reference: reference.to_string(),
            why: ": it is an index in an index".into(),
        });
    };
    Ok((fetched.digest, manifest, requests, prelude))
}

/// One document, and what comes with it.
async fn fetch_document(
    client: &Client,
    reference: &Reference,
    version: &Version,
    wish: Wish<'_>,
) -> Result<(Fetched, Option<Prelude>), WireError> {
    match wish.start {
        true => client.prelude(&reference.repository, version, wish.command).await,
        false => Ok((client.manifest(&reference.repository, version).await?, None)),
    }
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
