//! Which command a start is of.

use std::collections::BTreeMap;
use std::fmt;
use std::str::FromStr;

use crate::COMMAND_ANNOTATION;

/// A key is at most this long, in bytes: a program's name and a hash, in every URL and file name that it stands in.
pub const COMMAND_KEY_BYTES_MAX: usize = 64;
/// Commands of one image that have a profile of their own: each has a boot pack, some part of the image's size, and is built
/// again for each new tag.
pub const COMMANDS_MAX: usize = 16;
/// Of a program's name so much is kept in a key that is made here, in bytes.
const PROGRAM_BYTES_MAX: usize = 40;
/// Hexadecimal digits of the hash of arguments: 48 bits, to tell a dozen commands of one image apart.
const ARGUMENT_DIGITS: usize = 12;

/// What names a command of an image, wherever starts of different commands are told apart: 1 to 64 letters, digits, `.`, `_`
/// and `-`, the first of them a letter, a digit or `_`. So it is no path and needs no escapes in a URL.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct CommandKey(String);

/// A text that is no [`CommandKey`]; its beginning.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "{0:?} is no command key: that has 1 to 64 letters, digits, dots, underscores and hyphens, and begins with a letter, a digit or an underscore"
)]
pub struct ParseCommandKeyError(String);

impl CommandKey {
    /// The key of a command line: the base name of its program, and where there are arguments, a hyphen and 12 hexadecimal
    /// digits of their BLAKE3 (of each its length in bytes, as 64 bits, and the bytes). Characters that no key has become
    /// underscores, and a long name is cut. `None` for no command at all.
    ///
    /// So it does not matter where a program lies; every argument does, and their order.
    pub fn of(command: &[String]) -> Option<Self> {
        let (program, arguments) = command.split_first()?;
        let base = program.trim_end_matches('/').rsplit('/').next().unwrap_or_default();
        let kept = base.chars().take(PROGRAM_BYTES_MAX);
        let mut key: String = kept.map(|c| if is_inner(c) { c } else { '_' }).collect();
        if !key.starts_with(is_first) {
            key.replace_range(..key.len().min(1), "_");
        }
        if !arguments.is_empty() {
            let mut hasher = blake3::Hasher::new();
            for argument in arguments {
                hasher.update(&(argument.len() as u64).to_le_bytes());
                hasher.update(argument.as_bytes());
            }
            key.push('-');
            key.push_str(&hasher.finalize().to_hex()[..ARGUMENT_DIGITS]);
        }
        Some(key.parse().expect("only characters of a key, and short"))
    }

    /// Its text.
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// The one that these annotations of a profile or boot pack name. `None` where they name none, which is the image's general
    /// one, or something that is no key, which is nobody's.
    pub fn named_by(annotations: &BTreeMap<String, String>) -> Option<Self> {
        annotations.get(COMMAND_ANNOTATION)?.parse().ok()
    }

    /// Whether these are the annotations of what was made for `command`, or of the image's general one for `None`.
    pub fn is_named(command: Option<&Self>, annotations: &BTreeMap<String, String>) -> bool {
        annotations.get(COMMAND_ANNOTATION).map(String::as_str) == command.map(Self::as_str)
    }

    /// The annotation that names `command`; nothing for the general one.
    pub fn annotation(command: Option<&Self>) -> Option<(String, String)> {
        command.map(|command| (COMMAND_ANNOTATION.to_owned(), command.0.clone()))
    }
}

impl fmt::Display for CommandKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl FromStr for CommandKey {
    type Err = ParseCommandKeyError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let fits =
            text.len() <= COMMAND_KEY_BYTES_MAX && text.starts_with(is_first) && text.chars().all(is_inner);
        match fits {
            true => Ok(Self(text.to_owned())),
            false => Err(ParseCommandKeyError(text.chars().take(COMMAND_KEY_BYTES_MAX + 1).collect())),
        }
    }
}

fn is_first(c: char) -> bool {
    c.is_ascii_alphanumeric() || c == '_'
}

fn is_inner(c: char) -> bool {
    is_first(c) || matches!(c, '.' | '-')
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn of(command: &[&str]) -> String {
        let command: Vec<String> = command.iter().map(|word| (*word).to_owned()).collect();
        CommandKey::of(&command).unwrap().to_string()
    }

    #[test]
    fn a_command_line_has_the_name_of_its_program_and_a_hash_of_its_arguments() {
        assert_eq!(of(&["/usr/bin/redis-server"]), "redis-server");
        assert_eq!(of(&["python3", "-c", "import torch"]), "python3-762e28c12ed5");
        assert_eq!(of(&["python3", "-c", "import torch"]), of(&["/usr/bin/python3", "-c", "import torch"]));
        let different = [&["a", "b", "c"][..], &["a", "bc"], &["a", "c", "b"], &["a", ""], &["a"]];
        let keys: std::collections::BTreeSet<_> = different.into_iter().map(of).collect();
        assert_eq!(keys.len(), different.len());
        assert_eq!(CommandKey::of(&[]), None);
    }

    #[test]
    fn a_program_with_a_strange_name_has_a_key_all_the_same() {
        for (program, expected) in [
            ("", "_"),
            ("/", "_"),
            ("..", "_."),
            ("-x", "_x"),
            ("/opt/my tool/", "my_tool"),
            ("größe", "gr__e"),
            (&"x".repeat(5000), &"x".repeat(40)),
        ] {
            assert_eq!(of(&[program]), expected, "{program}");
        }
    }

    #[test]
    fn what_is_no_key_is_refused_and_named_in_brief() {
        let long = "x".repeat(65);
        for text in
            ["", ".", "..", "../x", "a/b", "-a", "a b", "a\n", "a\0", "a\u{1b}[2J", "ä", "a%2e", &long]
        {
            assert!(text.parse::<CommandKey>().is_err(), "{text:?}");
        }
        for text in ["a", "_", "9", "a..b", "python3-762e28c12ed5", &long[1..]] {
            assert_eq!(text.parse::<CommandKey>().unwrap().as_str(), text);
        }
        let error = "\u{1b}x".repeat(100_000).parse::<CommandKey>().unwrap_err().to_string();
        assert!(error.len() < 1000 && !error.contains('\u{1b}'), "{error}");
    }

    #[test]
    fn what_is_named_badly_is_neither_of_a_command_nor_the_general_one() {
        let key: CommandKey = "a".parse().unwrap();
        let annotations = |text: &str| BTreeMap::from([(COMMAND_ANNOTATION.to_owned(), text.to_owned())]);
        let own = CommandKey::annotation(Some(&key)).into_iter().collect();
        assert!(CommandKey::is_named(Some(&key), &own) && !CommandKey::is_named(None, &own));
        assert_eq!(CommandKey::named_by(&own), Some(key.clone()));
        let general = CommandKey::annotation(None).into_iter().collect();
        assert!(CommandKey::is_named(None, &general) && !CommandKey::is_named(Some(&key), &general));
        for bad in [annotations(""), annotations("../a"), annotations("A")] {
            assert!(!CommandKey::is_named(None, &bad) && !CommandKey::is_named(Some(&key), &bad));
        }
        assert_eq!(CommandKey::named_by(&annotations("../a")), None);
    }

    proptest! {
        #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

        #[test]
        fn any_command_line_has_a_key_that_parses(command in prop::collection::vec("\\PC{0,80}", 1..4)) {
            let key = CommandKey::of(&command).expect("a command");
            prop_assert_eq!(key.as_str().parse(), Ok(key.clone()));
            prop_assert_eq!(CommandKey::of(&command), Some(key));
        }

        #[test]
        fn a_text_is_a_key_or_is_refused(text in "[A-Za-z0-9._/ \\x00-]{0,70}") {
            if let Ok(key) = text.parse::<CommandKey>() {
                prop_assert_eq!(key.as_str(), &text);
                prop_assert!(text.len() <= COMMAND_KEY_BYTES_MAX && !text.contains(['/', ' ', '\0']));
            }
        }
    }
}
