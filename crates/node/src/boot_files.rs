//! Boot packs on this machine's disk: written as they come, so that the next start, and pages that the kernel drops, need no
//! network.
//!
//! A boot pack is not one of the cache's frames, so it has files of its own beside the cache. They are never believed: whoever
//! reads one checks every part against its table. The oldest are removed when all of them exceed a bound.

use std::collections::HashMap;
use std::fs::{self, File};
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::SystemTime;
use std::{fmt, io};

use bytes::Bytes;
use futures_util::future::BoxFuture;
use futures_util::{FutureExt, StreamExt, stream};
use lamina_cache::{Class, Pieces, Source, SourceError};
use lamina_chunk::PackId;
use lamina_wire::PartStream;
use parking_lot::Mutex;

use crate::sources::Sources;

/// One that is here is read in pieces of so many bytes.
const KEPT_PIECE_BYTES: usize = 256 << 10;

/// What has come and was not written yet, at most, and a piece more.
const UNWRITTEN_BYTES: usize = 4 << 20;

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

    /// Where one is written that is not here whole yet: for each who writes it, another place.
    fn part(&self, pack: PackId) -> PathBuf {
        static PARTS: AtomicU64 = AtomicU64::new(0);
        self.path(pack, &format!("{}.part", PARTS.fetch_add(1, Ordering::Relaxed)))
    }

    /// Whether a boot pack is here whole, or at least its first `len` bytes. One that is shorter is removed.
    fn has(&self, pack: PackId, len: u64) -> bool {
        let Ok(found) = fs::metadata(self.path(pack, "boot")) else { return false };
        if found.len() < len {
            self.forget(pack);
        }
        found.len() >= len
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

/// What came of a boot pack, on its way to the disk.
#[derive(Debug, Default)]
struct Part {
    /// This mount's own: another one may bring the same.
    file: Option<(Arc<File>, PathBuf)>,
    written: Vec<Range<u64>>,
    /// What is not written yet, with the place of its first byte.
    unwritten: Vec<(u64, Bytes)>,
    unwritten_bytes: usize,
}

/// A registry whose boot packs are kept.
#[derive(Debug)]
pub(crate) struct KeptBoot {
    registry: Sources,
    files: BootFiles,
    /// `None` for those that are to stay no more, or are here.
    parts: Mutex<HashMap<PackId, Option<Part>>>,
    /// One that comes already, until it is taken.
    begun: Mutex<Option<ComingPack>>,
}

/// A boot pack that comes from its first byte on.
struct ComingPack(PackId, Pieces);

impl fmt::Debug for ComingPack {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "ComingPack({})", self.0)
    }
}

impl KeptBoot {
    /// Keeps the boot packs of `registry` in `files`.
    pub(crate) fn new(registry: Sources, files: BootFiles) -> Self {
        Self { registry, files, parts: Mutex::default(), begun: Mutex::default() }
    }

    /// Takes all `len` bytes of a boot pack, which come already from the registry: they are not asked for when they are wanted.
    pub(crate) fn begin(&self, pack: PackId, len: u64, bytes: PartStream) {
        *self.begun.lock() = Some(ComingPack(pack, self.registry.taken(pack, len, bytes)));
    }

    /// What comes already of these bytes. Whatever else comes is given up: it would hold a connection for nothing.
    fn take_begun(&self, pack: PackId, range: &Range<u64>) -> Option<Pieces> {
        let ComingPack(begun, pieces) = self.begun.lock().take()?;
        (begun == pack && range.start == 0).then_some(pieces)
    }

    /// Takes note of a piece that came at `start`. Whether it is time to write.
    fn note(&self, pack: PackId, start: u64, piece: Bytes) -> bool {
        let mut parts = self.parts.lock();
        let Some(part) = parts.entry(pack).or_insert_with(|| Some(Part::default())) else { return false };
        part.unwritten_bytes += piece.len();
        part.unwritten.push((start, piece));
        part.unwritten_bytes >= UNWRITTEN_BYTES
    }

    /// Writes what came and was not written yet. A disk that is full costs the next start its boot pack, and nothing else. Blocks.
    fn write(&self, pack: PackId) -> io::Result<()> {
        let (file, unwritten) = {
            let mut parts = self.parts.lock();
            let Some(Some(part)) = parts.get_mut(&pack) else { return Ok(()) };
            part.unwritten_bytes = 0;
            let unwritten = std::mem::take(&mut part.unwritten);
            let file = match &part.file {
                Some((file, _)) => Arc::clone(file),
                None => {
                    let path = self.files.part(pack);
                    let file = Arc::new(File::create_new(&path)?);
                    part.file = Some((Arc::clone(&file), path));
                    file
                }
            };
            (file, unwritten)
        };
        for (start, piece) in &unwritten {
            file.write_all_at(piece, *start)?;
        }
        if let Some(Some(part)) = self.parts.lock().get_mut(&pack) {
            part.written.extend(unwritten.iter().map(|(start, piece)| *start..*start + piece.len() as u64));
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

    /// Writes pieces that begin at `at` as they go by, many at once; a small boot pack, when the start has it.
    fn keeping(self: Arc<Self>, pack: PackId, at: u64, pieces: Pieces) -> Pieces {
        let noted = move |at: &mut u64, piece: Result<Bytes, SourceError>| {
            let start = *at;
            *at += piece.as_ref().map_or(0, |piece| piece.len() as u64);
            let full = piece.as_ref().is_ok_and(|piece| self.note(pack, start, piece.clone()));
            let this = full.then(|| Arc::clone(&self));
            async move {
                if let Some(this) = this {
                    let written = tokio::task::spawn_blocking(move || this.write(pack)).await;
                    if let Ok(Err(error)) = written {
                        tracing::debug!(%pack, %error, "a boot pack is not kept");
                    }
                }
                Some(piece)
            }
        };
        let origin = pieces.origin;
        Pieces::new(pieces.scan(at, noted).boxed()).from(origin)
    }

    /// Once a boot pack of `len` bytes has come and was right: it appears whole, or not at all. Blocks.
    pub(crate) fn finish(&self, pack: PackId, len: u64) -> io::Result<()> {
        let rest = self.write(pack);
        let Some(Some(mut part)) = self.parts.lock().insert(pack, None) else { return Ok(()) };
        part.written.sort_by_key(|range| range.start);
        let whole = part
            .written
            .iter()
            .fold(0, |end, range| if range.start <= end { end.max(range.end) } else { end });
        let Some((_, unfinished)) = part.file else { return rest };
        if whole != len || len > self.files.bytes_max {
            return fs::remove_file(unfinished).and(rest);
        }
        fs::rename(unfinished, self.files.path(pack, "boot"))?;
        self.files.shrink()
    }

    /// Forgets a boot pack that was not right.
    pub(crate) fn forget(&self, pack: PackId) {
        self.files.forget(pack);
        self.give_up(pack);
    }

    /// Gives up what came of one that will not be here whole.
    pub(crate) fn give_up(&self, pack: PackId) {
        if let Some(Some(part)) = self.parts.lock().insert(pack, None) {
            part.remove();
        }
    }
}

impl Part {
    fn remove(self) {
        if let Some((_, path)) = self.file {
            let _ = fs::remove_file(path);
        }
    }
}

impl Drop for KeptBoot {
    fn drop(&mut self) {
        self.parts.get_mut().drain().filter_map(|(_, part)| part).for_each(Part::remove);
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
            let begun = self.0.take_begun(pack, &range);
            if self.0.files.has(pack, range.end) {
                return Ok(self.0.kept(pack, range));
            }
            let start = range.start;
            let pieces = match begun {
                Some(pieces) => pieces,
                None => self.0.registry.stream(pack, range, class).await?,
            };
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

    /// As when it is time to write.
    fn keep(kept: &KeptBoot, pack: PackId, start: u64, bytes: &[u8]) {
        assert!(!kept.note(pack, start, Bytes::copy_from_slice(bytes)), "little is written at the end");
        kept.write(pack).expect("written");
    }

    #[test]
    fn a_boot_pack_appears_once_it_is_whole_and_not_before() {
        let (_directory, kept) = kept(1000);
        keep(&kept, pack(1), 5, b"67890");
        assert_eq!(kept.files.read(pack(1), &(5..10)), None);
        keep(&kept, pack(1), 0, b"12345");
        kept.finish(pack(1), 10).expect("finished");
        assert_eq!(kept.files.read(pack(1), &(3..7)).as_deref(), Some(&b"4567"[..]));
        assert_eq!(kept.files.read(pack(1), &(3..11)), None, "beyond its end");
        kept.give_up(pack(1));
        assert!(kept.files.has(pack(1), 10), "what was right stays right when it is not needed to the end");
        kept.forget(pack(1));
        assert_eq!(kept.files.read(pack(1), &(3..7)), None);
    }

    #[test]
    fn one_with_a_gap_or_too_long_is_not_kept() {
        let (directory, kept) = kept(1000);
        keep(&kept, pack(1), 0, b"123");
        keep(&kept, pack(1), 4, b"5");
        kept.finish(pack(1), 5).expect("removed");
        keep(&kept, pack(2), 0, &[1; 1001]);
        kept.finish(pack(2), 1001).expect("removed");
        assert_eq!(fs::read_dir(directory.path().join("boot")).expect("listed").count(), 0);
    }

    #[test]
    fn the_directory_never_holds_more_than_its_bound() {
        let (directory, kept) = kept(1000);
        for number in 0..5 {
            keep(&kept, pack(number), 0, &[number; 400]);
            kept.finish(pack(number), 400).expect("finished");
        }
        assert_eq!(fs::read_dir(directory.path().join("boot")).expect("listed").count(), 2);
    }

    #[test]
    fn two_who_bring_the_same_one_are_not_in_each_others_way() {
        let (directory, one) = kept(1000);
        let other = KeptBoot::new(one.registry.clone(), one.files.clone());
        keep(&one, pack(1), 0, b"12345");
        keep(&other, pack(1), 0, b"123");
        one.note(pack(1), 5, Bytes::from_static(b"67890"));
        other.give_up(pack(1));
        assert!(!other.note(pack(1), 3, Bytes::from_static(b"4")), "what was given up is not taken up again");
        one.finish(pack(1), 10).expect("finished");
        assert_eq!(one.files.read(pack(1), &(0..10)).as_deref(), Some(&b"1234567890"[..]));
        keep(&one, pack(2), 0, b"1");
        drop((one, other));
        assert_eq!(fs::read_dir(directory.path().join("boot")).expect("listed").count(), 1);
    }

    #[test]
    fn one_that_is_shorter_than_it_should_be_is_asked_for_again() {
        let (_directory, kept) = kept(1000);
        fs::write(kept.files.path(pack(1), "boot"), b"123").expect("written");
        assert!(kept.files.has(pack(1), 3));
        assert!(!kept.files.has(pack(1), 4));
        assert!(!kept.files.has(pack(1), 3), "it is gone");
    }

    #[test]
    fn little_is_written_when_all_has_come_and_much_before() {
        let (directory, kept) = kept(u64::MAX);
        let written = || fs::read_dir(directory.path().join("boot")).expect("listed").count();
        assert!(!kept.note(pack(1), 0, Bytes::from_static(b"123")));
        assert_eq!(written(), 0);
        kept.finish(pack(1), 3).expect("finished");
        assert_eq!(kept.files.read(pack(1), &(0..3)).as_deref(), Some(&b"123"[..]));
        assert!(kept.note(pack(2), 0, vec![1; UNWRITTEN_BYTES].into()));
        kept.write(pack(2)).expect("written");
        assert!(!kept.note(pack(2), UNWRITTEN_BYTES as u64, Bytes::from_static(b"4")));
        kept.finish(pack(2), UNWRITTEN_BYTES as u64 + 1).expect("finished");
        let end = UNWRITTEN_BYTES as u64;
        assert_eq!(kept.files.read(pack(2), &(end - 1..end + 1)).as_deref(), Some(&[1, b'4'][..]));
    }

    #[test]
    fn one_of_which_nothing_was_written_leaves_nothing() {
        let (directory, kept) = kept(1000);
        kept.note(pack(1), 0, Bytes::from_static(b"123"));
        kept.finish(pack(1), 4).expect("given up");
        kept.note(pack(2), 0, Bytes::from_static(b"123"));
        kept.give_up(pack(2));
        assert_eq!(fs::read_dir(directory.path().join("boot")).expect("listed").count(), 0);
    }

    #[test]
    fn what_a_crash_left_is_removed() {
        let (directory, kept) = kept(1000);
        keep(&kept, pack(1), 0, b"123");
        BootFiles::open(directory.path().join("boot"), 1000).expect("opened");
        assert_eq!(fs::read_dir(directory.path().join("boot")).expect("listed").count(), 0);
    }
}
