use std::fs::{self, File};
use std::os::unix::fs::{PermissionsExt, chown, symlink};
use std::time::{Duration, SystemTime};

use super::*;

/// Two trees that are alike in everything.
fn twins() -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    for side in ["left", "right"] {
        let root = dir.path().join(side);
        fs::create_dir_all(root.join("dir/inner")).unwrap();
        fs::write(root.join("dir/file"), vec![7; 2 << 20]).unwrap();
        fs::write(root.join("dir/small"), "small").unwrap();
        fs::hard_link(root.join("dir/file"), root.join("dir/inner/again")).unwrap();
        symlink("file", root.join("dir/link")).unwrap();
        fs::write(root.join(OsStr::from_bytes(b"\xff\xfe")), "odd").unwrap();
        rustix::fs::mknodat(
            rustix::fs::CWD,
            root.join("null"),
            rustix::fs::FileType::CharacterDevice,
            rustix::fs::Mode::from(0o666),
            rustix::fs::makedev(1, 3),
        )
        .unwrap();
        settle(&root);
    }
    dir
}

/// Gives all entries the same time.
fn settle(root: &Path) {
    for name in ["dir/file", "dir/small", "dir/inner", "dir", "\u{0}", "null", "dir/link", ""] {
        let path = if name == "\u{0}" { root.join(OsStr::from_bytes(b"\xff\xfe")) } else { root.join(name) };
        let time = rustix::fs::Timespec { tv_sec: 1_000_000, tv_nsec: 5 };
        let times = rustix::fs::Timestamps { last_access: time, last_modification: time };
        rustix::fs::utimensat(rustix::fs::CWD, path, &times, rustix::fs::AtFlags::SYMLINK_NOFOLLOW).unwrap();
    }
}

fn differences(dir: &tempfile::TempDir, compare: &Compare<'_>) -> Vec<String> {
    let found = compare.trees(&dir.path().join("left"), &dir.path().join("right")).unwrap();
    found.differences.iter().map(Difference::to_string).collect()
}

#[test]
fn equal_trees_have_no_difference() {
    let dir = twins();
    let found = Compare::default().trees(&dir.path().join("left"), &dir.path().join("right")).unwrap();
    assert!(found.differences.is_empty(), "{:?}", found.differences);
    assert_eq!((found.entries, found.bytes), (9, (2 << 20) + 5 + 3));
}

#[test]
fn each_change_is_the_one_difference_found() {
    type Change = (&'static str, fn(&Path), &'static str);
    let changes: [Change; 9] = [
        (
            "mode",
            |r| fs::set_permissions(r.join("dir/small"), fs::Permissions::from_mode(0o4644)).unwrap(),
            "mode",
        ),
        ("uid", |r| chown(r.join("dir/small"), Some(5), None).unwrap(), "uid"),
        ("gid", |r| chown(r.join("dir/small"), None, Some(6)).unwrap(), "gid"),
        ("a byte", |r| fs::write(r.join("dir/small"), "smell").unwrap(), "contents differ from byte 2"),
        (
            "an xattr",
            |r| xattr::set(r.join("dir"), "trusted.t", b"v").unwrap(),
            "xattr trusted.t absent != \"v\"",
        ),
        ("size", |r| fs::write(r.join("dir/small"), "smaller").unwrap(), "size 5 != 7"),
        (
            "target",
            |r| {
                fs::remove_file(r.join("dir/link")).unwrap();
                symlink("fil", r.join("dir/link")).unwrap();
            },
            "target file != fil",
        ),
        (
            "a name",
            |r| drop(File::create(r.join(OsStr::from_bytes(b"dir/inner/\xf0"))).unwrap()),
            "name absent != present",
        ),
        (
            "a type",
            |r| {
                fs::remove_file(r.join("null")).unwrap();
                fs::create_dir(r.join("null")).unwrap();
            },
            "type character device != directory",
        ),
    ];
    for (name, change, expected) in changes {
        let dir = twins();
        change(&dir.path().join("right"));
        settle(&dir.path().join("right"));
        let found = differences(&dir, &Compare::default());
        let found: Vec<_> =
            found.iter().filter(|what| !what.contains("size 4 ") && !what.contains("/: nlink")).collect();
        assert!(found.len() == 1 && found[0].contains(expected), "{name}: {found:?}");
    }
}

#[test]
fn a_nanosecond_is_a_difference_unless_left_out_for_a_directory() {
    let dir = twins();
    let inner = File::open(dir.path().join("right/dir/inner")).unwrap();
    inner.set_modified(SystemTime::UNIX_EPOCH + Duration::new(1_000_000, 6)).unwrap();
    assert_eq!(
        differences(&dir, &Compare::default()),
        ["/dir/inner: mtime 1000000.000000005 != 1000000.000000006"]
    );
    let compare = Compare { directory_mtime: &|path| path != Path::new("dir/inner"), ..Compare::default() };
    assert!(differences(&dir, &compare).is_empty());
}

#[test]
fn a_copy_in_place_of_a_hard_link_is_a_difference() {
    let dir = twins();
    let again = dir.path().join("right/dir/inner/again");
    fs::remove_file(&again).unwrap();
    fs::write(&again, vec![7; 2 << 20]).unwrap();
    let found = differences(&dir, &Compare::default());
    assert!(found.iter().any(|what| what.contains("nlink 2 != 1")), "{found:?}");
    assert!(found.iter().any(|what| what.contains("same inode as dir/file != dir/inner/again")), "{found:?}");
}

#[test]
fn ignored_xattrs_may_differ() {
    let dir = twins();
    xattr::set(dir.path().join("left/dir"), "trusted.overlay.opaque", b"y").unwrap();
    assert_eq!(differences(&dir, &Compare::default()).len(), 1);
    let compare = Compare { xattrs_ignored: &["trusted.overlay.opaque"], ..Compare::default() };
    assert!(differences(&dir, &compare).is_empty());
}

#[test]
fn a_tree_that_is_missing_is_an_error() {
    assert!(Compare::default().trees(Path::new("/proc/self"), Path::new("/nonexistent")).is_err());
}
