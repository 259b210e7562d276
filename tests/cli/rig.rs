//! A registry, a node's cache and a scratch directory for one test; everything goes when it ends.

use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use lamina_testkit::compare::Compare;
use lamina_testkit::image::{Image, Layer};
use lamina_testkit::mounts::unmount_below;
use lamina_testkit::noise;
use lamina_testkit::process::{Process, run, until};

/// No step takes longer on any machine.
pub(crate) const DEADLINE: Duration = Duration::from_secs(90);

pub(crate) struct Rig {
    pub(crate) registry: Option<Process>,
    pub(crate) address: String,
    /// What every process is started with besides the test's own environment.
    environment: Vec<(&'static str, String)>,
    directory: tempfile::TempDir,
    /// Where the cache is, if not there.
    memory: Option<tempfile::TempDir>,
}

impl Rig {
    pub(crate) fn new() -> Result<Self> {
        Self::with_environment(Vec::new())
    }

    pub(crate) fn with_environment(environment: Vec<(&'static str, String)>) -> Result<Self> {
        ensure!(Path::new("/dev/fuse").exists(), "these tests need /dev/fuse and root");
        let directory = tempfile::tempdir()?;
        for name in ["mount", "scratch", "tmp"] {
            std::fs::create_dir(directory.path().join(name))?;
        }
        let mut rig = Self { registry: None, address: String::new(), environment, directory, memory: None };
        rig.start_registry()?;
        Ok(rig)
    }

    /// One whose cache is on a file system that is not stacked, whatever the rest of the machine is on.
    pub(crate) fn in_memory() -> Result<Self> {
        let (mut rig, memory) = (Self::new()?, tempfile::tempdir_in("/dev/shm")?);
        std::os::unix::fs::symlink(memory.path(), rig.path("cache"))?;
        rig.memory = Some(memory);
        Ok(rig)
    }

    pub(crate) fn start_registry(&mut self) -> Result<()> {
        self.start_registry_on("127.0.0.1:0")
    }

    /// Starts the registry on an address, such as the one where it was killed.
    pub(crate) fn start_registry_on(&mut self, address: &str) -> Result<()> {
        let mut command = Command::new(env!("CARGO_BIN_EXE_lamina"));
        command.args(["registry", "--listen", address, "--storage"]).arg(self.path("storage"));
        command.envs(self.environment.iter().cloned());
        let mut process = Process::spawn("registry", &mut command)?;
        let line = process.wait_line("listening on ", DEADLINE)?;
        self.address = line.rsplit('/').next().context("an address")?.to_owned();
        self.registry = Some(process);
        Ok(())
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    /// A reference of this registry.
    pub(crate) fn name(&self, name: &str) -> String {
        format!("{}/{name}", self.address)
    }

    /// Writes an image as a layout and gives its source.
    pub(crate) fn layout(&self, name: &str, image: &Image) -> Result<String> {
        image.write(&self.path(name), "t")
    }

    /// Runs `lamina`, whatever comes of it.
    pub(crate) fn lamina(&self, arguments: &[&str]) -> Result<Output> {
        let mut command = Command::new(env!("CARGO_BIN_EXE_lamina"));
        command.args(arguments).env("LAMINA_CACHE", self.path("cache")).env("TMPDIR", self.path("tmp"));
        command.envs(self.environment.iter().cloned());
        Ok(command.output()?)
    }

    /// Runs `lamina`, which must succeed; what it printed.
    pub(crate) fn ok(&self, arguments: &[&str]) -> Result<String> {
        let output = self.lamina(arguments)?;
        let said = String::from_utf8_lossy(&output.stderr);
        ensure!(output.status.success(), "lamina {arguments:?}: {}: {said}", output.status);
        Ok(String::from_utf8(output.stdout)?)
    }

    /// Runs `lamina`, which must fail with exit code 1; its complaint.
    pub(crate) fn fails(&self, arguments: &[&str]) -> Result<String> {
        let output = self.lamina(arguments)?;
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        ensure!(output.status.code() == Some(1), "lamina {arguments:?}: {}: {said}", output.status);
        ensure!(said.starts_with("lamina: ") && said.lines().count() == 1, "not one clear line: {said}");
        Ok(said)
    }

    pub(crate) fn json(&self, arguments: &[&str]) -> Result<serde_json::Value> {
        let mut arguments = arguments.to_vec();
        arguments.push("--json");
        Ok(serde_json::from_str(&self.ok(&arguments)?)?)
    }

    pub(crate) fn mount(&self, name: &str) -> Result<PathBuf> {
        let directory = self.path("mount");
        self.ok(&["mount", &self.name(name), &text(&directory)])?;
        Ok(directory)
    }

    /// Mounts an image so that all reads of contents go through the cache.
    pub(crate) fn mount_plain(&self, name: &str) -> Result<PathBuf> {
        let directory = self.path("mount");
        self.ok(&["mount", "--no-boot", "--no-trace", &self.name(name), &text(&directory)])?;
        Ok(directory)
    }

    pub(crate) fn unmount(&self) -> Result<()> {
        let said = self.ok(&["unmount", &text(&self.path("mount"))]);
        said.map(drop)
            .with_context(|| std::fs::read_to_string(self.path("cache/node.log")).unwrap_or_default())
    }

    /// Waits until the node has ended after its last mount.
    pub(crate) fn node_ended(&self) -> Result<()> {
        until("the node to end", DEADLINE, || Ok((!self.path("cache/node.sock").exists()).then_some(())))
    }

    /// One of the node's counters.
    pub(crate) fn counter(&self, name: &str) -> Result<u64> {
        self.json(&["stats"])?["cache"][name].as_u64().with_context(|| format!("a counter {name}"))
    }

    /// Mounts an image, compares it with a directory in everything, and unmounts it.
    pub(crate) fn must_equal(&self, name: &str, directory: &Path, compare: &Compare<'_>) -> Result<()> {
        let mounted = self.mount(name)?;
        let compared = compare.trees(&mounted, directory)?;
        if !compared.differences.is_empty() {
            let all: Vec<String> = compared.differences.iter().map(ToString::to_string).collect();
            bail!("{name} differs: {}", all.join("\n"));
        }
        ensure!(compared.entries > 1, "nothing was compared");
        self.unmount()
    }

    /// Waits until the registry has converted an image, or given it up.
    pub(crate) fn converted(&self, name: &str) -> Result<serde_json::Value> {
        until("the conversion", DEADLINE, || {
            let status = self.json(&["inspect", &self.name(name)])?;
            let state = status["conversion"]["state"].as_str().unwrap_or("none").to_owned();
            Ok((state == "done" || state == "failed").then_some(status))
        })
    }
}

impl Drop for Rig {
    fn drop(&mut self) {
        let _ = unmount_below(self.directory.path());
        if let Ok(stats) = self.json(&["stats"])
            && let Some(pid) = stats["pid"].as_u64()
        {
            let _ = Command::new("kill").arg(pid.to_string()).status();
        }
    }
}

pub(crate) fn text(path: &Path) -> String {
    path.to_str().expect("temporary paths are UTF-8").to_owned()
}

pub(crate) fn skopeo(arguments: &[&str]) -> Result<String> {
    Ok(String::from_utf8(run(Command::new("skopeo").args(arguments))?.stdout)?)
}

/// Adds programs of this machine, by their paths, with the libraries that they need.
pub(crate) fn programs(layer: Layer, paths: &[&str]) -> Result<Layer> {
    let output = String::from_utf8(run(Command::new("ldd").args(paths))?.stdout)?;
    let libraries = output.split_whitespace().filter(|word| word.starts_with('/') && !word.ends_with(':'));
    let mut files: Vec<&str> = paths.iter().copied().chain(libraries).collect();
    files.sort_unstable();
    files.dedup();
    files.into_iter().try_fold(layer, |layer, path| {
        Ok(layer.file(path.trim_start_matches('/'), std::fs::read(path)?).mode(0o755))
    })
}

/// The real small image, as a source: made by `scripts/small-image`, found by `LAMINA_TEST_IMAGES`.
pub(crate) fn real_image() -> Result<String> {
    let here = Path::new(env!("CARGO_MANIFEST_DIR"));
    let directory =
        std::env::var_os("LAMINA_TEST_IMAGES").map_or_else(|| here.join("target/test-images"), PathBuf::from);
    let made = directory.join("oci/index.json").exists();
    ensure!(made, "there is no image in {}: run scripts/small-image target/test-images", directory.display());
    Ok(format!("oci:{}/oci:numpy", text(&directory)))
}

/// Everything that an image can hold, in three layers.
pub(crate) fn everything() -> Image {
    let long = "long/".repeat(30) + &"n".repeat(200);
    Image::new()
        .layer(|layer| {
            layer
                .dir("")
                .dir("etc")
                .file("etc/motd", "hidden later")
                .file("etc/keep", "kept")
                .dir("opaque")
                .file("opaque/low", "hidden")
                .dir("d")
                .file("d/empty", "")
                .file("d/big", noise(3_000_000, 1))
                .file("d/first", "shared by three names")
                .hardlink("d/second", "d/first")
                .file("setuid", "#!")
                .mode(0o4755)
                .owner(1000, 70_000)
                .mtime(1_700_000_000, 123_456_789)
                .file("old", "from before 1970")
                .mtime(-86_400, 0)
                .gzip()
        })
        .layer(|layer| {
            layer
                .symlink("link", "../../../etc/keep")
                .fifo("fifo")
                .device("null", 1, 3)
                .block_device("loop", 7, 300)
                .file("marked", "x")
                .xattr("user.colour", b"bl\nue\0\xff")
                .xattr("security.capability", b"\x01\0\0\x02\0\x04\0\0\0\0\0\0\0\0\0\0\0\0\0\0")
                .sparse("holes", 10_000_000, &[(4096, &[7; 1024]), (5_000_000, b"and there")])
                .file(b"caf\xe9\xff", "a name that is not UTF-8")
                .file(long, "deep")
                .plain()
        })
        .layer(|layer| {
            layer
                .whiteout("etc/motd")
                .opaque("opaque")
                .file("opaque/up", "seen")
                .hardlink("third", "d/first")
                .file("etc/keep", "changed")
                .gzip()
        })
}

/// Whether an unpacker keeps the time of this directory of [`everything`]: those that no entry describes get the time of
/// unpacking, and so does the root.
pub(crate) fn described(path: &Path) -> bool {
    !path.starts_with("long") && !path.as_os_str().is_empty()
}
