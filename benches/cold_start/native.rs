//! The image unpacked on the local disk, one directory a layer under one overlayfs: what nothing can beat.

use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::Result;
use lamina_testkit::process;
use rustix::fs::{CWD, FileType, Mode, makedev, mknodat};

use crate::sample::{Evidence, Sample};
use crate::stage::{DEADLINE, Root, Stage};

/// The unpacked layers.
pub(crate) struct Native {
    /// The topmost first, as overlayfs wants them.
    layers: Vec<PathBuf>,
}

impl Native {
    /// Unpacks every layer with `tar`, whiteouts as overlayfs has them.
    ///
    /// # Errors
    /// When a layer cannot be unpacked.
    pub(crate) fn unpack(stage: &Stage) -> Result<Self> {
        let start = Instant::now();
        let mut layers = Vec::new();
        for (index, blob) in stage.image.layers.iter().enumerate() {
            let dir = stage.dir.join(format!("layer-{index}"));
            std::fs::create_dir(&dir)?;
            let mut tar = Command::new("tar");
            tar.args(["--numeric-owner", "--xattrs", "--xattrs-include=*", "-xpf"])
                .arg(blob)
                .arg("-C")
                .arg(&dir);
            process::run_logged(&mut tar, &stage.dir.join("prepare.log"), DEADLINE)?;
            whiteouts(&dir)?;
            layers.insert(0, dir);
        }
        eprintln!("prepare: unpack for native overlayfs: {:.2} s", start.elapsed().as_secs_f64());
        Ok(Self { layers })
    }

    /// The workload's second run on the unpacked image.
    pub(crate) fn measure(&self, stage: &Stage, round: u32) -> Sample {
        Sample::from_result(self.try_measure(stage, round))
    }

    fn try_measure(&self, stage: &Stage, round: u32) -> Result<Sample> {
        let dir = stage.fresh("native", round)?;
        let log = dir.join("log");
        let root = Root::new(&self.layers, &dir)?;
        stage.run_in(&root.path, &log)?;
        let sample = stage.measure(|| stage.run_in(&root.path, &log).map(|()| Duration::ZERO))?;
        drop(root);
        std::fs::remove_dir_all(&dir)?;
        Ok(sample.check(Evidence::Local, stage.image.layer_bytes))
    }
}

/// Turns the whiteouts of a layer's tar into those of overlayfs, in `dir` and below.
fn whiteouts(dir: &Path) -> Result<()> {
    for entry in std::fs::read_dir(dir)? {
        let entry = entry?;
        let (path, name) = (entry.path(), entry.file_name());
        if name == ".wh..wh..opq" {
            std::fs::remove_file(&path)?;
            rustix::fs::setxattr(dir, "trusted.overlay.opaque", b"y", rustix::fs::XattrFlags::empty())?;
        } else if let Some(hidden) = name.as_bytes().strip_prefix(b".wh.") {
            std::fs::remove_file(&path)?;
            let hidden = dir.join(OsStr::from_bytes(hidden));
            mknodat(CWD, hidden, FileType::CharacterDevice, Mode::empty(), makedev(0, 0))?;
        } else if entry.file_type()?.is_dir() {
            whiteouts(&path)?;
        }
    }
    Ok(())
}
