//! The real binary as a registry, with the clients that people have: skopeo, podman, containerd's `ctr`, and ours.

use std::collections::BTreeMap;
use std::io::{Read, Write};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use lamina_testkit::image::Image;
use lamina_testkit::noise;
use lamina_testkit::process::{Process, run, until};

/// No step takes longer on any machine.
const DEADLINE: Duration = Duration::from_secs(60);

/// `lamina registry` on a free loopback port.
struct Registry {
    process: Process,
    address: String,
}

impl Registry {
    fn start(storage: &Path) -> Result<Self> {
        let mut command = lamina();
        command.args(["registry", "--listen", "127.0.0.1:0", "--storage"]).arg(storage);
        let mut process = Process::spawn("registry", &mut command)?;
        let line = process.wait_line("listening on ", DEADLINE)?;
        let address = line.rsplit('/').next().context("an address")?.to_owned();
        Ok(Self { process, address })
    }

    fn name(&self, name: &str) -> String {
        format!("{}/{name}", self.address)
    }

    fn stop(self) -> Result<()> {
        let status = self.process.stop(DEADLINE)?;
        ensure!(status.success(), "the registry ended with {status}");
        Ok(())
    }
}

fn lamina() -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_lamina"));
    command.env_remove("LAMINA_CONFIG");
    command
}

fn skopeo(arguments: &[&str]) -> Result<Vec<u8>> {
    Ok(run(Command::new("skopeo").args(arguments))?.stdout)
}

fn pull_with_skopeo(name: &str, into: &Path) -> Result<BTreeMap<String, Vec<u8>>> {
    let target = format!("oci:{}:back", into.display());
    skopeo(&["copy", "--preserve-digests", "--src-tls-verify=false", &format!("docker://{name}"), &target])?;
    blobs(into)
}

/// The blobs of an OCI layout.
fn blobs(layout: &Path) -> Result<BTreeMap<String, Vec<u8>>> {
    let mut blobs = BTreeMap::new();
    for file in std::fs::read_dir(layout.join("blobs/sha256"))? {
        let path = file?.path();
        let name = path.file_name().context("a name")?.to_string_lossy().into_owned();
        blobs.insert(name, std::fs::read(&path)?);
    }
    Ok(blobs)
}

fn image() -> Image {
    Image::new()
        .layer(|l| {
            l.dir("etc")
                .file("etc/motd", "hello\n")
                .dir("lib")
                .file("lib/one", noise(3_000_000, 1))
                .symlink("bin", "lib")
        })
        .layer(|l| {
            l.file("lib/two", noise(400_000, 2)).hardlink("lib/three", "lib/two").whiteout("etc/motd").zstd()
        })
        .command(["/lib/one"])
}

/// An image written as a layout: its source name, and the directory.
fn layout(directory: &Path) -> Result<(String, PathBuf)> {
    let layout = directory.join("layout");
    Ok((image().write(&layout, "v1")?, layout))
}

/// Pulls with podman into a storage of its own, and gives the image ID.
fn pull_with_podman(name: &str, storage: &Path) -> Result<String> {
    let mut command = Command::new("podman");
    command.arg("--root").arg(storage.join("root")).arg("--runroot").arg(storage.join("run"));
    command.args(["--storage-driver", "vfs", "--cgroup-manager", "cgroupfs"]);
    command.args(["pull", "-q", "--tls-verify=false", name]);
    Ok(String::from_utf8(run(&mut command)?.stdout)?.trim().to_owned())
}

/// A containerd of its own.
struct Containerd {
    socket: PathBuf,
    _process: Process,
}

impl Containerd {
    fn start(directory: &Path) -> Result<Self> {
        let at = |name: &str| directory.join(name).display().to_string();
        let config = format!(
            "version = 2\nroot = {:?}\nstate = {:?}\ndisabled_plugins = [\"io.containerd.grpc.v1.cri\"]\n\
             [grpc]\naddress = {:?}\n[ttrpc]\naddress = {:?}\n",
            at("root"),
            at("state"),
            at("c.sock"),
            at("t.sock"),
        );
        std::fs::write(at("config.toml"), config)?;
        let log = std::fs::File::create(at("log"))?;
        let mut command = Command::new("containerd");
        command.args(["-c", &at("config.toml")]).stderr(log);
        let process = Process::spawn("containerd", &mut command)?;
        let daemon = Self { socket: at("c.sock").into(), _process: process };
        until("containerd to answer", DEADLINE, || Ok(daemon.ctr(&["version"]).ok()))?;
        Ok(daemon)
    }

    fn ctr(&self, arguments: &[&str]) -> Result<String> {
        let mut command = Command::new("ctr");
        command.arg("-a").arg(&self.socket).args(arguments);
        Ok(String::from_utf8(run(&mut command)?.stdout)?)
    }
}

#[test]
fn what_skopeo_pushed_comes_back_byte_for_byte_also_after_a_restart() -> Result<()> {
    let directory = tempfile::tempdir()?;
    let (source, there) = layout(directory.path())?;
    let storage = directory.path().join("storage");
    let registry = Registry::start(&storage)?;
    let name = registry.name("team/app:v1");
    skopeo(&["copy", "--dest-tls-verify=false", &source, &format!("docker://{name}")])?;
    registry.stop()?;
    let registry = Registry::start(&storage)?;
    let back = pull_with_skopeo(&registry.name("team/app:v1"), &directory.path().join("back"))?;
    ensure!(back == blobs(&there)?, "other blobs came back");
    registry.stop()
}

#[test]
fn any_client_pulls_what_lamina_pushed() -> Result<()> {
    let directory = tempfile::tempdir()?;
    let (source, _) = layout(directory.path())?;
    let registry = Registry::start(&directory.path().join("storage"))?;
    let name = registry.name("team/app:v1");
    run(lamina().args(["push", &source, &name]))?;

    let back = pull_with_skopeo(&name, &directory.path().join("back"))?;
    let image = image();
    for layer in image.layers() {
        let tar = layer.tar();
        ensure!(back.values().any(|blob| *blob == tar), "a layer of {} bytes did not come back", tar.len());
    }
    let config = skopeo(&["inspect", "--config", "--raw", &source])?;
    ensure!(back.values().any(|blob| *blob == config), "the config changed");

    let id = pull_with_podman(&name, &directory.path().join("podman"))?;
    ensure!(back.contains_key(&id), "podman's image ID {id} is not the config's digest");

    let containerd = directory.path().join("containerd");
    std::fs::create_dir(&containerd)?;
    let containerd = Containerd::start(&containerd)?;
    containerd.ctr(&["images", "pull", "--plain-http", "--snapshotter", "native", &name])?;
    let pushed = registry.name("team/app:from-containerd");
    containerd.ctr(&["images", "push", "--plain-http", &pushed, &name])?;
    let again = pull_with_skopeo(&pushed, &directory.path().join("again"))?;
    ensure!(again == back, "containerd pushed other blobs");
    registry.stop()
}

#[test]
fn containerd_pulls_and_pushes_an_ordinary_image() -> Result<()> {
    let directory = tempfile::tempdir()?;
    let (source, there) = layout(directory.path())?;
    let registry = Registry::start(&directory.path().join("storage"))?;
    let name = registry.name("team/app:v1");
    skopeo(&["copy", "--dest-tls-verify=false", &source, &format!("docker://{name}")])?;
    let containerd = directory.path().join("containerd");
    std::fs::create_dir(&containerd)?;
    let containerd = Containerd::start(&containerd)?;
    containerd.ctr(&["images", "pull", "--plain-http", "--snapshotter", "native", &name])?;
    let pushed = registry.name("other/app:v1");
    containerd.ctr(&["images", "push", "--plain-http", &pushed, &name])?;
    let back = pull_with_skopeo(&pushed, &directory.path().join("back"))?;
    ensure!(back == blobs(&there)?, "containerd pushed other blobs");
    registry.stop()
}

#[test]
fn the_second_push_sends_next_to_nothing_and_reads_no_layer() -> Result<()> {
    let directory = tempfile::tempdir()?;
    let (source, _) = layout(directory.path())?;
    let registry = Registry::start(&directory.path().join("storage"))?;
    let push = |tag: &str| -> Result<serde_json::Value> {
        let output = run(lamina().args(["push", "--json", &source, &registry.name(tag)]))?;
        Ok(serde_json::from_slice(&output.stdout)?)
    };
    let first = push("app:v1")?;
    ensure!(first["sent_bytes"].as_u64().is_some_and(|sent| sent > 3_000_000), "{first}");
    let second = push("app:v2")?;
    ensure!(second["layers_known"] == 2 && second["read_bytes"] == 0, "{second}");
    ensure!(second["sent_bytes"].as_u64().is_some_and(|sent| sent < 10_000), "{second}");
    registry.stop()
}

#[test]
fn clients_that_go_away_in_the_middle_of_a_blob_do_not_end_the_registry() -> Result<()> {
    let directory = tempfile::tempdir()?;
    let registry = Registry::start(&directory.path().join("storage"))?;
    let bytes = noise(16_000_000, 1);
    let digest = lamina_image::Digest::of(&bytes);
    let send = |head: String, body: &[u8]| -> Result<std::net::TcpStream> {
        let mut stream = std::net::TcpStream::connect(&registry.address)?;
        stream.write_all(
            format!("{head} HTTP/1.1\r\nhost: x\r\ncontent-length: {}\r\n\r\n", body.len()).as_bytes(),
        )?;
        stream.write_all(body)?;
        Ok(stream)
    };
    let mut answer = [0; 12];
    send(format!("POST /v2/a/blobs/uploads/?digest={digest}"), &bytes)?.read_exact(&mut answer)?;
    ensure!(answer == *b"HTTP/1.1 201", "{}", String::from_utf8_lossy(&answer));
    for _ in 0..50 {
        let mut stream = send(format!("GET /v2/a/blobs/{digest}"), b"")?;
        stream.read_exact(&mut [0; 100_000])?;
    }
    send("GET /v2/".to_owned(), b"")?.read_exact(&mut answer)?;
    ensure!(answer == *b"HTTP/1.1 200", "{}", String::from_utf8_lossy(&answer));
    registry.stop()
}

#[test]
fn a_second_registry_on_the_same_storage_says_why_it_does_not_start() -> Result<()> {
    let directory = tempfile::tempdir()?;
    let registry = Registry::start(directory.path())?;
    let mut command = lamina();
    command.args(["registry", "--listen", "127.0.0.1:0", "--storage"]).arg(directory.path());
    let second = command.output()?;
    let said = String::from_utf8_lossy(&second.stderr);
    ensure!(!second.status.success() && said.contains("another registry"), "{said}");
    registry.stop()
}
