//! The registry beside nginx and Debian's docker-registry, on loopback, in one run.
//!
//! ```text
//! cargo bench --bench registry [-- --image oci:DIR:TAG] [--rounds 3] [--seconds 10]
//! cargo bench --bench registry -- --twenty DIR [--json FILE]
//! ```
//!
//! Serving: `wrk` reads one blob of 64 MiB, whole and in ranges of 1 MiB at random, over 64 connections, from a warm page
//! cache; nginx serves the very same file. Pushing, where an image is given: `skopeo copy` of it into both registries in
//! turn, and how long after it the image can be mounted lazily. Needs wrk, nginx, skopeo and docker-registry, which
//! `scripts/setup bench` installs. Exits with 1 where a limit is not held.
//!
//! Keeping: with `--twenty` only what twenty builds of one application take (`twenty.rs`).

mod servers;
mod twenty;

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use clap::Parser;
use lamina_image::Digest;
use lamina_testkit::noise;
use lamina_testkit::process::{Process, run};

use self::servers::{Lamina, docker_registry, free_port, mountable, push};

/// No single step takes longer.
const DEADLINE: Duration = Duration::from_secs(900);
const BLOB_BYTES: usize = 64 << 20;
/// The least share of nginx's throughput.
const SHARE_MIN: f64 = 0.8;
/// The most memory of the registry while it serves, in MiB.
const SERVING_MIB_MAX: u64 = 200;
/// The most that a push may take, in times of docker-registry's.
const PUSH_MAX: f64 = 1.15;
/// The most that an image may take to be mountable after its push, in seconds.
const MOUNTABLE_MAX: f64 = 45.0;

#[derive(Parser)]
struct Arguments {
    /// An image to push: oci:DIR:TAG
    #[arg(long)]
    image: Option<String>,
    /// Only see what twenty builds take, upon the image that scripts/small-image has made here
    #[arg(long, value_name = "DIR", conflicts_with = "image")]
    twenty: Option<PathBuf>,
    /// Write what was measured there as JSON
    #[arg(long, value_name = "FILE", requires = "twenty")]
    json: Option<PathBuf>,
    /// How often each is measured; medians are compared
    #[arg(long, default_value_t = 3)]
    rounds: usize,
    /// How long wrk reads each time
    #[arg(long, default_value_t = 10)]
    seconds: u32,
    /// The program to measure
    #[arg(long, default_value = env!("CARGO_BIN_EXE_lamina"))]
    lamina: PathBuf,
    /// Where everything is kept meanwhile [default: the system's temporary directory]
    #[arg(long)]
    scratch: Option<PathBuf>,
    /// cargo says so
    #[arg(long, hide = true)]
    bench: bool,
}

/// nginx, whose workers end only where its master is asked to.
struct Nginx(Option<Process>);

impl Drop for Nginx {
    fn drop(&mut self) {
        if let Some(process) = self.0.take() {
            // it is killed where it does not end
            let _ = process.stop(Duration::from_secs(10));
        }
    }
}

fn nginx(directory: &Path, root: &Path) -> Result<(Nginx, SocketAddr)> {
    let address = free_port()?;
    let at = |name: &str| directory.join(name).display().to_string();
    let text = format!(
        "daemon off; worker_processes auto; pid {}; error_log {};\nevents {{ worker_connections 1024; }}\n\
         http {{ access_log off; sendfile on; tcp_nopush on; tcp_nodelay on; keepalive_requests 1000000;\n\
         client_body_temp_path {b}; proxy_temp_path {b}; fastcgi_temp_path {b}; uwsgi_temp_path {b}; scgi_temp_path {b};\n\
         server {{ listen {address}; root {}; }} }}\n",
        at("nginx.pid"),
        at("nginx.log"),
        root.display(),
        b = at("nginx.tmp"),
    );
    std::fs::write(directory.join("nginx.conf"), text)?;
    let mut command = Command::new("nginx");
    command.arg("-c").arg(directory.join("nginx.conf")).args(["-e", &at("nginx.log"), "-p"]).arg(directory);
    // its workers read what only root may
    command.args(["-g", "user root;"]);
    let mut process = Process::spawn("nginx", &mut command)?;
    process.wait_port(address, DEADLINE)?;
    Ok((Nginx(Some(process)), address))
}

/// What wrk measured, in MiB a second.
fn wrk(url: &str, script: Option<&Path>, seconds: u32) -> Result<f64> {
    let mut command = Command::new("wrk");
    command.args(["-t2", "-c64", "--timeout", "30s", &format!("-d{seconds}s")]);
    if let Some(script) = script {
        command.arg("-s").arg(script);
    }
    let said = String::from_utf8(run(command.arg(url))?.stdout)?;
    ensure!(!said.contains("Non-2xx"), "{said}");
    let rate =
        said.lines().find_map(|line| line.trim().strip_prefix("Transfer/sec:")).context(said.clone())?.trim();
    let unit = rate.trim_start_matches(|sign: char| sign.is_ascii_digit() || sign == '.');
    let number: f64 = rate.trim_end_matches(char::is_alphabetic).parse()?;
    Ok(number
        * match unit {
            "GB" => 1024.0,
            "MB" => 1.0,
            "KB" => 1.0 / 1024.0,
            other => anyhow::bail!("unit {other}"),
        })
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

/// Compares serving with nginx. True where the limits are held.
fn serving(arguments: &Arguments, scratch: &Path) -> Result<bool> {
    let storage = scratch.join("serving");
    let bytes = noise(BLOB_BYTES, 1);
    let digest = Digest::of(&bytes);
    let file = scratch.join("blob");
    std::fs::write(&file, &bytes)?;
    let lamina = Lamina::start(&arguments.lamina, &storage)?;
    let upload = format!("http://{}/v2/a/blobs/uploads/?digest={digest}", lamina.address);
    run(Command::new("curl")
        .args(["-sf", "-X", "POST", "--data-binary"])
        .arg(format!("@{}", file.display()))
        .arg(upload))?;
    drop(lamina);
    // with no memory of the upload
    let lamina = Lamina::start(&arguments.lamina, &storage)?;
    let root = storage.join("objects/blobs/sha256");
    let (_nginx, address) = nginx(scratch, &root)?;
    let script = scratch.join("ranges.lua");
    let lua = format!(
        "function request() local at = math.random(0, {}) * 1048576\n\
         return wrk.format(\"GET\", nil, {{ Range = \"bytes=\" .. at .. \"-\" .. at + 1048575 }}) end\n",
        (BLOB_BYTES >> 20) - 1
    );
    std::fs::write(&script, lua)?;
    let ours = format!("http://{}/v2/a/blobs/{digest}", lamina.address);
    let theirs = format!("http://{address}/{}", digest.hex());
    let mut held = true;
    for (what, script) in [("64 MiB blob", None), ("1 MiB ranges", Some(script.as_path()))] {
        let (mut lamina_rates, mut nginx_rates) = (Vec::new(), Vec::new());
        for _ in 0..arguments.rounds {
            nginx_rates.push(wrk(&theirs, script, arguments.seconds)?);
            lamina_rates.push(wrk(&ours, script, arguments.seconds)?);
        }
        let (lamina, nginx) = (median(lamina_rates), median(nginx_rates));
        println!(
            "{what:<13} lamina {lamina:>6.0} MiB/s, nginx {nginx:>6.0} MiB/s, {:.2} of it",
            lamina / nginx
        );
        held &= lamina / nginx >= SHARE_MIN;
    }
    let peak = lamina.peak_mib()?;
    println!("memory        {peak} MiB at most");
    Ok(held && peak <= SERVING_MIB_MAX)
}

/// Compares pushing with docker-registry. True where the limits are held.
fn pushing(arguments: &Arguments, image: &str, scratch: &Path) -> Result<bool> {
    let (mut ours, mut theirs, mut waits) = (Vec::new(), Vec::new(), Vec::new());
    for round in 0..arguments.rounds {
        let directory = scratch.join(format!("push-{round}"));
        std::fs::create_dir_all(&directory)?;
        let (process, address) = docker_registry(&directory)?;
        theirs.push(push(image, address, "t")?);
        drop(process);
        run(Command::new("rm").arg("-rf").arg(directory.join("docker")))?;
        let lamina = Lamina::start(&arguments.lamina, &directory.join("lamina"))?;
        ours.push(push(image, lamina.address, "t")?);
        waits.push(mountable(lamina.address, "t")?);
        println!(
            "push          lamina {:.1} s, mountable {:.1} s after it, {} MiB at most; docker-registry {:.1} s",
            ours[round],
            waits[round],
            lamina.peak_mib()?,
            theirs[round]
        );
        drop(lamina);
        run(Command::new("rm").arg("-rf").arg(directory))?;
    }
    let (share, wait) = (median(ours) / median(theirs), median(waits));
    println!("push          {share:.2} of docker-registry's time, mountable {wait:.1} s after it (medians)");
    Ok(share <= PUSH_MAX && wait <= MOUNTABLE_MAX)
}

fn main() -> Result<ExitCode> {
    let arguments = Arguments::parse();
    let scratch = match &arguments.scratch {
        Some(directory) => tempfile::tempdir_in(directory)?,
        None => tempfile::tempdir()?,
    };
    if let Some(made) = &arguments.twenty {
        twenty::measure(&arguments.lamina, made, scratch.path(), arguments.json.as_deref())?;
        return Ok(ExitCode::SUCCESS);
    }
    let mut held = serving(&arguments, scratch.path())?;
    if let Some(image) = &arguments.image {
        held &= pushing(&arguments, image, scratch.path())?;
    }
    Ok(if held { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}
