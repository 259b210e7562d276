//! A mount against the same layers, unpacked by umoci.

use std::path::Path;
use std::process::Command;

use lamina_testkit::compare::Compare;
use lamina_testkit::image::Image;

use crate::rig::{Packs, Rig, noise};

/// Everything that a layer can hold, in three of them.
fn image() -> Image {
    let long =
        "long/".to_owned() + &"directory-name-of-forty-bytes-in-all-here/".repeat(5) + &"f".repeat(200);
    Image::new()
        .layer(|l| {
            l.dir("usr")
                .mtime(1_600_000_000, 5)
                .dir("usr/bin")
                .file("usr/bin/su", noise(1, 100_000))
                .mode(0o4755)
                .mtime(1_500_000_000, 999_999_999)
                .file("usr/bin/old", "old")
                .hardlink("usr/bin/alias", "usr/bin/su")
                .symlink("bin", "usr/bin")
                .symlink("absolute", "/usr/bin/su")
                .symlink("dangling", "../../no/where")
                .dir("etc")
                .owner(10, 20)
                .mode(0o2775)
                .file("etc/motd", "hello")
                .owner(1_000_000, 3_000_000_000)
                .xattr("user.colour", b"blue\0\xff")
                .xattr(
                    "security.capability",
                    b"\x01\x00\x00\x02\x00\x04\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00",
                )
                .dir("opaque")
                .file("opaque/below", "x")
                .file("opaque/deep/below", "x")
                .file(b"etc/\xff\xfe not utf-8", "bytes")
                .file(long, "long")
                .dir("empty")
                .mode(0)
        })
        .layer(|l| {
            l.whiteout("usr/bin/old")
                .opaque("opaque")
                .file("opaque/above", "y")
                .file("etc/motd", "changed")
                .mtime(-1_000, 500)
                .hardlink("usr/bin/second", "usr/bin/su")
                .dir("dev")
                .fifo("dev/initctl")
                .device("dev/null", 1, 3)
                .mode(0o666)
                .block_device("dev/disk", 259, 70_000)
                .sparse("sparse", 5_000_000, &[(4096, &noise(2, 4096)), (1_000_448, b"middle of nowhere")])
                .file("large", noise(3, 1_500_000))
        })
        .layer(|l| {
            l.whiteout("dangling")
                .symlink("large-link", "large")
                .dir("empty")
                .mode(0o1777)
                .file("empty/no-more", "")
                // a directory in place of a link, a file in place of a directory
                .whiteout("opaque")
                .file("opaque", "now a file")
        })
}

#[test]
fn a_mount_equals_the_layers_unpacked_in_every_attribute_and_byte() {
    let image = image();
    let tars: Vec<_> = image.layers().iter().map(|layer| layer.tar()).collect();
    let rig = Rig::of(&tars, Packs::default());
    let directory = rig.directory.path();
    let reference = image.write(&directory.join("oci"), "test").expect("written");
    let layout = reference.strip_prefix("oci:").expect("a layout");
    let bundle = directory.join("bundle");
    let unpacked = Command::new("umoci").args(["unpack", "--image", layout]).arg(&bundle).status();
    assert!(unpacked.expect("umoci is needed").success());
    // directories that no entry describes are as new as the unpacking
    let described = |path: &Path| path != Path::new("") && !path.starts_with("long");
    let compare = Compare { directory_mtime: &described, ..Compare::default() };
    let found = compare.trees(&bundle.join("rootfs"), &rig.path("")).expect("walked");
    assert!(found.differences.is_empty(), "{:#?}", found.differences);
    assert!(
        found.entries > 25 && found.bytes > 6_000_000,
        "{} entries, {} bytes",
        found.entries,
        found.bytes
    );
}
