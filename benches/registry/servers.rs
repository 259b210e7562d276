//! The registries that are compared, and what is asked of both.

use std::io::Read;
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::path::Path;
use std::process::Command;
use std::time::Instant;

use anyhow::{Context, Result, ensure};
use lamina_testkit::process::{Process, run, until};

use crate::DEADLINE;

/// `lamina registry`.
pub(crate) struct Lamina {
    process: Process,
    pub(crate) address: SocketAddr,
}

impl Lamina {
    pub(crate) fn start(program: &Path, storage: &Path) -> Result<Self> {
        let mut command = Command::new(program);
        command.env_remove("LAMINA_CONFIG").args([
            "--log",
            "warn",
            "registry",
            "--listen",
            "127.0.0.1:0",
            "--storage",
        ]);
        let mut process = Process::spawn("registry", command.arg(storage))?;
        let line = process.wait_line("listening on ", DEADLINE)?;
        let address = line.rsplit('/').next().context("an address")?.parse()?;
        Ok(Self { process, address })
    }

    /// The most memory that it ever had, in MiB.
    pub(crate) fn peak_mib(&self) -> Result<u64> {
        let status =
            std::fs::read_to_string(format!("/proc/{}/status", self.process.pid().as_raw_nonzero()))?;
        let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).context("no VmHWM")?;
        Ok(line.trim().trim_end_matches(" kB").parse::<u64>()? >> 10)
    }
}

/// A port that nothing listens on now.
pub(crate) fn free_port() -> Result<SocketAddr> {
    Ok(TcpListener::bind("127.0.0.1:0")?.local_addr()?)
}

fn get(address: SocketAddr, path: &str) -> Result<String> {
    let mut stream = TcpStream::connect(address)?;
    std::io::Write::write_all(
        &mut stream,
        format!("GET {path} HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n").as_bytes(),
    )?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer)?;
    Ok(answer)
}

/// Debian's docker-registry, with its storage in `docker` of a directory.
pub(crate) fn docker_registry(directory: &Path) -> Result<(Process, SocketAddr)> {
    let address = free_port()?;
    let text = format!(
        "version: 0.1\nlog:\n  level: error\nstorage:\n  filesystem:\n    rootdirectory: {}\nhttp:\n  addr: {address}\n",
        directory.join("docker").display()
    );
    let config = directory.join("docker-registry.yml");
    std::fs::write(&config, text)?;
    let mut process =
        Process::spawn("docker-registry", Command::new("docker-registry").arg("serve").arg(config))?;
    process.wait_port(address, DEADLINE)?;
    Ok((process, address))
}

/// Pushes an image under a tag of the repository `a`, and gives the seconds that it took.
pub(crate) fn push(image: &str, address: SocketAddr, tag: &str) -> Result<f64> {
    let begun = Instant::now();
    run(Command::new("skopeo").args([
        "copy",
        "-q",
        "--dest-tls-verify=false",
        image,
        &format!("docker://{address}/a:{tag}"),
    ]))?;
    Ok(begun.elapsed().as_secs_f64())
}

/// Waits until the image under a tag has its tree, and gives the seconds.
pub(crate) fn mountable(address: SocketAddr, tag: &str) -> Result<f64> {
    let begun = Instant::now();
    let head = get(address, &format!("/v2/a/manifests/{tag}"))?;
    let digest = head
        .lines()
        .find_map(|line| line.strip_prefix("docker-content-digest: "))
        .context(head.clone())?
        .trim();
    until("the image to have its tree", DEADLINE, || {
        let status = get(address, &format!("/lamina/v1/a/images/{digest}"))?;
        ensure!(!status.contains("\"failed\""), "{status}");
        Ok(status.contains("\"done\"").then_some(()))
    })?;
    Ok(begun.elapsed().as_secs_f64())
}
