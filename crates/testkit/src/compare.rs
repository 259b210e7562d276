//! Every difference between two directory trees, such as a mount and the same image unpacked.
//!
//! Compared are names (as bytes), types, permission bits, owners, sizes, times to the nanosecond, extended
//! attributes, link counts, which names share an inode, device numbers, targets of symbolic links, and every byte
//! of every file. Not compared are inode numbers, access and change times, the size of a directory, and
//! allocated blocks: a file system chooses those.
//!
//! Nothing is written, and symbolic links are never followed.

use std::collections::{BTreeMap, HashMap};
use std::ffi::{OsStr, OsString};
use std::fmt;
use std::fs::Metadata;
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

use self::contents::Pair;

mod contents;

/// More differences than a person reads; the walk stops there.
const DIFFERENCES_MAX: usize = 1000;

/// What to compare beside the file contents.
#[derive(Clone, Copy)]
pub struct Compare<'a> {
    /// Extended attributes that may differ, by their full names.
    pub xattrs_ignored: &'a [&'a str],
    /// Whether the time of the directory at this path, relative to the root (which is empty), is compared.
    pub directory_mtime: &'a dyn Fn(&Path) -> bool,
    /// Whether link counts of directories are compared: some file systems always say 1.
    pub directory_links: bool,
}

impl Default for Compare<'_> {
    /// Everything is compared.
    fn default() -> Self {
        Self { xattrs_ignored: &[], directory_mtime: &|_| true, directory_links: true }
    }
}

/// One difference.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Difference {
    /// Where, relative to both roots; empty for the roots themselves.
    pub path: PathBuf,
    /// What, the left tree first.
    pub what: String,
}

/// What was compared and what differs.
#[derive(Clone, Debug, Default)]
pub struct Comparison {
    /// The differences in order of paths, those of contents last; at most 1,000.
    pub differences: Vec<Difference>,
    /// Names that both trees have, the root among them.
    pub entries: u64,
    /// Bytes of files that were read on either side and compared.
    pub bytes: u64,
}

impl fmt::Display for Difference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "/{}: {}", self.path.as_os_str().as_bytes().escape_ascii(), self.what)
    }
}

impl Compare<'_> {
    /// Walks both trees and reads all their files, with as many threads as there are cores.
    ///
    /// # Errors
    /// When one side cannot be read; a file that cannot be read is a difference if the other one can.
    pub fn trees(&self, left: &Path, right: &Path) -> Result<Comparison> {
        let mut walk = Walk::new(self, left, right);
        walk.entry(PathBuf::new())?;
        let Walk { mut found, files, .. } = walk;
        contents::compare(&files, &mut found);
        found.differences.truncate(DIFFERENCES_MAX);
        Ok(found)
    }
}

struct Walk<'a> {
    compare: &'a Compare<'a>,
    roots: [&'a Path; 2],
    found: Comparison,
    /// Pairs whose bytes are still to be compared, each pair of inodes once.
    files: Vec<Pair>,
    /// The first name of each inode with several, on the left and on the right.
    names: [HashMap<(u64, u64), PathBuf>; 2],
}

impl<'a> Walk<'a> {
    fn new(compare: &'a Compare<'a>, left: &'a Path, right: &'a Path) -> Self {
        let names = [HashMap::new(), HashMap::new()];
        Self { compare, roots: [left, right], found: Comparison::default(), files: Vec::new(), names }
    }

    /// Compares what both trees have at `path`, and all below it.
    fn entry(&mut self, path: PathBuf) -> Result<()> {
        if self.found.differences.len() >= DIFFERENCES_MAX {
            return Ok(());
        }
        let full =
            self.roots.map(|root| if path.as_os_str().is_empty() { root.into() } else { root.join(&path) });
        let [left, right] = [&full[0], &full[1]]
            .map(|path| path.symlink_metadata().with_context(|| format!("stat {}", path.display())));
        let meta = [left?, right?];
        self.found.entries += 1;
        if meta[0].mode() & libc::S_IFMT != meta[1].mode() & libc::S_IFMT {
            self.differ(&path, "type", kind(&meta[0]), kind(&meta[1]));
            return Ok(());
        }
        self.attributes(&path, &meta);
        self.xattrs(&path, &full)?;
        if meta[0].is_symlink() {
            let targets = [std::fs::read_link(&full[0])?, std::fs::read_link(&full[1])?];
            self.expect_same(&path, "target", targets.map(|target| escape(target.as_os_str())));
        }
        if meta[0].is_dir() {
            return self.children(&path, &full);
        }
        let first_name = self.shared_inode(&path, &meta);
        if meta[0].is_file() && meta[0].len() == meta[1].len() && first_name {
            let [left, right] = full;
            self.files.push(Pair { path, left, right, bytes: meta[0].len() });
        }
        Ok(())
    }

    fn attributes(&mut self, path: &Path, [left, right]: &[Metadata; 2]) {
        let mode = |meta: &Metadata| format!("{:04o}", meta.mode() & 0o7777);
        let time = |meta: &Metadata| format!("{}.{:09}", meta.mtime(), meta.mtime_nsec());
        self.expect_same(path, "mode", [mode(left), mode(right)]);
        self.expect_same(path, "uid", [left.uid(), right.uid()]);
        self.expect_same(path, "gid", [left.gid(), right.gid()]);
        let dir = left.is_dir();
        if !dir || (self.compare.directory_mtime)(path) {
            self.expect_same(path, "mtime", [time(left), time(right)]);
        }
        if !dir || self.compare.directory_links {
            self.expect_same(path, "nlink", [left.nlink(), right.nlink()]);
        }
        if !dir {
            self.expect_same(path, "size", [left.len(), right.len()]);
            let device = |meta: &Metadata| (libc::major(meta.rdev()), libc::minor(meta.rdev()));
            self.expect_same(path, "device", [device(left), device(right)].map(|pair| format!("{pair:?}")));
        }
    }

    fn xattrs(&mut self, path: &Path, full: &[PathBuf; 2]) -> Result<()> {
        let ignored = self.compare.xattrs_ignored;
        let [left, right] = [xattrs(&full[0], ignored)?, xattrs(&full[1], ignored)?];
        for name in left.keys().chain(right.keys().filter(|name| !left.contains_key(*name))) {
            let value = |side: &BTreeMap<OsString, Vec<u8>>| match side.get(name) {
                None => "absent".to_owned(),
                Some(value) => format!("\"{}\"", value.escape_ascii()),
            };
            self.expect_same(path, &format!("xattr {}", escape(name)), [value(&left), value(&right)]);
        }
        Ok(())
    }

    fn children(&mut self, path: &Path, full: &[PathBuf; 2]) -> Result<()> {
        let [left, right] = [names(&full[0])?, names(&full[1])?];
        for name in left.iter().filter(|name| right.binary_search(name).is_err()) {
            self.differ(&path.join(name), "name", "present", "absent");
        }
        for name in &right {
            if left.binary_search(name).is_err() {
                self.differ(&path.join(name), "name", "absent", "present");
            } else {
                self.entry(path.join(name))?;
            }
        }
        Ok(())
    }

    /// Notes which names share an inode. Whether this name is the first of its inode, on both sides.
    fn shared_inode(&mut self, path: &Path, meta: &[Metadata; 2]) -> bool {
        let mut first = [path.to_owned(), path.to_owned()];
        for side in 0..2 {
            if meta[side].nlink() > 1 {
                let inode = (meta[side].dev(), meta[side].ino());
                first[side].clone_from(self.names[side].entry(inode).or_insert_with(|| path.to_owned()));
            }
        }
        let is_first = first.iter().any(|first| first == path);
        self.expect_same(path, "same inode as", first.map(|path| escape(path.as_os_str())));
        is_first
    }

    fn expect_same<T: PartialEq + fmt::Display>(&mut self, path: &Path, what: &str, [left, right]: [T; 2]) {
        if left != right {
            self.differ(path, what, left, right);
        }
    }

    fn differ(&mut self, path: &Path, what: &str, left: impl fmt::Display, right: impl fmt::Display) {
        self.found
            .differences
            .push(Difference { path: path.into(), what: format!("{what} {left} != {right}") });
    }
}

fn kind(meta: &Metadata) -> &'static str {
    match meta.mode() & libc::S_IFMT {
        libc::S_IFREG => "file",
        libc::S_IFDIR => "directory",
        libc::S_IFLNK => "symbolic link",
        libc::S_IFIFO => "pipe",
        libc::S_IFCHR => "character device",
        libc::S_IFBLK => "block device",
        libc::S_IFSOCK => "socket",
        _ => "unknown type",
    }
}

/// The names in a directory, sorted as bytes.
fn names(dir: &Path) -> Result<Vec<OsString>> {
    let list = || std::fs::read_dir(dir)?.map(|entry| Ok(entry?.file_name())).collect::<io::Result<Vec<_>>>();
    let mut names = list().with_context(|| format!("list {}", dir.display()))?;
    names.sort_unstable();
    Ok(names)
}

fn xattrs(path: &Path, ignored: &[&str]) -> Result<BTreeMap<OsString, Vec<u8>>> {
    let list = match xattr::list(path) {
        Err(error) if matches!(error.raw_os_error(), Some(libc::EOPNOTSUPP | libc::ENOSYS)) => {
            return Ok(BTreeMap::new());
        }
        list => list.with_context(|| format!("xattrs of {}", path.display()))?,
    };
    let mut found = BTreeMap::new();
    for name in list.filter(|name| !ignored.iter().any(|ignored| name == ignored)) {
        let value =
            xattr::get(path, &name).with_context(|| format!("xattr {name:?} of {}", path.display()))?;
        found.insert(name, value.unwrap_or_default());
    }
    Ok(found)
}

fn escape(text: &OsStr) -> String {
    text.as_bytes().escape_ascii().to_string()
}

#[cfg(test)]
mod tests;
