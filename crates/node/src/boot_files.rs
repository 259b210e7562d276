//! Boot packs on this machine's disk: written as they come, so that the next start, and pages that the kernel drops, need no
//! network.
//!
//! A boot pack is not one of the cache's frames, so it has files of its own beside the cache. They are never believed: whoever
//! reads one checks every part against its table. The oldest are removed when all of them exceed a bound.

use std::collections::HashMap;
use std::fs::{self, File};
use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::SystemTime;

use bytes::Bytes;
use futures_util::future::BoxFuture;
use futures_util::{FutureExt, StreamExt, stream};
use lamina_cache::{Class, Pieces, Source, SourceError};
use lamina_chunk::PackId;
use parking_lot::Mutex;

use crate::sources::Sources;

/// One that is here is read in pieces of so many bytes.
const KEPT_PIECE_BYTES: usize = 256 << 10;

/// The directory of boot packs.
#[derive(Clone, Debug)]
pub(crate) struct BootFiles {
    directory: PathBuf,
    bytes_max: u64,
}

impl BootFiles {
    /// Takes the directory, creating it where it is missing; all files in it have at most `bytes_max` bytes.
    pub(crate) fn open(directory: PathBuf, bytes_max: u64) -> io::Result<Self> {
        fs::create_dir_all(&directory)?;
        for entry in fs::read_dir(&directory)?.flatten() {
            // what a crash left half written
            if entry.path().extension().is_some_and(|extension| extension == "part") {
                let _ = fs::remove_file(entry.path());
            }
        }
        Ok(Self { directory, bytes_max })
    }

    fn path(&self, pack: PackId, extension: &str) -> PathBuf {
        self.directory.join(format!("{pack}.{extension}").replace(':', "-"))
    }

    /// Some bytes of a boot pack, if it is here whole. Blocks.
    fn read(&self, pack: PackId, range: &Range<u64>) -> Option<Bytes> {
        let file = File::open(self.path(pack, "boot")).ok()?;
        let mut bytes = vec![0; usize::try_from(range.end.checked_sub(range.start)?).ok()?];
        file.read_exact_at(&mut bytes, range.start).ok()?;
        Some(bytes.into())
    }

    /// Whether a boot pack is here whole.
    fn has(&self, pack: PackId) -> bool {
        self.path(pack, "boot").exists()
    }

    /// Removes a boot pack that turned out to be damaged.
    pub(crate) fn forget(&self, pack: PackId) {
        let _ = fs::remove_file(self.path(pack, "boot"));
    }

    /// Removes the oldest until all fit.
    fn shrink(&self) -> io::Result<()> {
        let mut files: Vec<(SystemTime, u64, PathBuf)> = Vec::new();
        for entry in fs::read_dir(&self.directory)? {
            let (entry, metadata) = entry.and_then(|entry| Ok((entry.path(), entry.metadata()?)))?;
            files.push((metadata.modified()?, metadata.len(), entry));
        }
        files.sort_by_key(|file| std::cmp::Reverse(file.0));
        let mut sum = 0u64;
        for (_, len, path) in files {
            sum = sum.saturating_add(len);
            if sum > self.bytes_max {
                fs::remove_file(path)?;
            }
        }
        Ok(())
    }
}

/// A boot pack that is being written.
#[derive(Debug)]
struct Part {
    file: Arc<File>,
    written: Vec<Range<u64>>,
}

/// A registry whose boot packs are kept.
#[derive(Debug)]
pub(crate) struct KeptBoot {
    registry: Sources,
    files: BootFiles,
    parts: Mutex<HashMap<PackId, Part>>,
}

impl KeptBoot {
    /// Keeps the boot packs of `registry` in `files`.
    pub(crate) fn new(registry: Sources, files: BootFiles) -> Self {
        Self { registry, files, parts: Mutex::default() }
    }

    /// Writes what came. A disk that is full costs the next start its boot pack, and nothing else.
    fn keep(&self, pack: PackId, range: Range<u64>, bytes: &[u8]) -> io::Result<()> {
        let file = match self.parts.lock().entry(pack) {
            std::collections::hash_map::Entry::Occupied(part) => part.get().file.clone(),
            std::collections::hash_map::Entry::Vacant(place) => {
                let file = Arc::new(File::create(self.files.path(pack, "part"))?);
                place.insert(Part { file, written: Vec::new() }).file.clone()
            }
        };
        file.write_all_at(bytes, range.start)?;
        if let Some(part) = self.parts.lock().get_mut(&pack) {
            part.written.push(range);
        }
        Ok(())
    }

    /// One that is here, in pieces.
    fn kept(self: &Arc<Self>, pack: PackId, range: Range<u64>) -> Pieces {
        let starts = range.clone().step_by(KEPT_PIECE_BYTES);
        let this = Arc::clone(self);
        let piece = move |start: u64| {
            let (this, end) = (Arc::clone(&this), range.end.min(start + KEPT_PIECE_BYTES as u64));
            async move {
                let read = tokio::task::spawn_blocking(move || this.files.read(pack, &(start..end))).await;
                // removed meanwhile: whoever asks again is sent to the registry
                let gone =
                    || io::Error::new(io::ErrorKind::NotFound, "it was removed from this machine's disk");
                let gone = || SourceError::Unreachable { pack, cause: Arc::new(gone()) };
                read.ok().flatten().ok_or_else(gone)
            }
        };
        Pieces::new(stream::iter(starts).then(piece).boxed())
    }

    /// Writes pieces that begin at `at` as they go by.
    fn keeping(self: Arc<Self>, pack: PackId, at: u64, pieces: Pieces) -> Pieces {
        let written = move |at: &mut u64, piece: Result<Bytes, SourceError>| {
            let (this, start) = (Arc::clone(&self), *at);
            *at += piece.as_ref().map_or(0, |piece| piece.len() as u64);
            async move {
                if let Ok(piece) = &piece {
                    let piece = piece.clone();
                    let range = start..start + piece.len() as u64;
                    let written = tokio::task::spawn_blocking(move || this.keep(pack, range, &piece)).await;
                    if let Ok(Err(error)) = written {
                        tracing::debug!(%pack, %error, "a boot pack is not kept");
                    }
                }
                Some(piece)
            }
        };
        let origin = pieces.origin;
        Pieces::new(pieces.scan(at, written).boxed()).from(origin)
    }

    /// Once a boot pack of `len` bytes has come and was right: it appears whole, or not at all. Blocks.
    pub(crate) fn finish(&self, pack: PackId, len: u64) -> io::Result<()> {
        let Some(mut part) = self.parts.lock().remove(&pack) else { return Ok(()) };
        part.written.sort_by_key(|range| range.start);
        let whole = part
            .written
            .iter()
            .fold(0, |end, range| if range.start <= end { end.max(range.end) } else { end });
        let (unfinished, finished) = (self.files.path(pack, "part"), self.files.path(pack, "boot"));
        if whole != len || len > self.files.bytes_max {
            return fs::remove_file(unfinished);
        }
        fs::rename(unfinished, finished)?;
        self.files.shrink()
    }

    /// Forgets a boot pack that was not right.
    pub(crate) fn forget(&self, pack: PackId) {
        self.files.forget(pack);
        self.give_up(pack);
    }

    /// Gives up what came of one that will not be here whole.
    pub(crate) fn give_up(&self, pack: PackId) {
        if self.parts.lock().remove(&pack).is_some() {
            let _ = fs::remove_file(self.files.path(pack, "part"));
        }
    }
}

/// [`KeptBoot`] as a source of a mount.
#[derive(Clone, Debug)]
pub(crate) struct KeptSource(pub(crate) Arc<KeptBoot>);

impl Source for KeptSource {
    fn fetch(
        &self,
        pack: PackId,
        range: Range<u64>,
        class: Class,
    ) -> BoxFuture<'_, Result<Bytes, SourceError>> {
        if class != Class::Boot {
            return self.0.registry.fetch(pack, range, class);
        }
        async move {
            let (kept, wanted) = (Arc::clone(&self.0), range.clone());
            let here = tokio::task::spawn_blocking(move || kept.files.read(pack, &wanted)).await;
            match here {
                Ok(Some(bytes)) => Ok(bytes),
                _ => self.0.registry.fetch(pack, range, class).await,
            }
        }
        .boxed()
    }

    fn stream(
        &self,
        pack: PackId,
        range: Range<u64>,
        class: Class,
    ) -> BoxFuture<'_, Result<Pieces, SourceError>> {
        if class != Class::Boot {
            return self.0.registry.stream(pack, range, class);
        }
        async move {
            if self.0.files.has(pack) {
                return Ok(self.0.kept(pack, range));
            }
            let start = range.start;
            let pieces = self.0.registry.stream(pack, range, class).await?;
            Ok(self.0.clone().keeping(pack, start, pieces))
        }
        .boxed()
    }

    fn distrust(&self, pack: PackId, origin: usize) {
        self.0.registry.distrust(pack, origin);
    }
}

#[cfg(test)]
mod tests {
    use lamina_image::Digest;
    use lamina_wire::ClientConfig;

    use super::*;
    use crate::sources::Hosts;

    fn kept(bytes_max: u64) -> (tempfile::TempDir, KeptBoot) {
        let directory = tempfile::tempdir().expect("a directory");
        let files = BootFiles::open(directory.path().join("boot"), bytes_max).expect("opened");
        // nothing listens there, and nobody asks
        let hosts = Hosts::new(ClientConfig::default(), HashMap::new());
        let reference = "127.0.0.1:1/app:t".parse().expect("a reference");
        let registry = hosts.sources(&reference, false).expect("a client");
        (directory, KeptBoot::new(registry, files))
    }

    fn pack(number: u8) -> PackId {
        PackId::try_from(Digest::of(&[number])).unwrap()
    }

    #[test]
    fn a_boot_pack_appears_once_it_is_whole_and_not_before() {
        let (_directory, kept) = kept(1000);
        kept.keep(pack(1), 5..10, b"67890").expect("written");
        assert_eq!(kept.files.read(pack(1), &(5..10)), None);
        kept.keep(pack(1), 0..5, b"12345").expect("written");
        kept.finish(pack(1), 10).expect("finished");
        assert_eq!(kept.files.read(pack(1), &(3..7)).as_deref(), Some(&b"4567"[..]));
        assert_eq!(kept.files.read(pack(1), &(3..11)), None, "beyond its end");
        kept.give_up(pack(1));
        assert!(kept.files.has(pack(1)), "what was right stays right when it is not needed to the end");
        kept.forget(pack(1));
        assert_eq!(kept.files.read(pack(1), &(3..7)), None);
    }

    #[test]
    fn one_with_a_gap_or_too_long_is_not_kept() {
        let (directory, kept) = kept(1000);
        kept.keep(pack(1), 0..3, b"123").expect("written");
        kept.keep(pack(1), 4..5, b"5").expect("written");
        kept.finish(pack(1), 5).expect("removed");
        kept.keep(pack(2), 0..1001, &[1; 1001]).expect("written");
        kept.finish(pack(2), 1001).expect("removed");
        assert_eq!(fs::read_dir(directory.path().join("boot")).expect("listed").count(), 0);
    }

    #[test]
    fn the_directory_never_holds_more_than_its_bound() {
        let (directory, kept) = kept(1000);
        for number in 0..5 {
            kept.keep(pack(number), 0..400, &[number; 400]).expect("written");
            kept.finish(pack(number), 400).expect("finished");
        }
        assert_eq!(fs::read_dir(directory.path().join("boot")).expect("listed").count(), 2);
    }

    #[test]
    fn what_a_crash_left_is_removed() {
        let (directory, kept) = kept(1000);
        kept.keep(pack(1), 0..3, b"123").expect("written");
        BootFiles::open(directory.path().join("boot"), 1000).expect("opened");
        assert_eq!(fs::read_dir(directory.path().join("boot")).expect("listed").count(), 0);
    }
}
