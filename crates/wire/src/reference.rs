//! `[host[:port]/]repository[:tag|@digest]`.

use std::fmt;
use std::str::FromStr;

use lamina_image::Digest;

/// Where a reference without a host points: the registry that `lamina registry` serves by default.
const DEFAULT_HOST: &str = "127.0.0.1:5000";
/// The distribution specification allows 255 characters for host and repository together.
const NAME_BYTES_MAX: usize = 255;

/// Which version of a repository's image.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Version {
    /// Whatever the tag points at.
    Tag(String),
    /// Exactly this manifest.
    Digest(Digest),
}

impl fmt::Display for Version {
    /// As it stands in the path of a manifest request.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Tag(tag) => f.write_str(tag),
            Self::Digest(digest) => digest.fmt(f),
        }
    }
}

/// An image in a registry.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Reference {
    /// `host[:port]`.
    pub host: String,
    /// The repository, of one or more parts.
    pub repository: String,
    /// The tag (`latest` where none was given) or digest.
    pub version: Version,
}

impl fmt::Display for Reference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let separator = if matches!(self.version, Version::Tag(_)) { ':' } else { '@' };
        write!(f, "{}/{}{separator}{}", self.host, self.repository, self.version)
    }
}

/// The text is not a reference.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{text:?} is not a reference: {reason}; write [host[:port]/]repository[:tag|@sha256:digest]")]
pub struct ParseReferenceError {
    text: String,
    reason: &'static str,
}

impl FromStr for Reference {
    type Err = ParseReferenceError;

    fn from_str(text: &str) -> Result<Self, ParseReferenceError> {
        let wrong = |reason| ParseReferenceError { text: text.chars().take(300).collect(), reason };
        let (name, version) = match text.split_once('@') {
            Some((name, digest)) => {
                let digest = digest.parse().map_err(|_| wrong("the digest is neither sha256 nor sha512"))?;
                // a tag beside a digest says nothing more
                (without_tag(name).0, Version::Digest(digest))
            }
            None => {
                let (name, tag) = without_tag(text);
                (name, Version::Tag(tag.unwrap_or("latest").to_owned()))
            }
        };
        let (host, repository) = match name.split_once('/') {
            Some((host, rest)) if host.contains(['.', ':']) || host == "localhost" => (host, rest),
            _ => (DEFAULT_HOST, name),
        };
        if name.len() > NAME_BYTES_MAX {
            return Err(wrong("it is longer than 255 characters"));
        }
        if !is_host(host) {
            return Err(wrong("the host is not a name or address with an optional port"));
        }
        if !is_repository_name(repository) {
            return Err(wrong("a repository has lower-case letters, digits and single separators . _ - /"));
        }
        if matches!(&version, Version::Tag(tag) if !is_tag(tag)) {
            return Err(wrong("a tag has up to 128 letters, digits and . _ -"));
        }
        Ok(Self { host: host.to_owned(), repository: repository.to_owned(), version })
    }
}

/// Splits the tag off: what follows the last colon, unless a slash comes after it.
fn without_tag(text: &str) -> (&str, Option<&str>) {
    match text.rsplit_once(':') {
        Some((name, tag)) if !tag.contains('/') => (name, Some(tag)),
        _ => (text, None),
    }
}

fn is_host(host: &str) -> bool {
    let Some(address) = host.strip_prefix('[') else {
        let (name, port) = host.split_once(':').unwrap_or((host, "1"));
        let name_fits = name.bytes().all(|byte| byte.is_ascii_alphanumeric() || b".-".contains(&byte));
        return !name.is_empty() && name_fits && port.parse::<u16>().is_ok();
    };
    let Some((address, port)) = address.split_once(']') else { return false };
    let port_fits = port.is_empty() || port.strip_prefix(':').is_some_and(|port| port.parse::<u16>().is_ok());
    address.parse::<std::net::Ipv6Addr>().is_ok() && port_fits
}

/// Whether this is the name of a repository: `[a-z0-9]+((\.|_|__|-+)[a-z0-9]+)*`, parts divided by `/`
/// (distribution-spec 1.1, "Pulling manifests").
pub fn is_repository_name(name: &str) -> bool {
    name.len() <= NAME_BYTES_MAX && name.split('/').all(is_repository_part)
}

fn is_repository_part(part: &str) -> bool {
    let is_word = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit();
    let bytes = part.as_bytes();
    let (Some(first), Some(last)) = (bytes.first(), bytes.last()) else { return false };
    let ends_fit = is_word(*first) && is_word(*last);
    let separators = part.split(|letter: char| letter.is_ascii() && is_word(letter as u8));
    ends_fit
        && separators.filter(|separator| !separator.is_empty()).all(|separator| {
            [".", "_", "__"].contains(&separator) || separator.bytes().all(|byte| byte == b'-')
        })
}

/// Whether this is a tag: `[a-zA-Z0-9_][a-zA-Z0-9._-]{0,127}`.
pub fn is_tag(tag: &str) -> bool {
    let rest_fits = |byte: u8| byte.is_ascii_alphanumeric() || b"._-".contains(&byte);
    (1..=128).contains(&tag.len()) && tag.bytes().all(rest_fits) && !tag.starts_with(['.', '-'])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn references_are_read_as_they_are_written() {
        let digest = Digest::of(b"");
        for (text, host, repository, version) in [
            ("torch", DEFAULT_HOST, "torch", Version::Tag("latest".into())),
            ("team/torch:2.8.0", DEFAULT_HOST, "team/torch", Version::Tag("2.8.0".into())),
            ("localhost/torch", "localhost", "torch", Version::Tag("latest".into())),
            ("r.example:5000/a/b:c", "r.example:5000", "a/b", Version::Tag("c".into())),
            ("[::1]:5000/a:b", "[::1]:5000", "a", Version::Tag("b".into())),
            (&format!("r.example/a@{digest}"), "r.example", "a", Version::Digest(digest)),
            (&format!("r.example/a:b@{digest}"), "r.example", "a", Version::Digest(digest)),
        ] {
            let expected = Reference { host: host.into(), repository: repository.into(), version };
            let parsed: Reference = text.parse().unwrap();
            assert_eq!(parsed, expected);
            assert_eq!(parsed.to_string().parse(), Ok(expected));
        }
    }

    #[test]
    fn what_could_name_something_else_is_refused() {
        for text in [
            "",
            ":",
            "a:",
            "A",
            "a//b",
            "a/../b",
            "a/./b",
            "a_.b",
            "a___b",
            "-a",
            "a-",
            "a b",
            "a%2fb",
            "a:b/c:d e",
            "r.example:99999/a",
            "r.example:x/a",
            "r.example/",
            "a@sha256:12",
            "ä",
            "[::1/a",
            "a:.b",
        ] {
            assert!(text.parse::<Reference>().is_err(), "{text:?}");
        }
        assert!("a".repeat(256).parse::<Reference>().is_err());
        assert!(is_repository_name("a--b/c__d/e.f_g"));
    }
}
