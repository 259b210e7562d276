//! OCI image layouts, as directories and inside a tar.

use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail, ensure};
use lamina_image::{Descriptor, Digest, Index, MANIFEST_BYTES_MAX, Platform};

use super::{Source, SourceImage, image_of, resolve, sniff_media_type};

/// The annotation that holds a tag (OCI image-spec, annotations.md).
const TAG: &str = "org.opencontainers.image.ref.name";

/// Files by their path inside a layout.
pub(super) trait Files: Send + Sync {
    fn open(&self, path: &str) -> Result<Box<dyn Read + Send>>;
    fn name(&self) -> String;
}

/// A layout in a directory.
pub(super) struct Directory(PathBuf);

impl Directory {
    pub(super) fn new(path: &Path) -> Result<Self> {
        ensure!(path.is_dir(), "{}: there is no such directory", path.display());
        Ok(Self(path.to_owned()))
    }
}

impl Files for Directory {
    fn open(&self, path: &str) -> Result<Box<dyn Read + Send>> {
        let path = self.0.join(path);
        Ok(Box::new(File::open(&path).with_context(|| path.display().to_string())?))
    }

    fn name(&self) -> String {
        format!("oci:{}", self.0.display())
    }
}

/// One image of a layout.
pub(super) struct Layout<F> {
    files: F,
    image: SourceImage,
}

impl<F: Files> Layout<F> {
    pub(super) fn open(files: F, tag: Option<&str>, platform: &Platform) -> Result<Self> {
        let name = files.name();
        let index =
            small_file(&files, "index.json").with_context(|| format!("{name} is not an OCI layout"))?;
        let index: Index = serde_json::from_slice(&index).with_context(|| format!("{name}/index.json"))?;
        let chosen = choose(&name, &index, tag)?;
        let mut fetch = |descriptor: &Descriptor| document(&files, descriptor);
        let (media_type, bytes) = fetch(chosen)?;
        let manifest = resolve(&name, &media_type, bytes, platform, &mut fetch)?;
        let config = blob(&files, manifest.2.config.digest)?;
        let image = image_of(&name, manifest, config)?;
        Ok(Self { files, image })
    }
}

impl<F: Files> Source for Layout<F> {
    fn image(&self) -> &SourceImage {
        &self.image
    }

    fn layer(&self, number: usize) -> Result<Box<dyn Read + Send>> {
        let descriptor = self.image.layers[number].descriptor.as_ref().expect("layouts have descriptors");
        self.files.open(&blob_path(descriptor.digest))
    }
}

fn choose<'a>(name: &str, index: &'a Index, tag: Option<&str>) -> Result<&'a Descriptor> {
    let tag_of = |one: &'a Descriptor| one.annotations.get(TAG).map(String::as_str);
    let tags = || index.manifests.iter().filter_map(tag_of).collect::<Vec<_>>().join(", ");
    match (tag, index.manifests.as_slice()) {
        (None, [only]) => Ok(only),
        (None, []) => bail!("{name} has no image"),
        (None, _) => bail!("{name} has several images; choose one: {name}:TAG with TAG one of {}", tags()),
        (Some(tag), all) => {
            let found = all.iter().find(|one| tag_of(one) == Some(tag));
            found.with_context(|| format!("{name} has no tag {tag:?}; it has {}", tags()))
        }
    }
}

fn blob_path(digest: Digest) -> String {
    format!("blobs/{}/{}", digest.algorithm(), digest.hex())
}

fn blob(files: &dyn Files, digest: Digest) -> Result<Vec<u8>> {
    let bytes = small_file(files, &blob_path(digest))?;
    ensure!(
        Digest::of(&bytes) == digest,
        "{}: blob {digest} is damaged: it hashes to {}",
        files.name(),
        Digest::of(&bytes)
    );
    Ok(bytes)
}

fn document(files: &dyn Files, descriptor: &Descriptor) -> Result<(String, Vec<u8>)> {
    let bytes = blob(files, descriptor.digest)?;
    let media_type = if descriptor.media_type.is_empty() {
        sniff_media_type(&bytes)
    } else {
        descriptor.media_type.clone()
    };
    Ok((media_type, bytes))
}

/// A whole document, if it is not longer than any may be.
pub(super) fn small_file(files: &dyn Files, path: &str) -> Result<Vec<u8>> {
    let mut bytes = Vec::new();
    let max = MANIFEST_BYTES_MAX as u64;
    files
        .open(path)?
        .take(max + 1)
        .read_to_end(&mut bytes)
        .with_context(|| format!("{}/{path}", files.name()))?;
    ensure!(bytes.len() as u64 <= max, "{}/{path} is longer than {max} bytes", files.name());
    Ok(bytes)
}
