//! Making one profile of two.

use std::collections::hash_map::Entry;
use std::collections::{HashMap, HashSet};

use super::{PROFILE_PAGES_MAX, PathBudget, Profile, ProfileRun};

/// Starts counted; then the old ones weigh half.
const STARTS_MAX: u32 = 16;
/// With so many starts, what fewer than one in [`RARE_PART`] of them touched is dropped.
const RARE_STARTS: u32 = 4;
const RARE_PART: u32 = 4;

/// A page of a file, by the number that the file has in both profiles.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
struct Page {
    file: u32,
    number: u64,
}

/// When a page was read first, as a part of 2³² of the profile's pages, and in how many starts.
#[derive(Clone, Copy)]
struct Touch {
    rank: u64,
    seen: u32,
}

/// See [`Profile::merged`].
pub(super) fn merged(old: &Profile, new: &Profile, missed: bool) -> Profile {
    let (files, [old_numbers, new_numbers]) = one_list(&old.files, &new.files);
    let mut pages = touches(old, &old_numbers);
    if missed {
        pages.values_mut().for_each(|touch| touch.seen = touch.seen.saturating_add(new.starts));
    }
    for (page, touch) in touches(new, &new_numbers) {
        // what is known keeps its order: a start that was slow at one place, or had a boot pack, has another one
        let known = pages.entry(page).or_insert(Touch { seen: 0, ..touch });
        known.seen = known.seen.saturating_add(touch.seen);
    }
    let (mut starts, mut weight) = (old.starts.saturating_add(new.starts), 1);
    while starts > STARTS_MAX {
        (starts, weight) = (starts / 2, weight * 2);
    }
    let weighed = pages.into_iter().map(|(page, touch)| {
        let seen = touch.seen.div_ceil(weight).min(starts);
        (touch.rank, page, seen)
    });
    let often = |seen: u32| starts < RARE_STARTS || seen * RARE_PART >= starts;
    let mut ranked: Vec<_> = weighed.filter(|(.., seen)| often(*seen)).collect();
    ranked.sort_unstable();
    let mut merged = Profile::empty(starts);
    merged.inherited = old.inherited && new.inherited;
    let mut budget = PathBudget::full();
    merged.names = paths(&old.names, &new.names, &mut budget);
    merged.dirs = paths(&old.dirs, &new.dirs, &mut budget);
    add_pages(&mut merged, &files, ranked.into_iter().map(|(_, page, seen)| (page, seen)));
    merged
}

/// The files of two lists, each once, and the number there of each item of either list.
fn one_list<'a>(old: &'a [String], new: &'a [String]) -> (Vec<&'a str>, [Vec<u32>; 2]) {
    let (mut files, mut known) = (Vec::new(), HashMap::new());
    let numbers = [old, new].map(|list| {
        let number = |path: &'a String| {
            *known.entry(path.as_str()).or_insert_with(|| {
                files.push(path.as_str());
                u32::try_from(files.len() - 1).expect("at most two lists of half a million")
            })
        };
        list.iter().map(number).collect()
    });
    (files, numbers)
}

/// Every page of a profile, once.
fn touches(profile: &Profile, numbers: &[u32]) -> HashMap<Page, Touch> {
    let (all, mut position) = (profile.pages().max(1), 0);
    let mut pages = HashMap::with_capacity(usize::try_from(all.min(PROFILE_PAGES_MAX)).expect("a million"));
    for ProfileRun(file, first, count, seen) in profile.runs.iter().copied() {
        for number in first..first + count {
            let page = Page { file: numbers[file as usize], number };
            pages.entry(page).or_insert(Touch { rank: (position << 32) / all, seen });
            position += 1;
        }
    }
    pages
}

/// The paths of both lists, each once.
fn paths(old: &[String], new: &[String], budget: &mut PathBudget) -> Vec<String> {
    let mut seen = HashSet::new();
    let paths = old.iter().chain(new).filter(|path| seen.insert(path.as_str()));
    paths.filter(|path| budget.take(path)).cloned().collect()
}

/// Appends pages as runs, until the profile is full.
fn add_pages(profile: &mut Profile, files: &[&str], pages: impl Iterator<Item = (Page, u32)>) {
    let (mut numbers, mut budget) = (HashMap::new(), PathBudget::full());
    let mut left = PROFILE_PAGES_MAX;
    for (page, seen) in pages {
        let file = match numbers.entry(page.file) {
            Entry::Occupied(known) => *known.get(),
            Entry::Vacant(place) => {
                let path = files[page.file as usize];
                *place.insert(budget.take(path).then(|| profile.add_file(path.to_owned())))
            }
        };
        let Some(file) = file else { continue };
        left -= 1;
        if !profile.add_page(file, page.number, seen) || left == 0 {
            break;
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use proptest::prelude::*;

    use super::*;
    use crate::PROFILE_ITEMS_MAX;
    use crate::profile::tests::profile;

    /// A profile of single pages, by file and page, each read in all starts.
    fn of_pages(starts: u32, pages: &[(&str, u64)]) -> Profile {
        let mut profile = Profile::empty(starts);
        for (file, page) in pages {
            let known = profile.files.iter().position(|known| known == file);
            let number = match known {
                Some(number) => u32::try_from(number).unwrap(),
                None => profile.add_file((*file).to_owned()),
            };
            profile.runs.push(ProfileRun(number, *page, 1, starts));
        }
        profile
    }

    /// Its pages in order, and how many starts read each.
    fn pages(profile: &Profile) -> Vec<(&str, u64, u32)> {
        let pages = |run: &ProfileRun| {
            let file = profile.files[run.0 as usize].as_str();
            let seen = run.3;
            (run.1..run.1 + run.2).map(move |page| (file, page, seen))
        };
        profile.runs.iter().flat_map(pages).collect()
    }

    #[test]
    fn pages_that_both_have_keep_their_order_whatever_number_their_file_has() {
        let old = of_pages(1, &[("a", 5), ("b", 0), ("a", 1), ("c", 9)]);
        let new = of_pages(1, &[("new", 0), ("a", 5), ("b", 0), ("new", 1), ("a", 1), ("c", 9)]);
        let merged = old.merged(&new, false);
        assert_eq!(merged.starts, 2);
        let both: Vec<_> = pages(&merged).into_iter().filter(|(file, ..)| *file != "new").collect();
        assert_eq!(both, [("a", 5, 2), ("b", 0, 2), ("a", 1, 2), ("c", 9, 2)]);
        assert_eq!(pages(&merged).len(), 6, "and what only one has is there too");
    }

    #[test]
    fn neighbours_that_were_read_as_often_are_one_run_and_others_are_not() {
        let old = of_pages(1, &[("a", 0), ("a", 1), ("a", 2)]);
        let merged = old.merged(&of_pages(1, &[("a", 0), ("a", 1)]), false);
        assert_eq!(merged.runs, [ProfileRun(0, 0, 2, 2), ProfileRun(0, 2, 1, 1)]);
    }

    #[test]
    fn what_fewer_than_one_in_four_starts_touch_is_dropped_once_there_are_four() {
        let rare = of_pages(1, &[("often", 0), ("rare", 0)]);
        let often = of_pages(1, &[("often", 0)]);
        let mut merged = rare;
        for starts in 2..=4 {
            merged = merged.merged(&often, false);
            assert_eq!(pages(&merged), [("often", 0, starts), ("rare", 0, 1)]);
        }
        merged = merged.merged(&often, false);
        assert_eq!(pages(&merged), [("often", 0, 5)]);
        assert_eq!(merged.files, ["often"]);
    }

    #[test]
    fn a_start_with_a_boot_pack_confirms_what_it_did_not_miss() {
        let old = of_pages(4, &[("a", 0), ("b", 0)]);
        let merged = old.merged(&of_pages(1, &[("c", 0), ("b", 0)]), true);
        let mut found = pages(&merged);
        found.sort_unstable();
        // one in five is rare
        assert_eq!(found, [("a", 0, 5), ("b", 0, 5)]);
    }

    #[test]
    fn a_full_profile_takes_pages_that_make_its_last_run_longer_and_no_others() {
        let mut full = of_pages(1, &[("a", 0)]);
        full.runs = (0..PROFILE_ITEMS_MAX as u64).map(|number| ProfileRun(0, 2 * number, 1, 1)).collect();
        let next = 2 * PROFILE_ITEMS_MAX as u64 - 1;
        assert!(full.add_page(0, next, 1));
        assert!(!full.add_page(0, next + 2, 1) && !full.add_page(0, next + 1, 2));
        assert_eq!(Profile::parse(&full.to_json()).unwrap(), full);
    }

    #[test]
    fn beyond_sixteen_starts_the_old_ones_weigh_half() {
        let mut old = of_pages(16, &[("all", 0), ("half", 0)]);
        old.runs[1].3 = 8;
        let merged = old.merged(&of_pages(1, &[("all", 0)]), false);
        assert_eq!(merged.starts, 8);
        assert_eq!(pages(&merged), [("all", 0, 8), ("half", 0, 4)]);
        let huge = of_pages(u32::MAX, &[("all", 0)]);
        let merged = huge.merged(&huge, true);
        assert!(merged.starts <= STARTS_MAX && pages(&merged) == [("all", 0, merged.starts)]);
    }

    #[test]
    fn a_profile_is_inherited_until_a_start_confirms_it() {
        let start = of_pages(1, &[("a", 0)]);
        let old = Profile { inherited: true, ..start.clone() };
        assert!(!old.merged(&start, false).inherited);
        assert!(old.merged(&old, false).inherited);
    }

    #[test]
    fn the_most_that_two_profiles_can_hold_becomes_one_that_can_be_read() {
        let path = |number: usize| format!("{number}/{}", "\u{1}".repeat(30));
        let full = |which: usize| {
            let mut profile = Profile::empty(1);
            for number in 0..PROFILE_ITEMS_MAX {
                let page = (1 << 52) - 2 - 4 * number as u64 - 2 * which as u64;
                profile.runs.push(ProfileRun(u32::try_from(number % 1000).unwrap(), page, 1, u32::MAX));
            }
            profile.files = (0..1000).map(path).collect();
            profile.names = (0..100_000).map(|number| path(number + which * 100_000)).collect();
            profile
        };
        let merged = full(0).merged(&full(1), false);
        let json = merged.to_json();
        assert!(json.len() <= crate::PROFILE_BYTES_MAX, "{} bytes", json.len());
        assert_eq!(Profile::parse(&json).unwrap(), merged);
        assert_eq!(merged.runs.len(), PROFILE_ITEMS_MAX);
    }

    proptest! {
        #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

        #[test]
        fn a_merged_profile_is_sound_and_has_no_page_that_neither_has(
            old in profile(), new in profile(), missed in any::<bool>(),
        ) {
            let merged = old.merged(&new, missed);
            prop_assert_eq!(&Profile::parse(&merged.to_json()).unwrap(), &merged);
            let set = |profile: &Profile| -> BTreeSet<(String, u64)> {
                pages(profile).into_iter().map(|(file, page, _)| (file.to_owned(), page)).collect()
            };
            let (found, known) = (set(&merged), &set(&old) | &set(&new));
            prop_assert!(found.is_subset(&known));
            prop_assert_eq!(found.len(), pages(&merged).len(), "each once");
            prop_assert!(merged.starts <= STARTS_MAX);
            prop_assert!(merged.runs.iter().all(|run| run.3 <= merged.starts));
            if merged.starts < RARE_STARTS {
                prop_assert_eq!(found, known);
            }
        }
    }
}
