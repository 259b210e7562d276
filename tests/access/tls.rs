//! TLS on the registry.

use std::path::Path;
use std::process::Command;

use anyhow::{Result, ensure};
use lamina_testkit::noise;
use lamina_testkit::process::{run, until};

use crate::guarded::{Guarded, RULES, small};
use crate::rig::{DEADLINE, Rig, text};

/// A certificate `<name>.crt` for loopback that it has signed itself, and its key.
fn certificate(directory: &Path, name: &str, subject: &str) -> Result<()> {
    let arguments = "req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 2 -addext subjectAltName=IP:127.0.0.1 -addext basicConstraints=critical,CA:FALSE";
    let mut openssl = Command::new("openssl");
    openssl.args(arguments.split(' ')).args(["-subj", &format!("/CN={subject}")]);
    openssl.args(["-keyout", &format!("{name}.key"), "-out", &format!("{name}.crt")]);
    run(openssl.current_dir(directory)).map(drop)
}

/// What a client is shown.
fn subject(address: &str) -> Result<String> {
    let script =
        format!("openssl s_client -connect {address} </dev/null 2>/dev/null | openssl x509 -noout -subject");
    Ok(String::from_utf8(run(Command::new("sh").args(["-c", &script]))?.stdout)?)
}

#[test]
fn images_are_pushed_and_mounted_by_tls_and_a_renewed_certificate_is_shown_without_a_restart() -> Result<()> {
    let scratch = tempfile::tempdir()?;
    certificate(scratch.path(), "server", "first")?;
    certificate(scratch.path(), "next", "second")?;
    let path = |name: &str| text(&scratch.path().join(name));
    let guarded =
        Guarded::start(RULES, &["--tls-cert", &path("server.crt"), "--tls-key", &path("server.key")])?;
    let (name, source) = (guarded.name("team/open:t"), small(&guarded.rig, 1)?);
    guarded.lamina("alice", &["push", &source, &name, "--ca", &path("server.crt")])?;
    let mounted = text(&guarded.rig.path("mount"));
    guarded.lamina("bob", &["mount", &name, &mounted, "--ca", &path("server.crt")])?;
    ensure!(std::fs::read(guarded.rig.path("mount/f"))? == noise(400_000, 1));
    guarded.rig.unmount()?;
    ensure!(subject(&guarded.address)?.contains("first"));

    // half of a renewal changes nothing, the whole of it does
    std::fs::copy(scratch.path().join("next.key"), scratch.path().join("server.key"))?;
    std::fs::copy(scratch.path().join("next.crt"), scratch.path().join("server.crt"))?;
    until("the next certificate", DEADLINE, || {
        Ok(subject(&guarded.address)?.contains("second").then_some(()))
    })?;
    guarded.lamina("bob", &["inspect", &name, "--ca", &path("next.crt")])?;

    // plain HTTP to it, and silence, end without an answer, and hold nobody up
    let plain =
        Command::new("curl").args(["-s", "-m", "20", &format!("http://{}/v2/", guarded.address)]).status()?;
    ensure!(!plain.success());
    guarded.lamina("bob", &["inspect", &name, "--ca", &path("next.crt")]).map(drop)
}

#[test]
fn a_certificate_that_cannot_be_used_is_named() -> Result<()> {
    let rig = Rig::new()?;
    let scratch = tempfile::tempdir()?;
    certificate(scratch.path(), "one", "one")?;
    certificate(scratch.path(), "two", "two")?;
    let path = |name: &str| text(&scratch.path().join(name));
    let storage = text(&rig.path("other"));
    for (certificate, key) in
        [("one.crt", "absent"), ("absent", "one.key"), ("one.key", "one.key"), ("one.crt", "two.key")]
    {
        let said = rig.fails(&[
            "registry",
            "--listen",
            "127.0.0.1:0",
            "--storage",
            &storage,
            "--tls-cert",
            &path(certificate),
            "--tls-key",
            &path(key),
        ])?;
        ensure!(said.contains(&path(certificate)) || said.contains(&path(key)), "{said}");
    }
    let said = rig.fails(&["registry", "--listen", "0.0.0.0:0", "--storage", &storage])?;
    ensure!(said.contains("--tls-cert") && said.contains("--plain-http"), "{said}");
    Ok(())
}
