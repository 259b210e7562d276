//! Traces of starts that no registry wanted, kept for `lamina profile push`.

use std::io::{self, Read, Write};
use std::path::PathBuf;
use std::time::SystemTime;

use lamina_image::Digest;
use lamina_wire::proto::Trace;
use prost::Message;

/// Traces that are kept, the newest; each has at most 16 MiB, mostly far less.
const TRACES_MAX: usize = 64;
/// A file is read up to this length, in bytes: no trace is longer.
const TRACE_BYTES_MAX: u64 = 64 << 20;

/// A directory with one file for the last start of an image without a boot pack, and one for the last with one, which says
/// what that lacked.
#[derive(Clone, Debug)]
pub struct KeptTraces(PathBuf);

impl KeptTraces {
    /// In this directory, which is made when there is something to keep.
    pub fn new(directory: PathBuf) -> Self {
        Self(directory)
    }

    fn path(&self, manifest: Digest, boot: bool) -> PathBuf {
        self.0.join(format!("{}.{}", manifest.hex(), if boot { "missed" } else { "start" }))
    }

    /// Keeps a trace, in place of the last one of its kind. Blocks.
    pub fn keep(&self, manifest: Digest, trace: &Trace) -> io::Result<()> {
        std::fs::create_dir_all(&self.0)?;
        let mut file = tempfile::NamedTempFile::new_in(&self.0)?;
        file.write_all(&trace.encode_to_vec())?;
        file.persist(self.path(manifest, trace.boot)).map_err(|error| error.error)?;
        self.prune()
    }

    /// The traces of an image, the one without a boot pack first. What is damaged counts as not there. Blocks.
    pub fn find(&self, manifest: Digest) -> io::Result<Vec<Trace>> {
        let mut found = Vec::new();
        for boot in [false, true] {
            let file = match std::fs::File::open(self.path(manifest, boot)) {
                Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
                file => file?,
            };
            let mut bytes = Vec::new();
            file.take(TRACE_BYTES_MAX).read_to_end(&mut bytes)?;
            found.extend(Trace::decode(bytes.as_slice()).ok());
        }
        Ok(found)
    }

    /// Forgets the traces of an image. Blocks.
    pub fn forget(&self, manifest: Digest) -> io::Result<()> {
        for boot in [false, true] {
            match std::fs::remove_file(self.path(manifest, boot)) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
                _ => {}
            }
        }
        Ok(())
    }

    fn prune(&self) -> io::Result<()> {
        let mut files = Vec::new();
        for entry in std::fs::read_dir(&self.0)? {
            let entry = entry?;
            let written = entry.metadata().and_then(|metadata| metadata.modified());
            files.push((written.unwrap_or(SystemTime::UNIX_EPOCH), entry.path()));
        }
        files.sort();
        let surplus = files.len().saturating_sub(TRACES_MAX);
        files.into_iter().take(surplus).try_for_each(|(_, path)| std::fs::remove_file(path))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn trace(boot: bool, number: u64) -> Trace {
        Trace { boot, run_inos: vec![number], run_firsts: vec![0], run_pages: vec![1], ..Trace::default() }
    }

    #[test]
    fn the_last_start_of_each_kind_is_kept_until_it_is_forgotten() {
        let directory = tempfile::tempdir().unwrap();
        let traces = KeptTraces::new(directory.path().join("traces"));
        let image = Digest::of(b"image");
        assert_eq!(traces.find(image).unwrap(), []);
        for one in [trace(true, 1), trace(false, 2), trace(false, 3)] {
            traces.keep(image, &one).unwrap();
        }
        assert_eq!(traces.find(image).unwrap(), [trace(false, 3), trace(true, 1)]);
        traces.forget(image).unwrap();
        assert_eq!(traces.find(image).unwrap(), []);
    }

    #[test]
    fn no_more_than_so_many_are_kept() {
        let directory = tempfile::tempdir().unwrap();
        let traces = KeptTraces::new(directory.path().to_owned());
        for number in 0..TRACES_MAX as u64 + 9 {
            traces.keep(Digest::of(&number.to_le_bytes()), &trace(false, number)).unwrap();
        }
        assert_eq!(std::fs::read_dir(directory.path()).unwrap().count(), TRACES_MAX);
    }
}
