//! Files as the writers of the world put them into tars, and what a reader should find.

use std::collections::BTreeMap;

use super::header::header;
use super::memory::noise;

/// A way to write one file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Layout {
    Ustar,
    Gnu,
    Pax,
    GnuSparse,
    PaxSparse00,
    PaxSparse01,
    PaxSparse10,
}

impl Layout {
    fn is_pax(self) -> bool {
        matches!(self, Self::Pax | Self::PaxSparse00 | Self::PaxSparse01 | Self::PaxSparse10)
    }

    fn is_sparse(self) -> bool {
        !matches!(self, Self::Ustar | Self::Gnu | Self::Pax)
    }
}

/// One file and how to write it.
#[derive(Clone, Debug)]
pub(crate) struct WrittenFile {
    pub(crate) layout: Layout,
    /// The directories above it.
    pub(crate) parts: Vec<Vec<u8>>,
    /// A hole's length and the length of the bytes after it. In files that are not sparse the holes are missing.
    pub(crate) runs: Vec<(u64, usize)>,
    pub(crate) xattrs: BTreeMap<String, Vec<u8>>,
    pub(crate) mtime: (i64, u32),
    pub(crate) mode: u32,
    pub(crate) owner: (u32, u32),
    /// Whether a hard link to it follows.
    pub(crate) linked: bool,
}

impl WrittenFile {
    pub(crate) fn path(&self, number: usize) -> Vec<u8> {
        let name = format!("file-{number}").into_bytes();
        match self.layout {
            Layout::Ustar | Layout::GnuSparse => name,
            _ => [self.parts.clone(), vec![name]].concat().join(&b'/'),
        }
    }

    /// Where the stored bytes lie.
    fn segments(&self) -> Vec<(u64, u64)> {
        let mut end = 0;
        let segment = |(hole, len): &(u64, usize)| {
            let offset = end + if self.layout.is_sparse() { *hole } else { 0 };
            end = offset + *len as u64;
            (offset, *len as u64)
        };
        self.runs.iter().map(segment).collect()
    }

    fn stored(&self, number: usize) -> Vec<u8> {
        noise(self.runs.iter().map(|(_, len)| len).sum(), number as u64 + 7)
    }

    pub(crate) fn bytes(&self, number: usize) -> Vec<u8> {
        let stored = self.stored(number);
        let (mut bytes, mut taken) = (Vec::new(), 0);
        for (offset, len) in self.segments() {
            let (offset, len) = (usize::try_from(offset).unwrap(), usize::try_from(len).unwrap());
            bytes.resize(offset, 0);
            bytes.extend_from_slice(&stored[taken..taken + len]);
            taken += len;
        }
        bytes
    }

    /// Only PAX has nanoseconds, and times before 1970 without tricks.
    pub(crate) fn mtime_as_kept(&self) -> (i64, u32) {
        if self.layout.is_pax() { self.mtime } else { (self.mtime.0.abs() >> 8, 0) }
    }

    pub(crate) fn owner_as_kept(&self) -> (u32, u32) {
        match self.layout {
            Layout::Gnu | Layout::GnuSparse => self.owner,
            layout if layout.is_pax() => self.owner,
            // seven octal digits
            _ => (self.owner.0 >> 11, self.owner.1 >> 11),
        }
    }

    pub(crate) fn xattrs_as_kept(&self) -> Vec<(Vec<u8>, Vec<u8>)> {
        let pairs = self.xattrs.iter().filter(|_| self.layout.is_pax());
        // a `=` would end the key of a PAX record
        let pairs = pairs.filter(|(name, _)| !name.contains('='));
        pairs.map(|(name, value)| (name.clone().into_bytes(), value.clone())).collect()
    }

    fn pax_records(&self, number: usize) -> Vec<(String, Vec<u8>)> {
        let mut records = vec![("path".to_owned(), self.path(number))];
        for (name, value) in self.xattrs_as_kept() {
            records.push((format!("SCHILY.xattr.{}", String::from_utf8(name).unwrap()), value));
        }
        let (seconds, nanoseconds) = self.mtime;
        let mtime = match (seconds < 0, nanoseconds) {
            (true, 1..) => {
                let (seconds, nanoseconds) = (-(seconds + 1), 1_000_000_000 - nanoseconds);
                format!("-{seconds}.{nanoseconds:09}")
            }
            (_, nanoseconds) => format!("{seconds}.{nanoseconds:09}"),
        };
        records.push(("mtime".to_owned(), mtime.into_bytes()));
        records.push(("uid".to_owned(), self.owner.0.to_string().into_bytes()));
        records.push(("gid".to_owned(), self.owner.1.to_string().into_bytes()));
        records.push(("VENDOR.unknown".to_owned(), b"\0\n=".to_vec()));
        self.pax_sparse(number, &mut records);
        records
    }

    fn pax_sparse(&self, number: usize, records: &mut Vec<(String, Vec<u8>)>) {
        let mut push = |key: &str, value: String| records.push((key.to_owned(), value.into_bytes()));
        let size = self.bytes(number).len().to_string();
        let segments = self.segments();
        match self.layout {
            Layout::PaxSparse00 => {
                push("GNU.sparse.size", size);
                push("GNU.sparse.numblocks", segments.len().to_string());
                for (offset, len) in segments {
                    push("GNU.sparse.offset", offset.to_string());
                    push("GNU.sparse.numbytes", len.to_string());
                }
            }
            Layout::PaxSparse01 => {
                push("GNU.sparse.size", size);
                let numbers = segments.iter().flat_map(|(offset, len)| [offset.to_string(), len.to_string()]);
                push("GNU.sparse.map", numbers.collect::<Vec<_>>().join(","));
            }
            Layout::PaxSparse10 => {
                push("GNU.sparse.major", "1".to_owned());
                push("GNU.sparse.minor", "0".to_owned());
                push("GNU.sparse.realsize", size);
                records.push(("GNU.sparse.name".to_owned(), self.path(number)));
            }
            Layout::Ustar | Layout::Gnu | Layout::Pax | Layout::GnuSparse => {}
        }
    }

    fn header(&self, stored_len: usize) -> tar::Header {
        let kind = match self.layout {
            Layout::GnuSparse => tar::EntryType::GNUSparse,
            _ => tar::EntryType::Regular,
        };
        let mut header = header(kind, stored_len as u64);
        if self.layout == Layout::Ustar {
            header = tar::Header::new_ustar();
            header.set_entry_type(kind);
            header.set_size(stored_len as u64);
        }
        header.set_mode(self.mode);
        let (uid, gid) = self.owner_as_kept();
        let fits = self.layout != Layout::Ustar || uid.max(gid) < 1 << 21;
        assert!(fits, "seven octal digits");
        header.set_uid(uid.into());
        header.set_gid(gid.into());
        header.set_mtime(self.mtime_as_kept().0.unsigned_abs());
        header
    }

    /// Header, its extensions and the map, for the old GNU way.
    fn gnu_sparse(&self, number: usize, tar: &mut Vec<u8>) {
        let stored = self.stored(number);
        let mut header = self.header(stored.len());
        let path = self.path(number);
        header.as_old_mut().name[..path.len()].copy_from_slice(&path);
        let octal = |value: u64| -> [u8; 12] { format!("{value:011o}\0").into_bytes().try_into().unwrap() };
        let pairs: Vec<[[u8; 12]; 2]> =
            self.segments().into_iter().map(|(offset, len)| [octal(offset), octal(len)]).collect();
        let gnu = header.as_gnu_mut().unwrap();
        gnu.realsize = octal(self.bytes(number).len() as u64);
        for (place, [offset, len]) in gnu.sparse.iter_mut().zip(&pairs) {
            (place.offset, place.numbytes) = (*offset, *len);
        }
        let rest = pairs.get(4..).unwrap_or_default();
        gnu.isextended[0] = u8::from(!rest.is_empty());
        header.set_cksum();
        tar.extend_from_slice(header.as_bytes());
        let blocks = rest.chunks(21).len();
        for (block, pairs) in rest.chunks(21).enumerate() {
            let mut extension = [0; 512];
            for (place, pair) in extension.chunks_exact_mut(24).zip(pairs) {
                place.copy_from_slice(&pair.concat());
            }
            extension[504] = u8::from(block + 1 < blocks);
            tar.extend_from_slice(&extension);
        }
        tar.extend_from_slice(&stored);
        tar.resize(tar.len().next_multiple_of(512), 0);
    }

    fn write(&self, number: usize, tar: &mut Vec<u8>) {
        if self.layout == Layout::GnuSparse {
            return self.gnu_sparse(number, tar);
        }
        let mut stored = self.stored(number);
        if self.layout == Layout::PaxSparse10 {
            let segments = self.segments();
            let mut map = format!("{}\n", segments.len());
            segments.iter().for_each(|(offset, len)| map.push_str(&format!("{offset}\n{len}\n")));
            let mut map = map.into_bytes();
            map.resize(map.len().next_multiple_of(512), 0);
            stored = [map, stored].concat();
        }
        let mut header = self.header(stored.len());
        let mut builder = tar::Builder::new(Vec::new());
        let path = self.path(number);
        if self.layout.is_pax() {
            let records = self.pax_records(number);
            builder
                .append_pax_extensions(records.iter().map(|(key, value)| (key.as_str(), &value[..])))
                .unwrap();
            header.as_old_mut().name[..5].copy_from_slice(b"short");
            header.set_cksum();
            builder.append(&header, &stored[..]).unwrap();
        } else {
            // by hand: the tar crate cannot shorten a name that is not UTF-8
            if path.len() > 100 {
                let long = [&path[..], b"\0"].concat();
                let mut extension = super::header::header(tar::EntryType::GNULongName, long.len() as u64);
                extension.as_old_mut().name[..13].copy_from_slice(b"././@LongLink");
                extension.set_cksum();
                builder.append(&extension, &long[..]).unwrap();
            }
            let short = path.len().min(100);
            header.as_old_mut().name[..short].copy_from_slice(&path[..short]);
            header.set_cksum();
            builder.append(&header, &stored[..]).unwrap();
        }
        let len = tar.len();
        tar.extend_from_slice(builder.get_ref());
        assert_eq!((tar.len() - len) % 512, 0);
    }
}

fn bytes_as_str(bytes: &[u8]) -> &std::ffi::OsStr {
    std::os::unix::ffi::OsStrExt::from_bytes(bytes)
}

/// All files, and the hard links to them.
pub(crate) fn write_tar(files: &[WrittenFile]) -> Vec<u8> {
    let mut tar = Vec::new();
    for (number, file) in files.iter().enumerate() {
        file.write(number, &mut tar);
        if file.linked {
            let mut builder = tar::Builder::new(Vec::new());
            let target = file.path(number);
            let mut header = header(tar::EntryType::Link, 0);
            builder.append_link(&mut header, format!("link-{number}"), bytes_as_str(&target)).unwrap();
            tar.extend_from_slice(builder.get_ref());
        }
    }
    tar.resize(tar.len() + 1024, 0);
    tar
}
