//! What the next version of an image takes over of what was learnt of its libraries.

use bytes::Bytes;
use header::header;
use lamina_chunk::{Chunk, FrameId, Place};
use lamina_image::{Inheritance, Profile, ProfileRun, Tree, derive_tree};
use lamina_testkit::library::Library;
use lamina_testkit::noise;
use memory::{Memory, take_in};
use proptest::prelude::*;

#[path = "support/header.rs"]
mod header;
#[expect(dead_code, reason = "contents are read in other tests")]
#[path = "support/memory.rs"]
mod memory;

const PAGE: usize = 4096;

/// An image with one file.
fn image(sink: &Memory, path: &str, bytes: &[u8]) -> Tree {
    let mut tar = tar::Builder::new(Vec::new());
    tar.append_data(&mut header(tar::EntryType::Regular, bytes.len() as u64), path, bytes).unwrap();
    let recipes = take_in(sink, vec![tar.into_inner().unwrap()]).unwrap();
    Tree::open(Bytes::from(derive_tree(&recipes).unwrap())).unwrap()
}

fn opening(sink: &Memory) -> impl FnMut(FrameId, Place) -> Result<Chunk, ()> {
    |id, place| Ok(Chunk::cut(sink.open(id, place)))
}

/// A profile of these runs of one file: first page, pages.
fn profile(path: &str, runs: &[(u64, u64)]) -> Profile {
    let runs: Vec<_> = runs.iter().map(|(first, pages)| (0, first, pages, 1)).collect();
    let json = serde_json::json!({"version": 1, "starts": 1, "names": [], "files": [path], "runs": runs});
    Profile::parse(&serde_json::to_vec(&json).unwrap()).unwrap()
}

/// The pages that the second of two versions of a file takes over of these runs of the first.
fn taken(versions: [&[u8]; 2], runs: &[(u64, u64)]) -> Vec<u64> {
    let sink = Memory::default();
    let [old, new] = versions.map(|bytes| image(&sink, "lib", bytes));
    let inherited = Inheritance::new(Some(&old), &new).of(&profile("lib", runs), opening(&sink)).unwrap();
    assert!(inherited.inherited && Profile::parse(&inherited.to_json()).unwrap() == inherited);
    inherited.runs.iter().flat_map(|run| run.1..run.1 + run.2).collect()
}

/// A library with so many pages before its code, and then functions of these lengths in pages, each with a name.
fn library(before: usize, functions: &[(&str, usize)]) -> Vec<u8> {
    let len = functions.iter().map(|(_, pages)| pages * PAGE).sum();
    let mut library =
        Library::new().section(".head", &noise(before * PAGE - 64, 1)).section(".text", &noise(len, 2));
    let mut at = 0;
    for (name, pages) in functions {
        library = library.symbol(name, ".text", at);
        at += (pages * PAGE) as u64;
    }
    library.bytes()
}

#[test]
fn a_function_is_found_by_its_name_wherever_the_linker_has_put_it() {
    let old = library(1, &[("a", 10), ("b", 10), ("c", 10), ("d", 10)]);
    let new = library(4, &[("d", 10), ("a", 25), ("new", 3), ("c", 10)]);
    // the second pages of d, a and c, the third of b
    let found = taken([&old, &new], &[(32, 1), (2, 1), (22, 1), (13, 1)]);
    // what is not there any more is looked for where it was in its section
    assert_eq!(found, [4 + 1, 4 + 10 + 1, 4 + 38 + 1, 4 + 12]);
}

#[test]
fn a_page_with_parts_of_two_functions_becomes_two_where_these_are_apart() {
    let two = |gap: usize| {
        let text = noise(40 * PAGE, 2);
        let library = Library::new().section(".head", &noise(PAGE - 64, 1)).section(".text", &text);
        library.symbol("a", ".text", 0).symbol("b", ".text", (PAGE / 2 + gap * PAGE) as u64).bytes()
    };
    assert_eq!(taken([&two(3), &two(8)], &[(4, 1)]), [4, 9]);
}

#[test]
fn a_section_that_was_read_nearly_whole_is_read_whole() {
    let with_table = |before: usize, pages: usize| {
        let library = Library::new().section(".head", &noise(before * PAGE - 64, 1));
        library.section(".table", &noise(pages * PAGE, 3)).section(".text", &noise(20 * PAGE, 4)).bytes()
    };
    let (old, new) = (with_table(1, 16), with_table(3, 24));
    // from the end to the beginning, without one
    let read: Vec<(u64, u64)> = (1..17).rev().filter(|page| *page != 5).map(|page| (page, 1)).collect();
    let mut found = taken([&old, &new], &read);
    assert!(found[0] > 20, "the order stays: {found:?}");
    found.sort_unstable();
    assert_eq!(found, (3..27).collect::<Vec<_>>());
    let found = taken([&old, &new], &read[..8]);
    assert_eq!(found.len(), 8, "of a half no more than that: {found:?}");
    // one that has grown to something else is not
    let found = taken([&old, &with_table(3, 100)], &read);
    assert_eq!(found.len(), 15, "{found:?}");
}

#[test]
fn a_file_that_is_the_same_or_no_library_keeps_its_pages() {
    let (old, other) = (library(1, &[("a", 10), ("b", 10)]), noise(8 * PAGE, 7));
    assert_eq!(taken([&old, &old], &[(12, 2), (3, 1)]), [12, 13, 3]);
    assert_eq!(taken([&old, &other], &[(12, 2), (3, 1)]), [3]);
    assert_eq!(taken([&other, &old], &[(7, 1), (3, 1)]), [7, 3]);
    let sink = Memory::default();
    let [one, again] = [(), ()].map(|()| image(&sink, "lib", &old));
    let mut inheritance = Inheritance::new(Some(&one), &again);
    let same =
        inheritance.of(&profile("lib", &[(3, 2)]), |_, _| -> Result<Chunk, ()> { panic!("looked at") });
    assert_eq!(same.unwrap().runs, [ProfileRun(0, 3, 2, 1)]);
}

#[test]
fn where_frames_cannot_be_had_pages_stay_what_they_were() {
    let sink = Memory::default();
    let (old, new) = (library(1, &[("a", 10), ("b", 10)]), library(5, &[("a", 10), ("b", 10)]));
    let [old, new] = [old, new].map(|bytes| image(&sink, "lib", &bytes));
    let mut inheritance = Inheritance::new(Some(&old), &new);
    let mut asked = 0;
    for _ in 0..2 {
        let inherited = inheritance.of(&profile("lib", &[(12, 2)]), |_, _| {
            asked += 1;
            Err("gone")
        });
        assert_eq!(inherited.unwrap().runs, [ProfileRun(0, 12, 2, 1)]);
    }
    assert_eq!(asked, 1);
}

#[test]
fn what_lies_in_no_section_stays_where_it_was() {
    // a program with an archive behind it
    let with_archive = |before: usize| [library(before, &[("a", 10)]), noise(20 * PAGE, 6)].concat();
    assert_eq!(taken([&with_archive(1), &with_archive(3)], &[(0, 1), (25, 2), (5, 1)]), [0, 25, 26, 7]);
}

#[test]
fn a_section_that_shrank_gives_no_page_of_the_one_behind_it() {
    let with_table = |pages: usize| {
        let table = noise(pages * PAGE, 3);
        let library = Library::new().section(".head", &noise(PAGE - 64, 1)).section(".table", &table);
        library.section(".text", &noise(20 * PAGE, 4)).bytes()
    };
    assert_eq!(taken([&with_table(16), &with_table(4)], &[(2, 1), (3, 1), (10, 1)]), [2, 3]);
}

#[test]
fn a_page_that_a_profile_names_a_thousand_times_is_looked_for_once() {
    let (old, new) = (library(1, &[("a", 10), ("b", 10)]), library(4, &[("a", 10), ("b", 10)]));
    assert_eq!(taken([&old, &new], &[(13, 2); 1000]), [16, 17]);
}

#[test]
fn a_file_with_two_names_is_looked_at_once() {
    let sink = Memory::default();
    let with_link = |bytes: &[u8]| {
        let mut tar = tar::Builder::new(Vec::new());
        tar.append_data(&mut header(tar::EntryType::Regular, bytes.len() as u64), "lib", bytes).unwrap();
        tar.append_link(&mut header(tar::EntryType::Link, 0), "same", "lib").unwrap();
        let recipes = take_in(&sink, vec![tar.into_inner().unwrap()]).unwrap();
        Tree::open(Bytes::from(derive_tree(&recipes).unwrap())).unwrap()
    };
    let [old, new] = [1, 4].map(|before| with_link(&library(before, &[("a", 10), ("b", 10)])));
    let mut inheritance = Inheritance::new(Some(&old), &new);
    let mut opened = [0, 0];
    for (path, opened) in ["lib", "same"].into_iter().zip(&mut opened) {
        let counted = |id, place| {
            *opened += 1;
            opening(&sink)(id, place)
        };
        let inherited = inheritance.of(&profile(path, &[(13, 1)]), counted).unwrap();
        assert_eq!((&inherited.files[0][..], &inherited.runs[..]), (path, &[ProfileRun(0, 16, 1, 1)][..]));
    }
    assert!(opened[0] > 0 && opened[1] == 0, "{opened:?}");
}

#[test]
fn many_symbols_in_one_page_do_not_make_many_pages_of_it() {
    let scattered = |apart: u64| {
        let mut library = Library::new().section(".text", &noise(1000 * PAGE, 5));
        for number in 0..400u64 {
            library = library.symbol(&format!("f{number}"), ".text", number * apart);
        }
        library.bytes()
    };
    assert_eq!(taken([&scattered(8), &scattered(8192)], &[(0, 1)]).len(), 8);
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn whatever_libraries_say_pages_lie_within_the_file(
        functions in prop::collection::vec(("[a-d]", 1usize..6), 0..6),
        changes in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 0..12),
        runs in prop::collection::vec((0u64..40, 1u64..9), 1..6),
    ) {
        let functions: Vec<_> = functions.iter().map(|(name, pages)| (&name[..], *pages)).collect();
        let sound = library(1, &functions);
        let mut damaged = library(2, &functions);
        // where it says where things are
        let tables = damaged.len() - 800;
        for (at, byte) in changes {
            let at = at.index(864);
            let at = if at < 64 { at } else { tables + at - 64 };
            damaged[at] = byte;
        }
        for versions in [[&sound[..], &damaged], [&damaged, &sound]] {
            let end = versions[1].len().div_ceil(PAGE) as u64;
            let found = taken(versions, &runs);
            prop_assert!(found.iter().all(|page| *page < end), "{found:?}");
        }
    }
}
