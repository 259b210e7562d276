//! A cache whose disk is small, full, broken, or not its own.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;

use anyhow::{Context, Result, ensure};
use lamina_testkit::image::Image;
use lamina_testkit::mounts::MountGuard;
use lamina_testkit::noise;
use lamina_testkit::process::run;
use rustix::mount::MountFlags;

use crate::rig::{Rig, text};

const FILES: u64 = 6;
const FILE_BYTES: usize = 4_000_000;

/// An image that has its own contents for each `number`.
fn push(rig: &Rig, number: u64) -> Result<String> {
    let mut image = Image::new();
    image = image.layer(|mut layer| {
        for file in 0..FILES {
            layer = layer.file(format!("file-{file}"), noise(FILE_BYTES, 100 * number + file));
        }
        layer
    });
    let source = rig.layout(&format!("layout-{number}"), &image)?;
    let name = rig.name(&format!("image-{number}:t"));
    rig.ok(&["push", &source, &name])?;
    Ok(name)
}

fn reads_right(mounted: &Path, number: u64) -> Result<()> {
    for file in 0..FILES {
        let path = mounted.join(format!("file-{file}"));
        let bytes = fs::read(&path).with_context(|| path.display().to_string())?;
        ensure!(bytes == noise(FILE_BYTES, 100 * number + file), "{} is wrong", path.display());
    }
    Ok(())
}

/// What the segment files of a cache take now. Files that go meanwhile are not counted.
fn segment_bytes(cache: &Path) -> u64 {
    let files = fs::read_dir(cache.join("segments")).into_iter().flatten().flatten();
    files.filter_map(|file| Some(file.metadata().ok()?.size())).sum()
}

#[test]
fn the_cap_holds_to_the_byte_while_eight_images_larger_than_the_cache_start_at_once() -> Result<()> {
    const CAP: u64 = 16 << 20;
    let rig = Rig::new()?;
    let names: Vec<String> = (0..8).map(|number| push(&rig, number)).collect::<Result<_>>()?;
    let (ended, most, looks) = (AtomicBool::new(false), AtomicU64::new(0), AtomicU64::new(0));
    let points: Vec<PathBuf> = (0..8).map(|number| rig.path(&format!("mount-{number}"))).collect();
    thread::scope(|scope| -> Result<()> {
        let watcher = scope.spawn(|| {
            while !ended.load(Ordering::SeqCst) {
                most.fetch_max(segment_bytes(&rig.path("cache")), Ordering::SeqCst);
                looks.fetch_add(1, Ordering::SeqCst);
            }
        });
        let starts: Vec<_> = (0..8usize)
            .map(|number| {
                let (rig, name, point) = (&rig, &names[number], &points[number]);
                scope.spawn(move || -> Result<()> {
                    fs::create_dir(point)?;
                    rig.ok(&["mount", "--cache-mib", "16", name, &text(point)])?;
                    reads_right(point, number as u64)
                })
            })
            .collect();
        let starts: Vec<Result<()>> =
            starts.into_iter().map(|start| start.join().expect("a start does not panic")).collect();
        ended.store(true, Ordering::SeqCst);
        watcher.join().expect("it does not panic");
        starts.into_iter().collect()
    })?;
    let (most, looks) = (most.into_inner(), looks.into_inner());
    println!("at most {most} of {CAP} bytes in {looks} looks");
    ensure!(most <= CAP, "{most} bytes where {CAP} are the cap");
    ensure!(most > CAP / 2 && looks > 100, "the cap was never near: {most} bytes, {looks} looks");
    ensure!(rig.counter("evicted_bytes")? > CAP);
    for point in &points {
        rig.ok(&["unmount", &text(point)])?;
    }
    Ok(())
}

/// A small file system for the cache, whose disk can be made to fail.
struct Disk {
    image: PathBuf,
    device: String,
    _mounted: MountGuard,
}

impl Disk {
    fn new(rig: &Rig) -> Result<Self> {
        let (image, point) = (rig.path("disk.img"), rig.path("cache"));
        fs::File::create(&image)?.set_len(64 << 20)?;
        run(Command::new("mkfs.ext4").args(["-q", "-F", "-m", "0"]).arg(&image))?;
        let output = run(Command::new("losetup").args(["--find", "--show"]).arg(&image))?;
        let device = String::from_utf8(output.stdout)?.trim().to_owned();
        fs::create_dir(&point)?;
        let disk = Self { image, device, _mounted: MountGuard::new(&point) };
        run(Command::new("mount").args(["-o", "errors=continue"]).arg(&disk.device).arg(&point))?;
        Ok(disk)
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg("-l").arg(self._mounted.path()).status();
        let _ = Command::new("losetup").args(["--detach", &self.device]).status();
    }
}

#[test]
fn a_full_disk_leaves_a_working_mount() -> Result<()> {
    let rig = Rig::new()?;
    let name = push(&rig, 1)?;
    let cache = rig.path("cache");
    fs::create_dir(&cache)?;
    rustix::mount::mount("tmpfs", &cache, "tmpfs", MountFlags::empty(), c"size=6m,mode=0700")?;
    let _guard = MountGuard::new(&cache);
    let mounted = rig.path("mount");
    rig.ok(&["mount", "--no-boot", "--no-trace", &name, &text(&mounted)])?;
    reads_right(&mounted, 1)?;
    ensure!(rig.counter("disk_failures")? > 0, "the disk was never full");
    ensure!(rig.counter("verify_failures")? == 0);
    rig.unmount()
}

#[test]
fn a_disk_that_fails_leaves_a_working_mount() -> Result<()> {
    let rig = Rig::new()?;
    let name = push(&rig, 1)?;
    let disk = Disk::new(&rig)?;
    let mounted = rig.path("mount");
    rig.ok(&["mount", "--no-boot", "--no-trace", &name, &text(&mounted)])?;
    fs::read(mounted.join("file-0"))?;
    ensure!(rig.counter("written_frames")? > 0);
    // from here on every block behind the first ones cannot be read or written any more
    run(Command::new("sync").arg("-f").arg(rig.path("cache")))?;
    fs::File::options().write(true).open(&disk.image)?.set_len(2 << 20)?;
    for segment in fs::read_dir(rig.path("cache/segments"))? {
        let file = fs::File::open(segment?.path())?;
        rustix::fs::fadvise(&file, 0, None, rustix::fs::Advice::DontNeed)?;
    }
    reads_right(&mounted, 1)?;
    reads_right(&mounted, 1)?;
    ensure!(rig.counter("disk_failures")? > 0, "the disk never failed");
    rig.unmount()
}

#[test]
fn a_directory_that_is_not_this_nodes_is_refused_and_left_as_it_is() -> Result<()> {
    let rig = Rig::new()?;
    let name = push(&rig, 1)?;
    let (cache, mounted) = (rig.path("cache"), text(&rig.path("mount")));
    fs::create_dir(&cache)?;
    fs::write(cache.join("version"), "lamina cache 9\n")?;
    let said = rig.fails(&["mount", &name, &mounted])?;
    ensure!(said.contains("lamina cache 9") && said.contains(&text(&cache)), "{said}");
    ensure!(!cache.join("segments").exists(), "something was made in it");
    fs::remove_file(cache.join("version"))?;
    std::os::unix::fs::chown(&cache, Some(12345), None)?;
    let said = rig.fails(&["mount", &name, &mounted])?;
    ensure!(said.contains("user 12345"), "{said}");
    std::os::unix::fs::chown(&cache, Some(0), None)?;
    rig.ok(&["mount", &name, &mounted])?;
    let second = rig.fails(&["node", "--cache", &text(&cache)])?;
    ensure!(second.contains("is in use by process"), "{second}");
    rig.unmount()
}
