//! Profiles and the trees that they belong to.

use lamina_image::{Inheritance, Ino, Profile, ProfileRun, Trace, TraceRun};
use memory::find;
use proptest::prelude::*;
use started::{Image, profile};

#[path = "support/header.rs"]
mod header;
#[expect(dead_code, reason = "contents are read in other tests")]
#[path = "support/memory.rs"]
mod memory;
#[expect(dead_code, reason = "only the tree matters here")]
#[path = "support/started.rs"]
mod started;

fn trace(names: &[(Ino, &[u8])], runs: &[(Ino, u64, u64)]) -> Trace {
    Trace {
        names: names.iter().map(|(dir, name)| (*dir, name.to_vec())).collect(),
        runs: runs
            .iter()
            .map(|(ino, first, pages)| TraceRun { ino: *ino, first: *first, pages: *pages })
            .collect(),
        boot: false,
    }
}

#[test]
fn a_trace_becomes_paths_in_the_order_of_the_start() {
    let image = Image::new(50_000);
    let ino = |path: &str| find(&image.tree, path).unwrap();
    let dir = ino("a");
    let names: [(Ino, &[u8]); 4] = [(dir, b"big"), (Ino::ROOT, b"etc"), (dir, b"not there"), (dir, b"big")];
    let runs = [(ino("a/whole"), 1, 1), (ino("a/big"), 3, 2), (ino("a/same"), 0, 1), (ino("a/whole"), 0, 1)];
    let profile = Profile::of_trace(&image.tree, &trace(&names, &runs)).unwrap();
    assert_eq!(profile.names, ["a/big", "etc", "a/not there"]);
    assert_eq!(profile.files[..2], ["a/whole", "a/big"]);
    assert_eq!(find(&image.tree, &profile.files[2]), Some(ino("a/small")), "either name of the file");
    let runs =
        [ProfileRun(0, 1, 1, 1), ProfileRun(1, 3, 2, 1), ProfileRun(2, 0, 1, 1), ProfileRun(0, 0, 1, 1)];
    assert_eq!(profile.runs, runs);
    assert_eq!((profile.starts, profile.inherited, profile.pages()), (1, false, 5));
}

#[test]
fn what_is_not_in_the_tree_is_left_out_of_a_trace() {
    let image = Image::new(50_000);
    let ino = |path: &str| find(&image.tree, path).unwrap();
    let (dir, beyond) = (ino("a"), Ino(u64::from(image.tree.inodes()) + 1));
    let names: [(Ino, &[u8]); 11] = [
        (dir, b".."),
        (dir, b"."),
        (dir, b""),
        (dir, b"b/c"),
        (dir, b"b\0c"),
        (dir, b"\xff"),
        (dir, &[b'x'; 256]),
        (ino("a/small"), b"below a file"),
        (Ino(0), b"x"),
        (beyond, b"x"),
        (Ino(u64::MAX), b"x"),
    ];
    let big = ino("a/big");
    let runs = [
        (big, 13, 1),
        (big, u64::MAX, 1),
        (big, 1, 0),
        (ino("a/empty"), 0, 1),
        (dir, 0, 1),
        (ino("a/link"), 0, 1),
        (Ino(0), 0, 1),
        (beyond, 0, 1),
        (Ino(u64::MAX), 0, 1),
        (big, 12, u64::MAX),
        (big, 11, 100),
    ];
    let profile = Profile::of_trace(&image.tree, &trace(&names, &runs)).unwrap();
    assert!(profile.names.is_empty(), "{:?}", profile.names);
    assert_eq!(profile.dirs, ["a"], "a dot says that it was listed");
    assert_eq!(profile.files, ["a/big"]);
    // and each page once
    assert_eq!(profile.runs, [ProfileRun(0, 12, 1, 1), ProfileRun(0, 11, 1, 1)]);
}

#[test]
fn a_trace_that_repeats_itself_a_million_times_stays_readable() {
    let image = Image::new(50_000);
    let big = find(&image.tree, "a/big").unwrap();
    let name = |number: usize| (Ino::ROOT, format!("{number}\u{1}\u{1}\u{1}").into_bytes());
    let runs = vec![TraceRun { ino: big, first: 0, pages: u64::MAX }; 1 << 20];
    let trace = Trace { names: (0..1 << 20).map(name).collect(), runs, boot: false };
    let profile = Profile::of_trace(&image.tree, &trace).unwrap();
    assert!(!profile.names.is_empty() && !profile.runs.is_empty());
    assert_eq!(Profile::parse(&profile.to_json()).unwrap(), profile);
}

/// What an image takes over of a profile of another one, of which nothing else is known.
fn inherited(profile: &Profile, image: &Image) -> Profile {
    Inheritance::new(None, &image.tree).of(profile, |_, _| Err(())).unwrap()
}

#[test]
fn the_next_version_inherits_the_files_that_it_still_has_cut_to_their_size() {
    let next = Image::new(3 * 4096 + 1);
    let mut old =
        profile(&["a/gone", "a/big"], &[(0, 2, 9), (1, 0, 1), (3, 0, 2), (0, 4, 1), (2, 0, 7), (5, 1, 1)]);
    old.files[1] = "a/gone".to_owned();
    old.files[5] = "a/small/below a file".to_owned();
    old.runs.iter_mut().for_each(|run| run.3 = 3);
    old.starts = 3;
    let inherited = inherited(&old, &next);
    assert!(inherited.inherited);
    assert_eq!(inherited.starts, 3);
    assert_eq!(inherited.names, old.names, "it matters as well that a name is not there");
    assert_eq!(inherited.files, ["a/big", "a/whole"]);
    assert_eq!(inherited.runs, [ProfileRun(0, 2, 2, 3), ProfileRun(1, 0, 2, 3)]);
    assert_eq!(Profile::parse(&inherited.to_json()).unwrap(), inherited);
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn any_trace_makes_a_profile_that_lies_within_the_tree(
        names in prop::collection::vec((0u64..12, "[a./\\x00é]{0,4}"), 0..8),
        runs in prop::collection::vec((0u64..12, prop_oneof![0u64..20, any::<u64>()], prop_oneof![0u64..20, any::<u64>()]), 0..8),
    ) {
        let image = Image::new(50_000);
        let names: Vec<_> = names.iter().map(|(dir, name)| (Ino(*dir), name.as_bytes())).collect();
        let runs: Vec<_> = runs.iter().map(|(ino, first, pages)| (Ino(*ino), *first, *pages)).collect();
        let profile = Profile::of_trace(&image.tree, &trace(&names, &runs)).unwrap();
        prop_assert_eq!(&Profile::parse(&profile.to_json()).unwrap(), &profile);
        for run in &profile.runs {
            let ino = find(&image.tree, &profile.files[run.0 as usize]).unwrap();
            prop_assert!((run.1 + run.2 - 1) * 4096 < image.tree.inode(ino).unwrap().size);
        }
        let mut inherited = inherited(&profile, &image);
        inherited.inherited = false;
        prop_assert_eq!(inherited, profile);
    }
}
