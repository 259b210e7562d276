//! Header blocks, numbers and paths.

use std::io;

use super::{TarError, lossy};

/// Everything in a tar comes in blocks of 512 bytes.
pub(super) const BLOCK: usize = 512;

/// Linux: `NAME_MAX`.
const NAME_BYTES_MAX: usize = 255;
/// Linux: `PATH_MAX`.
const PATH_BYTES_MAX: usize = 4096;

/// A header block, if its checksum is right. The sum may be of signed or unsigned bytes: old tars differ.
pub(super) fn checked_header(block: &[u8], at: u64) -> Result<tar::Header, TarError> {
    if block.len() < BLOCK {
        return Err(TarError::Truncated(at + block.len() as u64));
    }
    let mut header = tar::Header::new_old();
    header.as_mut_bytes().copy_from_slice(block);
    let said = number(header.cksum().map(u64::from), "checksum", at)?;
    let blank = |position: usize, byte: u8| if (148..156).contains(&position) { b' ' } else { byte };
    let bytes = || block.iter().enumerate().map(|(position, byte)| blank(position, *byte));
    let unsigned: u64 = bytes().map(u64::from).sum();
    let signed: i64 = bytes().map(|byte| i64::from(byte.cast_signed())).sum();
    if said != unsigned && i64::try_from(said) != Ok(signed) {
        return Err(TarError::Header { at, field: "checksum" });
    }
    Ok(header)
}

/// A field as the tar crate decoded it.
pub(super) fn number(decoded: io::Result<u64>, field: &'static str, at: u64) -> Result<u64, TarError> {
    decoded.map_err(|_| TarError::Header { at, field })
}

/// The same for a field that writers may leave blank, which means 0: GNU tar and Go read it so.
pub(super) fn or_blank(
    raw: &[u8],
    decoded: io::Result<u64>,
    field: &'static str,
    at: u64,
) -> Result<u64, TarError> {
    match raw.iter().all(|byte| [0, b' '].contains(byte)) {
        true => Ok(0),
        false => number(decoded, field, at),
    }
}

/// A number that may be negative: octal, or base 256 with the sign in its second bit.
pub(super) fn signed(field: &[u8; 12], name: &'static str, at: u64) -> Result<i64, TarError> {
    let wrong = TarError::Header { at, field: name };
    if field[0] & 0x80 != 0 {
        let first = if field[0] & 0x40 != 0 { field[0] } else { field[0] & 0x7f };
        let mut value = i128::from(first.cast_signed());
        for byte in &field[1..] {
            value = (value << 8) | i128::from(*byte);
        }
        return i64::try_from(value).map_err(|_| wrong);
    }
    let text = field.split(|byte| *byte == 0).next().unwrap_or_default();
    let text = std::str::from_utf8(text).map_err(|_| TarError::Header { at, field: name })?.trim();
    if text.is_empty() { Ok(0) } else { i64::from_str_radix(text, 8).map_err(|_| wrong) }
}

/// The parts of a path: `./a//b/` is `a`, `b`, and so is `/a/b`. An error for `..`, which could climb out, and
/// for what no file system takes.
pub fn path_parts(path: &[u8]) -> Result<Vec<&[u8]>, TarError> {
    let wrong = |reason| Err(TarError::Name { name: lossy(path), reason });
    if path.len() > PATH_BYTES_MAX {
        return wrong("is longer than 4096 bytes");
    }
    if path.contains(&0) {
        return wrong("contains a NUL");
    }
    let parts: Vec<&[u8]> =
        path.split(|byte| *byte == b'/').filter(|part| !part.is_empty() && *part != b".").collect();
    if parts.contains(&&b".."[..]) {
        return wrong("contains `..`");
    }
    if parts.iter().any(|part| part.len() > NAME_BYTES_MAX) {
        return wrong("has a part longer than 255 bytes");
    }
    Ok(parts)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_stay_inside_the_root() {
        assert_eq!(path_parts(b"./a//b/").unwrap(), [b"a", b"b"]);
        assert_eq!(path_parts(b"/etc/passwd").unwrap(), [&b"etc"[..], b"passwd"]);
        assert!(path_parts(b"./").unwrap().is_empty());
        for climbing in [&b"../x"[..], b"a/../../x", b"a/..", b"..", b"a\0b"] {
            assert!(path_parts(climbing).is_err(), "{}", lossy(climbing));
        }
        assert!(path_parts(&[b'a'; 256]).is_err());
    }

    #[test]
    fn times_before_1970_are_read() {
        let mut field = [0xff; 12];
        assert_eq!(signed(&field, "mtime", 0).unwrap(), -1);
        field = *b"00000000012\0";
        assert_eq!(signed(&field, "mtime", 0).unwrap(), 10);
        field = *b"banana\0\0\0\0\0\0";
        assert!(signed(&field, "mtime", 0).is_err());
    }
}
