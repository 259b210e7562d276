//! Images in a tar: OCI layouts, and what `docker save` writes.

use std::collections::HashMap;
use std::fs::File;
use std::io::{self, Read};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::{Context, Result, bail, ensure};
use lamina_image::{Digest, ImageConfig};

use super::layout::{Files, small_file};
use super::{Source, SourceImage, SourceLayer};

/// Links that are followed for one member: `docker save` once linked equal layers.
const LINKS_MAX: usize = 8;

/// Where a member's bytes are.
#[derive(Clone, Debug)]
enum Member {
    At { start: u64, len: u64 },
    Link(String),
}

/// A tar whose members are read wherever they lie.
pub(super) struct Archive {
    path: PathBuf,
    file: Arc<File>,
    members: HashMap<String, Member>,
}

impl Archive {
    pub(super) fn open(path: &Path) -> Result<Self> {
        let name = path.display();
        let file = File::open(path).with_context(|| name.to_string())?;
        let mut tar = tar::Archive::new(io::BufReader::new(&file));
        let mut members = HashMap::new();
        for entry in tar.entries_with_seek().with_context(|| format!("{name} is not a tar"))? {
            let entry = entry.with_context(|| format!("{name} is not a plain tar, or is cut off"))?;
            let member = clean(&entry.path_bytes());
            let here = match entry.header().entry_type() {
                tar::EntryType::Regular | tar::EntryType::Continuous => {
                    Member::At { start: entry.raw_file_position(), len: entry.size() }
                }
                tar::EntryType::Link => Member::Link(clean(&entry.link_name_bytes().unwrap_or_default())),
                tar::EntryType::Symlink => {
                    let target = clean(&entry.link_name_bytes().unwrap_or_default());
                    let directory = member.rsplit_once('/').map_or("", |(directory, _)| directory);
                    Member::Link(join(directory, &target))
                }
                _ => continue,
            };
            members.insert(member, here);
        }
        Ok(Self { path: path.to_owned(), file: Arc::new(file), members })
    }

    fn find(&self, path: &str) -> Result<(u64, u64)> {
        let mut path = path.to_owned();
        for _ in 0..LINKS_MAX {
            match self.members.get(&path) {
                Some(Member::At { start, len }) => return Ok((*start, *len)),
                Some(Member::Link(target)) => path.clone_from(target),
                None => bail!("{} has no {path}", self.path.display()),
            }
        }
        bail!("{}: {path} is a link to itself", self.path.display())
    }
}

impl Files for Archive {
    fn open(&self, path: &str) -> Result<Box<dyn Read + Send>> {
        let (position, left) = self.find(path)?;
        Ok(Box::new(Part { file: Arc::clone(&self.file), position, left }))
    }

    fn name(&self) -> String {
        self.path.display().to_string()
    }
}

/// A run of bytes in a file that others read too.
struct Part {
    file: Arc<File>,
    position: u64,
    left: u64,
}

impl Read for Part {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let len = usize::try_from(self.left).unwrap_or(usize::MAX).min(buffer.len());
        let read = self.file.read_at(&mut buffer[..len], self.position)?;
        if read == 0 && len > 0 {
            return Err(io::Error::new(io::ErrorKind::UnexpectedEof, "the archive is cut off"));
        }
        self.position += read as u64;
        self.left -= read as u64;
        Ok(read)
    }
}

fn clean(path: &[u8]) -> String {
    let path = String::from_utf8_lossy(path);
    path.split('/').filter(|part| !part.is_empty() && *part != ".").collect::<Vec<_>>().join("/")
}

fn join(directory: &str, target: &str) -> String {
    let mut parts: Vec<&str> = directory.split('/').filter(|part| !part.is_empty()).collect();
    for part in target.split('/') {
        match part {
            ".." => parts.truncate(parts.len().saturating_sub(1)),
            part => parts.push(part),
        }
    }
    parts.join("/")
}

/// What `docker save` writes: `manifest.json` with a list of images.
#[derive(serde::Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Saved {
    config: String,
    #[serde(default)]
    repo_tags: Option<Vec<String>>,
    layers: Vec<String>,
}

/// One image of such an archive.
pub(super) struct DockerArchive {
    archive: Archive,
    layers: Vec<String>,
    image: SourceImage,
}

impl DockerArchive {
    pub(super) fn open(path: &Path, wanted: Option<&str>) -> Result<Self> {
        let archive = Archive::open(path)?;
        let name = path.display();
        let saved = small_file(&archive, "manifest.json").context("this is not what `docker save` writes")?;
        let mut saved: Vec<Saved> =
            serde_json::from_slice(&saved).with_context(|| format!("{name}/manifest.json"))?;
        let tags = |one: &Saved| one.repo_tags.clone().unwrap_or_default();
        let chosen = match wanted {
            None if saved.len() == 1 => 0,
            None => bail!("{name} has {} images; choose one: docker-archive:FILE:name:tag", saved.len()),
            Some(wanted) => {
                saved.iter().position(|one| tags(one).iter().any(|tag| tag == wanted)).with_context(|| {
                    format!(
                        "{name} has no {wanted:?}; it has {}",
                        saved.iter().flat_map(tags).collect::<Vec<_>>().join(", ")
                    )
                })?
            }
        };
        let Saved { config, layers, .. } = saved.swap_remove(chosen);
        let config = small_file(&archive, &clean(config.as_bytes()))?;
        let parsed: ImageConfig =
            serde_json::from_slice(&config).with_context(|| format!("{name}: its config"))?;
        let diff_ids: Vec<Digest> = parsed.rootfs.diff_ids;
        ensure!(
            diff_ids.len() == layers.len(),
            "{name}: {} layers, but {} in the config",
            layers.len(),
            diff_ids.len()
        );
        let layers: Vec<String> = layers.iter().map(|layer| clean(layer.as_bytes())).collect();
        let found = layers.iter().zip(diff_ids).map(|(layer, diff_id)| {
            let (_, len) = archive.find(layer)?;
            Ok(SourceLayer { descriptor: None, diff_id: Some(diff_id), len: Some(len) })
        });
        let found = found.collect::<Result<Vec<_>>>()?;
        let image = SourceImage { manifest: None, config: Some(config), layers: found };
        Ok(Self { archive, layers, image })
    }
}

impl Source for DockerArchive {
    fn image(&self) -> &SourceImage {
        &self.image
    }

    fn layer(&self, number: usize) -> Result<Box<dyn Read + Send>> {
        self.archive.open(&self.layers[number])
    }
}
