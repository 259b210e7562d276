//! Parsers of foreign bytes: what is sound is read as it was meant, and everything else is refused without a
//! panic.

#[path = "support/damage.rs"]
mod damage;
#[path = "support/header.rs"]
mod header;
#[path = "support/memory.rs"]
mod memory;
#[path = "support/written.rs"]
mod written;

use std::collections::{BTreeMap, BTreeSet};
use std::io::Read;

use bytes::Bytes;
use damage::{damaged, damages};
use header::header;
use lamina_chunk::{Chunk, pack_records};
use lamina_image::{
    BootHead, Compression, Digest, Document, FileKind, IngestOptions, Ino, LayerInput, Profile, Progress,
    Recipe, Tree, build_boot, derive_tree, ingest, media_type, pack_tree, parse_config, unpack_tree,
};
use memory::{Memory, find, noise, take_in};
use proptest::prelude::*;
use written::{Layout, WrittenFile, write_tar};

/// No flat tree of the small images here comes near this.
const SMALL_TREE_BYTES: usize = 1 << 20;

fn layout() -> impl Strategy<Value = Layout> {
    prop_oneof![
        Just(Layout::Ustar),
        Just(Layout::Gnu),
        Just(Layout::Pax),
        Just(Layout::GnuSparse),
        Just(Layout::PaxSparse00),
        Just(Layout::PaxSparse01),
        Just(Layout::PaxSparse10),
    ]
}

fn written_file() -> impl Strategy<Value = WrittenFile> {
    let parts = prop::collection::vec((1usize..90, prop::sample::select(vec![b'a', 0x7f, 0xe9])), 0..4);
    let runs = prop::collection::vec((0u64..100_000, 0usize..3_000), 1..40);
    let xattrs =
        prop::collection::btree_map("user\\.[a-z=]{1,12}", prop::collection::vec(any::<u8>(), 0..40), 0..4);
    let times = (-(1i64 << 40)..(1 << 40), 0u32..1_000_000_000);
    (layout(), parts, runs, xattrs, times, 0u32..0o10000, any::<(u32, u32, bool)>()).prop_map(
        |(layout, parts, runs, xattrs, mtime, mode, (uid, gid, linked))| WrittenFile {
            layout,
            parts: parts.into_iter().map(|(len, byte)| vec![byte; len]).collect(),
            runs,
            xattrs,
            mtime,
            mode,
            owner: (uid, gid),
            linked,
        },
    )
}

/// Asks a tree everything about its first inodes. Whether the answers are errors is not looked at.
fn ask_everything(tree: &Tree) {
    for number in (0..=u64::from(tree.inodes()).min(40)).chain([u64::from(u32::MAX), u64::MAX]) {
        let ino = Ino(number);
        let _ =
            (tree.inode(ino), tree.symlink(ino), tree.xattrs(ino), tree.lookup(ino, b"f"), tree.parent(ino));
        if let Ok(entries) = tree.entries(ino) {
            let _ = entries.iter().take(100).filter(Result::is_ok).count();
        }
        for (from, to) in [(0, u64::MAX), (70_000, 70_001), (u64::MAX - 1, u64::MAX)] {
            if let Ok(extents) = tree.extents(ino, from, to) {
                let _ = extents.take(100).filter(Result::is_ok).count();
            }
        }
    }
    let _ = (tree.packs().count(), tree.frame(0), tree.frame(u32::MAX));
}

/// Gives every block that looks like a header the checksum it needs, so that damage reaches what is behind
/// it.
fn with_checksums(mut tar: Vec<u8>) -> Vec<u8> {
    for block in tar.chunks_exact_mut(512).filter(|block| block[257..262] == *b"ustar") {
        block[148..156].fill(b' ');
        let sum: u32 = block.iter().map(|byte| u32::from(*byte)).sum();
        block[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
    }
    tar
}

fn sample_files() -> Vec<WrittenFile> {
    let all = [
        Layout::Ustar,
        Layout::Gnu,
        Layout::Pax,
        Layout::GnuSparse,
        Layout::PaxSparse00,
        Layout::PaxSparse01,
        Layout::PaxSparse10,
    ];
    let file = |layout| WrittenFile {
        layout,
        parts: vec![vec![b'n'; 80], vec![b'm'; 60]],
        runs: vec![(100, 700), (5_000, 20), (1, 3), (1, 3), (1, 3), (9, 1)],
        xattrs: BTreeMap::from([("user.x".to_owned(), b"a\0\n=".to_vec())]),
        mtime: (1_700_000_000, 5),
        mode: 0o644,
        owner: (0, 0),
        linked: true,
    };
    all.map(file).to_vec()
}

/// The plain form of a recipe's compressed parts: header, tables, literal bytes.
fn recipe_parts(blob: &[u8]) -> [Vec<u8>; 3] {
    let tables_end = 96 + u32::from_le_bytes(blob[80..84].try_into().unwrap()) as usize;
    let plain = |frame: &[u8]| zstd::decode_all(frame).unwrap();
    [blob[..96].to_vec(), plain(&blob[96..tables_end]), plain(&blob[tables_end..])]
}

fn recipe_of_parts(mut header: Vec<u8>, tables: &[u8], literals: &[u8]) -> Vec<u8> {
    let [tables, literals] = [tables, literals].map(|plain| zstd::encode_all(plain, 1).unwrap());
    header.resize(96, 0);
    header[80..84].copy_from_slice(&u32::try_from(tables.len()).unwrap().to_le_bytes());
    [header, tables, literals].concat()
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 48, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn a_tar_of_any_writer_is_read_as_it_was_meant_and_rebuilt(files in prop::collection::vec(written_file(), 1..6)) {
        let tar = write_tar(&files);
        let sink = Memory::default();
        let recipe = take_in(&sink, vec![tar.clone()]).unwrap().remove(0);
        prop_assert!(sink.rebuild(&recipe, 0) == tar);
        let tree = Tree::open(Bytes::from(derive_tree(&[recipe]).unwrap())).unwrap();
        for (number, file) in files.iter().enumerate() {
            let path = file.path(number);
            let ino = path.split(|byte| *byte == b'/').try_fold(Ino::ROOT, |dir, name| tree.lookup(dir, name).unwrap());
            let ino = ino.expect("there");
            let inode = tree.inode(ino).unwrap();
            let expected = file.bytes(number);
            prop_assert_eq!(inode.kind(), FileKind::Regular);
            prop_assert_eq!(inode.size, expected.len() as u64);
            prop_assert_eq!(inode.mode & 0o7777, file.mode);
            prop_assert_eq!((inode.mtime_s, inode.mtime_ns), file.mtime_as_kept());
            prop_assert_eq!((inode.uid, inode.gid), file.owner_as_kept());
            let expected_xattrs = file.xattrs_as_kept();
            let found: Vec<(Vec<u8>, Vec<u8>)> =
                tree.xattrs(ino).unwrap().into_iter().map(|(name, value)| (name.to_vec(), value.to_vec())).collect();
            prop_assert_eq!(found, expected_xattrs);
            prop_assert!(sink.read_ino(&tree, ino) == expected, "the bytes of file {}", number);
            if file.linked {
                prop_assert_eq!(find(&tree, &format!("link-{number}")), Some(ino));
            }
        }
    }

    #[test]
    fn layers_make_the_tree_that_applying_them_one_by_one_makes(layers in prop::collection::vec(changes(), 1..5)) {
        let sink = Memory::default();
        let recipes = take_in(&sink, layers.iter().map(|layer| tar_of(layer)).collect()).unwrap();
        let tree = Tree::open(Bytes::from(derive_tree(&recipes).unwrap())).unwrap();
        let mut model = BTreeMap::new();
        layers.iter().for_each(|layer| apply(&mut model, layer));
        prop_assert_eq!(visible(&sink, &tree), model);
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 256, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn a_damaged_tar_is_refused_or_rebuilt_as_it_is(damages in damages(), mended in any::<bool>()) {
        let tar = damaged(&write_tar(&sample_files()), &damages);
        let tar = if mended { with_checksums(tar) } else { tar };
        let sink = Memory::default();
        let Ok(mut recipes) = take_in(&sink, vec![tar.clone()]) else { return Ok(()) };
        prop_assert!(sink.rebuild(&recipes.remove(0), 0) == tar);
        let recipes = take_in(&sink, vec![tar.clone(), tar]).unwrap();
        let Ok(flat) = derive_tree(&recipes) else { return Ok(()) };
        prop_assert!(flat.len() < SMALL_TREE_BYTES);
        ask_everything(&Tree::open(Bytes::from(flat)).unwrap());
    }

    #[test]
    fn a_damaged_recipe_never_panics(damages in damages(), part in 0usize..4) {
        let recipe = take_in(&Memory::default(), vec![write_tar(&sample_files())]).unwrap().remove(0);
        let mut parts = recipe_parts(recipe.blob());
        if part < 3 {
            parts[part] = damaged(&parts[part], &damages);
            if part == 2 { parts[2] = with_checksums(std::mem::take(&mut parts[2])); }
        }
        let [header, tables, literals] = parts;
        let blob = recipe_of_parts(header, &tables, &literals);
        let blob = if part == 3 { damaged(&blob, &damages) } else { blob };
        let Ok(recipe) = Recipe::parse(Bytes::from(blob)) else { return Ok(()) };
        for from in [0, 1, 70_000, u64::MAX] {
            let _ = recipe.pieces(from).filter(Result::is_ok).count();
        }
        if let Ok(flat) = derive_tree(&[recipe.clone(), recipe]) {
            prop_assert!(flat.len() < SMALL_TREE_BYTES);
            ask_everything(&Tree::open(Bytes::from(flat)).unwrap());
        }
    }

    #[test]
    fn a_damaged_tree_never_panics(damages in damages(), packed in any::<bool>()) {
        let recipe = take_in(&Memory::default(), vec![write_tar(&sample_files())]).unwrap();
        let flat = derive_tree(&recipe).unwrap();
        let flat = match packed {
            true => unpack_tree(&damaged(&pack_tree(&flat), &damages)),
            false => Ok(damaged(&flat, &damages)),
        };
        if let Ok(flat) = flat
            && let Ok(tree) = Tree::open(Bytes::from(flat))
        {
            ask_everything(&tree);
        }
    }

    #[test]
    fn a_damaged_document_never_panics(damages in damages(), junk in prop::collection::vec(any::<u8>(), 0..100)) {
        let manifest = manifest_json();
        let sound = match Document::parse(media_type::OCI_MANIFEST, manifest.as_bytes()).unwrap() {
            Document::Manifest(manifest) => manifest,
            Document::Index(_) => unreachable!("it was read as a manifest"),
        };
        let index = r#"{"schemaVersion":2,"manifests":[{"mediaType":"x","digest":"sha256:00","size":1,"platform":{"os":"linux","architecture":"amd64"}}],"annotations":null}"#;
        for bytes in [damaged(manifest.as_bytes(), &damages), damaged(index.as_bytes(), &damages), junk] {
            let _ = Document::parse(media_type::OCI_MANIFEST, &bytes).map(|it| it.subject().is_some());
            let _ = Document::parse(media_type::OCI_INDEX, &bytes);
            let _ = parse_config(&sound, &bytes);
        }
        let config = format!(r#"{{"rootfs":{{"type":"layers","diff_ids":["sha256:{}"]}},"config":{{"Env":null,"X":1}}}}"#, "0".repeat(64));
        prop_assert!(parse_config(&sound, config.as_bytes()).is_ok());
        let _ = parse_config(&sound, &damaged(config.as_bytes(), &damages));
    }

    #[test]
    fn a_damaged_pack_never_panics(damages in damages()) {
        let sink = Memory::default();
        take_in(&sink, vec![write_tar(&sample_files())]).unwrap();
        let packs = sink.packs.lock().unwrap();
        let pack = Bytes::from(damaged(packs.values().next().unwrap(), &damages));
        if let Ok(records) = pack_records(&pack) {
            let _ = records.iter().filter(|record| record.verify(&pack).is_ok()).count();
        }
    }

    #[test]
    fn junk_is_decompressed_to_bytes_or_an_error(
        magic in prop::sample::select(vec![&b""[..], b"\x1f\x8b\x08\0\0\0\0\0\0\0", b"\x28\xb5\x2f\xfd", b"\x50\x2a\x4d\x18"]),
        junk in prop::collection::vec(any::<u8>(), 0..4_000),
        damages in damages(),
    ) {
        let tar = write_tar(&sample_files()[..1]);
        let zstd = damaged(&zstd::encode_all(&tar[..], 1).unwrap(), &damages);
        for bytes in [[magic, &junk].concat(), zstd] {
            let mut plain = Vec::new();
            if let Ok(decoder) = Compression::decode(std::io::Cursor::new(bytes)) {
                let _ = decoder.take(64 << 20).read_to_end(&mut plain);
            }
            prop_assert!(plain.len() <= 64 << 20);
        }
    }
}

fn manifest_json() -> String {
    let zeros = "0".repeat(64);
    format!(
        r#"{{"schemaVersion":2,"unknown":[1,{{}}],"config":{{"mediaType":"application/vnd.oci.image.config.v1+json","digest":"sha256:{zeros}","size":2,"urls":null}},"layers":[{{"mediaType":"application/vnd.oci.image.layer.v1.tar","digest":"sha256:{zeros}","size":3,"annotations":null}}],"annotations":{{"a":"b"}}}}"#
    )
}

/// What a layer does, to paths of which those that end in `d` or `e` are directories and nothing else.
#[derive(Clone, Debug)]
enum Change {
    File(String, u8),
    Directory(String),
    Whiteout(String),
    Opaque(String),
}

fn changes() -> impl Strategy<Value = Vec<Change>> {
    let parents = prop::sample::select(vec!["", "d/", "e/", "d/d/", "d/e/", "e/d/", "d/d/d/"]);
    let leaf = prop::sample::select(vec!["f", "g", "x"]);
    let path = (parents, leaf).prop_map(|(parents, leaf)| format!("{parents}{leaf}"));
    let directory =
        || prop::sample::select(vec!["d", "e", "d/d", "d/e", "e/d", "d/d/d"]).prop_map(str::to_owned);
    let change = prop_oneof![
        4 => (path.clone(), any::<u8>()).prop_map(|(path, byte)| Change::File(path, byte)),
        2 => directory().prop_map(Change::Directory),
        // a directory where others may have a file
        1 => Just(Change::Directory("d/x".to_owned())),
        2 => path.prop_map(Change::Whiteout),
        1 => directory().prop_map(Change::Whiteout),
        1 => directory().prop_map(Change::Opaque),
    ];
    prop::collection::vec(change, 0..10)
}

fn tar_of(changes: &[Change]) -> Vec<u8> {
    let mut tar = tar::Builder::new(Vec::new());
    let mut add = |kind, path: &str, bytes: &[u8]| {
        tar.append_data(&mut header(kind, bytes.len() as u64), path, bytes).unwrap();
    };
    for change in changes {
        match change {
            Change::File(path, byte) => add(tar::EntryType::Regular, path, &[*byte]),
            Change::Directory(path) => add(tar::EntryType::Directory, path, b""),
            Change::Whiteout(path) => {
                let (parents, name) = path.rsplit_once('/').unwrap_or((".", path));
                add(tar::EntryType::Regular, &format!("{parents}/.wh.{name}"), b"");
            }
            Change::Opaque(path) => add(tar::EntryType::Regular, &format!("{path}/.wh..wh..opq"), b""),
        }
    }
    tar.into_inner().unwrap()
}

/// Paths, with a file's byte.
type Visible = BTreeMap<String, Option<u8>>;

fn remove_below(model: &mut Visible, path: &str) {
    model.retain(|other, _| !other.starts_with(&format!("{path}/")));
}

/// A layer's whiteouts first, then what it brings, since it never hides its own.
fn apply(model: &mut Visible, changes: &[Change]) {
    for change in changes {
        match change {
            Change::Whiteout(path) => {
                model.remove(path);
                remove_below(model, path);
            }
            Change::Opaque(path) => remove_below(model, path),
            Change::File(..) | Change::Directory(_) => {}
        }
    }
    for change in changes {
        let (path, contents) = match change {
            Change::File(path, byte) => (path, Some(*byte)),
            Change::Directory(path) => (path, None),
            Change::Whiteout(_) | Change::Opaque(_) => continue,
        };
        let parents = path.match_indices('/').map(|(at, _)| path[..at].to_owned());
        model.extend(parents.map(|parent| (parent, None)));
        model.insert(path.clone(), contents);
    }
}

fn visible(sink: &Memory, tree: &Tree) -> Visible {
    let mut found = Visible::new();
    let mut directories = vec![(Ino::ROOT, String::new())];
    let mut seen = BTreeSet::new();
    while let Some((directory, prefix)) = directories.pop() {
        assert!(seen.insert(directory.0), "a directory has one name");
        for entry in tree.entries(directory).unwrap().iter().map(Result::unwrap) {
            let path = format!("{prefix}{}", String::from_utf8_lossy(entry.name));
            if entry.kind == FileKind::Directory {
                directories.push((entry.ino, format!("{path}/")));
                found.insert(path, None);
            } else {
                let byte = sink.read_ino(tree, entry.ino)[0];
                found.insert(path, Some(byte));
            }
        }
    }
    found
}

fn from_hex(text: &str) -> Vec<u8> {
    hex::decode(text.split_whitespace().collect::<String>()).unwrap()
}

/// A fixed image. Its one file is noise, so that its pack holds no compressed byte.
fn golden_image() -> (Vec<u8>, Recipe, Vec<u8>) {
    let mut tar = tar::Builder::new(Vec::new());
    tar.append_data(&mut header(tar::EntryType::Directory, 0), "etc", &b""[..]).unwrap();
    tar.append_pax_extensions([("SCHILY.xattr.user.note", &b"hi"[..]), ("mtime", b"1700000000.5")]).unwrap();
    tar.append_data(&mut header(tar::EntryType::Regular, 40), "etc/noise", &noise(40, 11)[..]).unwrap();
    tar.append_link(&mut header(tar::EntryType::Link, 0), "etc/same", "etc/noise").unwrap();
    tar.append_link(&mut header(tar::EntryType::Symlink, 0), "link", "etc/noise").unwrap();
    let tar = tar.into_inner().unwrap();
    let recipe = take_in(&Memory::default(), vec![tar.clone()]).unwrap().remove(0);
    let flat = derive_tree(std::slice::from_ref(&recipe)).unwrap();
    (tar, recipe, flat)
}

#[test]
fn the_bytes_of_a_tree_are_the_golden_ones() {
    let (_, _, flat) = golden_image();
    let golden = from_hex(include_str!("../golden/tree.hex"));
    assert_eq!(hex::encode(flat), hex::encode(golden));
}

#[test]
fn a_recipe_is_the_golden_one_but_for_how_well_it_is_compressed() {
    let (tar, recipe, flat) = golden_image();
    let golden = from_hex(include_str!("../golden/recipe.hex"));
    let [mut header, tables, literals] = recipe_parts(recipe.blob());
    let [mut golden_header, golden_tables, golden_literals] = recipe_parts(&golden);
    // how long the tables are when compressed
    header[80..84].fill(0);
    golden_header[80..84].fill(0);
    assert_eq!(hex::encode(header), hex::encode(golden_header));
    assert_eq!(hex::encode(tables), hex::encode(golden_tables));
    assert_eq!(hex::encode(literals), hex::encode(golden_literals));
    let golden = Recipe::parse(Bytes::from(golden)).unwrap();
    assert_eq!(golden.tar_bytes(), tar.len() as u64);
    assert_eq!(derive_tree(&[golden]).unwrap(), flat);
}

/// Names and all pages of the golden image's file, and a name that is not there.
fn golden_boot() -> (Tree, Digest, Vec<u8>) {
    let (_, _, flat) = golden_image();
    let json =
        br#"{"version":1,"starts":1,"names":["etc","lib64"],"files":["etc/noise"],"runs":[[0,0,1,1]]}"#;
    let digest = Digest::from_bytes([0xd1; 32]);
    let tree = Tree::open(Bytes::from(flat)).unwrap();
    let open = |_, _| Ok::<_, ()>(Chunk::cut(Bytes::from(noise(40, 11))));
    let boot = build_boot(&tree, digest, &Profile::parse(json).unwrap(), open).unwrap().unwrap();
    (tree, digest, boot)
}

/// A boot pack in parts: the head without what depends on how well the table is compressed, the plain table,
/// the frames.
fn boot_parts(boot: &[u8]) -> [Vec<u8>; 3] {
    let table_end = 128 + u32::from_le_bytes(boot[8..12].try_into().unwrap()) as usize;
    let mut head = boot[..128].to_vec();
    head[8..12].fill(0);
    head[60..92].fill(0);
    [head, zstd::decode_all(&boot[128..table_end]).unwrap(), boot[table_end..].to_vec()]
}

#[test]
fn a_boot_pack_is_the_golden_one_but_for_how_well_its_table_is_compressed() {
    let (tree, digest, boot) = golden_boot();
    let golden = from_hex(include_str!("../golden/boot.hex"));
    assert_eq!(boot_parts(&boot).map(hex::encode), boot_parts(&golden).map(hex::encode));
    let head = BootHead::parse(&golden[..128], digest).unwrap();
    let table = head.records(&golden[128..128 + head.table_len()]).unwrap().table(&tree).unwrap();
    assert_eq!(table.names, ["etc", "lib64", "etc/noise"]);
    let frame = &table.frames[0];
    let sealed = &golden[usize::try_from(frame.offset).unwrap()..];
    assert_eq!(frame.open(sealed).unwrap(), noise(40, 11));
}

#[test]
fn a_layer_that_says_one_thing_of_all_its_entries_does_not_multiply() {
    let mut tar = tar::Builder::new(Vec::new());
    let value = vec![b'v'; 60_000];
    let mut record = b"60023 SCHILY.xattr.a=".to_vec();
    record.extend_from_slice(&value);
    record.push(b'\n');
    let len = record.len();
    record.splice(..5, len.to_string().into_bytes());
    tar.append_data(&mut header(tar::EntryType::XGlobalHeader, len as u64), "g", &record[..]).unwrap();
    tar.append_data(&mut header(tar::EntryType::Regular, 0), "f", &b""[..]).unwrap();
    let bytes = Box::new(std::io::Cursor::new(tar.into_inner().unwrap()));
    let input = LayerInput { name: "layer".into(), bytes, diff_id: None };
    let result = ingest(vec![input], &Memory::default(), IngestOptions::default(), &Progress::default());
    let error = result.unwrap_err().to_string();
    assert!(error.contains("global header"), "{error}");
}
