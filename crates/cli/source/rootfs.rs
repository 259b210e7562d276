//! A directory as an image of one layer.

use std::collections::HashMap;
use std::fs::{self, File, Metadata};
use std::io::{self, Read, Write};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};

use anyhow::{Result, ensure};
use lamina_image::Platform;

use super::{Source, SourceImage, SourceLayer};

/// Names that fit the old header; longer ones go into an extension.
const OLD_NAME_BYTES: usize = 100;
/// Numbers that fit the old header's eight octal digits.
const OLD_NUMBER_MAX: u64 = 0o777_7777;

/// A root file system on disk. Other file systems mounted in it are left out.
pub(super) struct Rootfs {
    root: PathBuf,
    image: SourceImage,
}

impl Rootfs {
    pub(super) fn open(root: &Path, _platform: &Platform) -> Result<Self> {
        ensure!(root.is_dir(), "{}: there is no such directory", root.display());
        let layers = vec![SourceLayer { descriptor: None, diff_id: None, len: None }];
        Ok(Self { root: root.to_owned(), image: SourceImage { manifest: None, config: None, layers } })
    }
}

impl Source for Rootfs {
    fn image(&self) -> &SourceImage {
        &self.image
    }

    fn layer(&self, _number: usize) -> Result<Box<dyn Read + Send>> {
        let (reader, writer) = io::pipe()?;
        let root = self.root.clone();
        let thread = std::thread::Builder::new().name("tar".into()).spawn(move || {
            let mut tar = TarWriter::new(io::BufWriter::with_capacity(1 << 20, writer), &root)?;
            tar.directory(&root, b"./")?;
            tar.finish()
        })?;
        Ok(Box::new(Piped { reader, thread: Some(thread) }))
    }
}

/// The tar on its way. Ends in the writer's error where it had one, not in a short tar.
struct Piped {
    reader: io::PipeReader,
    thread: Option<std::thread::JoinHandle<io::Result<()>>>,
}

impl Read for Piped {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let len = self.reader.read(buffer)?;
        if len == 0
            && let Some(thread) = self.thread.take()
        {
            thread.join().map_err(|_| io::Error::other("the writer of the tar has died"))??;
        }
        Ok(len)
    }
}

/// Writes a PAX tar of a directory: entries sorted by name, so that the same directory gives the same bytes.
struct TarWriter<W> {
    out: W,
    device: u64,
    /// The first name of each file that has several.
    links: HashMap<u64, Vec<u8>>,
}

impl<W: Write> TarWriter<W> {
    fn new(out: W, root: &Path) -> io::Result<Self> {
        Ok(Self { out, device: fs::metadata(root)?.dev(), links: HashMap::new() })
    }

    fn directory(&mut self, path: &Path, name: &[u8]) -> io::Result<()> {
        let metadata = fs::symlink_metadata(path)?;
        self.entry(path, name, &metadata)?;
        if metadata.dev() != self.device {
            // what is mounted here is not part of the image
            return Ok(());
        }
        let mut children =
            fs::read_dir(path).map_err(|error| named(path, &error))?.collect::<io::Result<Vec<_>>>()?;
        children.sort_by_key(fs::DirEntry::file_name);
        for child in children {
            let (path, mut name) = (child.path(), name.to_vec());
            name.extend_from_slice(child.file_name().as_bytes());
            let metadata = fs::symlink_metadata(&path).map_err(|error| named(&path, &error))?;
            if metadata.is_dir() {
                name.push(b'/');
                self.directory(&path, &name)?;
            } else {
                self.entry(&path, &name, &metadata)?;
            }
        }
        Ok(())
    }

    fn entry(&mut self, path: &Path, name: &[u8], metadata: &Metadata) -> io::Result<()> {
        let kind = metadata.file_type();
        if kind.is_socket() {
            // sockets belong to running programs; no tar has them
            return Ok(());
        }
        let mut header = tar::Header::new_ustar();
        let mut extensions = Extensions::default();
        let mut link = Vec::new();
        let mut contents = None;
        let entry_type = if kind.is_dir() {
            tar::EntryType::Directory
        } else if metadata.nlink() > 1 && self.links.contains_key(&metadata.ino()) {
            link.clone_from(&self.links[&metadata.ino()]);
            tar::EntryType::Link
        } else {
            if metadata.nlink() > 1 {
                self.links.insert(metadata.ino(), name.to_vec());
            }
            if kind.is_symlink() {
                link = fs::read_link(path)?.as_os_str().as_bytes().to_vec();
                tar::EntryType::Symlink
            } else if kind.is_file() {
                contents = Some(File::open(path).map_err(|error| named(path, &error))?);
                tar::EntryType::Regular
            } else {
                let device = metadata.rdev();
                header.set_device_major(libc::major(device))?;
                header.set_device_minor(libc::minor(device))?;
                let devices = [
                    (kind.is_char_device(), tar::EntryType::Char),
                    (kind.is_block_device(), tar::EntryType::Block),
                ];
                devices
                    .into_iter()
                    .find(|(is, _)| *is)
                    .map_or(tar::EntryType::Fifo, |(_, entry_type)| entry_type)
            }
        };
        header.set_entry_type(entry_type);
        header.set_mode(metadata.mode() & 0o7777);
        extensions.name(b"path", name, &mut header.as_old_mut().name);
        extensions.name(b"linkpath", &link, &mut header.as_old_mut().linkname);
        let size = if contents.is_some() { metadata.size() } else { 0 };
        extensions.number("size", size, 0o777_7777_7777, |size| header.set_size(size));
        extensions.number("uid", metadata.uid().into(), OLD_NUMBER_MAX, |id| header.set_uid(id));
        extensions.number("gid", metadata.gid().into(), OLD_NUMBER_MAX, |id| header.set_gid(id));
        header.set_mtime(u64::try_from(metadata.mtime()).unwrap_or(0));
        extensions.time(metadata.mtime(), metadata.mtime_nsec());
        if entry_type != tar::EntryType::Link {
            extensions.xattrs(path)?;
        }
        extensions.write(&mut self.out)?;
        header.set_cksum();
        self.out.write_all(header.as_bytes())?;
        match contents {
            Some(file) => self.contents(path, file, size),
            None => Ok(()),
        }
    }

    /// Exactly `size` bytes: a file that shrinks meanwhile is an error, one that grows is cut.
    fn contents(&mut self, path: &Path, file: File, size: u64) -> io::Result<()> {
        let copied = io::copy(&mut file.take(size), &mut self.out).map_err(|error| named(path, &error))?;
        if copied < size {
            return Err(named(path, &io::Error::other("it got shorter while it was read")));
        }
        let padding = size.next_multiple_of(512) - size;
        self.out.write_all(&[0; 512][..usize::try_from(padding).expect("less than a block")])
    }

    fn finish(mut self) -> io::Result<()> {
        self.out.write_all(&[0; 1024])?;
        self.out.flush()
    }
}

fn named(path: &Path, error: &io::Error) -> io::Error {
    io::Error::new(error.kind(), format!("{}: {error}", path.display()))
}

/// The PAX records of one entry.
#[derive(Default)]
struct Extensions(Vec<u8>);

impl Extensions {
    fn record(&mut self, key: &[u8], value: &[u8]) {
        // the length counts its own digits
        let rest = key.len() + value.len() + 3;
        let mut len = rest + 1;
        while len != rest + len.to_string().len() {
            len = rest + len.to_string().len();
        }
        self.0.extend_from_slice(len.to_string().as_bytes());
        self.0.push(b' ');
        self.0.extend_from_slice(key);
        self.0.push(b'=');
        self.0.extend_from_slice(value);
        self.0.push(b'\n');
    }

    fn name(&mut self, key: &[u8], name: &[u8], field: &mut [u8; OLD_NAME_BYTES]) {
        let fits = name.len().min(OLD_NAME_BYTES);
        field[..fits].copy_from_slice(&name[..fits]);
        if name.len() > OLD_NAME_BYTES {
            self.record(key, name);
        }
    }

    fn number(&mut self, key: &str, number: u64, old_max: u64, set: impl FnOnce(u64)) {
        set(if number > old_max { 0 } else { number });
        if number > old_max {
            self.record(key.as_bytes(), number.to_string().as_bytes());
        }
    }

    fn time(&mut self, seconds: i64, nanoseconds: i64) {
        if nanoseconds == 0 && seconds >= 0 {
            return;
        }
        // PAX writes 1.25 seconds before 1970 as -1.25, stat(2) as -2 s and 750,000,000 ns
        let text = match (seconds, nanoseconds) {
            (seconds, 0) => format!("{seconds}"),
            (seconds, nanoseconds) if seconds >= 0 => format!("{seconds}.{nanoseconds:09}"),
            (seconds, nanoseconds) => format!("-{}.{:09}", -(seconds + 1), 1_000_000_000 - nanoseconds),
        };
        self.record(b"mtime", text.as_bytes());
    }

    fn xattrs(&mut self, path: &Path) -> io::Result<()> {
        let mut names: Vec<_> = match xattr::list(path) {
            Ok(names) => names.collect(),
            Err(error) if error.kind() == io::ErrorKind::Unsupported => return Ok(()),
            Err(error) => return Err(named(path, &error)),
        };
        names.sort();
        for name in names {
            if let Some(value) = xattr::get(path, &name)? {
                self.record(&[b"SCHILY.xattr.", name.as_bytes()].concat(), &value);
            }
        }
        Ok(())
    }

    fn write(self, out: &mut impl Write) -> io::Result<()> {
        if self.0.is_empty() {
            return Ok(());
        }
        let mut header = tar::Header::new_ustar();
        header.set_entry_type(tar::EntryType::XHeader);
        header.as_old_mut().name[..11].copy_from_slice(b"PaxHeaders/");
        header.set_mode(0o644);
        header.set_uid(0);
        header.set_gid(0);
        header.set_mtime(0);
        header.set_size(self.0.len() as u64);
        header.set_cksum();
        out.write_all(header.as_bytes())?;
        out.write_all(&self.0)?;
        out.write_all(&[0; 512][..self.0.len().next_multiple_of(512) - self.0.len()])
    }
}
