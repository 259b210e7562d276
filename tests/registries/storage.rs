//! A registry whose storage is slow and refuses: its clients get what is right, or hear what is wrong.

use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use lamina_testkit::image::Image;
use lamina_testkit::noise;
use lamina_testkit::process::{Process, run, until};
use lamina_testkit::s3::S3;

use crate::rig::{DEADLINE, Rig, skopeo};
use crate::server::{Server, is_whole};

/// A registry over a bucket, with whatever else a test needs.
fn start() -> Result<(S3, Server, Rig)> {
    let (s3, mut rig) = (S3::start()?, Rig::new()?);
    let server = Server::start(&s3, &rig.path("index"))?;
    rig.address.clone_from(&server.address);
    Ok((s3, server, rig))
}

fn status(server: &Server, path: &str) -> Result<String> {
    let url = format!("http://{}{path}", server.address);
    let answer = run(Command::new("curl").args(["-s", "-o", "/dev/null", "-w", "%{http_code}", &url]))?;
    Ok(String::from_utf8(answer.stdout)?)
}

#[test]
fn over_storage_that_is_slow_and_refuses_every_fifth_request_pushes_and_pulls_end_right() -> Result<()> {
    let (s3, server, rig) = start()?;
    s3.refuse_every(5);
    s3.answer_late(Duration::from_millis(5));
    let image =
        Image::new().layer(|l| l.file("f", noise(9_000_000, 1)).gzip()).layer(|l| l.file("g", "hi").plain());
    let source = rig.layout("layout", &image)?;
    rig.ok(&["push", &source, &rig.name("a:ours")])?;
    let name = format!("docker://{}", rig.name("a:theirs"));
    skopeo(&["copy", "-q", "--preserve-digests", "--dest-tls-verify=false", &source, &name])?;
    rig.converted("a:theirs")?;
    let back = rig.path("back");
    let target = format!("oci:{}:t", back.display());
    skopeo(&["copy", "-q", "--preserve-digests", "--src-tls-verify=false", &name, &target])?;
    for blob in std::fs::read_dir(rig.path("layout/blobs/sha256"))? {
        let blob = blob?;
        let pulled = std::fs::read(back.join("blobs/sha256").join(blob.file_name()))?;
        ensure!(pulled == std::fs::read(blob.path())?, "{} came back as other bytes", blob.path().display());
    }
    for name in ["a:ours", "a:theirs"] {
        let mounted = rig.mount_plain(name)?;
        ensure!(std::fs::read(mounted.join("f"))? == noise(9_000_000, 1), "{name} reads as other bytes");
        rig.unmount()?;
    }
    s3.refuse_every(0);
    is_whole(&s3)?;
    server.stop()
}

#[test]
fn a_push_outlasts_an_outage_of_the_storage_which_the_registry_tells_who_asks() -> Result<()> {
    let (s3, server, rig) = start()?;
    let source = rig.layout("layout", &Image::new().layer(|l| l.file("f", noise(9_000_000, 1)).gzip()))?;
    s3.refuse_every(1);
    let mut command = Command::new(env!("CARGO_BIN_EXE_lamina"));
    let (name, before) = (rig.name("a:t"), s3.requests());
    let mut push = Process::spawn("push", command.args(["push", &source, &name]))?;
    until("requests to be refused", DEADLINE, || Ok((s3.requests() > before + 3).then_some(())))?;
    ensure!(status(&server, "/readyz")? == "503" && status(&server, "/healthz")? == "200");
    s3.refuse_every(0);
    let ended = push.wait(DEADLINE)?;
    ensure!(ended.success(), "the push ended with {ended}");
    ensure!(status(&server, "/readyz")? == "200");
    let mounted = rig.mount_plain("a:t").context("mount")?;
    ensure!(std::fs::read(mounted.join("f"))? == noise(9_000_000, 1));
    rig.unmount()?;
    is_whole(&s3)?;
    server.stop()
}
