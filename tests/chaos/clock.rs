//! A wall clock of the processes under test alone, by libfaketime: it can be stepped while they run, and nobody else's is touched.
//!
//! What they measure time with (CLOCK_MONOTONIC) and the times of files stay the machine's, as they do where a clock is set.

use std::fs;
use std::io::{Read, Write};
use std::net::TcpStream;
use std::path::Path;
use std::time::{Duration, SystemTime};

use anyhow::{Context, Result, ensure};
use lamina_testkit::process::until;
use tempfile::TempDir;

use crate::faults::Chance;
use crate::node::{daemon, kill, successor};
use crate::rig::{DEADLINE, Rig};

/// Where Debian's package `libfaketime` has it, below the directory of the machine's libraries.
const LIBRARY: &str = "faketime/libfaketimeMT.so.1";
const HOUR: i64 = 3600;
const YEAR: i64 = 365 * 24 * HOUR;
/// How far from the machine's clock it may be set, in seconds: an hour is daylight saving time, days are leases and tokens, years
/// are a machine without a battery.
const OFFSETS: [i64; 9] = [0, HOUR, -HOUR, 72 * HOUR, -72 * HOUR, 2 * YEAR, -2 * YEAR, 20 * YEAR, -20 * YEAR];
/// No step leads so far, so that a clock which shows this was set to it.
const LAST_OFFSET: i64 = 40 * YEAR;
/// What is read from a clock may be so old.
const READ_WITHIN: Duration = Duration::from_secs(300);

/// The clock.
pub(crate) struct Clock(TempDir);

impl Clock {
    /// One that agrees with the machine's.
    pub(crate) fn new() -> Result<Self> {
        let clock = Self(tempfile::tempdir()?);
        clock.set(0)?;
        Ok(clock)
    }

    /// What makes a process, and those that it starts, go by this clock.
    pub(crate) fn environment(&self) -> Result<Vec<(&'static str, String)>> {
        let directories = fs::read_dir("/usr/lib")?.flatten().map(|entry| entry.path());
        let library = directories.map(|directory| directory.join(LIBRARY)).find(|path| path.exists());
        let library = library.context("no libfaketime: install it with `scripts/setup test`")?;
        let set = |name, value: &str| (name, value.to_owned());
        Ok(vec![
            ("LD_PRELOAD", library.display().to_string()),
            ("FAKETIME_TIMESTAMP_FILE", self.0.path().join("offset").display().to_string()),
            set("FAKETIME_NO_CACHE", "1"),
            set("FAKETIME_DONT_FAKE_MONOTONIC", "1"),
            set("NO_FAKE_STAT", "1"),
        ])
    }

    fn set(&self, offset: i64) -> Result<()> {
        // in one step: a process that finds half of a file would go by half of an offset
        let (written, read) = (self.0.path().join("next"), self.0.path().join("offset"));
        fs::write(&written, format!("{offset:+}\n"))?;
        Ok(fs::rename(written, read)?)
    }

    /// Steps it forward or back.
    pub(crate) fn step_anywhere(&self, chance: &mut Chance) -> Result<()> {
        let at = usize::try_from(chance.below(OFFSETS.len() as u64))?;
        self.set(OFFSETS[at])
    }

    /// Steps it once more. *Errors*: the registry, or a daemon that the holder starts, does not go by it.
    pub(crate) fn must_be_gone_by(&self, rig: &Rig, cache: &Path) -> Result<()> {
        self.set(LAST_OFFSET)?;
        let wanted = SystemTime::now() + Duration::from_secs(LAST_OFFSET.unsigned_abs());
        let date = date_of(&rig.address)?;
        let apart = wanted.duration_since(date).unwrap_or_else(|error| error.duration());
        ensure!(apart < READ_WITHIN, "the registry's clock is {apart:?} from where it was stepped to");
        let year = httpdate::fmt_http_date(date).split(' ').nth(3).context("a year")?.to_owned();
        let before = daemon(rig)?;
        kill(before)?;
        successor(rig, before)?;
        until("the node to log by its clock", DEADLINE, || {
            let log = fs::read_to_string(cache.join("node.log"))?;
            Ok(log.lines().any(|line| line.starts_with(&year)).then_some(()))
        })
    }
}

impl Drop for Clock {
    /// Removes what the library keeps for each process, and leaves where one is killed.
    fn drop(&mut self) {
        for entry in fs::read_dir("/dev/shm").into_iter().flatten().flatten() {
            let name = entry.file_name().to_string_lossy().into_owned();
            let of = ["faketime_shm_", "sem.faketime_sem_"].iter().find_map(|kept| name.strip_prefix(kept));
            if of.is_some_and(|pid| !Path::new("/proc").join(pid).exists()) {
                let _ = fs::remove_file(entry.path());
            }
        }
    }
}

/// What a server's clock shows, by its own word.
fn date_of(address: &str) -> Result<SystemTime> {
    let mut connection = TcpStream::connect(address)?;
    connection.write_all(b"GET /v2/ HTTP/1.1\r\nHost: registry\r\nConnection: close\r\n\r\n")?;
    let mut answer = String::new();
    connection.read_to_string(&mut answer)?;
    let date =
        answer.lines().find_map(|line| line.strip_prefix("date: ")).context("an answer with a date")?;
    Ok(httpdate::parse_http_date(date)?)
}
