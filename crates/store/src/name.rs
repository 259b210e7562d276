//! Names of repositories and tags, checked against the grammar of OCI distribution-spec 1.1.

use std::fmt;
use std::str::FromStr;

/// A repository's name: `library/debian`. At most 255 bytes; parts of lower-case letters and digits, with single
/// separators between them. It cannot hold `..`, a percent sign, or anything else that a path would take apart.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Repo(String);

/// A tag: at most 128 letters, digits, underscores, and after the first also dots and dashes.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Tag(String);

/// The text is not such a name.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ParseNameError {
    /// Not a repository's name.
    #[error("{0:?} is not a repository name: lower-case letters and digits, with . _ __ - / between them")]
    Repo(String),
    /// Not a tag.
    #[error("{0:?} is not a tag: up to 128 letters, digits, and _ . - after the first")]
    Tag(String),
}

impl Repo {
    /// The name.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl Tag {
    /// The tag.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for Repo {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl fmt::Display for Tag {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl FromStr for Repo {
    type Err = ParseNameError;

    fn from_str(text: &str) -> Result<Self, ParseNameError> {
        if text.len() <= 255 && text.split('/').all(is_component) {
            return Ok(Self(text.to_owned()));
        }
        Err(ParseNameError::Repo(text.chars().take(100).collect()))
    }
}

impl FromStr for Tag {
    type Err = ParseNameError;

    fn from_str(text: &str) -> Result<Self, ParseNameError> {
        let word = |byte: u8| byte.is_ascii_alphanumeric() || byte == b'_';
        let good = text.len() <= 128
            && text.bytes().next().is_some_and(word)
            && text.bytes().all(|byte| word(byte) || byte == b'.' || byte == b'-');
        if good {
            Ok(Self(text.to_owned()))
        } else {
            Err(ParseNameError::Tag(text.chars().take(100).collect()))
        }
    }
}

/// `[a-z0-9]+((\.|_|__|-+)[a-z0-9]+)*`
fn is_component(text: &str) -> bool {
    let alphanumeric = |byte: &u8| byte.is_ascii_lowercase() || byte.is_ascii_digit();
    let bytes = text.as_bytes();
    let (Some(first), Some(last)) = (bytes.first(), bytes.last()) else { return false };
    if !alphanumeric(first) || !alphanumeric(last) {
        return false;
    }
    let separators = bytes.split(alphanumeric).filter(|run| !run.is_empty());
    separators
        .into_iter()
        .all(|run| matches!(run, b"." | b"_" | b"__") || run.iter().all(|byte| *byte == b'-'))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn repository_names_follow_the_grammar() {
        for good in ["a", "library/debian", "a.b_c__d-e---f/0", "a/b/c/d"] {
            assert!(good.parse::<Repo>().is_ok(), "{good}");
        }
        let long = "a".repeat(256);
        for bad in [
            "", "/", "a/", "/a", "a//b", "A", "a..b", "../a", "a/..", "a___b", "a._b", "-a", "a-", "a%2f",
            "a!b", "ä", &long,
        ] {
            assert!(bad.parse::<Repo>().is_err(), "{bad}");
        }
    }

    #[test]
    fn tags_follow_the_grammar() {
        for good in ["v1", "_", "Latest", "1.2-rc.3_x", &"t".repeat(128)] {
            assert!(good.parse::<Tag>().is_ok(), "{good}");
        }
        for bad in ["", ".", "..", "-a", ".a", "a/b", "a:b", "a b", "a%", &"t".repeat(129)] {
            assert!(bad.parse::<Tag>().is_err(), "{bad}");
        }
    }

    proptest! {
        #[test]
        fn what_is_taken_for_a_name_prints_as_it_was_and_never_climbs(text in "[a-zA-Z0-9._/%!-]{0,20}") {
            if let Ok(repo) = text.parse::<Repo>() {
                prop_assert_eq!(repo.as_str(), text.as_str());
                prop_assert!(!text.contains("..") && !text.starts_with('/') && !text.contains('%'));
            }
            if let Ok(tag) = text.parse::<Tag>() {
                prop_assert_eq!(tag.as_str(), text.as_str());
                prop_assert!(!text.contains('/') && !text.starts_with('.'));
            }
        }
    }
}
