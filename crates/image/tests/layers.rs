//! From the tars of layers to recipes, packs and a tree, and back.

use std::io::Read;

use bytes::Bytes;
use header::header;
use lamina_image::{
    Digest, FileKind, IngestError, IngestOptions, Ino, LayerInput, Progress, Recipe, Tree, TreeError,
    TreeNames, TreeUnpacking, derive_tree, ingest, pack_tree, pack_tree_as_before, unpack_tree,
};
use memory::{Memory, find, noise, take_in};

#[path = "support/header.rs"]
mod header;
#[path = "support/memory.rs"]
mod memory;

fn names(tree: &Tree, path: &str) -> Vec<String> {
    let dir = if path.is_empty() { Ino::ROOT } else { find(tree, path).unwrap() };
    let entries = tree.entries(dir).unwrap();
    entries.iter().map(|entry| String::from_utf8_lossy(entry.unwrap().name).into_owned()).collect()
}

/// Writes a tar, entry by entry.
struct Tar(tar::Builder<Vec<u8>>);

impl Tar {
    fn new() -> Self {
        Self(tar::Builder::new(Vec::new()))
    }

    fn file(mut self, path: &str, bytes: &[u8]) -> Self {
        self.0.append_data(&mut header(tar::EntryType::Regular, bytes.len() as u64), path, bytes).unwrap();
        self
    }

    fn dir(mut self, path: &str) -> Self {
        self.0.append_data(&mut header(tar::EntryType::Directory, 0), path, &[][..]).unwrap();
        self
    }

    fn link(mut self, kind: tar::EntryType, path: &str, target: &str) -> Self {
        self.0.append_link(&mut header(kind, 0), path, target).unwrap();
        self
    }

    /// An entry whose name the builder would not write.
    fn raw(mut self, kind: tar::EntryType, path: &[u8]) -> Self {
        let mut header = header(kind, 0);
        header.as_old_mut().name[..path.len()].copy_from_slice(path);
        header.set_cksum();
        self.0.append(&header, &[][..]).unwrap();
        self
    }

    fn done(self) -> Vec<u8> {
        self.0.into_inner().unwrap()
    }
}

fn image(layers: Vec<Vec<u8>>) -> (Memory, Tree) {
    let sink = Memory::default();
    let recipes = take_in(&sink, layers).unwrap();
    let flat = derive_tree(&recipes).unwrap();
    assert_eq!(unpack_tree(&pack_tree(&flat)).unwrap(), flat);
    for blob in pack_tree_as_before(&flat) {
        assert_eq!(unpack_tree(&blob).unwrap(), flat);
    }
    (sink, Tree::open(Bytes::from(flat)).unwrap())
}

fn gzip(tar: &[u8]) -> Vec<u8> {
    let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    std::io::Write::write_all(&mut encoder, tar).unwrap();
    encoder.finish().unwrap()
}

#[test]
fn a_layer_is_rebuilt_byte_for_byte_from_any_byte_on() {
    let big = noise(5_000_000, 1);
    let tar = Tar::new().dir("d").file("d/big", &big).file("small", b"x").file("d/again", &big).done();
    let sink = Memory::default();
    let recipe = take_in(&sink, vec![tar.clone()]).unwrap().remove(0);
    assert_eq!(recipe.diff_id(), Digest::of(&tar));
    assert_eq!(recipe.tar_bytes(), tar.len() as u64);
    assert!(
        sink.packs.lock().unwrap().values().map(Bytes::len).sum::<usize>() < 5_200_000,
        "not deduplicated"
    );
    for from in [0, 1, 511, 512, 1024, 70_000, 3_000_000, tar.len() - 1, tar.len()] {
        assert!(sink.rebuild(&recipe, from as u64) == tar[from..], "from byte {from}");
    }
}

#[test]
fn every_compression_gives_the_same_recipe() {
    let tar = Tar::new().file("f", &noise(300_000, 2)).done();
    let compressed = [gzip(&tar), zstd::encode_all(&tar[..], 1).unwrap(), tar];
    let blobs =
        compressed.map(|layer| take_in(&Memory::default(), vec![layer]).unwrap().remove(0).blob().clone());
    assert_eq!(blobs[0], blobs[1]);
    assert_eq!(blobs[0], blobs[2]);
}

#[test]
fn known_chunks_are_not_stored_again() {
    let sink = Memory::default();
    let tar = Tar::new().file("f", &noise(1_000_000, 3)).done();
    let first = take_in(&sink, vec![tar.clone()]).unwrap();
    let packs = sink.packs.lock().unwrap().len();
    let second = take_in(&sink, vec![tar]).unwrap();
    assert_eq!(sink.packs.lock().unwrap().len(), packs);
    assert_eq!(first[0].blob(), second[0].blob());
}

#[test]
fn whiteouts_hide_lower_layers_and_nothing_else() {
    let (sink, tree) = image(vec![
        Tar::new()
            .file("etc/motd", b"hi")
            .file("etc/keep", b"low")
            .file("d/low", b"")
            .file("d/s/low", b"")
            .done(),
        Tar::new()
            .file("etc/.wh.motd", b"")
            .file("etc/new", b"up")
            .file("d/s/up", b"")
            .file("d/.wh..wh..opq", b"")
            .file("d/up", b"")
            .file(".wh.nothing", b"")
            .done(),
    ]);
    assert_eq!(names(&tree, ""), ["d", "etc"]);
    assert_eq!(names(&tree, "etc"), ["keep", "new"]);
    assert_eq!(names(&tree, "d"), ["s", "up"]);
    assert_eq!(names(&tree, "d/s"), ["up"]);
    assert_eq!(sink.read_ino(&tree, find(&tree, "etc/keep").unwrap()), b"low");
}

#[test]
fn a_whiteout_does_not_hide_what_its_own_layer_brings() {
    let (sink, tree) = image(vec![
        Tar::new().file("f", b"low").file("d/low", b"").done(),
        Tar::new().file("f", b"up").file(".wh.f", b"").dir("d").file("d/up", b"").file(".wh.d", b"").done(),
    ]);
    assert_eq!(sink.read_ino(&tree, find(&tree, "f").unwrap()), b"up");
    assert_eq!(names(&tree, "d"), ["up"]);
}

#[test]
fn a_layer_full_of_whiteouts_is_merged_in_one_walk() {
    let mut up = Tar::new();
    for number in 0..2_000 {
        up = up.file(&format!("d/{number}/f"), b"");
    }
    // 4 x 10^8 steps, over a minute, if each walked through what its own layer has brought
    for _ in 0..200_000 {
        up = up.raw(tar::EntryType::Regular, b"d/.wh..wh..opq");
    }
    let (_, tree) = image(vec![Tar::new().file("d/low", b"").done(), up.done()]);
    assert_eq!(names(&tree, "d").len(), 2_000);
    assert_eq!(find(&tree, "d/low"), None);
}

#[test]
fn hard_links_share_an_inode_across_layers() {
    let link = tar::EntryType::Link;
    let (_, tree) = image(vec![
        Tar::new().file("a", b"x").link(link, "b", "a").done(),
        Tar::new().link(link, "c", "./b").file("a", b"other").done(),
    ]);
    let [a, b, c] = ["a", "b", "c"].map(|name| find(&tree, name).unwrap());
    assert_eq!(b, c);
    assert_ne!(a, b);
    assert_eq!(tree.inode(b).unwrap().nlink, 2);
    assert_eq!(tree.inode(a).unwrap().nlink, 1);
}

#[test]
fn parents_are_resolved_through_links_that_stay_inside() {
    let symlink = tar::EntryType::Symlink;
    let (_, tree) = image(vec![
        Tar::new().dir("usr/lib").link(symlink, "lib", "usr/lib").link(symlink, "up", "../../../usr").done(),
        Tar::new().file("lib/a", b"").file("up/b", b"").done(),
    ]);
    assert_eq!(names(&tree, ""), ["lib", "up", "usr"]);
    assert_eq!(names(&tree, "usr/lib"), ["a"]);
    assert_eq!(names(&tree, "usr"), ["b", "lib"]);
    assert_eq!(tree.symlink(find(&tree, "lib").unwrap()).unwrap(), b"usr/lib");
}

#[test]
fn a_directory_over_a_directory_keeps_its_children_and_a_file_over_it_does_not() {
    let (_, tree) = image(vec![
        Tar::new().file("d/x", b"").file("e/x", b"").done(),
        Tar::new().dir("d").file("e", b"now a file").done(),
    ]);
    assert_eq!(names(&tree, "d"), ["x"]);
    assert_eq!(tree.inode(find(&tree, "e").unwrap()).unwrap().kind(), FileKind::Regular);
    assert_eq!(tree.inode(Ino::ROOT).unwrap().nlink, 3);
}

#[test]
fn names_that_climb_out_are_refused_by_name() {
    for name in [&b"../etc/passwd"[..], b"a/../../b", b".."] {
        let tar = Tar::new().raw(tar::EntryType::Directory, name).done();
        let recipes = take_in(&Memory::default(), vec![tar]).unwrap();
        let error = derive_tree(&recipes).unwrap_err().to_string();
        assert!(error.contains("`..`") && error.contains("layer 0"), "{error}");
    }
    let tar = Tar::new().raw(tar::EntryType::Directory, b"/etc/").done();
    assert_eq!(names(&image(vec![tar]).1, ""), ["etc"]);
}

#[test]
fn numbers_that_are_left_blank_are_zero() {
    let mut header = tar::Header::new_ustar();
    header.set_entry_type(tar::EntryType::Regular);
    header.as_old_mut().name[..1].copy_from_slice(b"f");
    let old = header.as_old_mut();
    old.size = [b' '; 12];
    (old.mode, old.uid, old.gid, old.mtime) = ([0; 8], [0; 8], [b' '; 8], [0; 12]);
    header.set_cksum();
    let (_, tree) = image(vec![[&header.as_bytes()[..], &[0; 1024]].concat()]);
    let inode = tree.inode(find(&tree, "f").unwrap()).unwrap();
    assert_eq!((inode.mode & 0o7777, inode.uid, inode.gid, inode.mtime_s), (0, 0, 0, 0));
}

#[test]
fn truncated_and_damaged_layers_are_refused() {
    let tar = Tar::new().file("f", &noise(100_000, 4)).file("g", b"x").done();
    let (gzip, zstd) = (gzip(&tar), zstd::encode_all(&tar[..], 1).unwrap());
    for damaged in
        [&tar[..60_000], &tar[..700], &tar[..100], &gzip[..gzip.len() / 2], &zstd[..zstd.len() / 2]]
    {
        let error = take_in(&Memory::default(), vec![damaged.to_vec()]).unwrap_err();
        assert!(matches!(error, IngestError::Layer { .. }), "{error}");
    }
    let mut flipped = tar;
    flipped[3] ^= 1;
    assert!(matches!(take_in(&Memory::default(), vec![flipped]), Err(IngestError::Layer { .. })));
}

#[test]
fn a_layer_that_is_not_what_the_config_says_is_refused() {
    let input = LayerInput {
        name: "layer".into(),
        bytes: Box::new(std::io::Cursor::new(Tar::new().file("f", b"x").done())),
        diff_id: Some(Digest::of(b"else")),
    };
    let result = ingest(vec![input], &Memory::default(), IngestOptions::default(), &Progress::default());
    assert!(matches!(result, Err(IngestError::DiffId { .. })));
}

#[test]
fn a_sink_that_fails_ends_the_push_with_its_reason() {
    let sink = Memory { refuse: true, ..Memory::default() };
    let error = take_in(&sink, vec![Tar::new().file("f", &noise(80_000_000, 5)).done()]).unwrap_err();
    assert_eq!(error.to_string(), "the disk is full");
}

#[test]
fn a_bomb_is_refused_at_its_limit() {
    let header = Tar::new().file("zeros", b"").done()[..512].to_vec();
    let mut header = tar::Header::from_byte_slice(&header).clone();
    header.set_size(1 << 40);
    header.set_cksum();
    let tar = std::io::Cursor::new(header.as_bytes().to_vec()).chain(std::io::repeat(0).take(1 << 30));
    let input = LayerInput { name: "bomb".into(), bytes: Box::new(tar), diff_id: None };
    let options = IngestOptions { tar_bytes_max: 100 << 20, ..IngestOptions::default() };
    let error = ingest(vec![input], &Memory::default(), options, &Progress::default()).unwrap_err();
    assert!(error.to_string().contains("limit"), "{error}");
}

#[test]
fn a_tree_of_which_the_names_have_come_answers_all_but_where_files_are() {
    let (_, whole) = image(vec![Tar::new().file("d/f", &noise(400_000, 6)).dir("e").done()]);
    let blob = pack_tree(whole.as_bytes());
    let names = TreeNames::of(&blob).unwrap();
    let (mut part, rest) = blob.split_at(usize::try_from(names.bytes).unwrap());
    assert_eq!(Digest::of(part), names.digest);
    assert_eq!(TreeNames::noted_in(&names.notes().into()), Some(names));
    let begun = TreeUnpacking::begin(&mut part).unwrap();
    let mut flat = vec![0; usize::try_from(begun.flat_len()).unwrap()];
    let contents = begun.unpack_names(part, &mut flat[..]).unwrap();

    let tree = Tree::open_names(Bytes::from(flat.clone())).unwrap();
    let dir = tree.lookup(Ino::ROOT, b"d").unwrap().unwrap();
    let file = tree.lookup(dir, b"f").unwrap().unwrap();
    assert_eq!(tree.inode(file).unwrap(), whole.inode(file).unwrap());
    assert!(!tree.has_contents());
    assert_eq!(tree.extents(file, 0, 1).err(), Some(TreeError::Coming));
    assert_eq!(tree.frame(0), Err(TreeError::Coming));
    assert_eq!(tree.packs().count(), 0);

    contents.unpack(rest, &mut flat[..]).unwrap();
    let (_, other) = image(vec![Tar::new().dir("e").done()]);
    assert_eq!(tree.set_contents(other.as_bytes().clone()), Err(TreeError::Header));
    tree.set_contents(Bytes::from(flat)).unwrap();
    assert_eq!(tree.as_bytes(), whole.as_bytes());
    let extents = |tree: &Tree| tree.extents(file, 0, u64::MAX).unwrap().collect::<Vec<_>>();
    assert_eq!(extents(&tree), extents(&whole));
    assert_eq!(tree.frame(0), whole.frame(0));
}

#[test]
fn a_tree_that_is_cut_off_or_goes_on_is_refused() {
    let (_, tree) = image(vec![Tar::new().file("d/f", &noise(400_000, 6)).done()]);
    for blob in std::iter::once(pack_tree(tree.as_bytes())).chain(pack_tree_as_before(tree.as_bytes())) {
        for len in 0..blob.len() {
            assert!(unpack_tree(&blob[..len]).is_err(), "{len} of {} bytes", blob.len());
        }
        assert_eq!(unpack_tree(&[&blob[..], b"more"].concat()), Err(TreeError::Compressed));
    }
}

#[test]
fn what_a_blob_claims_beyond_the_bound_is_refused_before_anything_is_unpacked() {
    let (in_parts, large) = (1 << 63, (2 << 30) + 1);
    for [flat, names] in
        [[large, 0], [in_parts | large, 100], [in_parts | 100, large + 16], [in_parts | 100, 15]]
    {
        let blob = [u64::to_le_bytes(flat), u64::to_le_bytes(names)].concat();
        let refused = TreeUnpacking::begin(&blob[..]).unwrap_err().into_inner().unwrap();
        let wanted = if names == 15 { TreeError::Header } else { TreeError::TooLarge("its length") };
        assert_eq!(*refused.downcast::<TreeError>().unwrap(), wanted, "{flat:x} {names:x}");
    }
    for bytes in [0, 15, large] {
        let noted = TreeNames { digest: Digest::of(b""), bytes }.notes();
        assert_eq!(TreeNames::noted_in(&noted.into()), None, "{bytes}");
    }
}

#[test]
fn a_tree_with_any_byte_changed_gives_errors_or_values_but_never_a_panic() {
    let (_, tree) = image(vec![Tar::new().file("d/f", &noise(400_000, 6)).dir("e").done()]);
    let flat = tree.as_bytes().to_vec();
    for at in 0..flat.len() {
        let mut damaged = flat.clone();
        damaged[at] ^= 0xff;
        let Ok(tree) = Tree::open(Bytes::from(damaged)) else { continue };
        for index in 1..=u64::from(tree.inodes()).min(20) {
            let ino = Ino(index);
            let _ = (
                tree.inode(ino),
                tree.symlink(ino),
                tree.xattrs(ino),
                tree.lookup(ino, b"f"),
                tree.parent(ino),
            );
            if let Ok(entries) = tree.entries(ino) {
                entries.iter().take(100).for_each(|entry| assert!(entry.is_ok() || entry.is_err()));
            }
            if let Ok(extents) = tree.extents(ino, 0, u64::MAX) {
                extents.take(100).for_each(|extent| assert!(extent.is_ok() || extent.is_err()));
            }
        }
    }
    for len in 0..flat.len() {
        assert!(Tree::open(Bytes::copy_from_slice(&flat[..len])).is_err(), "{len} bytes");
    }
}

#[test]
fn a_recipe_with_any_byte_changed_never_panics() {
    let sink = Memory::default();
    let tar = Tar::new().file("f", &noise(200_000, 7)).done();
    let recipe = take_in(&sink, vec![tar]).unwrap().remove(0);
    for at in 0..recipe.blob().len() {
        let mut damaged = recipe.blob().to_vec();
        damaged[at] ^= 0x55;
        let Ok(recipe) = Recipe::parse(Bytes::from(damaged)) else { continue };
        recipe.pieces(0).for_each(|piece| assert!(piece.is_ok() || piece.is_err()));
        let _ = derive_tree(&[recipe]);
    }
}
