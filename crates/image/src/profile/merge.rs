//! Making one profile of two.

use std::collections::hash_map::Entry;
use std::collections::{HashMap, HashSet};

use super::{PROFILE_ITEMS_MAX, PROFILE_PAGES_MAX, PathBudget, Profile, ProfileRun};

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
        let known = pages.entry(page).or_insert(Touch { rank: touch.rank, seen: 0 });
        *known = Touch { rank: known.rank.min(touch.rank), seen: known.seen.saturating_add(touch.seen) };
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
    merged.names = names(old, new);
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

/// The names of both, each once.
fn names(old: &Profile, new: &Profile) -> Vec<String> {
    let (mut seen, mut budget) = (HashSet::new(), PathBudget::full());
    let names = old.names.iter().chain(&new.names).filter(|name| seen.insert(name.as_str()));
    names.filter(|name| budget.take(name)).cloned().collect()
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
        let is_full = profile.runs.len() == PROFILE_ITEMS_MAX;
        match profile.runs.last_mut() {
            Some(last) if last.0 == file && last.1 + last.2 == page.number && last.3 == seen => last.2 += 1,
            _ if is_full => break,
            _ => profile.runs.push(ProfileRun(file, page.number, 1, seen)),
        }
        left -= 1;
        if left == 0 {
            break;
        }
    }
}
