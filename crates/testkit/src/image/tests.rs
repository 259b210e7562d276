use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::process::{Command, Stdio};

use super::*;
use crate::process::run;

fn everything(l: Layer) -> Layer {
    let long = "long/".to_owned() + &"n".repeat(200);
    l.dir("etc")
        .mode(0o2750)
        .owner(3, 4)
        .mtime(1_700_000_000, 123_456_789)
        .file("etc/motd", "hi")
        .mode(0o4755)
        .xattr("user.note", b"a\0b=\n")
        .hardlink("etc/again", "etc/motd")
        .symlink("etc/link", "t".repeat(150))
        .fifo("pipe")
        .device("null", 1, 3)
        .block_device("loop", 7, 0)
        .dir("long")
        .file(&long, "x")
        .file(b"not-utf8-\xff\xfe", "y")
        .file("old", "z")
        .mtime(-2, 500_000_000)
        .sparse("holes", 1 << 20, &[(4096, &[1; 512]), (1 << 19, b"two")])
}

#[test]
fn gnu_tar_reads_back_what_was_described() {
    let dir = tempfile::tempdir().unwrap();
    let mut tar = Command::new("tar")
        .args(["--xattrs", "--numeric-owner", "-xpf", "-", "-C"])
        .arg(dir.path())
        .stdin(Stdio::piped())
        .spawn()
        .unwrap();
    tar.stdin.take().unwrap().write_all(&everything(Layer::new()).tar()).unwrap();
    assert!(tar.wait().unwrap().success());

    let path = |name: &[u8]| dir.path().join(OsStr::from_bytes(name));
    let meta = |name: &[u8]| std::fs::symlink_metadata(path(name)).unwrap();
    let etc = meta(b"etc");
    assert_eq!((etc.mode() & 0o7777, etc.uid(), etc.gid()), (0o2750, 3, 4));
    assert_eq!((etc.mtime(), etc.mtime_nsec()), (1_700_000_000, 123_456_789));
    assert_eq!((meta(b"etc/motd").mode() & 0o7777, meta(b"etc/motd").nlink()), (0o4755, 2));
    assert_eq!(meta(b"etc/motd").ino(), meta(b"etc/again").ino());
    assert_eq!(xattr::get(path(b"etc/motd"), "user.note").unwrap().unwrap(), b"a\0b=\n");
    assert_eq!(std::fs::read_link(path(b"etc/link")).unwrap().as_os_str(), &*"t".repeat(150));
    assert!(meta(b"pipe").file_type().is_fifo());
    assert_eq!(meta(b"null").rdev(), rustix::fs::makedev(1, 3));
    assert!(meta(b"loop").file_type().is_block_device());
    assert_eq!(std::fs::read(path(&[b"long/", "n".repeat(200).as_bytes()].concat())).unwrap(), b"x");
    assert_eq!(std::fs::read(path(b"not-utf8-\xff\xfe")).unwrap(), b"y");
    assert_eq!((meta(b"old").mtime(), meta(b"old").mtime_nsec()), (-2, 500_000_000));
    let holes = std::fs::read(path(b"holes")).unwrap();
    assert_eq!(
        (holes.len(), &holes[4096..4608], &holes[1 << 19..][..3]),
        (1 << 20, &[1; 512][..], &b"two"[..])
    );
}

#[test]
fn umoci_unpacks_a_layout_and_applies_its_whiteouts() {
    let dir = tempfile::tempdir().unwrap();
    let layout = dir.path().join("oci");
    let image = Image::new()
        .layer(|l| l.dir("etc").file("etc/motd", "hi").file("etc/keep", "1").plain())
        .layer(|l| l.whiteout("etc/motd").dir("var").file("var/a", "1").gzip())
        .layer(|l| l.dir("var").opaque("var").file("var/b", "2"));
    image.write(&layout, "first").unwrap();
    image.write(&layout, "second").unwrap();
    let bundle = dir.path().join("bundle");
    let image = format!("{}:second", layout.display());
    run(Command::new("umoci").args(["unpack", "--image", &image]).arg(&bundle)).unwrap();
    let exists = |name: &str| bundle.join("rootfs").join(name).exists();
    assert!(exists("etc/keep") && exists("var/b"));
    assert!(!exists("etc/motd") && !exists("var/a"));
}

#[test]
fn the_same_description_gives_the_same_bytes() {
    assert_eq!(everything(Layer::new()).tar(), everything(Layer::new()).tar());
}

#[test]
fn every_packing_holds_the_same_tar() {
    let layer = everything(Layer::new());
    let tar = layer.tar();
    assert_eq!(layer.clone().plain().packing().pack(&tar).unwrap(), tar);
    assert_eq!(zstd::stream::decode_all(&*layer.clone().zstd().packing().pack(&tar).unwrap()).unwrap(), tar);
    let mut unpacked = Vec::new();
    let gzip = layer.gzip().packing().pack(&tar).unwrap();
    std::io::copy(&mut flate2::read::GzDecoder::new(&*gzip), &mut unpacked).unwrap();
    assert_eq!(unpacked, tar);
}
