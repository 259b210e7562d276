//! The machine itself: kernel, devices, privileges, limits, disk.

use std::fs::{self, File};
use std::io::{Read, Write};
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::time::Instant;

use rustix::process::{Resource, getrlimit};

use super::Check;
use crate::commands::mib;

/// From here on programs survive the node that serves them, and files may be passed through (FUSE_NOTIFY_RESEND,
/// FUSE_PASSTHROUGH).
const KERNEL_GOOD: (u32, u32) = (6, 9);
/// What is negotiated at every mount is there since this one (FUSE_CACHE_SYMLINKS, 4.20; nothing older is tested).
const KERNEL_MIN: (u32, u32) = (5, 4);
/// A node has some 70 files of its cache open, and a few for each mount.
const FILES_MIN: u64 = 256;
const FILES_GOOD: u64 = 4096;
/// CAP_SYS_ADMIN's bit in `/proc/self/status`.
const SYS_ADMIN: u64 = 1 << 21;
/// The part of the disk that is written and read to see whether it works, in bytes.
const TRIAL_BYTES: usize = 8 << 20;

pub(super) fn checks() -> Vec<Check> {
    vec![kernel(), device(), privileges(), overlay(), readahead(), files(), memory()]
}

fn kernel() -> Check {
    let release = fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default().trim().to_owned();
    let mut numbers = release.split(['.', '-']).map_while(|part| part.parse::<u32>().ok());
    let version = (numbers.next().unwrap_or(0), numbers.next().unwrap_or(0));
    let found = format!("Linux {release}");
    if version >= KERNEL_GOOD {
        return Check::ok("kernel", found);
    }
    let (major, minor) = KERNEL_GOOD;
    if version >= KERNEL_MIN {
        let advice = format!("from {major}.{minor} on programs survive a node that is killed");
        return Check::poor("kernel", found, advice);
    }
    Check::bad(
        "kernel",
        found,
        format!("use {}.{} or newer, better {major}.{minor}", KERNEL_MIN.0, KERNEL_MIN.1),
    )
}

fn device() -> Check {
    match File::options().read(true).write(true).open("/dev/fuse") {
        Ok(_) => Check::ok("/dev/fuse", "can be opened"),
        Err(error) => {
            let advice = "load it with `modprobe fuse`, run as root, and in a container give it the device \
                          (docker run --device /dev/fuse)";
            Check::bad("/dev/fuse", error.to_string(), advice)
        }
    }
}

fn privileges() -> Check {
    let status = fs::read_to_string("/proc/self/status").unwrap_or_default();
    let effective = status.lines().find_map(|line| line.strip_prefix("CapEff:"));
    let bits = effective.and_then(|hex| u64::from_str_radix(hex.trim(), 16).ok()).unwrap_or(0);
    match bits & SYS_ADMIN {
        0 => Check::bad(
            "privileges",
            "no CAP_SYS_ADMIN",
            "mounting needs it: run as root, or give it the capability",
        ),
        _ => Check::ok("privileges", "CAP_SYS_ADMIN"),
    }
}

fn overlay() -> Check {
    let known = fs::read_to_string("/proc/filesystems").unwrap_or_default();
    match known.lines().any(|line| line.split_whitespace().last() == Some("overlay")) {
        true => Check::ok("overlayfs", "known"),
        false => Check::poor(
            "overlayfs",
            "unknown to the kernel",
            "`modprobe overlay`, to write on top of a mount",
        ),
    }
}

fn readahead() -> Check {
    let flags = rustix::fs::statvfs("/sys").map(|stat| stat.f_flag);
    match flags {
        Ok(flags) if !flags.contains(rustix::fs::StatVfsMountFlags::RDONLY) => {
            Check::ok("readahead", "/sys/class/bdi can be written")
        }
        _ => Check::poor(
            "readahead",
            "/sys is read-only",
            "mount it writable: without, starts read more than they need and bulk reads are slow",
        ),
    }
}

fn files() -> Check {
    let limit = getrlimit(Resource::Nofile).current.unwrap_or(u64::MAX);
    let found = format!("{limit} open files");
    match limit {
        0..FILES_MIN => Check::bad("limits", found, format!("raise it: `ulimit -n {FILES_GOOD}`")),
        FILES_MIN..FILES_GOOD => {
            let advice =
                format!("enough for some dozen mounts; for more, `ulimit -n {FILES_GOOD}`, or LimitNOFILE=");
            Check::poor("limits", found, advice)
        }
        _ => Check::ok("limits", found),
    }
}

fn memory() -> Check {
    let text = fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let line = text.lines().find_map(|line| line.strip_prefix("MemAvailable:"));
    let kib = line.and_then(|rest| rest.split_whitespace().next()?.parse::<u64>().ok()).unwrap_or(0);
    let found = format!("{} available", mib(kib << 10));
    match kib < 256 << 10 {
        true => Check::poor("memory", found, "a node wants up to 200 MiB, and page cache for what runs"),
        false => Check::ok("memory", found),
    }
}

/// The cache directory and the disk under it.
pub(super) fn cache(directory: &Path, bytes_max: u64) -> Vec<Check> {
    let name = directory.display().to_string();
    let mut checks = Vec::new();
    match lamina_node::check_cache_directory(directory) {
        Ok(()) => checks.push(Check::ok("cache", name.clone())),
        Err(error) => {
            let advice = "choose another one with --cache";
            return vec![Check::bad("cache", error.to_string(), advice)];
        }
    }
    checks.extend(space(directory, bytes_max));
    checks.push(match trial(directory) {
        Ok(rate) => Check::ok("disk", format!("written and read back at {rate} MiB/s")),
        Err(error) => Check::bad(
            "disk",
            format!("{name}: {error}"),
            "mounts work without it, but fetch everything each time: mend it, or choose another --cache",
        ),
    });
    checks
}

fn space(directory: &Path, bytes_max: u64) -> Option<Check> {
    let stat = rustix::fs::statvfs(directory).ok()?;
    let free = stat.f_bavail * stat.f_frsize;
    let used: u64 = ["segments", "boot", "trees"].iter().map(|part| length(&directory.join(part))).sum();
    // segments, a tenth more for boot packs, 2 % for the index, and trees
    let wanted = (bytes_max + bytes_max / 8).saturating_sub(used);
    let found =
        format!("{} free, {} used by the cache, which may take {}", mib(free), mib(used), mib(bytes_max));
    Some(match free < wanted {
        true => {
            let fits = ((free + used) / 9 * 8) >> 20;
            Check::poor("space", found, format!("make room, or say --cache-mib {fits}"))
        }
        false => Check::ok("space", found),
    })
}

/// The sum of the files of a directory.
fn length(directory: &Path) -> u64 {
    let entries = fs::read_dir(directory).into_iter().flatten().flatten();
    entries.filter_map(|entry| Some(entry.metadata().ok()?.size())).sum()
}

/// Writes, reads back and compares; MiB a second for both.
fn trial(directory: &Path) -> std::io::Result<u64> {
    let begun = Instant::now();
    let mut file = tempfile::tempfile_in(directory)?;
    let bytes: Vec<u8> = (0..TRIAL_BYTES).map(|at| (at ^ (at >> 9)).to_le_bytes()[0]).collect();
    file.write_all(&bytes)?;
    file.sync_all()?;
    rustix::fs::fadvise(&file, 0, None, rustix::fs::Advice::DontNeed)?;
    std::io::Seek::rewind(&mut file)?;
    let mut back = Vec::with_capacity(TRIAL_BYTES);
    file.read_to_end(&mut back)?;
    if back != bytes {
        return Err(std::io::Error::other("it gives back other bytes than were written"));
    }
    let us = begun.elapsed().as_micros().max(1);
    Ok(u64::try_from((2 * (TRIAL_BYTES as u128) * 1_000_000 / us) >> 20).unwrap_or(u64::MAX))
}
