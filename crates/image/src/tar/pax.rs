//! PAX extended headers: records of `length key=value\n`, where the value may be any bytes.

use std::collections::BTreeMap;

use super::TarError;

/// Before the name of an extended attribute.
const XATTR: &[u8] = b"SCHILY.xattr.";
/// More extended attributes on one entry are refused.
const XATTRS_MAX: usize = 1_000;

/// What the extension headers before an entry said about it.
#[derive(Clone, Debug, Default)]
pub(super) struct Extensions {
    pub(super) long_name: Option<Vec<u8>>,
    pub(super) long_link: Option<Vec<u8>>,
    path: Option<Vec<u8>>,
    link: Option<Vec<u8>>,
    pub(super) size: Option<u64>,
    pub(super) uid: Option<u64>,
    pub(super) gid: Option<u64>,
    pub(super) mtime: Option<(i64, u32)>,
    pub(super) xattrs: BTreeMap<Vec<u8>, Vec<u8>>,
    pub(super) sparse: PaxSparse,
}

/// What a global header says is said again of every entry, so 512 bytes of tar could become any number in memory. A
/// path and a link's target of 4096 bytes each fit.
const GLOBAL_BYTES_MAX: usize = 8192;

/// The `GNU.sparse` keys.
#[derive(Clone, Debug, Default)]
pub(super) struct PaxSparse {
    pub(super) version: Option<(u64, u64)>,
    name: Option<Vec<u8>>,
    pub(super) real_size: Option<u64>,
    /// Offsets and lengths, taking turns.
    pub(super) map: Vec<u64>,
}

impl Extensions {
    /// The entry's path, where an extension gave one.
    pub(super) fn path(&self) -> Option<Vec<u8>> {
        let given = [&self.sparse.name, &self.path, &self.long_name];
        given.into_iter().flatten().next().cloned()
    }

    /// The link's target, where an extension gave one.
    pub(super) fn link(&self) -> Option<Vec<u8>> {
        self.link.clone().or_else(|| self.long_link.clone())
    }

    /// That what is said of every entry is short.
    pub(super) fn check_global(&self) -> Result<(), TarError> {
        let texts = [&self.path, &self.link].into_iter().flatten().map(Vec::len);
        let xattrs = self.xattrs.iter().map(|(name, value)| name.len() + value.len());
        if texts.chain(xattrs).sum::<usize>() <= GLOBAL_BYTES_MAX {
            return Ok(());
        }
        let name = String::from_utf8_lossy(&self.path().unwrap_or_default()).chars().take(200).collect();
        Err(TarError::TooLarge { name, what: "a global header", limit: GLOBAL_BYTES_MAX as u64 })
    }

    /// These, and where they say nothing what a global header said.
    pub(super) fn over(self, global: &Self) -> Self {
        let mut xattrs = global.xattrs.clone();
        xattrs.extend(self.xattrs);
        Self {
            path: self.path.or_else(|| global.path.clone()),
            link: self.link.or_else(|| global.link.clone()),
            size: self.size.or(global.size),
            uid: self.uid.or(global.uid),
            gid: self.gid.or(global.gid),
            mtime: self.mtime.or(global.mtime),
            xattrs,
            ..self
        }
    }

    /// Takes the records of one extended header.
    pub(super) fn add(&mut self, mut data: &[u8], at: u64) -> Result<(), TarError> {
        let wrong = || TarError::Header { at, field: "PAX record" };
        while !data.is_empty() && data[0] != 0 {
            let space = data.iter().take(20).position(|byte| *byte == b' ').ok_or_else(wrong)?;
            let len: usize = parse(&data[..space]).ok_or_else(wrong)?;
            let record = data.get(space + 1..len).ok_or_else(wrong)?;
            let record = record.strip_suffix(b"\n").ok_or_else(wrong)?;
            let equals = record.iter().position(|byte| *byte == b'=').ok_or_else(wrong)?;
            let (key, value) = (&record[..equals], &record[equals + 1..]);
            // an empty value is no value, as in Go; only an attribute may really be empty
            if !value.is_empty() || key.starts_with(XATTR) {
                self.set(key, value, at)?;
            }
            data = &data[len..];
        }
        Ok(())
    }

    fn set(&mut self, key: &[u8], value: &[u8], at: u64) -> Result<(), TarError> {
        let wrong = |field| TarError::Header { at, field };
        let number = |field| parse::<u64>(value).ok_or_else(|| wrong(field));
        match key {
            b"path" => self.path = Some(value.to_vec()),
            b"linkpath" => self.link = Some(value.to_vec()),
            b"size" => self.size = Some(number("PAX size")?),
            b"uid" => self.uid = Some(number("PAX uid")?),
            b"gid" => self.gid = Some(number("PAX gid")?),
            b"mtime" => self.mtime = Some(time(value).ok_or_else(|| wrong("PAX mtime"))?),
            b"GNU.sparse.major" => self.sparse.version.get_or_insert_default().0 = number("sparse version")?,
            b"GNU.sparse.minor" => self.sparse.version.get_or_insert_default().1 = number("sparse version")?,
            b"GNU.sparse.name" => self.sparse.name = Some(value.to_vec()),
            b"GNU.sparse.size" | b"GNU.sparse.realsize" => {
                self.sparse.real_size = Some(number("sparse size")?);
            }
            b"GNU.sparse.offset" | b"GNU.sparse.numbytes" => self.sparse.map.push(number("sparse map")?),
            b"GNU.sparse.map" => {
                let numbers = value.split(|byte| *byte == b',').map(parse::<u64>);
                self.sparse.map = numbers.collect::<Option<_>>().ok_or_else(|| wrong("sparse map"))?;
            }
            _ => self.set_xattr(key, value, at)?,
        }
        Ok(())
    }

    fn set_xattr(&mut self, key: &[u8], value: &[u8], at: u64) -> Result<(), TarError> {
        let Some(name) = key.strip_prefix(XATTR) else { return Ok(()) };
        // Linux: XATTR_NAME_MAX and XATTR_SIZE_MAX
        let possible = (1..=255).contains(&name.len()) && !name.contains(&0) && value.len() <= 65_536;
        if !possible || self.xattrs.len() >= XATTRS_MAX {
            return Err(TarError::Header { at, field: "extended attribute" });
        }
        self.xattrs.insert(name.to_vec(), value.to_vec());
        Ok(())
    }
}

pub(super) fn parse<T: std::str::FromStr>(digits: &[u8]) -> Option<T> {
    if digits.is_empty() || !digits.iter().all(u8::is_ascii_digit) {
        return None;
    }
    std::str::from_utf8(digits).ok()?.parse().ok()
}

/// `-1.25` is 1.25 seconds before 1970: seconds rounded down, nanoseconds counted up. Digits beyond nanoseconds
/// are cut off.
fn time(text: &[u8]) -> Option<(i64, u32)> {
    let (negative, digits) = match text.strip_prefix(b"-") {
        Some(digits) => (true, digits),
        None => (false, text),
    };
    let mut parts = digits.splitn(2, |byte| *byte == b'.');
    let seconds: i64 = parse(parts.next()?)?;
    let mut nanoseconds = 0u32;
    let fraction = parts.next().unwrap_or_default();
    if !fraction.iter().all(u8::is_ascii_digit) {
        return None;
    }
    for digit in fraction.iter().chain([b'0'; 9].iter()).take(9) {
        nanoseconds = nanoseconds * 10 + u32::from(digit - b'0');
    }
    Some(match (negative, nanoseconds) {
        (false, _) => (seconds, nanoseconds),
        (true, 0) => (-seconds, 0),
        (true, _) => (-seconds - 1, 1_000_000_000 - nanoseconds),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_may_hold_newlines_and_zeros() {
        let mut found = Extensions::default();
        found.add(b"34 SCHILY.xattr.user.x=a\n=\0\n12 bytes\n", 0).unwrap_err();
        let mut found = Extensions::default();
        found.add(b"29 SCHILY.xattr.user.x=a\n=\0b\n13 path=a/bc\n", 0).unwrap();
        assert_eq!(found.xattrs[&b"user.x"[..]], b"a\n=\0b");
        assert_eq!(found.path().unwrap(), b"a/bc");
    }

    #[test]
    fn an_empty_value_says_nothing_but_of_an_attribute() {
        let mut found = Extensions::default();
        found.add(b"8 path=\n8 size=\n9 mtime=\n24 SCHILY.xattr.user.x=\n", 0).unwrap();
        assert_eq!((found.path(), found.size, found.mtime), (None, None, None));
        assert_eq!(found.xattrs[&b"user.x"[..]], b"");
    }

    #[test]
    fn times_keep_their_nanoseconds_on_both_sides_of_1970() {
        for (text, expected) in [
            ("12", Some((12, 0))),
            ("1.5", Some((1, 500_000_000))),
            ("1.123456789123", Some((1, 123_456_789))),
            ("-1.25", Some((-2, 750_000_000))),
            ("-3", Some((-3, 0))),
            ("x", None),
            ("1.x", None),
            ("", None),
        ] {
            assert_eq!(time(text.as_bytes()), expected, "{text}");
        }
    }

    #[test]
    fn records_whose_lengths_lie_are_refused() {
        for bad in [&b"5 a=b\n"[..], b"99 a=b\n", b"x a=b\n", b"6 ab\n\n", b"3 a", b"0 a=b\n"] {
            assert!(Extensions::default().add(bad, 0).is_err(), "{}", String::from_utf8_lossy(bad));
        }
    }
}
