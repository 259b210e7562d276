//! Traces of starts that no registry wanted, kept for `lamina profile push`.

use std::io::{self, Read, Write};
use std::path::PathBuf;
use std::time::SystemTime;

use lamina_image::{CommandKey, Digest};
use lamina_wire::proto::Trace;
use prost::Message;

/// Traces that are kept, the newest; each has at most 16 MiB, mostly far less.
const TRACES_MAX: usize = 64;
/// A file is read up to this length, in bytes: no trace is longer.
const TRACE_BYTES_MAX: u64 = 64 << 20;

/// A directory with one file for the last start of each command of an image without a boot pack, and one for the last with one,
/// which says what that lacked. Starts of no known command have files of their own.
#[derive(Clone, Debug)]
pub struct KeptTraces(PathBuf);

/// A trace that is kept.
#[derive(Clone, Debug, PartialEq)]
pub struct KeptTrace {
    /// The command that started, if that is known.
    pub command: Option<CommandKey>,
    /// What it touched.
    pub trace: Trace,
}

/// What the name of a file ends with, by whether the start had a boot pack.
const ENDINGS: [(bool, &str); 2] = [(false, ".start"), (true, ".missed")];

impl KeptTraces {
    /// In this directory, which is made when there is something to keep.
    pub fn new(directory: PathBuf) -> Self {
        Self(directory)
    }

    fn path(&self, manifest: Digest, command: Option<&CommandKey>, boot: bool) -> PathBuf {
        let ending = ENDINGS[usize::from(boot)].1;
        let command = command.map_or_else(String::new, |command| format!(".{command}"));
        self.0.join(format!("{}{command}{ending}", manifest.hex()))
    }

    /// Keeps a trace, in place of the last one of its kind. Blocks.
    pub fn keep(&self, manifest: Digest, command: Option<&CommandKey>, trace: &Trace) -> io::Result<()> {
        std::fs::create_dir_all(&self.0)?;
        let mut file = tempfile::NamedTempFile::new_in(&self.0)?;
        file.write_all(&trace.encode_to_vec())?;
        file.persist(self.path(manifest, command, trace.boot)).map_err(|error| error.error)?;
        self.prune()
    }

    /// The traces of an image, those without a boot pack first. What is damaged counts as not there. Blocks.
    pub fn find(&self, manifest: Digest) -> io::Result<Vec<KeptTrace>> {
        let mut found = Vec::new();
        for (boot, command) in self.kept(manifest)? {
            let file = match std::fs::File::open(self.path(manifest, command.as_ref(), boot)) {
                Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
                file => file?,
            };
            let mut bytes = Vec::new();
            file.take(TRACE_BYTES_MAX).read_to_end(&mut bytes)?;
            found.extend(Trace::decode(bytes.as_slice()).ok().map(|trace| KeptTrace { command, trace }));
        }
        Ok(found)
    }

    /// Forgets the traces of a command of an image, or all of the image. Blocks.
    pub fn forget(&self, manifest: Digest, command: Option<&CommandKey>) -> io::Result<()> {
        for (boot, of) in self.kept(manifest)? {
            if command.is_some() && of.as_ref() != command {
                continue;
            }
            match std::fs::remove_file(self.path(manifest, of.as_ref(), boot)) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
                _ => {}
            }
        }
        Ok(())
    }

    /// Which traces of an image there are: whether the start had a boot pack, and its command.
    fn kept(&self, manifest: Digest) -> io::Result<Vec<(bool, Option<CommandKey>)>> {
        let mut kept = Vec::new();
        let entries = match std::fs::read_dir(&self.0) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(kept),
            entries => entries?,
        };
        for entry in entries {
            let name = entry?.file_name();
            let Some(rest) = name.to_str().and_then(|name| name.strip_prefix(&manifest.hex())) else {
                continue;
            };
            for (boot, ending) in ENDINGS {
                let Some(command) = rest.strip_suffix(ending) else { continue };
                match command.strip_prefix('.').map(str::parse) {
                    None if command.is_empty() => kept.push((boot, None)),
                    Some(Ok(command)) => kept.push((boot, Some(command))),
                    _ => {}
                }
            }
        }
        kept.sort();
        Ok(kept)
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

    fn kept(command: Option<&CommandKey>, trace: Trace) -> KeptTrace {
        KeptTrace { command: command.cloned(), trace }
    }

    #[test]
    fn the_last_start_of_each_kind_is_kept_until_it_is_forgotten() {
        let directory = tempfile::tempdir().unwrap();
        let traces = KeptTraces::new(directory.path().join("traces"));
        let image = Digest::of(b"image");
        assert_eq!(traces.find(image).unwrap(), []);
        for one in [trace(true, 1), trace(false, 2), trace(false, 3)] {
            traces.keep(image, None, &one).unwrap();
        }
        assert_eq!(traces.find(image).unwrap(), [kept(None, trace(false, 3)), kept(None, trace(true, 1))]);
        traces.forget(image, None).unwrap();
        assert_eq!(traces.find(image).unwrap(), []);
    }

    #[test]
    fn each_command_has_traces_of_its_own() {
        let directory = tempfile::tempdir().unwrap();
        let traces = KeptTraces::new(directory.path().join("traces"));
        let (image, other) = (Digest::of(b"image"), Digest::of(b"other"));
        // what a name ends with may stand in a key as well
        let keys = ["a", "a.start", "start"].map(|key| key.parse::<CommandKey>().unwrap());
        for (key, number) in keys.iter().map(Some).chain([None]).zip(1..) {
            traces.keep(image, key, &trace(false, number)).unwrap();
        }
        traces.keep(image, Some(&keys[0]), &trace(true, 9)).unwrap();
        traces.keep(other, Some(&keys[0]), &trace(false, 8)).unwrap();
        let expected = [
            kept(None, trace(false, 4)),
            kept(Some(&keys[0]), trace(false, 1)),
            kept(Some(&keys[1]), trace(false, 2)),
            kept(Some(&keys[2]), trace(false, 3)),
            kept(Some(&keys[0]), trace(true, 9)),
        ];
        assert_eq!(traces.find(image).unwrap(), expected);
        traces.forget(image, Some(&keys[0])).unwrap();
        assert_eq!(traces.find(image).unwrap().len(), 3);
        traces.forget(image, None).unwrap();
        assert_eq!((traces.find(image).unwrap().len(), traces.find(other).unwrap().len()), (0, 1));
    }

    #[test]
    fn no_more_than_so_many_are_kept() {
        let directory = tempfile::tempdir().unwrap();
        let traces = KeptTraces::new(directory.path().to_owned());
        for number in 0..TRACES_MAX as u64 + 9 {
            traces.keep(Digest::of(&number.to_le_bytes()), None, &trace(false, number)).unwrap();
        }
        assert_eq!(std::fs::read_dir(directory.path()).unwrap().count(), TRACES_MAX);
    }
}
