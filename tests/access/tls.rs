//! TLS on the registry.

use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result, ensure};
use lamina_testkit::noise;
use lamina_testkit::process::{Process, run, until};

use crate::guarded::{Guarded, RULES, small};
use crate::rig::{DEADLINE, Rig, skopeo, text};

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

#[test]
fn a_new_certificate_that_cannot_be_used_changes_nothing_and_is_named_in_the_log() -> Result<()> {
    let rig = Rig::new()?;
    let scratch = tempfile::tempdir()?;
    certificate(scratch.path(), "server", "first")?;
    certificate(scratch.path(), "next", "second")?;
    let path = |name: &str| text(&scratch.path().join(name));
    let mut command = Command::new(env!("CARGO_BIN_EXE_lamina"));
    command.args(["registry", "--listen", "127.0.0.1:0", "--storage"]).arg(rig.path("tls"));
    command.args(["--tls-cert", &path("server.crt"), "--tls-key", &path("server.key")]);
    command.stderr(std::fs::File::create(scratch.path().join("log"))?);
    let mut registry = Process::spawn("a registry with TLS", &mut command)?;
    let line = registry.wait_line("listening on ", DEADLINE)?;
    let address = line.rsplit('/').next().context("an address")?.to_owned();
    let name = format!("{address}/a:t");
    rig.ok(&["push", &small(&rig, 1)?, &name, "--ca", &path("server.crt")])?;

    // half a file, and then one of another key
    let half = std::fs::read(scratch.path().join("next.crt"))?;
    std::fs::copy(scratch.path().join("server.crt"), scratch.path().join("first.crt"))?;
    for (times, bad) in [(1, &half[..half.len() / 2]), (2, &half[..])] {
        std::fs::write(scratch.path().join("server.crt"), bad)?;
        until("a word about the certificate", DEADLINE, || {
            let log = std::fs::read_to_string(scratch.path().join("log"))?;
            let said = log.lines().filter(|line| line.contains("the certificate stays as it was"));
            let named = said.filter(|line| line.contains(&path("server.crt")));
            Ok((named.count() >= times).then_some(()))
        })?;
        ensure!(subject(&address)?.contains("first"));
        rig.ok(&["inspect", &name, "--ca", &path("first.crt")])?;
    }
    std::fs::copy(scratch.path().join("next.key"), scratch.path().join("server.key"))?;
    until("the next certificate", DEADLINE, || Ok(subject(&address)?.contains("second").then_some(())))?;
    rig.ok(&["inspect", &name, "--ca", &path("next.crt")]).map(drop)
}

/// `ca.crt` of an authority of its own, alone in the directory `ca`, and `server.crt` that it has signed.
fn authority(directory: &Path) -> Result<()> {
    let script = "mkdir ca
        openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 2 -subj /CN=ours -keyout ca.key -out ca/ca.crt
        openssl req -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -subj /CN=server -keyout server.key -out server.csr
        echo subjectAltName=IP:127.0.0.1 > names
        openssl x509 -req -in server.csr -CA ca/ca.crt -CAkey ca.key -CAcreateserial -days 2 -extfile names -out server.crt";
    run(Command::new("sh").args(["-e", "-c", script]).current_dir(directory)).map(drop)
}

#[test]
fn skopeo_and_podman_go_by_an_authority_of_ours_and_who_has_no_login_pulls_where_he_may() -> Result<()> {
    for anonymous in [true, false] {
        let scratch = tempfile::tempdir()?;
        authority(scratch.path())?;
        let path = |name: &str| text(&scratch.path().join(name));
        let access = format!("anonymous-pull = {anonymous}\n");
        let guarded =
            Guarded::start(&access, &["--tls-cert", &path("server.crt"), "--tls-key", &path("server.key")])?;
        let (source, ca) = (small(&guarded.rig, 1)?, path("ca"));
        let name = guarded.name("team/app:t");
        let docker = format!("docker://{name}");
        let push = ["copy", "-q", "--dest-creds", "alice:secret", &source, &docker];
        ensure!(skopeo(&push).is_err(), "nobody trusts this authority");
        skopeo(&[&push[..], &["--dest-cert-dir", &ca]].concat())?;
        let inspect = |who: &str| skopeo(&["inspect", who, "--cert-dir", &ca, &docker]);
        inspect("--creds=bob:secret")?;
        ensure!(inspect("--creds=bob:wrong").is_err());
        ensure!(inspect("--no-creds").is_ok() == anonymous, "anonymous-pull = {anonymous}");
        ensure!(
            skopeo(&["copy", "-q", "--dest-no-creds", "--dest-cert-dir", &ca, &source, &docker]).is_err()
        );

        std::fs::write(guarded.login("nobody"), "{}")?;
        let podman = |login: &[&str]| {
            let mut command = Command::new("podman");
            command
                .arg("--root")
                .arg(guarded.rig.path("podman"))
                .arg("--runroot")
                .arg(guarded.rig.path("run"));
            command.args(["--storage-driver", "vfs", "pull", "-q", "--cert-dir", &ca]).args(login).arg(&name);
            run(command.env("REGISTRY_AUTH_FILE", guarded.login("nobody")))
        };
        podman(&["--creds", "bob:secret"])?;
        ensure!(podman(&[]).is_ok() == anonymous, "anonymous-pull = {anonymous}");
        let said = guarded.rig.lamina(&["inspect", &name, "--ca", &path("ca/ca.crt")])?;
        ensure!(said.status.success() == anonymous, "anonymous-pull = {anonymous}: {said:?}");
    }
    Ok(())
}
