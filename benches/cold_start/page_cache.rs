//! The kernel's page cache of one directory, kept while all others are emptied.
//!
//! Node and registry are two machines that share this one's memory. A start is cold for the node; its registry goes on, with what it
//! had in memory.

use std::fs::File;
use std::io::{self, Write};
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use memmap2::MmapOptions;

/// Read at once when a file's pages are brought back, in bytes.
const PIECE: usize = 1 << 20;

/// Empties the kernel's caches of files, names and inodes, but for the pages that files below `kept` have there.
///
/// *Errors*: of the files, and where this process may not.
pub(crate) fn drop_all_but(kept: &[PathBuf]) -> io::Result<()> {
    let mut resident = Vec::new();
    for dir in kept.iter().filter(|dir| dir.exists()) {
        find(dir, &mut resident)?;
    }
    rustix::fs::sync();
    File::options().write(true).open("/proc/sys/vm/drop_caches")?.write_all(b"3")?;
    resident.iter().try_for_each(|(file, parts)| bring_back(file, parts))
}

/// Adds which parts of each file below `dir` are in the page cache.
fn find(dir: &Path, resident: &mut Vec<(PathBuf, Vec<Range<u64>>)>) -> io::Result<()> {
    for entry in dir.read_dir()? {
        let entry = entry?;
        let (path, kind) = (entry.path(), entry.file_type()?);
        if kind.is_dir() {
            find(&path, resident)?;
        } else if kind.is_file() {
            // a registry that works removes some
            if let Some(file) = present(File::open(&path))? {
                resident.push((path, parts_in_memory(&file)?));
            }
        }
    }
    Ok(())
}

fn present(opened: io::Result<File>) -> io::Result<Option<File>> {
    match opened {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        opened => opened.map(Some),
    }
}

/// mincore(2), which tells of any file to root.
fn parts_in_memory(file: &File) -> io::Result<Vec<Range<u64>>> {
    let len = usize::try_from(file.metadata()?.len()).map_err(io::Error::other)?;
    if len == 0 {
        return Ok(Vec::new());
    }
    let page = rustix::param::page_size();
    #[expect(unsafe_code, reason = "mapping a file is unsafe because others could truncate it")]
    // SAFETY: nobody looks at what is mapped
    let map = unsafe { MmapOptions::new().len(len).map(file) }?;
    let mut pages = vec![0_u8; len.div_ceil(page)];
    #[expect(unsafe_code, reason = "rustix lacks mincore")]
    // SAFETY: the mapping is that long, and there is a byte for each of its pages
    let done = unsafe { libc::mincore(map.as_ptr().cast_mut().cast(), len, pages.as_mut_ptr()) };
    if done != 0 {
        return Err(io::Error::last_os_error());
    }
    let mut at = 0;
    let parts = pages.chunk_by(|one, next| one & 1 == next & 1).map(|part| {
        let begun = at;
        at += (part.len() * page) as u64;
        (part[0] & 1 == 1, begun..at)
    });
    Ok(parts.filter_map(|(is_here, part)| is_here.then_some(part)).collect())
}

fn bring_back(path: &Path, parts: &[Range<u64>]) -> io::Result<()> {
    let Some(file) = present(File::open(path))? else { return Ok(()) };
    // not what the kernel would read ahead
    rustix::fs::fadvise(&file, 0, None, rustix::fs::Advice::Random)?;
    let mut piece = vec![0; PIECE];
    for part in parts {
        let mut at = part.start;
        while at < part.end {
            let len = usize::try_from(part.end - at).map_or(PIECE, |left| left.min(PIECE));
            match file.read_at(&mut piece[..len], at)? {
                0 => break,
                read => at += read as u64,
            }
        }
    }
    Ok(())
}
