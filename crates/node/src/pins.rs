//! Images whose frames stay on disk, whatever else is fetched.
//!
//! One small JSON file a pin, under the manifest's name, so that pins outlive the daemon.

use std::collections::{BTreeMap, HashMap};
use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::path::PathBuf;
use std::sync::Arc;

use lamina_cache::Cache;
use lamina_chunk::FrameId;
use lamina_image::{Digest, Tree};
use lamina_wire::Reference;
use lamina_wire::proto::{Pin, PinRequest, PinResponse};
use parking_lot::Mutex;
use serde::{Deserialize, Serialize};

use crate::trees::Trees;
use crate::{Node, NodeError};

/// Pinned frames may take this part of the cache, in percent: what is not pinned must still have room to come and go.
const CACHE_PERCENT: u64 = 75;
/// A pin's file is never longer.
const FILE_BYTES_MAX: u64 = 16 << 10;

/// What a file says.
#[derive(Clone, Debug, Serialize, Deserialize)]
struct Entry {
    reference: String,
    manifest: String,
    tree: String,
}

#[derive(Debug)]
struct Pinned {
    entry: Entry,
    /// The frames, and their bytes.
    frames: Arc<[(FrameId, u32)]>,
}

/// The directory of pins.
#[derive(Debug)]
pub(crate) struct Pins {
    directory: PathBuf,
    /// What they may take, in bytes of frames.
    bytes_max: u64,
    /// By manifest.
    pinned: Mutex<BTreeMap<String, Pinned>>,
}

impl Pins {
    /// Takes the directory, creating it where it is missing. Nothing is pinned yet in a cache of `cache_bytes_max`.
    pub(crate) fn open(directory: PathBuf, cache_bytes_max: u64) -> io::Result<Self> {
        fs::create_dir_all(&directory)?;
        let bytes_max = cache_bytes_max / 100 * CACHE_PERCENT;
        Ok(Self { directory, bytes_max, pinned: Mutex::default() })
    }

    fn path(&self, manifest: &str) -> PathBuf {
        self.directory.join(format!("{}.json", manifest.replace(':', "-")))
    }

    fn entries(&self) -> io::Result<Vec<Entry>> {
        let read = |path: PathBuf| -> io::Result<Entry> {
            Ok(serde_json::from_reader(File::open(path)?.take(FILE_BYTES_MAX))?)
        };
        let mut entries = Vec::new();
        for file in fs::read_dir(&self.directory)? {
            let path = file?.path();
            if path.extension().is_none_or(|extension| extension != "json") {
                // what a crash left of a pin that nobody was told of
                fs::remove_file(&path)?;
                continue;
            }
            match read(path.clone()) {
                Ok(entry) => entries.push(entry),
                Err(error) => tracing::warn!(path = %path.display(), %error, "a pin cannot be read"),
            }
        }
        Ok(entries)
    }

    fn write(&self, entry: &Entry) -> io::Result<()> {
        let mut file = tempfile::NamedTempFile::new_in(&self.directory)?;
        file.write_all(&serde_json::to_vec(entry)?)?;
        file.as_file().sync_all()?;
        file.persist(self.path(&entry.manifest)).map_err(|error| error.error)?;
        File::open(&self.directory)?.sync_all()
    }

    fn remove(&self, manifest: &str) -> io::Result<()> {
        fs::remove_file(self.path(manifest))?;
        File::open(&self.directory)?.sync_all()
    }

    /// The bytes of all pinned frames and of `more`, each once.
    fn bytes<'a>(&self, more: impl IntoIterator<Item = &'a (FrameId, u32)>) -> u64 {
        let pinned = self.pinned.lock();
        let mut once: HashMap<FrameId, u32> =
            pinned.values().flat_map(|one| one.frames.iter()).copied().collect();
        once.extend(more.into_iter().copied());
        once.values().map(|len| u64::from(*len)).sum()
    }

    /// Whether pins might be that much more.
    pub(crate) fn have_room_for<'a>(&self, more: impl IntoIterator<Item = &'a (FrameId, u32)>) -> bool {
        self.bytes(more) <= self.bytes_max
    }
}

fn frames(tree: &Tree) -> Arc<[(FrameId, u32)]> {
    let frame = |number| tree.frame(number).ok().map(|(id, place)| (id, place.frame.sealed_len));
    (0..tree.frames()).filter_map(frame).collect()
}

impl Pins {
    /// Pins again what was pinned before. Blocks.
    pub(crate) fn restore(&self, cache: &Cache, trees: &Trees) {
        let entries = self.entries().unwrap_or_else(|error| {
            tracing::warn!(%error, "pins cannot be read; nothing is pinned");
            Vec::new()
        });
        for entry in entries {
            let tree: Option<Digest> = entry.tree.parse().ok();
            let Some(tree) = tree.and_then(|digest| trees.load(digest)) else {
                tracing::warn!(reference = entry.reference, "is pinned, and its tree is gone: pin it again");
                continue;
            };
            self.hold(cache, entry, frames(&tree));
        }
    }

    fn hold(&self, cache: &Cache, entry: Entry, frames: Arc<[(FrameId, u32)]>) {
        cache.pin(frames.iter().map(|(id, _)| *id));
        let before = self.pinned.lock().insert(entry.manifest.clone(), Pinned { entry, frames });
        if let Some(before) = before {
            cache.unpin(before.frames.iter().map(|(id, _)| *id));
        }
    }
}

impl Node {
    /// Pins an image, takes a pin away, or only lists them.
    pub async fn pin(&self, request: PinRequest) -> Result<PinResponse, NodeError> {
        let bytes_max = self.pins.bytes_max;
        if !request.reference.is_empty() {
            let reference: Reference = request.reference.parse()?;
            match request.remove {
                true => self.unpin(&reference)?,
                false => self.pin_image(&reference, request.plain_http).await?,
            }
        }
        let pin = |one: &Pinned| Pin {
            reference: one.entry.reference.clone(),
            manifest: one.entry.manifest.clone(),
            bytes: one.frames.iter().map(|(_, len)| u64::from(*len)).sum(),
        };
        let pins = self.pins.pinned.lock().values().map(pin).collect();
        Ok(PinResponse { pins, bytes: self.pins.bytes(&[]), bytes_max })
    }

    async fn pin_image(&self, reference: &Reference, plain_http: bool) -> Result<(), NodeError> {
        let (found, tree, _) = self.image(reference, plain_http).await?;
        let frames = frames(&tree);
        let (bytes, bytes_max) = (self.pins.bytes(&frames[..]), self.pins.bytes_max);
        if bytes > bytes_max {
            return Err(NodeError::TooLarge { reference: reference.to_string(), bytes, bytes_max });
        }
        let (manifest, tree) = (found.manifest.to_string(), found.tree.to_string());
        let entry = Entry { reference: reference.to_string(), manifest, tree };
        let path = self.pins.path(&entry.manifest);
        self.pins.write(&entry).map_err(|error| NodeError::File { path, error })?;
        self.pins.hold(&self.cache, entry, frames);
        self.fills.stays.make_way(&self.cache, &self.pins);
        Ok(())
    }

    fn unpin(&self, reference: &Reference) -> Result<(), NodeError> {
        let wanted = reference.to_string();
        let mut pinned = self.pins.pinned.lock();
        let is = |one: &Pinned| one.entry.reference == wanted || wanted.ends_with(&one.entry.manifest);
        let gone: Vec<String> =
            pinned.iter().filter(|(_, one)| is(one)).map(|(manifest, _)| manifest.clone()).collect();
        if gone.is_empty() {
            return Err(NodeError::Request(format!("{wanted} is not pinned; `lamina pin` lists what is")));
        }
        for manifest in gone {
            let path = self.pins.path(&manifest);
            self.pins.remove(&manifest).map_err(|error| NodeError::File { path, error })?;
            if let Some(one) = pinned.remove(&manifest) {
                self.cache.unpin(one.frames.iter().map(|(id, _)| *id));
            }
        }
        Ok(())
    }
}

#[cfg(test)]
impl Pins {
    /// Pins frames that no image names.
    pub(crate) fn hold_frames(&self, cache: &Cache, manifest: &str, frames: Arc<[(FrameId, u32)]>) {
        let entry = Entry { reference: String::new(), manifest: manifest.to_owned(), tree: String::new() };
        self.hold(cache, entry, frames);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pin_is_read_again_and_what_a_crash_left_of_one_is_removed() {
        let directory = tempfile::tempdir().unwrap();
        let pins = Pins::open(directory.path().join("pins"), 100).unwrap();
        let manifest = Digest::of(b"m").to_string();
        let entry = Entry {
            reference: "r/a:t".into(),
            manifest: manifest.clone(),
            tree: Digest::of(b"t").to_string(),
        };
        pins.write(&entry).unwrap();
        let half = directory.path().join("pins/.tmp1");
        fs::copy(pins.path(&manifest), &half).unwrap();
        let entries = pins.entries().unwrap();
        assert_eq!(entries.iter().map(|entry| entry.reference.as_str()).collect::<Vec<_>>(), ["r/a:t"]);
        assert!(!half.exists(), "it would bring the pin back after it was taken away");
        pins.remove(&manifest).unwrap();
        assert!(pins.entries().unwrap().is_empty());
    }
}
