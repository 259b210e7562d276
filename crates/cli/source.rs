//! Where an image comes from: layouts, archives, registries, root file systems.
//!
//! Every kind answers the same questions: what are the documents, and what are the bytes of layer N.

mod archive;
mod layout;
mod remote;
mod rootfs;

use std::io::Read;
use std::path::PathBuf;
use std::str::FromStr;

use anyhow::{Context, Result, bail};
use lamina_image::{Descriptor, Digest, Document, ImageConfig, Manifest, Platform, media_type, parse_config};
use lamina_wire::{ClientConfig, Reference};

pub(crate) use remote::Remote;

/// What `SOURCE` says, before anything is opened.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum SourceName {
    /// `oci:DIR[:tag]`
    Layout(PathBuf, Option<String>),
    /// `oci-archive:FILE[:tag]`
    LayoutArchive(PathBuf, Option<String>),
    /// `docker-archive:FILE[:name:tag]`
    DockerArchive(PathBuf, Option<String>),
    /// `docker://REF`
    Registry(Reference),
    /// `dir:ROOTFS`
    Rootfs(PathBuf),
}

impl FromStr for SourceName {
    type Err = anyhow::Error;

    fn from_str(text: &str) -> Result<Self> {
        let (kind, rest) = text.split_once(':').unwrap_or((text, ""));
        let path_and_tag = || match rest.split_once(':') {
            Some((path, tag)) => (PathBuf::from(path), Some(tag.to_owned())),
            None => (PathBuf::from(rest), None),
        };
        if rest.is_empty() {
            bail!(
                "{text:?} is not a source; write oci:DIR[:tag], oci-archive:FILE, docker-archive:FILE, docker://REF or dir:ROOTFS"
            );
        }
        Ok(match kind {
            "oci" => {
                let (path, tag) = path_and_tag();
                Self::Layout(path, tag)
            }
            "oci-archive" => {
                let (path, tag) = path_and_tag();
                Self::LayoutArchive(path, tag)
            }
            "docker-archive" => {
                let (path, tag) = path_and_tag();
                Self::DockerArchive(path, tag)
            }
            "docker" => Self::Registry(rest.trim_start_matches("//").parse()?),
            "dir" => Self::Rootfs(PathBuf::from(rest)),
            other => bail!(
                "{other:?} is not a kind of source; there are oci, oci-archive, docker-archive, docker and dir"
            ),
        })
    }
}

/// One layer of a source.
#[derive(Clone, Debug)]
pub(crate) struct SourceLayer {
    /// As the source's manifest has it, where it has one.
    pub(crate) descriptor: Option<Descriptor>,
    /// As the config has it; `None` where the layer is only being made.
    pub(crate) diff_id: Option<Digest>,
    /// Its length in bytes as it is read, where that is known.
    pub(crate) len: Option<u64>,
}

/// The documents of one image.
#[derive(Clone, Debug)]
pub(crate) struct SourceImage {
    /// The manifest as it is, with its media type; `None` where the source has none worth keeping.
    pub(crate) manifest: Option<(String, Vec<u8>, Manifest)>,
    /// The config as it is; `None` where it is only being made.
    pub(crate) config: Option<Vec<u8>>,
    /// Lowest first.
    pub(crate) layers: Vec<SourceLayer>,
}

/// An opened source.
pub(crate) trait Source: Send + Sync {
    /// The documents.
    fn image(&self) -> &SourceImage;

    /// The bytes of one layer, compressed or not. May be called again.
    fn layer(&self, number: usize) -> Result<Box<dyn Read + Send>>;
}

/// Opens a source and reads its documents. Blocks.
pub(crate) fn open(name: &SourceName, platform: &Platform, client: ClientConfig) -> Result<Box<dyn Source>> {
    Ok(match name {
        SourceName::Layout(path, tag) => {
            Box::new(layout::Layout::open(layout::Directory::new(path)?, tag.as_deref(), platform)?)
        }
        SourceName::LayoutArchive(path, tag) => {
            Box::new(layout::Layout::open(archive::Archive::open(path)?, tag.as_deref(), platform)?)
        }
        SourceName::DockerArchive(path, tag) => Box::new(archive::DockerArchive::open(path, tag.as_deref())?),
        SourceName::Registry(reference) => Box::new(Remote::open(reference, platform, client)?),
        SourceName::Rootfs(path) => Box::new(rootfs::Rootfs::open(path, platform)?),
    })
}

/// The platform that this binary runs on, as images name it.
pub(crate) fn host_platform() -> Platform {
    let architecture = match std::env::consts::ARCH {
        "x86_64" => "amd64",
        "aarch64" => "arm64",
        other => other,
    };
    Platform { architecture: architecture.into(), os: "linux".into(), variant: None }
}

/// A document's media type and bytes.
type MediaTypeAndBytes = (String, Vec<u8>);

/// Finds the image in what a tag names: itself, or the one of an index that fits the platform.
fn resolve(
    what: &str,
    media_type: &str,
    bytes: Vec<u8>,
    platform: &Platform,
    fetch: &mut dyn FnMut(&Descriptor) -> Result<MediaTypeAndBytes>,
) -> Result<(String, Vec<u8>, Manifest)> {
    match Document::parse(media_type, &bytes).with_context(|| format!("{what}: its manifest"))? {
        Document::Manifest(manifest) => Ok((media_type.to_owned(), bytes, manifest)),
        Document::Index(index) => {
            let one = index.for_platform(platform).with_context(|| {
                format!("{what} has no image for {}/{}; see --platform", platform.os, platform.architecture)
            })?;
            let (media_type, bytes) = fetch(one)?;
            match Document::parse(&media_type, &bytes).with_context(|| format!("{what}: {}", one.digest))? {
                Document::Manifest(manifest) => Ok((media_type, bytes, manifest)),
                Document::Index(_) => bail!("{what}: an index in an index is not an image"),
            }
        }
    }
}

/// Puts documents together, after checking that they belong together.
fn image_of(what: &str, manifest: (String, Vec<u8>, Manifest), config: Vec<u8>) -> Result<SourceImage> {
    if !manifest.2.is_image() {
        bail!("{what} is an artifact of type {}, not a container image", manifest.2.config.media_type);
    }
    if Digest::of(&config) != manifest.2.config.digest {
        bail!("{what}: its config is not {}, as the manifest says", manifest.2.config.digest);
    }
    let parsed: ImageConfig =
        parse_config(&manifest.2, &config).with_context(|| format!("{what}: its config"))?;
    let layers = manifest.2.layers.iter().zip(&parsed.rootfs.diff_ids);
    let layers = layers.map(|(descriptor, diff_id)| SourceLayer {
        descriptor: Some(descriptor.clone()),
        diff_id: Some(*diff_id),
        len: Some(descriptor.size),
    });
    let layers = layers.collect();
    Ok(SourceImage { manifest: Some(manifest), config: Some(config), layers })
}

/// The media type of a manifest whose descriptor does not say it.
fn sniff_media_type(bytes: &[u8]) -> String {
    #[derive(serde::Deserialize)]
    #[serde(rename_all = "camelCase")]
    struct Said {
        media_type: Option<String>,
        manifests: Option<serde_json::Value>,
    }
    let said: Option<Said> = serde_json::from_slice(bytes).ok();
    match said {
        Some(Said { media_type: Some(said), .. }) => said,
        Some(Said { manifests: Some(_), .. }) => media_type::OCI_INDEX.into(),
        _ => media_type::OCI_MANIFEST.into(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sources_are_read_as_skopeo_writes_them() {
        let tag = Some("t".to_owned());
        for (text, expected) in [
            ("oci:/a/b:t", SourceName::Layout("/a/b".into(), tag.clone())),
            ("oci:b", SourceName::Layout("b".into(), None)),
            ("oci-archive:a.tar:t", SourceName::LayoutArchive("a.tar".into(), tag.clone())),
            ("docker-archive:a.tar:n:t", SourceName::DockerArchive("a.tar".into(), Some("n:t".into()))),
            ("docker://r.example/a:t", SourceName::Registry("r.example/a:t".parse().unwrap())),
            ("dir:/rootfs", SourceName::Rootfs("/rootfs".into())),
        ] {
            assert_eq!(text.parse::<SourceName>().unwrap(), expected, "{text}");
        }
        for wrong in ["", "oci:", "oci", "zip:a", "docker://A"] {
            assert!(wrong.parse::<SourceName>().is_err(), "{wrong}");
        }
    }
}
