//! Traces and profiles: what a start touches, in the order in which it touches it.
//!
//! A [`Trace`] is what one start did on one tree, by inode number. A [`Profile`] is many traces merged, by
//! path, so that the next version of an image can take it over: [`Inheritance`](crate::Inheritance). As a blob
//! it is JSON, which people read and write as well (`lamina profile export`).
//!
//! Paths that are not UTF-8 are left out: the file is then read in the ordinary way.

use std::collections::{HashMap, HashSet};
use std::fmt;
use std::marker;

use serde::de::{Deserializer, IgnoredAny, SeqAccess, Visitor};
use serde::{Deserialize, Serialize};

use crate::{FileKind, Ino, Tree, TreeError};

mod command;
mod merge;
mod paths;
mod start;

pub use command::{COMMAND_KEY_BYTES_MAX, COMMANDS_MAX, CommandKey, ParseCommandKeyError};
use paths::Paths;
pub(crate) use paths::{PathBudget, file_size, find, is_inside};
pub use start::{BootHad, Start, Starts};

/// Bytes of a page.
pub const PAGE_BYTES: u64 = 4096;
/// A profile or trace names no more pages: 4 GiB, more than any start reads before it answers.
pub const PROFILE_PAGES_MAX: u64 = 1 << 20;
/// No more names, files or runs each.
pub const PROFILE_ITEMS_MAX: usize = 1 << 19;
/// A profile's JSON is at most this long, in bytes. What is made here stays below: [`PROFILE_ITEMS_MAX`] runs
/// of at most 37 bytes, and twice the bytes that a path budget has.
pub const PROFILE_BYTES_MAX: usize = 32 << 20;

/// Pages of one file that were read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TraceRun {
    /// The file.
    pub ino: Ino,
    /// The first page, in units of 4 KiB from the beginning of the file.
    pub first: u64,
    /// How many pages.
    pub pages: u64,
}

/// What one start touched, in order.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Trace {
    /// Names looked up, found or not, by directory. The name `.` says that the directory was listed.
    pub names: Vec<(Ino, Vec<u8>)>,
    /// Pages read.
    pub runs: Vec<TraceRun>,
    /// Whether the start had a boot pack, so that only what was missing in that is here.
    pub boot: bool,
}

/// Why bytes are no profile.
#[derive(Debug, thiserror::Error)]
pub enum ProfileError {
    /// Not the JSON that it should be.
    #[error("not a profile: {0}")]
    Json(#[from] serde_json::Error),
    /// Of a version that this program does not know.
    #[error("a profile of version {0}; this program reads version 1")]
    Version(u32),
    /// More of something than a start could need.
    #[error("a profile with too many {0}")]
    TooMany(&'static str),
    /// A path that leaves the image, is empty or too long.
    #[error("a profile with the path {0:?}")]
    Path(String),
    /// A run without pages, or of a file that is not listed.
    #[error("a profile whose run {0} makes no sense")]
    Run(usize),
}

/// Pages of one file in a profile: file number, first page, pages, and in how many starts they were read.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ProfileRun(pub u32, pub u64, pub u64, pub u32);

/// What starts of an image touch. See the module.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Profile {
    version: u32,
    /// How many starts it comes from.
    pub starts: u32,
    /// Whether it was taken over from another image and no start of this one has confirmed it.
    #[serde(default)]
    pub inherited: bool,
    /// Paths to look up, found or not, in order; without a leading slash.
    #[serde(deserialize_with = "bounded")]
    pub names: Vec<String>,
    /// Directories that are listed, in order.
    #[serde(default, deserialize_with = "bounded", skip_serializing_if = "Vec::is_empty")]
    pub dirs: Vec<String>,
    /// The files that are read, by path.
    #[serde(deserialize_with = "bounded")]
    pub files: Vec<String>,
    /// What is read of them, in order.
    #[serde(deserialize_with = "bounded")]
    pub runs: Vec<ProfileRun>,
}

impl Profile {
    /// Reads a profile's JSON, and checks all of it.
    pub fn parse(bytes: &[u8]) -> Result<Self, ProfileError> {
        if bytes.len() > PROFILE_BYTES_MAX {
            return Err(ProfileError::TooMany("bytes"));
        }
        let profile: Self = serde_json::from_slice(bytes)?;
        if profile.version != 1 {
            return Err(ProfileError::Version(profile.version));
        }
        for (items, what) in [
            (profile.names.len(), "names"),
            (profile.dirs.len(), "dirs"),
            (profile.files.len(), "files"),
            (profile.runs.len(), "runs"),
        ] {
            if items > PROFILE_ITEMS_MAX {
                return Err(ProfileError::TooMany(what));
            }
        }
        let mut paths = profile.names.iter().chain(&profile.dirs).chain(&profile.files);
        if let Some(path) = paths.find(|path| !is_inside(path)) {
            return Err(ProfileError::Path(path.chars().take(100).collect()));
        }
        let mut pages = 0u64;
        for (number, run) in profile.runs.iter().enumerate() {
            let known = (run.0 as usize) < profile.files.len();
            if !known || run.2 == 0 || run.1.checked_add(run.2).is_none_or(|end| end > u64::MAX / PAGE_BYTES)
            {
                return Err(ProfileError::Run(number));
            }
            pages = pages.saturating_add(run.2);
        }
        if pages > PROFILE_PAGES_MAX { Err(ProfileError::TooMany("pages")) } else { Ok(profile) }
    }

    /// Its JSON.
    pub fn to_json(&self) -> Vec<u8> {
        serde_json::to_vec(self).expect("strings and numbers")
    }

    /// How many pages it names.
    pub fn pages(&self) -> u64 {
        self.runs.iter().map(|run| run.2).sum()
    }

    /// The same with no more than its first so many pages.
    #[must_use]
    pub fn first_pages(mut self, pages_max: u64) -> Self {
        let mut left = pages_max;
        self.runs.retain_mut(|run| {
            run.2 = run.2.min(left);
            left -= run.2;
            run.2 > 0
        });
        self
    }

    /// The same profile, as if it came from at most so many starts.
    #[must_use]
    pub fn weighing(mut self, starts_max: u32) -> Self {
        let starts = u64::from(self.starts.max(1));
        if self.starts > starts_max {
            for run in &mut self.runs {
                let seen = (u64::from(run.3) * u64::from(starts_max)).div_ceil(starts);
                run.3 = u32::try_from(seen).unwrap_or(starts_max).min(starts_max);
            }
            self.starts = starts_max;
        }
        self
    }

    /// The profile of one start on `tree`. What is not in the tree is left out: a trace is somebody's word.
    ///
    /// Cost: one step for each name in the tree, and one for each item of the trace.
    pub fn of_trace(tree: &Tree, trace: &Trace) -> Result<Self, TreeError> {
        let paths = Paths::of(tree)?;
        let mut profile = Self::empty(1);
        (profile.names, profile.dirs) = names_of(tree, &paths, trace);
        let (mut numbers, mut budget, mut pages) = (HashMap::new(), PathBudget::full(), HashSet::new());
        for run in trace.runs.iter().take(PROFILE_ITEMS_MAX) {
            let Some(size) = file_size(tree, run.ino) else { continue };
            let end = run.first.saturating_add(run.pages).min(size.div_ceil(PAGE_BYTES));
            if run.first >= end || pages.len() as u64 + (end - run.first) > PROFILE_PAGES_MAX {
                continue;
            }
            let file = *numbers.entry(run.ino).or_insert_with(|| {
                let path = paths.path(run.ino).filter(|path| is_inside(path) && budget.take(path))?;
                Some(profile.add_file(path))
            });
            let Some(file) = file else { continue };
            for page in (run.first..end).filter(|page| pages.insert((file, *page))) {
                if !profile.add_page(file, page, 1) {
                    return Ok(profile);
                }
            }
        }
        Ok(profile)
    }

    /// What both know, a page that both have in the order of this one. What only rare
    /// starts touch is dropped, and old starts come to weigh less. `missed` says that `other` had a boot
    /// pack, so that it names only what was missing in that: then everything known counts as touched again.
    ///
    /// Cost: a step for each page, and a sort of them.
    #[must_use]
    pub fn merged(&self, other: &Self, missed: bool) -> Self {
        merge::merged(self, other, missed)
    }

    /// One for the next version of the image, without pages yet.
    pub(crate) fn heir(&self) -> Self {
        let mut budget = PathBudget::full();
        let [names, dirs] = [&self.names, &self.dirs]
            .map(|paths| paths.iter().filter(|path| budget.take(path)).cloned().collect());
        Self { inherited: true, names, dirs, ..Self::empty(self.starts) }
    }

    fn empty(starts: u32) -> Self {
        let (names, dirs, files) = (Vec::new(), Vec::new(), Vec::new());
        Self { version: 1, starts, inherited: false, names, dirs, files, runs: Vec::new() }
    }

    /// Appends a page; false where there is no room for another run.
    pub(crate) fn add_page(&mut self, file: u32, page: u64, seen: u32) -> bool {
        let is_full = self.runs.len() == PROFILE_ITEMS_MAX;
        match self.runs.last_mut() {
            Some(last) if last.0 == file && last.1 + last.2 == page && last.3 == seen => last.2 += 1,
            _ if is_full => return false,
            _ => self.runs.push(ProfileRun(file, page, 1, seen)),
        }
        true
    }

    pub(crate) fn add_file(&mut self, path: String) -> u32 {
        self.files.push(path);
        u32::try_from(self.files.len() - 1).expect("not more than there are runs")
    }
}

/// The paths that a trace looked up, each once, and the directories that it listed.
fn names_of(tree: &Tree, paths: &Paths<'_>, trace: &Trace) -> (Vec<String>, Vec<String>) {
    let (mut names, mut dirs, mut seen) = (Vec::new(), Vec::new(), HashSet::new());
    let mut budget = PathBudget::full();
    for (dir, name) in trace.names.iter().take(PROFILE_ITEMS_MAX) {
        // a name with a slash would be a path of its own
        let Some(name) = std::str::from_utf8(name).ok().filter(|name| !name.contains('/')) else { continue };
        if !seen.insert((dir, name)) || !is_directory(tree, *dir) {
            continue;
        }
        let Some(mut path) = paths.path(*dir) else { continue };
        if name == "." {
            if is_inside(&path) && budget.take(&path) {
                dirs.push(path);
            }
            continue;
        }
        if !path.is_empty() {
            path.push('/');
        }
        path.push_str(name);
        if is_inside(&path) && budget.take(&path) {
            names.push(path);
        }
    }
    (names, dirs)
}

fn is_directory(tree: &Tree, ino: Ino) -> bool {
    tree.inode(ino).is_ok_and(|inode| inode.kind() == FileKind::Directory)
}

/// Reads a list of which only the first [`PROFILE_ITEMS_MAX`] items and one more are kept, so that a list
/// that is too long is known as such and costs no memory.
fn bounded<'de, D: Deserializer<'de>, T: Deserialize<'de>>(deserializer: D) -> Result<Vec<T>, D::Error> {
    deserializer.deserialize_seq(Bounded(marker::PhantomData))
}

struct Bounded<T>(marker::PhantomData<T>);

impl<'de, T: Deserialize<'de>> Visitor<'de> for Bounded<T> {
    type Value = Vec<T>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a list")
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<Vec<T>, A::Error> {
        let mut items = Vec::new();
        while items.len() <= PROFILE_ITEMS_MAX {
            match list.next_element()? {
                Some(item) => items.push(item),
                None => return Ok(items),
            }
        }
        while list.next_element::<IgnoredAny>()?.is_some() {}
        Ok(items)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn json(files: &[&str], runs: &str) -> String {
        format!(r#"{{"version":1,"starts":1,"names":[],"files":{files:?},"runs":{runs}}}"#)
    }

    fn parse(text: &str) -> Result<Profile, ProfileError> {
        Profile::parse(text.as_bytes())
    }

    #[test]
    fn a_path_that_leaves_the_image_is_refused() {
        let long = ["x"; 2049].join("/");
        let long_part = "x".repeat(256);
        for path in
            ["", "/", "/a", "a/", "a//b", ".", "..", "../a", "a/..", "a/./b", "a\0b", &long, &long_part]
        {
            for list in ["names", "dirs", "files"] {
                let mut profile = Profile::empty(1);
                let paths = match list {
                    "names" => &mut profile.names,
                    "dirs" => &mut profile.dirs,
                    _ => &mut profile.files,
                };
                paths.push(path.to_owned());
                let read = Profile::parse(&profile.to_json());
                assert!(matches!(read, Err(ProfileError::Path(_))), "{path:?} in {list}");
            }
        }
        assert!(parse(&json(&["a/...", "..a/ b"], "[]")).is_ok());
    }

    #[test]
    fn a_run_of_no_pages_or_of_no_file_or_without_end_is_refused() {
        let runs = ["[0,0,0,1]", "[1,0,1,1]", "[0,18446744073709551615,1,1]", "[0,4503599627370495,1,1]"];
        for run in runs {
            let read = parse(&json(&["a"], &format!("[[0,0,1,1],{run}]")));
            assert!(matches!(read, Err(ProfileError::Run(1))), "{run}: {read:?}");
        }
        assert!(parse(&json(&["a"], "[[0,4503599627370494,1,1]]")).is_ok(), "the last page there can be");
    }

    #[test]
    fn too_much_of_anything_is_refused() {
        let many = PROFILE_ITEMS_MAX + 1;
        let list = |item: &str, count: usize| format!("[{}]", vec![item; count].join(","));
        let whole = |names: &str, files: &str, runs: &str| {
            format!(r#"{{"version":1,"starts":1,"names":{names},"files":{files},"runs":{runs}}}"#)
        };
        let cases = [
            (whole(&list(r#""n""#, many), "[]", "[]"), "names"),
            (whole("[]", &list(r#""f""#, 3 * many), "[]"), "files"),
            (whole("[]", r#"["f"]"#, &list("[0,0,1,1]", many)), "runs"),
            (whole("[]", r#"["f"]"#, &format!("[[0,0,{},1],[0,0,1,1]]", PROFILE_PAGES_MAX)), "pages"),
            (whole("[]", r#"["f"]"#, &format!("[[0,0,{},1],[0,1,{},1]]", 1u64 << 51, 1u64 << 51)), "pages"),
            (" ".repeat(PROFILE_BYTES_MAX + 1), "bytes"),
        ];
        for (text, what) in cases {
            let error = parse(&text).unwrap_err();
            assert!(matches!(error, ProfileError::TooMany(found) if found == what), "{what}: {error}");
        }
        assert!(parse(&whole(&list(r#""n""#, many - 1), "[]", "[]")).is_ok());
        assert!(parse(&json(&["f"], &format!("[[0,0,{PROFILE_PAGES_MAX},1]]"))).is_ok());
    }

    #[test]
    fn another_version_is_refused_and_unknown_fields_are_not() {
        let text = json(&["a"], "[[0,0,1,1]]");
        assert!(matches!(parse(&text.replace(":1,", ":2,")), Err(ProfileError::Version(2))));
        let more = text.replace(r#""starts""#, r#""inherited":true,"more":{"x":[1]},"starts""#);
        assert!(parse(&more).unwrap().inherited);
    }

    fn junk_json() -> impl Strategy<Value = String> {
        let number = prop::sample::select(vec!["0", "1", "-1", "1e9", "4294967296", "18446744073709551615"]);
        let item = prop_oneof![
            number.prop_map(str::to_owned),
            Just("null".to_owned()),
            "\"[a./\\\\\"x]{0,6}\"",
            prop::collection::vec(0u64..1 << 52, 0..6).prop_map(|run| format!("{run:?}")),
        ];
        let list = prop::collection::vec(item, 0..5).prop_map(|items| format!("[{}]", items.join(",")));
        let field = prop::sample::select(vec!["version", "starts", "inherited", "names", "files", "runs"]);
        let value = prop_oneof![4 => list, 1 => Just("1".to_owned()), 1 => Just("true".to_owned())];
        prop::collection::vec((field, value), 0..9).prop_map(|fields| {
            let fields: Vec<_> =
                fields.iter().map(|(field, value)| format!(r#""{field}":{value}"#)).collect();
            format!("{{{}}}", fields.join(","))
        })
    }

    /// Any profile that could be read.
    pub(super) fn profile() -> impl Strategy<Value = Profile> {
        let path = "[a-c\n\"\\\\é]{1,3}(/[a-c]{1,2}){0,2}";
        let run = (0u32..6, prop_oneof![0u64..40, Just((1 << 52) - 100)], 1u64..40, any::<u32>());
        let dirs = prop::collection::vec(path, 0..4);
        let paths = prop::collection::vec(path, 6);
        (any::<(u32, bool)>(), paths.clone(), dirs, paths, prop::collection::vec(run, 0..20)).prop_map(
            |((starts, inherited), names, dirs, files, runs)| {
                let runs =
                    runs.into_iter().map(|(file, first, pages, seen)| ProfileRun(file, first, pages, seen));
                Profile { version: 1, starts, inherited, names, dirs, files, runs: runs.collect() }
            },
        )
    }

    proptest! {
        #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

        #[test]
        fn what_is_written_is_read_again(profile in profile()) {
            prop_assert_eq!(Profile::parse(&profile.to_json()).unwrap(), profile);
        }

        #[test]
        fn junk_is_refused_or_read_without_a_panic(
            profile in profile(),
            text in junk_json(),
            changes in prop::collection::vec(any::<(u16, u8)>(), 0..4),
        ) {
            let mut bytes = profile.to_json();
            for (at, byte) in changes {
                let len = bytes.len();
                bytes[usize::from(at) % len] = byte;
            }
            for bytes in [text.into_bytes(), bytes] {
                let Ok(read) = Profile::parse(&bytes) else { continue };
                prop_assert_eq!(Profile::parse(&read.to_json()).unwrap(), read);
            }
        }
    }
}
