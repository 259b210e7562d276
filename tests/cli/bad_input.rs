//! What comes damaged, lies, refuses or runs full: a clear line, exit code 1, and nothing left half done.

use std::fs;
use std::io::{Read, Write};
use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, ensure};
use lamina_testkit::image::Image;
use lamina_testkit::mounts::{MountGuard, mounted_on};
use lamina_testkit::noise;
use lamina_testkit::process::run;

use crate::rig::{Rig, text};

/// The largest blob of a layout.
fn largest(layout: &Path) -> Result<PathBuf> {
    let blobs = fs::read_dir(layout.join("blobs/sha256"))?.collect::<std::io::Result<Vec<_>>>()?;
    let largest = blobs.into_iter().max_by_key(|blob| blob.metadata().map_or(0, |it| it.len()));
    Ok(largest.context("a blob")?.path())
}

#[test]
fn damaged_layers_are_refused_by_name_and_nothing_is_tagged() -> Result<()> {
    let rig = Rig::new()?;
    let gzip = Image::new().layer(|layer| layer.file("f", noise(300_000, 1)).gzip());
    let zstd = Image::new().layer(|layer| layer.file("f", noise(300_000, 2)).zstd());
    let plain = Image::new().layer(|layer| layer.file("f", noise(300_000, 3)).plain());
    for (name, image) in [("gzip", gzip), ("zstd", zstd), ("plain", plain)] {
        let source = rig.layout(name, &image)?;
        let layer = largest(&rig.path(name))?;
        let good = fs::read(&layer)?;
        let mut flipped = good.clone();
        flipped[150_000] ^= 1;
        for (how, bytes) in [("cut", &good[..100_000]), ("flipped", &flipped[..])] {
            fs::write(&layer, bytes)?;
            let said = rig.fails(&["push", &source, &rig.name("bad:t")])?;
            ensure!(said.contains("layer sha256:"), "{name} {how}: {said}");
            let said = rig.fails(&["inspect", &rig.name("bad:t")])?;
            ensure!(said.contains("not found"), "{name} {how}: {said}");
        }
    }
    Ok(())
}

#[test]
fn names_that_climb_out_are_refused() -> Result<()> {
    let rig = Rig::new()?;
    let source = rig.layout("layout", &Image::new().layer(|layer| layer.file("../../etc/passwd", "x")))?;
    let said = rig.fails(&["push", &source, &rig.name("bad:t")])?;
    ensure!(said.contains("`..`") && said.contains("etc/passwd"), "{said}");
    Ok(())
}

#[test]
fn what_is_missing_is_named() -> Result<()> {
    let rig = Rig::new()?;
    let source = rig.layout("layout", &Image::new().layer(|layer| layer.file("f", noise(100_000, 1))))?;
    let tag = source.replace(":t", ":other");
    ensure!(rig.fails(&["push", &tag, &rig.name("a:t")])?.contains("\"other\""));
    ensure!(rig.fails(&["push", "oci:/nowhere:t", &rig.name("a:t")])?.contains("/nowhere"));
    let said = rig.fails(&["mount", &rig.name("none:t"), &text(&rig.path("mount"))])?;
    ensure!(said.contains("/v2/none/manifests/t") && said.contains("not found"), "{said}");
    let layer = largest(&rig.path("layout"))?;
    fs::remove_file(&layer)?;
    ensure!(rig.fails(&["push", &source, &rig.name("a:t")])?.contains(&text(&layer)));
    Ok(())
}

#[test]
fn plain_http_beyond_loopback_is_only_spoken_on_demand() -> Result<()> {
    let rig = Rig::new()?;
    let said = rig.fails(&["registry", "--listen", "0.0.0.0:0", "--storage", &text(&rig.path("other"))])?;
    ensure!(said.contains("--plain-http"), "{said}");
    Ok(())
}

/// A registry that answers every request in one way.
fn misbehaving(answer: &'static [u8]) -> Result<String> {
    let listener = TcpListener::bind("127.0.0.1:0")?;
    let address = listener.local_addr()?.to_string();
    std::thread::spawn(move || {
        // ends with the process
        for mut stream in listener.incoming().flatten() {
            let mut request = [0; 4096];
            let _ = stream.read(&mut request);
            let _ = stream.write_all(answer);
        }
    });
    Ok(address)
}

#[test]
fn a_registry_that_refuses_or_breaks_off_is_quoted_with_its_url() -> Result<()> {
    let rig = Rig::new()?;
    let cases: [(&[u8], &str); 6] = [
        (b"HTTP/1.1 401 Unauthorized\r\nContent-Length: 0\r\n\r\n", "no credential"),
        (b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n", "not found"),
        (b"HTTP/1.1 429 Too Many\r\nContent-Length: 0\r\nConnection: close\r\n\r\n", "429"),
        (b"HTTP/1.1 500 Oops\r\nContent-Length: 5\r\nConnection: close\r\n\r\nhello", "500: hello"),
        (
            b"HTTP/1.1 200 OK\r\nContent-Length: 500\r\nConnection: close\r\n\r\ncut",
            "is the registry running",
        ),
        (b"SSH-2.0-nonsense\r\n", "is the registry running"),
    ];
    for (answer, expected) in cases {
        let address = misbehaving(answer)?;
        let said = rig.fails(&["mount", &format!("{address}/a:t"), &text(&rig.path("mount"))])?;
        ensure!(said.contains(expected), "expected {expected:?}: {said}");
        ensure!(said.contains(&format!("http://{address}/v2/a/manifests/t")), "{said}");
    }
    ensure!(mounted_on(&rig.path("mount"))?.is_none());
    Ok(())
}

#[test]
fn bytes_that_rot_in_the_registry_are_an_error_to_the_reader_and_never_wrong() -> Result<()> {
    let rig = Rig::new()?;
    let source =
        rig.layout("layout", &Image::new().layer(|layer| layer.file("f", noise(2_000_000, 7)).plain()))?;
    rig.ok(&["push", &source, &rig.name("a:t")])?;
    let mut packs = Vec::new();
    find(&rig.path("storage/objects"), 1 << 20, &mut packs)?;
    ensure!(!packs.is_empty());
    for pack in packs {
        let mut bytes = fs::read(&pack)?;
        bytes[1_000_000] ^= 1;
        fs::write(&pack, bytes)?;
    }
    let mounted = rig.mount("a:t")?;
    let error = fs::read(mounted.join("f")).expect_err("one frame is damaged");
    ensure!(error.raw_os_error() == Some(5), "{error}");
    ensure!(rig.counter("verify_failures")? > 0);
    rig.unmount()
}

#[test]
fn bytes_that_rot_in_the_cache_are_fetched_again() -> Result<()> {
    let rig = Rig::new()?;
    let source =
        rig.layout("layout", &Image::new().layer(|layer| layer.file("f", noise(2_000_000, 8)).plain()))?;
    rig.ok(&["push", &source, &rig.name("a:t")])?;
    let mounted = rig.mount_plain("a:t")?;
    ensure!(fs::read(mounted.join("f"))? == noise(2_000_000, 8));
    rig.unmount()?;
    rig.node_ended()?;
    let mut segments = Vec::new();
    find(&rig.path("cache/segments"), 1 << 20, &mut segments)?;
    ensure!(!segments.is_empty());
    for segment in segments {
        let mut bytes = fs::read(&segment)?;
        let middle = bytes.len() / 2;
        bytes[middle] ^= 1;
        fs::write(&segment, bytes)?;
    }
    let mounted = rig.mount_plain("a:t")?;
    ensure!(fs::read(mounted.join("f"))? == noise(2_000_000, 8));
    ensure!(rig.counter("verify_failures")? > 0 && rig.counter("source_frames")? > 0);
    rig.unmount()
}

#[test]
fn a_full_disk_fails_a_push_and_leaves_a_mount_working() -> Result<()> {
    let mut rig = Rig::new()?;
    let source =
        rig.layout("layout", &Image::new().layer(|layer| layer.file("f", noise(30_000_000, 9)).plain()))?;
    rig.ok(&["push", &source, &rig.name("a:t")])?;
    let small = |rig: &Rig, name: &str, size: &str| -> Result<MountGuard> {
        let path = rig.path(name);
        fs::create_dir_all(&path)?;
        run(Command::new("mount").args(["-t", "tmpfs", "-o", size, "none"]).arg(&path))?;
        Ok(MountGuard::new(path))
    };
    let cache = small(&rig, "cache", "size=20m")?;
    let mounted = rig.mount("a:t")?;
    ensure!(fs::read(mounted.join("f"))? == noise(30_000_000, 9), "a full cache must not be seen by readers");
    rig.unmount()?;
    rig.node_ended()?;
    drop(cache);

    rig.registry.take().context("running")?.stop(crate::rig::DEADLINE)?;
    let storage = rig.path("storage");
    fs::remove_dir_all(&storage)?;
    let _storage = small(&rig, "storage", "size=20m")?;
    rig.start_registry()?;
    let said = rig.fails(&["push", &source, &rig.name("a:t")])?;
    ensure!(said.contains("507") || said.to_lowercase().contains("space"), "{said}");
    ensure!(rig.fails(&["inspect", &rig.name("a:t")])?.contains("not found"));
    rig.registry.take().context("running")?.stop(crate::rig::DEADLINE)?;
    Ok(())
}

/// Files below `directory` of at least `least` bytes.
fn find(directory: &Path, least: u64, into: &mut Vec<PathBuf>) -> Result<()> {
    for entry in fs::read_dir(directory)? {
        let entry = entry?;
        if entry.metadata()?.is_dir() {
            find(&entry.path(), least, into)?;
        } else if entry.metadata()?.len() >= least {
            into.push(entry.path());
        }
    }
    Ok(())
}

#[test]
fn without_dev_fuse_a_mount_says_so_and_leaves_nothing() -> Result<()> {
    let rig = Rig::new()?;
    let source = rig.layout("layout", &Image::new().layer(|layer| layer.file("a", "a")))?;
    rig.ok(&["push", &source, &rig.name("a:t")])?;
    // a container's /dev, as it is where nobody gave it the device
    let dev = "mount -t tmpfs none /dev && mknod -m 666 /dev/null c 1 3 && mknod -m 666 /dev/urandom c 1 9";
    let mut command = Command::new("unshare");
    command.args(["--mount", "sh", "-c", &format!("{dev} && exec \"$@\""), "sh"]);
    command.args([env!("CARGO_BIN_EXE_lamina"), "mount", &rig.name("a:t"), &text(&rig.path("mount"))]);
    let output = command.env("LAMINA_CACHE", rig.path("cache")).output()?;
    let said = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.code() == Some(1), "{said}");
    ensure!(
        said.contains("/dev/fuse is missing") && said.contains("give this container the device"),
        "{said}"
    );
    ensure!(mounted_on(&rig.path("mount"))?.is_none(), "something is mounted");
    rig.node_ended()
}
