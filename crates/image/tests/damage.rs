//! Parsers of bytes that we did not write: whatever comes, they answer with a value or an error, and do not hang.

use std::io::{Cursor, Read};

use bytes::Bytes;
use lamina_chunk::{ChunkId, ChunkPlace, PackId, PackRecord};
use lamina_image::{
    ChunkSink, Compression, Document, IngestOptions, LayerInput, Manifest, Progress, Recipe, SinkError, Tree,
    derive_tree, ingest, media_type, parse_config, unpack_tree,
};
use proptest::prelude::*;

/// Takes everything and keeps nothing.
struct Nowhere;

impl ChunkSink for Nowhere {
    fn known(&self, ids: &[ChunkId]) -> Result<Vec<Option<ChunkPlace>>, SinkError> {
        Ok(vec![None; ids.len()])
    }

    fn put(&self, _pack: PackId, _bytes: Bytes, _records: &[PackRecord]) -> Result<(), SinkError> {
        Ok(())
    }
}

fn take_in(layer: Vec<u8>) -> Option<Recipe> {
    let input = LayerInput { name: "layer".into(), bytes: Box::new(Cursor::new(layer)), diff_id: None };
    let options = IngestOptions { sealers: 1, tar_bytes_max: 64 << 20, ..IngestOptions::default() };
    ingest(vec![input], &Nowhere, options, &Progress::default()).ok()?.pop()
}

/// A tar with a long name, extended attributes, a link, and sparse maps in both old and new form.
fn tar() -> Vec<u8> {
    let mut tar = tar::Builder::new(Vec::new());
    let mut header = tar::Header::new_gnu();
    header.set_mode(0o644);
    header.set_size(700);
    tar.append_data(&mut header.clone(), "long/".repeat(60) + "name", &[1; 700][..]).unwrap();
    tar.append_pax_extensions([("SCHILY.xattr.user.x", &b"a\n=\0"[..]), ("mtime", b"-1.5")]).unwrap();
    tar.append_data(&mut header.clone(), "marked", &[2; 700][..]).unwrap();
    let sparse =
        [("GNU.sparse.major", &b"1"[..]), ("GNU.sparse.minor", b"0"), ("GNU.sparse.realsize", b"9000")];
    tar.append_pax_extensions(sparse).unwrap();
    let mut contents = b"1\n4096\n188\n".to_vec();
    contents.resize(512, 0);
    contents.resize(700, 3);
    tar.append_data(&mut header.clone(), "holes", &contents[..]).unwrap();
    header.set_entry_type(tar::EntryType::Link);
    header.set_size(0);
    tar.append_link(&mut header, "link", "marked").unwrap();
    tar.into_inner().unwrap()
}

#[test]
fn the_tar_that_is_damaged_below_is_good_to_begin_with() {
    let recipe = take_in(tar()).unwrap();
    let tree = Tree::open(Bytes::from(derive_tree(&[recipe]).unwrap())).unwrap();
    let find = |name: &[u8]| tree.lookup(lamina_image::Ino::ROOT, name).unwrap().unwrap();
    assert_eq!(find(b"link"), find(b"marked"));
    assert_eq!(tree.inode(find(b"holes")).unwrap().size, 9000);
    assert_eq!(tree.extents(find(b"holes"), 0, 9000).unwrap().count(), 3);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(300))]

    #[test]
    fn a_tar_with_some_bytes_changed_is_taken_or_refused(
        changes in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..6),
        keep in any::<prop::sample::Index>(), fix in any::<bool>(),
    ) {
        let mut bytes = tar();
        for (at, byte) in changes {
            let at = at.index(bytes.len());
            bytes[at] = byte;
            if fix {
                // a header that is wrong inside but whose checksum is right gets further
                let block = at / 512 * 512;
                let mut header = tar::Header::from_byte_slice(&bytes[block..block + 512]).clone();
                header.set_cksum();
                bytes[block..block + 512].copy_from_slice(header.as_bytes());
            }
        }
        for bytes in [bytes[..keep.index(bytes.len())].to_vec(), bytes] {
            if let Some(recipe) = take_in(bytes.clone()) {
                prop_assert_eq!(recipe.tar_bytes(), bytes.len() as u64);
                if let Ok(flat) = derive_tree(&[recipe]) {
                    prop_assert!(Tree::open(Bytes::from(flat)).is_ok());
                }
            }
        }
    }

    #[test]
    fn any_bytes_are_no_tree_no_recipe_and_no_document(junk in prop::collection::vec(any::<u8>(), 0..2000)) {
        prop_assert!(Tree::open(Bytes::from(junk.clone())).is_err());
        prop_assert!(Recipe::parse(Bytes::from(junk.clone())).is_err());
        prop_assert!(unpack_tree(&junk).is_err());
        for kind in [media_type::OCI_MANIFEST, media_type::OCI_INDEX, "text/html", ""] {
            prop_assert!(Document::parse(kind, &junk).is_err());
        }
        if let Ok(mut plain) = Compression::decode(Cursor::new(junk)) {
            let mut bytes = Vec::new();
            let read = plain.by_ref().take(1 << 20).read_to_end(&mut bytes);
            prop_assert!(read.is_ok() || read.is_err());
        }
    }

    #[test]
    fn magic_and_junk_are_refused_too(junk in prop::collection::vec(any::<u8>(), 0..500)) {
        for magic in [&b"LAMTREE1"[..], b"LAMRECI1", b"LAMRECI1\0\0\0\0\0\0\0\0"] {
            let bytes = Bytes::from([magic, &junk].concat());
            prop_assert!(Recipe::parse(bytes.clone()).is_err());
            if let Ok(tree) = Tree::open(bytes) {
                prop_assert!(tree.inode(lamina_image::Ino(u64::from(tree.inodes()) + 1)).is_err());
            }
        }
    }

    #[test]
    fn documents_with_any_shape_of_json_are_taken_or_refused(
        layers in -2i64..3, version in -1i64..4, digest in "(sha256:[0-9a-f]{60,66}|[a-z:/.]{0,20})", size in any::<i64>(),
    ) {
        let descriptor = serde_json::json!({ "mediaType": media_type::OCI_CONFIG, "digest": digest, "size": size });
        let layers = match layers {
            -2 => serde_json::Value::Null,
            -1 => serde_json::json!({}),
            count => serde_json::json!(vec![descriptor.clone(); usize::try_from(count).unwrap()]),
        };
        let manifest = serde_json::json!({ "schemaVersion": version, "config": descriptor, "layers": layers });
        let bytes = serde_json::to_vec(&manifest).unwrap();
        if let Ok(document) = Document::parse(media_type::OCI_MANIFEST, &bytes) {
            prop_assert_eq!(version, 2);
            let Document::Manifest(manifest) = document else { panic!("asked for a manifest") };
            let manifest: Manifest = manifest;
            prop_assert!(parse_config(&manifest, &bytes).is_err(), "a manifest is no config");
        }
    }
}
