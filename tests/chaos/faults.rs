//! What goes wrong, and how it is made well again.

use std::fs::{self, File};
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result};

use crate::clock::Clock;
use crate::line::{Line, Weather};
use crate::node::{daemon, holder, kill, successor};
use crate::rig::Rig;

/// A sequence of numbers that depends on its seed alone.
pub(crate) struct Chance(u64);

impl Chance {
    pub(crate) fn new(seed: u64) -> Self {
        Self(seed | 1)
    }

    /// A number below `end`: xorshift64*.
    pub(crate) fn below(&mut self, end: u64) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        (self.0.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 32) % end
    }

    fn time(&mut self, least_ms: u64, most_ms: u64) -> Duration {
        Duration::from_millis(least_ms + self.below(most_ms - least_ms))
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Fault {
    NodeKilled,
    HolderKilled,
    RegistryKilled,
    LineCut,
    LineSlow,
    LineLies,
    FramesRot,
    DiskFull,
    Upgrade,
    ClockStepped,
    Nothing,
}

impl Fault {
    pub(crate) fn any(chance: &mut Chance) -> Self {
        match chance.below(14) {
            0..=2 => Self::NodeKilled,
            3 => Self::HolderKilled,
            4 => Self::RegistryKilled,
            5 => Self::LineCut,
            6 => Self::LineSlow,
            7 => Self::LineLies,
            8 => Self::FramesRot,
            9 => Self::DiskFull,
            10 => Self::Upgrade,
            11..=12 => Self::ClockStepped,
            _ => Self::Nothing,
        }
    }
}

/// What can break.
pub(crate) struct World<'a> {
    pub(crate) rig: &'a mut Rig,
    pub(crate) lines: &'a [Line; 2],
    pub(crate) cache: &'a Path,
    pub(crate) clock: &'a Clock,
    pub(crate) chance: &'a mut Chance,
}

impl World<'_> {
    /// Breaks something for a while, and returns when it is whole again.
    pub(crate) fn suffer(&mut self, fault: Fault) -> Result<()> {
        match fault {
            Fault::NodeKilled => {
                let before = daemon(self.rig)?;
                kill(before)?;
                successor(self.rig, before)?;
            }
            Fault::HolderKilled => {
                let before = holder(self.rig)?;
                kill(before)?;
                lamina_testkit::process::until("another holder", crate::rig::DEADLINE, || {
                    Ok(holder(self.rig).ok().filter(|pid| *pid != before))
                })?;
            }
            Fault::RegistryKilled => {
                drop(self.rig.registry.take());
                pass(self.chance.time(100, 2000));
                self.rig.start_registry()?;
                self.lines.iter().for_each(|line| line.lead_to(&self.rig.address));
            }
            Fault::LineCut => self.weather(Weather::Cut, 0..2, 2000),
            Fault::LineSlow => self.weather(Weather::Slow, 0..2, 2000),
            Fault::LineLies => {
                let one = usize::try_from(self.chance.below(2))?;
                self.weather(Weather::Lies, one..one + 1, 1000);
            }
            Fault::FramesRot => self.rot()?,
            Fault::DiskFull => self.fill()?,
            Fault::Upgrade => drop(self.rig.ok(&["node", "upgrade"])?),
            Fault::ClockStepped => {
                self.clock.step_anywhere(self.chance)?;
                pass(self.chance.time(100, 1000));
            }
            Fault::Nothing => pass(self.chance.time(100, 1000)),
        }
        Ok(())
    }

    fn weather(&mut self, weather: Weather, which: Range<usize>, most_ms: u64) {
        self.lines[which.clone()].iter().for_each(|line| line.set(weather));
        pass(self.chance.time(100, most_ms));
        self.lines[which].iter().for_each(|line| line.set(Weather::Fine));
    }

    /// Changes bytes of every file in which frames are kept.
    fn rot(&mut self) -> Result<()> {
        for entry in fs::read_dir(self.cache.join("segments"))?.flatten() {
            // one that is evicted meanwhile is not there any more
            let Ok(file) = File::options().read(true).write(true).open(entry.path()) else { continue };
            let len = file.metadata()?.len();
            for _ in 0..4 {
                let (at, mut byte) = (self.chance.below(len.max(65)).max(64), [0]);
                if file.read_at(&mut byte, at)? == 1 {
                    file.write_at(&[byte[0] ^ 0x40], at)?;
                }
            }
        }
        Ok(())
    }

    /// Takes all of the cache's disk for a while.
    fn fill(&mut self) -> Result<()> {
        let path = self.cache.join("ballast");
        let ballast = File::create(&path)?;
        let piece = vec![0x5a; 1 << 20];
        let mut at = 0;
        while let Ok(len @ 1..) = ballast.write_at(&piece, at) {
            at += len as u64;
        }
        pass(self.chance.time(100, 1500));
        fs::remove_file(path).context("the ballast")
    }
}

/// Lets a fault last. This is what the test is about, and not a way to wait for something.
fn pass(time: Duration) {
    std::thread::park_timeout(time);
}
