//! A recorded trace: lines of text, compressed.
//!
//! ```text
//! lamina frames 1
//! = torch-2.8.0     a phase begins: one start, or one scan
//! r 0 65120         a reader asks for a frame, seen for the first time: its length, sealed
//! a 1 70001         readahead, or a boot, asks for one
//! l 2 912           one comes along with those, since it lies near
//! r 0               the same frame again
//! ```

use std::collections::HashMap;
use std::fmt::Write as _;
use std::fs;
use std::io::{BufRead, BufReader, Read};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail, ensure};

const HEAD: &str = "lamina frames 1";
/// No trace is longer, in bytes of text.
const BYTES_MAX: u64 = 256 << 20;
/// The target of the events that a cache logs.
const TARGET: &str = "lamina_cache::asked";

/// Why a frame was asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Why {
    Read,
    Ahead,
    Along,
}

/// One frame asked for.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Ask {
    pub(crate) why: Why,
    /// Counted from 0, as frames first appear.
    pub(crate) frame: usize,
}

/// What one start or scan asked for.
#[derive(Debug)]
pub(crate) struct Phase {
    pub(crate) name: String,
    pub(crate) asks: Vec<Ask>,
}

/// Everything.
#[derive(Debug, Default)]
pub(crate) struct Trace {
    pub(crate) phases: Vec<Phase>,
    /// The sealed length of each frame, in bytes.
    pub(crate) lens: Vec<usize>,
}

impl Trace {
    /// What it would take to keep everything, in bytes of frames.
    pub(crate) fn bytes(&self) -> u64 {
        self.lens.iter().map(|len| *len as u64).sum()
    }

    pub(crate) fn summary(&self) -> String {
        let asks: usize = self.phases.iter().map(|phase| phase.asks.len()).sum();
        let (phases, frames, mib) = (self.phases.len(), self.lens.len(), self.bytes() >> 20);
        format!("{phases} starts and scans ask {asks} times for {frames} frames of together {mib} MiB")
    }

    pub(crate) fn read(path: &Path) -> Result<Self> {
        let text = BufReader::new(zstd::Decoder::new(fs::File::open(path)?)?.take(BYTES_MAX));
        let mut lines = text.lines();
        ensure!(lines.next().transpose()?.as_deref() == Some(HEAD), "it is no trace");
        let mut trace = Self::default();
        for line in lines {
            trace.take(&line?)?;
        }
        Ok(trace)
    }

    fn take(&mut self, line: &str) -> Result<()> {
        let (kind, rest) = line.split_once(' ').context("a line of one word")?;
        let why = match kind {
            "=" => {
                self.phases.push(Phase { name: rest.to_owned(), asks: Vec::new() });
                return Ok(());
            }
            "r" => Why::Read,
            "a" => Why::Ahead,
            "l" => Why::Along,
            _ => bail!("a line of unknown kind: {line:?}"),
        };
        let mut numbers = rest.split(' ').map(str::parse);
        let frame = numbers.next().context("a frame")??;
        if let Some(len) = numbers.next() {
            ensure!(frame == self.lens.len(), "frame {frame} is not the next");
            self.lens.push(len?);
        }
        ensure!(frame < self.lens.len(), "frame {frame} has no length");
        self.phases.last_mut().context("a phase")?.asks.push(Ask { why, frame });
        Ok(())
    }

    pub(crate) fn write(&self, path: &Path) -> Result<()> {
        let (mut text, mut seen) = (format!("{HEAD}\n"), 0);
        for phase in &self.phases {
            writeln!(text, "= {}", phase.name)?;
            for Ask { why, frame } in &phase.asks {
                let kind = match why {
                    Why::Read => 'r',
                    Why::Ahead => 'a',
                    Why::Along => 'l',
                };
                write!(text, "{kind} {frame}")?;
                if *frame == seen {
                    write!(text, " {}", self.lens[*frame])?;
                    seen += 1;
                }
                text.push('\n');
            }
        }
        Ok(fs::write(path, zstd::encode_all(text.as_bytes(), 19)?)?)
    }

    /// What nodes have logged, each a phase. A frame that was on disk before the first log began has no known length, and is left out.
    pub(crate) fn of_logs(logs: &[PathBuf]) -> Result<Self> {
        let (mut trace, mut known) = (Self::default(), HashMap::<String, usize>::new());
        for log in logs {
            let name = log.file_stem().and_then(|name| name.to_str()).context("a name")?;
            let name = name.split_once('-').map_or(name, |(_, name)| name).to_owned();
            let mut asks = Vec::new();
            for line in BufReader::new(fs::File::open(log)?).lines() {
                let Ok(event) = serde_json::from_str::<serde_json::Value>(&line?) else { continue };
                let (Some(id), true) = (event["id"].as_str(), event["target"] == TARGET) else { continue };
                let why = match event["class"].as_str() {
                    None | Some("Demand") => Why::Read,
                    Some("Along") => Why::Along,
                    Some(_) => Why::Ahead,
                };
                let frame = match (known.get(id), event["sealed_len"].as_u64()) {
                    (Some(frame), _) => *frame,
                    (None, None) => continue,
                    (None, Some(len)) => {
                        trace.lens.push(usize::try_from(len)?);
                        known.insert(id.to_owned(), trace.lens.len() - 1);
                        trace.lens.len() - 1
                    }
                };
                asks.push(Ask { why, frame });
            }
            trace.phases.push(Phase { name, asks });
        }
        Ok(trace)
    }
}
