//! Boot packs: what is in one is what the tree says, and everything else is refused.

use std::collections::HashSet;
use std::sync::OnceLock;

use bytes::Bytes;
use damage::{damaged, damages};
use lamina_chunk::Chunk;
use lamina_image::{
    BOOT_FRAME_BYTES, BOOT_HEAD_BYTES, BootError, BootHead, BootTable, BuildError, Digest, Ino, PAGE_BYTES,
    Profile, build_boot,
};
use memory::{find, noise};
use proptest::prelude::*;
use started::{FILES, Image, profile};

#[path = "support/damage.rs"]
mod damage;
#[path = "support/header.rs"]
mod header;
#[expect(dead_code, reason = "layers are rebuilt in other tests")]
#[path = "support/memory.rs"]
mod memory;
#[path = "support/started.rs"]
mod started;

/// Pages of the first frames; all others have as many as the last of these.
const FRAME_PAGES: [usize; 5] = [16, 32, 64, 128, 256];

fn image() -> &'static Image {
    static IMAGE: OnceLock<Image> = OnceLock::new();
    IMAGE.get_or_init(|| Image::new(3_000_123))
}

fn build(image: &Image, profile: &Profile) -> Option<Vec<u8>> {
    let open = |id, place| Ok::<_, BootError>(Chunk::cut(image.sink.open(id, place)));
    build_boot(&image.tree, image.digest, profile, open).unwrap()
}

/// Head and table, as a node reads them.
fn table(image: &Image, boot: &[u8]) -> Result<BootTable, BootError> {
    let head = BootHead::parse(boot.get(..BOOT_HEAD_BYTES).unwrap_or(boot), image.digest)?;
    let rest = &boot[BOOT_HEAD_BYTES..];
    head.records(&rest[..head.table_len().min(rest.len())])?.table(&image.tree)
}

/// The sealed bytes of a frame, as far as they are there.
fn sealed(boot: &[u8], table: &BootTable, frame: usize) -> Bytes {
    let frame = &table.frames[frame];
    let start = usize::try_from(frame.offset).unwrap().min(boot.len());
    Bytes::copy_from_slice(&boot[start..(start + frame.sealed_len as usize).min(boot.len())])
}

/// A boot pack by hand, with hashes that fit.
struct ByHand {
    counts: [u32; 3],
    /// Sealed length, plain length, runs.
    frames: Vec<[u32; 3]>,
    /// Position of the inode, first page, pages.
    runs: Vec<[u32; 3]>,
    names: Vec<u8>,
}

impl ByHand {
    fn new(frames: &[[u32; 3]], runs: &[[u32; 3]], names: &[&[u8]]) -> Self {
        let name = |name: &&[u8]| [&u16::try_from(name.len()).unwrap().to_le_bytes()[..], name].concat();
        Self {
            counts: [frames.len(), runs.len(), names.len()].map(|count| u32::try_from(count).unwrap()),
            frames: frames.to_vec(),
            runs: runs.to_vec(),
            names: names.iter().flat_map(name).collect(),
        }
    }

    fn plain_table(&self) -> Vec<u8> {
        let mut bytes = Vec::new();
        for frame in &self.frames {
            bytes.extend(frame.iter().flat_map(|word| word.to_le_bytes()));
            bytes.extend([7; 32]);
        }
        for column in 0..3 {
            bytes.extend(self.runs.iter().flat_map(|run| run[column].to_le_bytes()));
        }
        [bytes, self.names.clone()].concat()
    }

    fn read(&self) -> Result<BootTable, BootError> {
        let table = self.plain_table();
        read_by_hand(&table, u32::try_from(table.len()).unwrap(), self.counts)
    }
}

fn read_by_hand(
    plain: &[u8],
    plain_len: u32,
    [frames, runs, names]: [u32; 3],
) -> Result<BootTable, BootError> {
    let sealed = zstd::encode_all(plain, 1).unwrap();
    let mut head = b"LAMBOOT1".to_vec();
    for word in [u32::try_from(sealed.len()).unwrap(), plain_len, frames, runs, names] {
        head.extend(word.to_le_bytes());
    }
    head.extend(image().digest.as_bytes());
    let hash = blake3::hash(&[&head[..], &sealed].concat());
    head.extend(hash.as_bytes());
    head.resize(BOOT_HEAD_BYTES, 0);
    table(image(), &[head, sealed].concat())
}

/// The position of a file's inode in the tree's table.
fn index(path: &str) -> u32 {
    find(&image().tree, path).unwrap().index().unwrap()
}

/// What lies in each frame: the first are short.
fn frames<T>(mut pages: &[T]) -> Vec<&[T]> {
    let mut frames = Vec::new();
    while !pages.is_empty() {
        let full = FRAME_PAGES[frames.len().min(FRAME_PAGES.len() - 1)];
        let (frame, rest) = pages.split_at(full.min(pages.len()));
        frames.push(frame);
        pages = rest;
    }
    frames
}

/// The pages of a profile that the image has, each once, in order.
fn expected_pages(runs: &[(u32, u64, u64)]) -> Vec<(Ino, u64)> {
    let mut seen = HashSet::new();
    let page = |(file, first, pages): &(u32, u64, u64)| {
        let ino = find(&image().tree, FILES[*file as usize]).unwrap();
        let size = image().tree.inode(ino).unwrap().size;
        (*first..first + pages).map(move |page| (ino, page)).filter(move |page| page.1 * PAGE_BYTES < size)
    };
    runs.iter().flat_map(page).filter(|page| seen.insert(*page)).collect()
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 40, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn a_boot_pack_has_each_page_once_with_the_files_bytes_in_the_order_of_the_profile(
        runs in prop::collection::vec((0u32..6, prop_oneof![0u64..4, 0u64..800], 1u64..300), 1..20),
    ) {
        let image = image();
        let expected = expected_pages(&runs);
        let Some(boot) = build(image, &profile(&[], &runs)) else {
            prop_assert!(expected.is_empty());
            return Ok(());
        };
        let table = table(image, &boot).unwrap();
        let expected = frames(&expected);
        prop_assert_eq!(table.frames.len(), expected.len());
        for (number, expected) in expected.into_iter().enumerate() {
            let frame = &table.frames[number];
            let plain = frame.open(&sealed(&boot, &table, number)).unwrap();
            let runs = &table.runs[frame.runs.clone()];
            let mut found = Vec::new();
            for run in runs {
                let (start, skip) = (usize::try_from(run.offset).unwrap(), run.skip as usize);
                let bytes = &image.sink.read_ino(&image.tree, run.ino)[start..start + run.len as usize];
                prop_assert!(&plain[skip..skip + run.len as usize] == bytes);
                let pages = u64::from(run.len).div_ceil(PAGE_BYTES);
                found.extend((0..pages).map(|page| (run.ino, run.offset / PAGE_BYTES + page)));
            }
            let mut expected = expected.to_vec();
            expected.sort_unstable();
            prop_assert_eq!(found, expected, "the pages of frame {}, sorted", number);
            let joined = runs.windows(2).all(|pair| {
                pair[0].ino != pair[1].ino || pair[0].offset + u64::from(pair[0].len) < pair[1].offset
            });
            prop_assert!(joined, "neighbours are one run");
        }
        let last = table.frames.last().unwrap();
        prop_assert_eq!(last.offset + u64::from(last.sealed_len), boot.len() as u64);
    }

    #[test]
    fn a_damaged_table_with_a_fitting_hash_is_refused_or_lies_within_the_files(damages in damages()) {
        let by_hand = ByHand::new(
            &[[9000, 12289, 3], [100, 904, 1]],
            &[[index("a/big"), 0, 2], [index("a/big"), 700, 1], [index("a/small"), 0, 1], [index("holes"), 2, 1]],
            &[b"etc/ld.so.cache", b"a"],
        );
        let plain = damaged(&by_hand.plain_table(), &damages);
        let Ok(table) = read_by_hand(&plain, u32::try_from(plain.len()).unwrap(), by_hand.counts) else { return Ok(()) };
        let mut pages = HashSet::new();
        for run in &table.runs {
            let size = image().tree.inode(run.ino).unwrap().size;
            prop_assert!(run.len > 0 && run.offset + u64::from(run.len) <= size);
            prop_assert!(u64::from(run.len).is_multiple_of(PAGE_BYTES) || run.offset + u64::from(run.len) == size);
            for page in 0..u64::from(run.len).div_ceil(PAGE_BYTES) {
                prop_assert!(pages.insert((run.ino, run.offset / PAGE_BYTES + page)));
            }
        }
    }

    #[test]
    fn junk_is_no_boot_pack(junk in prop::collection::vec(any::<u8>(), 0..400), magic in any::<bool>()) {
        let mut junk = junk;
        if magic && junk.len() >= BOOT_HEAD_BYTES {
            junk[..8].copy_from_slice(b"LAMBOOT1");
            junk[28..60].copy_from_slice(image().digest.as_bytes());
            junk[92..BOOT_HEAD_BYTES].fill(0);
            junk[8..28].chunks_exact_mut(4).for_each(|word| word[2..].fill(0));
        }
        let head = BootHead::parse(&junk[..junk.len().min(BOOT_HEAD_BYTES)], image().digest);
        prop_assert!(head.is_err() || table(image(), &junk).is_err());
    }
}

#[test]
fn directories_that_are_listed_are_looked_up_once_like_all_names() {
    let mut profile = profile(&["etc", "a/small"], &[]);
    profile.dirs = ["a", "etc", "a"].map(str::to_owned).to_vec();
    let boot = build(image(), &profile).unwrap();
    let table = table(image(), &boot).unwrap();
    assert_eq!(table.dirs, ["a", "etc"]);
    assert_eq!(table.names.iter().filter(|name| *name == "etc").count(), 1);
    assert!(table.names.iter().any(|name| name == "a"));
}

#[test]
fn names_survive_with_and_without_pages() {
    let names = ["etc/ld.so.preload", "a/é", "a/small"];
    for runs in [&[][..], &[(1, 0, 1)]] {
        let boot = build(image(), &profile(&names, runs)).unwrap();
        let table = table(image(), &boot).unwrap();
        let (first, files) = table.names.split_at(names.len());
        assert_eq!(first, names);
        // a file may be known from listing its directory, so all are looked up as well, each once
        assert!(files.iter().all(|file| !names.contains(&file.as_str())), "{files:?}");
        assert_eq!(table.runs.len(), runs.len());
    }
}

#[test]
fn a_profile_of_nothing_that_is_there_makes_no_boot_pack() {
    assert_eq!(build(image(), &profile(&[], &[])), None);
    assert_eq!(build(image(), &profile(&[], &[(2, 0, 9), (1, 1, 5)])), None);
}

#[test]
fn a_frame_that_cannot_be_had_is_said() {
    let image = image();
    let result = build_boot(&image.tree, image.digest, &profile(&[], &[(1, 0, 1)]), |_, _| Err("gone"));
    assert!(matches!(result, Err(BuildError::Frame("gone"))));
}

#[test]
fn any_changed_byte_is_refused_and_touches_nothing_but_its_frame() {
    let image = image();
    // a frame is of zeros for the most part, so that it is compressed
    let boot =
        build(image, &profile(&["a/b"], &[(0, 0, 256), (5, 0, 25), (0, 256, 231), (0, 600, 9)])).unwrap();
    let sound = table(image, &boot).unwrap();
    assert_eq!(sound.frames.len(), 6);
    let first_frame = usize::try_from(sound.frames[0].offset).unwrap();
    for at in (0..first_frame).chain((first_frame..boot.len()).step_by(9_973)).chain([boot.len() - 1]) {
        let mut changed = boot.clone();
        changed[at] ^= 0x10;
        let read = table(image, &changed);
        if at < first_frame {
            let error = read.expect_err("a changed head or table");
            let expected = match at {
                28..60 => error == BootError::OtherImage,
                _ => matches!(error, BootError::Head | BootError::Damaged("table", 0)),
            };
            assert!(expected, "byte {at}: {error}");
            continue;
        }
        assert_eq!(read.unwrap(), sound);
        for (number, frame) in sound.frames.iter().enumerate() {
            let hit = (frame.offset..frame.offset + u64::from(frame.sealed_len)).contains(&(at as u64));
            assert_eq!(
                frame.open(&sealed(&changed, &sound, number)).is_err(),
                hit,
                "byte {at}, frame {number}"
            );
        }
    }
}

#[test]
fn a_boot_pack_that_is_cut_off_gives_the_frames_before_and_no_more() {
    let image = image();
    let boot = build(image, &profile(&["a/b"], &[(0, 0, 300)])).unwrap();
    let sound = table(image, &boot).unwrap();
    let [first, .., last] = &sound.frames[..] else { panic!("frames") };
    for len in 0..usize::try_from(first.offset).unwrap() {
        if len < BOOT_HEAD_BYTES {
            assert_eq!(BootHead::parse(&boot[..len], image.digest), Err(BootError::Head));
        } else {
            assert_eq!(table(image, &boot[..len]), Err(BootError::Damaged("table", 0)));
        }
    }
    let cut = &boot[..boot.len() - 1];
    assert!(first.open(&sealed(cut, &sound, 0)).is_ok());
    assert!(matches!(last.open(&sealed(cut, &sound, sound.frames.len() - 1)), Err(BootError::Damaged(..))));
}

#[test]
fn frames_are_opened_by_what_the_table_says_of_them_alone() {
    let image = image();
    let boot = build(image, &profile(&["a/b"], &[(0, 0, 256), (5, 0, 25)])).unwrap();
    let head = BootHead::parse(&boot[..BOOT_HEAD_BYTES], image.digest).unwrap();
    let records = head.records(&boot[BOOT_HEAD_BYTES..BOOT_HEAD_BYTES + head.table_len()]).unwrap();
    assert_eq!(records.blob_bytes(), boot.len() as u64);
    let frames = records.frames().to_vec();
    let table = records.table(&image.tree).unwrap();
    assert_eq!(frames, table.frames);
    assert!(frames.iter().enumerate().all(|(at, frame)| frame.open(&sealed(&boot, &table, at)).is_ok()));
}

#[test]
fn a_frame_is_opened_into_the_memory_of_another_one() {
    let image = image();
    let boot = build(image, &profile(&[], &[(0, 0, 16), (5, 0, 25)])).unwrap();
    let table = table(image, &boot).unwrap();
    let [first, last] = &table.frames[..] else { panic!("two frames") };
    let mut plain = Vec::with_capacity(BOOT_FRAME_BYTES);
    let at = plain.as_ptr();
    for (number, frame) in [first, last].into_iter().enumerate() {
        frame.open_into(&sealed(&boot, &table, number), &mut plain).unwrap();
        assert!(plain == frame.open(&sealed(&boot, &table, number)).unwrap());
        assert_eq!(plain.as_ptr(), at);
    }
}

#[test]
fn a_boot_pack_of_another_tree_is_of_another_image() {
    let boot = build(image(), &profile(&[], &[(1, 0, 1)])).unwrap();
    let other = BootHead::parse(&boot[..BOOT_HEAD_BYTES], Digest::of(b"another"));
    assert_eq!(other, Err(BootError::OtherImage));
}

#[test]
fn a_table_that_lies_about_runs_is_refused() {
    let (big, small, whole) = (index("a/big"), index("a/small"), index("a/whole"));
    let sound = ByHand::new(&[[8193, 8193, 2]], &[[small, 0, 1], [whole, 0, 2]], &[b"a/b"]);
    assert_eq!(sound.read().unwrap().runs.len(), 2);
    let cases: [(&str, [u32; 3], u32); 11] = [
        ("a page behind the last", [whole, 2, 1], 4096),
        ("two pages of which one is behind the last", [whole, 1, 2], 8192),
        ("a page of an empty file", [index("a/empty"), 0, 1], 0),
        ("no pages", [whole, 0, 0], 0),
        ("the last page there could be", [whole, u32::MAX, 1], 4096),
        ("more pages than a frame", [big, 0, 257], 4096),
        ("a gigantic count", [big, 0, u32::MAX], 4096),
        ("a directory", [index("a"), 0, 1], 4096),
        ("a symbolic link", [index("a/link"), 0, 1], 5),
        ("an inode that is not there", [image().tree.inodes(), 0, 1], 4096),
        ("an inode that no tree has", [u32::MAX, 0, 1], 4096),
    ];
    for (case, run, len) in cases {
        let table = ByHand::new(&[[1, 1 + len, 2]], &[[small, 0, 1], run], &[]).read();
        assert_eq!(table, Err(BootError::Run(1)), "{case}");
    }
    let overlaps: [[[u32; 3]; 3]; 3] = [
        [[big, 0, 2], [small, 0, 1], [big, 1, 2]],
        [[small, 0, 1], [big, 5, 2], [small, 0, 1]],
        [[big, 0, 4], [big, 6, 2], [big, 1, 1]],
    ];
    for runs in overlaps {
        let len = |run: &[u32; 3]| if run[0] == small { 1 } else { run[2] * 4096 };
        let frames: Vec<_> = runs.iter().map(|run| [len(run), len(run), 1]).collect();
        assert_eq!(ByHand::new(&frames, &runs, &[]).read(), Err(BootError::Run(2)), "{runs:?}");
    }
}

#[test]
fn a_table_that_lies_about_frames_and_names_is_refused() {
    let runs = [[index("a/small"), 0, 1], [index("a/big"), 0, 256]];
    let (one, big) = ([1, 1, 1], [256 * 4096, 256 * 4096, 1]);
    assert!(ByHand::new(&[one, big], &runs, &[]).read().is_ok());
    let cases: [(&str, &[[u32; 3]], usize); 9] = [
        ("a run in no frame", &[one], 1),
        ("a frame without a run", &[one, big, [1, 1, 0]], 2),
        ("a frame of runs that are not there", &[one, [256 * 4096, 256 * 4096, 2]], 1),
        ("a gigantic count of runs", &[[1, 1, u32::MAX]], 0),
        ("a frame that is longer than its runs", &[[1, 2, 1], big], 0),
        ("a frame that is shorter than its runs", &[one, [4096, 4096, 1]], 1),
        ("a frame without bytes", &[[0, 1, 1], big], 0),
        ("a frame that is longer sealed than plain", &[[2, 1, 1], big], 0),
        ("a frame of more than a MiB", &[[9, 256 * 4096 + 1, 2]], 0),
    ];
    for (case, frames, number) in cases {
        let table = ByHand::new(frames, &runs, &[]).read();
        assert_eq!(table, Err(BootError::Damaged("frame", number)), "{case}");
    }
    let long = ["x"; 2049].join("/");
    for name in [&b""[..], b"/etc", b"../etc", b"a//b", b"a/.", b"a\0", b"\xff", long.as_bytes()] {
        let table = ByHand::new(&[], &[], &[b"a", name]).read();
        assert_eq!(table, Err(BootError::Damaged("name", 1)), "{name:?}");
    }
}

#[test]
fn a_name_comes_at_most_twice() {
    let table = ByHand::new(&[], &[], &[b"a", b"etc", b"a", b"etc"]).read().unwrap();
    assert_eq!((table.names, table.dirs), (vec!["a".into(), "etc".into()], vec!["a".into(), "etc".into()]));
    let thrice = ByHand::new(&[], &[], &[b"a", b"etc", b"a", b"a"]).read();
    assert_eq!(thrice, Err(BootError::Damaged("name", 3)));
}

#[test]
fn counts_that_contradict_the_table_are_refused() {
    let sound = ByHand::new(&[[1, 1, 1]], &[[index("a/small"), 0, 1]], &[b"a"]);
    let plain = sound.plain_table();
    let len = u32::try_from(plain.len()).unwrap();
    assert!(read_by_hand(&plain, len, [1, 1, 1]).is_ok());
    for counts in [[0, 1, 1], [2, 1, 1], [1, 0, 1], [1, 2, 1], [1, 1, 0], [1, 1, 2]] {
        let error = read_by_hand(&plain, len, counts).unwrap_err();
        assert!(matches!(error, BootError::Damaged(..) | BootError::Run(_)), "{counts:?}: {error}");
    }
    for plain_len in [0, len - 1, len + 1, 64 << 20] {
        assert_eq!(read_by_hand(&plain, plain_len, [1, 1, 1]), Err(BootError::Damaged("table", 0)));
    }
    let gigantic = [[1 << 20, 1, 1], [1, (1 << 20) + 1, 1], [1, 1, (1 << 20) + 1], [u32::MAX; 3]];
    for counts in gigantic {
        assert_eq!(read_by_hand(&plain, len, counts), Err(BootError::Head), "{counts:?}");
    }
    assert_eq!(read_by_hand(&plain, u32::MAX, [1, 1, 1]), Err(BootError::Head));
}

#[test]
fn what_fits_a_frame_is_its_bytes_even_where_they_do_not_compress() {
    let image = image();
    let boot = build(image, &profile(&[], &[(3, 0, 2)])).unwrap();
    let table = table(image, &boot).unwrap();
    assert_eq!(table.frames[0].sealed_len, 8192, "noise is kept as it is");
    assert!(table.frames[0].open(&sealed(&boot, &table, 0)).unwrap() == noise(8192, 2));
}
