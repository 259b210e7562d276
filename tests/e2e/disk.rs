//! A cache whose disk is small, full, broken, or not its own.

use std::collections::HashMap;
use std::ffi::{CStr, OsString};
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
use lamina_testkit::process::{run, until};
use rustix::mount::MountFlags;

use crate::rig::{DEADLINE, Rig, text};

const FILES: u64 = 6;
const FILE_BYTES: usize = 4_000_000;

/// The image of number 1.
const FIRST: &str = "image-1:t";

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

/// What the segment files of a cache took at one moment at least. They only grow, and then go: those of a first look that a second
/// one finds as well were all there between the two, each at least as long as it was at first.
pub(crate) fn segment_bytes(cache: &Path) -> u64 {
    let look = || -> HashMap<OsString, u64> {
        let files = fs::read_dir(cache.join("segments")).into_iter().flatten().flatten();
        files.filter_map(|file| Some((file.file_name(), file.metadata().ok()?.size()))).collect()
    };
    let (first, second) = (look(), look());
    first.iter().filter(|(name, _)| second.contains_key(*name)).map(|(_, bytes)| bytes).sum()
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

/// A file system in memory for the cache, as long as what this gives.
fn cache_in_memory(rig: &Rig, options: &CStr) -> Result<MountGuard> {
    let cache = rig.path("cache");
    fs::create_dir(&cache)?;
    rustix::mount::mount("tmpfs", &cache, "tmpfs", MountFlags::empty(), options)?;
    Ok(MountGuard::new(&cache))
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

impl Disk {
    /// Makes the file system take nothing any more, as ext4 does after an error where it is told to.
    fn turn_read_only(&self) -> Result<()> {
        run(Command::new("mount").args(["-o", "remount,errors=remount-ro"]).arg(self._mounted.path()))?;
        let name = Path::new(&self.device).file_name().context("a device")?;
        let trigger = Path::new("/sys/fs/ext4").join(name).join("trigger_fs_error");
        Ok(fs::write(trigger, "a test")?)
    }
}

#[test]
fn a_full_disk_leaves_a_working_mount() -> Result<()> {
    let rig = Rig::new()?;
    push(&rig, 1)?;
    let _guard = cache_in_memory(&rig, c"size=6m,mode=0700")?;
    let mounted = rig.mount_plain(FIRST)?;
    reads_right(&mounted, 1)?;
    ensure!(rig.counter("disk_failures")? > 0, "the disk was never full");
    ensure!(rig.counter("verify_failures")? == 0);
    rig.unmount()
}

#[test]
fn a_disk_that_fails_leaves_a_working_mount() -> Result<()> {
    let rig = Rig::new()?;
    push(&rig, 1)?;
    let disk = Disk::new(&rig)?;
    let mounted = rig.mount_plain(FIRST)?;
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

#[test]
fn a_disk_that_turns_read_only_leaves_a_working_mount_and_is_named_at_the_next_start() -> Result<()> {
    let rig = Rig::new()?;
    let name = push(&rig, 1)?;
    let disk = Disk::new(&rig)?;
    let mounted = rig.mount_plain(FIRST)?;
    fs::read(mounted.join("file-0"))?;
    disk.turn_read_only()?;
    reads_right(&mounted, 1)?;
    ensure!(rig.counter("disk_failures")? > 0, "the disk never failed");
    ensure!(rig.counter("verify_failures")? == 0);
    let node = rig.json(&["stats"])?["pid"].to_string();
    rig.unmount()?;
    // its socket cannot be removed from such a disk
    until("the node to end", DEADLINE, || Ok((!Path::new("/proc").join(&node).exists()).then_some(())))?;
    let said = rig.fails(&["mount", &name, &text(&mounted)])?;
    ensure!(said.contains(&text(&rig.path("cache"))) && said.contains("read-only"), "{said}");
    Ok(())
}

#[test]
fn a_directory_on_a_read_only_mount_is_refused_until_it_can_be_written() -> Result<()> {
    let mut rig = Rig::new()?;
    let (name, cache) = (push(&rig, 1)?, rig.path("cache"));
    let _guard = cache_in_memory(&rig, c"size=64m,mode=0700")?;
    let mounted = rig.mount_plain(FIRST)?;
    reads_right(&mounted, 1)?;
    rig.unmount()?;
    rig.node_ended()?;
    let remount = |how| run(Command::new("mount").args(["-o", how]).arg(&cache));
    // as long as a process of the node has its log open, it is busy
    until("the directory to be let go", DEADLINE, || Ok(remount("remount,ro").ok()))?;
    for command in ["mount", "prefetch"] {
        let arguments = [command, &name, &text(&mounted)];
        let said = rig.fails(&arguments[..if command == "mount" { 3 } else { 2 }])?;
        ensure!(said.contains(&text(&cache)) && said.contains("read-only; remount it"), "{said}");
    }
    let seen = String::from_utf8(rig.lamina(&["doctor"])?.stdout)?;
    ensure!(seen.contains(&text(&cache)) && seen.contains("read-only; remount it"), "{seen}");
    remount("remount,rw")?;
    drop(rig.registry.take());
    rig.ok(&["mount", "--no-boot", "--no-trace", "--deadline", "3", &name, &text(&mounted)])?;
    reads_right(&mounted, 1)?;
    rig.unmount()
}

#[test]
fn a_directory_on_another_machine_is_refused_and_left_as_it_is() -> Result<()> {
    let rig = Rig::new()?;
    let name = push(&rig, 1)?;
    let image = Image::new().layer(|layer| layer.dir("cache"));
    let source = rig.layout("layout-remote", &image)?;
    rig.ok(&["push", &source, &rig.name("remote:t")])?;
    // a file system that is served over the network, as sshfs is: by a process
    let remote = rig.mount("remote:t")?;
    let other = rig.path("other");
    fs::create_dir(&other)?;
    let cache = text(&remote.join("cache"));
    let said = rig.fails(&["mount", "--cache", &cache, &name, &text(&other)])?;
    ensure!(said.contains(&cache) && said.contains("fuse.lamina, a network file system"), "{said}");
    ensure!(said.contains("use a directory on a local disk"), "{said}");
    let seen = String::from_utf8(rig.lamina(&["doctor", "--cache", &cache])?.stdout)?;
    ensure!(seen.contains("a network file system"), "{seen}");
    ensure!(fs::read_dir(remote.join("cache"))?.next().is_none());
    rig.unmount()
}
