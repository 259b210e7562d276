//! One entry of a tar: a ustar header, before it PAX records for what such a header cannot say.

use std::fmt::Write;

use tar::{EntryType, Header};

const BLOCK: usize = 512;
/// Longer names and targets go to a PAX record.
const NAME_BYTES_MAX: usize = 100;

#[derive(Clone, Debug)]
pub(super) struct Entry {
    name: Vec<u8>,
    kind: Kind,
    pub(super) mode: u32,
    pub(super) uid: u64,
    pub(super) gid: u64,
    pub(super) mtime: (i64, u32),
    pub(super) xattrs: Vec<(Vec<u8>, Vec<u8>)>,
}

#[derive(Clone, Debug)]
pub(super) enum Kind {
    Dir,
    File(Vec<u8>),
    Sparse { len: u64, pieces: Vec<(u64, Vec<u8>)> },
    Symlink(Vec<u8>),
    Hardlink(Vec<u8>),
    Fifo,
    Device { block: bool, major: u32, minor: u32 },
}

impl Entry {
    pub(super) fn new(name: &[u8], kind: Kind, mode: u32) -> Self {
        Self { name: name.to_vec(), kind, mode, uid: 0, gid: 0, mtime: (0, 0), xattrs: Vec::new() }
    }

    /// Adds the entry with its headers and padding.
    pub(super) fn append(&self, tar: &mut Vec<u8>) {
        let records = self.records();
        if !records.is_empty() {
            let mut header = Header::new_ustar();
            put_name(&mut header.as_old_mut().name, b"PaxHeaders/entry");
            header.set_entry_type(EntryType::XHeader);
            header.set_mode(0o644);
            put(tar, &mut header, &records);
        }
        let body = self.body();
        let mut header = self.header();
        put(tar, &mut header, &body);
    }

    fn header(&self) -> Header {
        let mut header = Header::new_ustar();
        put_name(&mut header.as_old_mut().name, &self.name);
        if let Kind::Symlink(target) | Kind::Hardlink(target) = &self.kind {
            put_name(&mut header.as_old_mut().linkname, target);
        }
        if let Kind::Device { major, minor, .. } = self.kind {
            header.set_device_major(major).expect("ustar has the field");
            header.set_device_minor(minor).expect("ustar has the field");
        }
        header.set_entry_type(match &self.kind {
            Kind::Dir => EntryType::Directory,
            Kind::File(_) | Kind::Sparse { .. } => EntryType::Regular,
            Kind::Symlink(_) => EntryType::Symlink,
            Kind::Hardlink(_) => EntryType::Link,
            Kind::Fifo => EntryType::Fifo,
            Kind::Device { block: false, .. } => EntryType::Char,
            Kind::Device { block: true, .. } => EntryType::Block,
        });
        header.set_mode(self.mode);
        header.set_uid(self.uid);
        header.set_gid(self.gid);
        header.set_mtime(u64::try_from(self.mtime.0).unwrap_or(0));
        header
    }

    fn body(&self) -> Vec<u8> {
        match &self.kind {
            Kind::File(bytes) => bytes.clone(),
            Kind::Sparse { len, pieces } => {
                let whole = |piece: &(u64, Vec<u8>)| piece.1.len().is_multiple_of(BLOCK);
                assert!(
                    pieces.iter().rev().skip(1).all(whole),
                    "a piece before the last is not in whole blocks"
                );
                let mut map = format!("{}\n", pieces.len() + 1);
                for (offset, bytes) in pieces {
                    writeln!(map, "{offset}\n{}", bytes.len()).expect("a string takes all");
                }
                // An empty piece at the end says where the file ends, as GNU tar writes and expects it.
                writeln!(map, "{len}\n0").expect("a string takes all");
                let mut body = map.into_bytes();
                pad(&mut body);
                for (_, bytes) in pieces {
                    body.extend_from_slice(bytes);
                }
                body
            }
            _ => Vec::new(),
        }
    }

    /// The PAX records, empty where the header says it all.
    fn records(&self) -> Vec<u8> {
        let mut records = Vec::new();
        if let Kind::Sparse { len, .. } = &self.kind {
            record(&mut records, b"GNU.sparse.major", b"1");
            record(&mut records, b"GNU.sparse.minor", b"0");
            record(&mut records, b"GNU.sparse.name", &self.name);
            record(&mut records, b"GNU.sparse.realsize", len.to_string().as_bytes());
        } else if self.name.len() > NAME_BYTES_MAX {
            record(&mut records, b"path", &self.name);
        }
        if let Kind::Symlink(target) | Kind::Hardlink(target) = &self.kind
            && target.len() > NAME_BYTES_MAX
        {
            record(&mut records, b"linkpath", target);
        }
        let (seconds, nanos) = self.mtime;
        if seconds < 0 || nanos != 0 {
            let total = i128::from(seconds) * 1_000_000_000 + i128::from(nanos);
            let (sign, total) = (if total < 0 { "-" } else { "" }, total.unsigned_abs());
            let value = format!("{sign}{}.{:09}", total / 1_000_000_000, total % 1_000_000_000);
            record(&mut records, b"mtime", value.as_bytes());
        }
        for (name, value) in &self.xattrs {
            record(&mut records, &[b"SCHILY.xattr.", name.as_slice()].concat(), value);
        }
        records
    }
}

/// `LEN KEY=VALUE\n`, where LEN counts itself.
fn record(records: &mut Vec<u8>, key: &[u8], value: &[u8]) {
    let rest = key.len() + value.len() + 3;
    let mut len = rest + 1;
    while len != rest + len.to_string().len() {
        len = rest + len.to_string().len();
    }
    records.extend_from_slice(len.to_string().as_bytes());
    records.push(b' ');
    records.extend_from_slice(key);
    records.push(b'=');
    records.extend_from_slice(value);
    records.push(b'\n');
}

/// As much of `name` as the field holds: a PAX record has the rest.
fn put_name(field: &mut [u8; NAME_BYTES_MAX], name: &[u8]) {
    for (to, from) in field.iter_mut().zip(name) {
        *to = *from;
    }
}

fn put(tar: &mut Vec<u8>, header: &mut Header, body: &[u8]) {
    header.set_size(body.len() as u64);
    header.set_cksum();
    tar.extend_from_slice(header.as_bytes());
    tar.extend_from_slice(body);
    pad(tar);
}

fn pad(bytes: &mut Vec<u8>) {
    bytes.resize(bytes.len().next_multiple_of(BLOCK), 0);
}
