//! A registry that wants to know who is there, behind TLS of a private authority.

use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Result, ensure};
use lamina_testkit::image::Image;
use lamina_testkit::noise;
use lamina_testkit::process::{Process, run, until};

use crate::docker_registry::DockerRegistry;
use crate::rig::{DEADLINE, Rig, text};

/// `alice` and `secret`, by bcrypt.
const HTPASSWD: &str = "alice:$2b$05$xwugU7Y2yEN0A9Hdu6PhIO7upbuPROJSi6Mf6mzmXWQVTNXxZ8bdG\n";
/// The base64 of `alice:secret` and `alice:wrong`.
pub(crate) const GOOD: &str = "YWxpY2U6c2VjcmV0";
pub(crate) const WRONG: &str = "YWxpY2U6d3Jvbmc=";

fn openssl(directory: &Path, arguments: &str) -> Result<()> {
    run(Command::new("openssl").args(arguments.split(' ')).current_dir(directory)).map(drop)
}

/// An authority `ca.crt`, and `server.crt` and `client.crt` that it has signed, each with its `.key`.
fn certificates(directory: &Path) -> Result<()> {
    std::fs::create_dir_all(directory)?;
    let key = "-newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes";
    openssl(directory, &format!("req -x509 {key} -keyout ca.key -out ca.crt -days 2 -subj /CN=authority"))?;
    let names = "subjectAltName=IP:127.0.0.1,IP:0.0.0.0,DNS:localhost\n";
    for (name, extensions) in [("server", names), ("client", "extendedKeyUsage=clientAuth\n")] {
        std::fs::write(directory.join("extensions"), extensions)?;
        openssl(directory, &format!("req -new {key} -keyout {name}.key -out {name}.csr -subj /CN={name}"))?;
        openssl(
            directory,
            &format!(
                "x509 -req -in {name}.csr -CA ca.crt -CAkey ca.key -CAcreateserial -out {name}.crt -days 2 -extfile extensions"
            ),
        )?;
    }
    Ok(())
}

/// A registry with TLS, for `alice` only; with `clients`, for clients with a certificate only.
pub(crate) fn guarded(rig: &Rig, clients: bool) -> Result<(DockerRegistry, PathBuf)> {
    let certs = rig.path("certs");
    certificates(&certs)?;
    std::fs::write(certs.join("htpasswd"), HTPASSWD)?;
    let path = |name: &str| certs.join(name).display().to_string();
    let mut more =
        format!("  tls:\n    certificate: {}\n    key: {}\n", path("server.crt"), path("server.key"));
    if clients {
        more += &format!("    clientcas:\n      - {}\n", path("ca.crt"));
    }
    more += &format!("auth:\n  htpasswd:\n    realm: r\n    path: {}\n", path("htpasswd"));
    Ok((DockerRegistry::start(&rig.path("home"), &more)?, certs))
}

fn write(path: &Path, text: &str) -> Result<String> {
    std::fs::create_dir_all(path.parent().expect("it has one"))?;
    std::fs::write(path, text)?;
    Ok(path.display().to_string())
}

pub(crate) fn auth_file(rig: &Rig, name: &str, host: &str, auth: &str) -> Result<String> {
    write(&rig.path(name), &format!(r#"{{"auths":{{"{host}":{{"auth":"{auth}"}}}}}}"#))
}

pub(crate) fn small(rig: &Rig) -> Result<String> {
    rig.layout("layout", &Image::new().layer(|layer| layer.file("f", noise(200_000, 1)).gzip()))
}

#[test]
fn a_login_of_docker_and_a_private_authority_are_enough_to_push_and_mount() -> Result<()> {
    let rig = Rig::new()?;
    let (home, certs) = guarded(&rig, false)?;
    let (source, name, ca) = (small(&rig)?, home.name("a:t"), text(&certs.join("ca.crt")));
    let good = auth_file(&rig, "good.json", &home.address, GOOD)?;
    let access = ["--ca", &ca, "--auth-file", &good];
    rig.ok(&[&["push", &source, &name], &access[..]].concat())?;
    let mounted = text(&rig.path("mount"));
    rig.ok(&[&["mount", &name, &mounted], &access[..]].concat())?;
    ensure!(std::fs::read(rig.path("mount/f"))? == noise(200_000, 1));
    rig.unmount()
}

#[test]
fn what_keeps_a_client_out_is_said_with_the_url_and_where_the_credential_came_from() -> Result<()> {
    let rig = Rig::new()?;
    let (home, certs) = guarded(&rig, false)?;
    let (name, ca, url) =
        (home.name("a:t"), text(&certs.join("ca.crt")), format!("https://{}", home.address));
    let inspect = |more: &[&str]| rig.fails(&[&["inspect", &name], more].concat());
    let absent = text(&rig.path("absent.json"));
    let wrong = auth_file(&rig, "wrong.json", &home.address, WRONG)?;
    let broken = write(&rig.path("broken.json"), "{")?;
    let helped = write(&rig.path("helped.json"), r#"{"credsStore":"that-does-not-exist"}"#)?;
    for (more, expected) in [
        (
            &["--ca", &ca, "--auth-file", &absent][..],
            &[url.as_str(), "401", "no credential", "absent.json"][..],
        ),
        (&["--ca", &ca, "--auth-file", &wrong], &[&url, "401", "\"alice\"", "wrong.json"]),
        (&["--ca", &ca, "--auth-file", &broken], &["broken.json", "not an auth file"]),
        (&["--ca", &ca, "--auth-file", &helped], &["docker-credential-that-does-not-exist", "helped.json"]),
        (&["--ca", &absent], &["absent.json", "certificate"]),
        (&["--ca", "/dev/null"], &["no certificate in /dev/null"]),
    ] {
        let said = inspect(more)?;
        ensure!(expected.iter().all(|part| said.contains(part)), "{more:?}: {said}");
        ensure!(!said.contains("secret") && !said.contains(WRONG), "{said}");
    }
    // trusted by nobody, where TLS is spoken at all
    let hosts = rig.path("hosts");
    write(&hosts.join(&home.address).join("hosts.toml"), "")?;
    let said = inspect(&["--hosts-dir", &text(&hosts)])?;
    ensure!(said.contains("--ca") && said.contains(&url), "{said}");
    // a registry that speaks no TLS is not asked in the clear
    let plain = rig.fails(&["inspect", &rig.name("a:t"), "--ca", &ca])?;
    ensure!(plain.contains("answers no TLS") && plain.contains("--plain-http"), "{plain}");
    Ok(())
}

#[test]
fn a_hosts_toml_of_containerd_brings_the_authority_and_the_client_certificate() -> Result<()> {
    let rig = Rig::new()?;
    let (home, certs) = guarded(&rig, true)?;
    let (source, name) = (small(&rig)?, home.name("a:t"));
    let good = auth_file(&rig, "good.json", &home.address, GOOD)?;
    let hosts = rig.path("hosts");
    let toml = |client: &str| {
        let ca = text(&certs.join("ca.crt"));
        write(&hosts.join(&home.address).join("hosts.toml"), &format!("ca = \"{ca}\"\n{client}"))
    };
    let access = ["--hosts-dir", &text(&hosts), "--auth-file", &good];
    toml("")?;
    let said = rig.fails(&[&["push", &source, &name], &access[..]].concat())?;
    ensure!(said.contains("ertificate"), "{said}");
    let (certificate, key) = (text(&certs.join("client.crt")), text(&certs.join("client.key")));
    toml(&format!("client = [[\"{certificate}\", \"{key}\"]]\n"))?;
    rig.ok(&[&["push", &source, &name], &access[..]].concat())?;
    let mounted = text(&rig.path("mount"));
    rig.ok(&[&["mount", &name, &mounted], &access[..]].concat())?;
    ensure!(std::fs::read(rig.path("mount/f"))? == noise(200_000, 1));
    rig.unmount()
}

#[test]
fn credentials_are_found_where_docker_and_podman_keep_them() -> Result<()> {
    let rig = Rig::new()?;
    let (home, certs) = guarded(&rig, false)?;
    let (source, name) = (small(&rig)?, home.name("a:t"));
    let place = |name: &str| auth_file(&rig, name, &home.address, GOOD);
    let [docker, runtime, config, user, file] = [
        "docker/config.json",
        "runtime/containers/auth.json",
        "config/containers/auth.json",
        "user/.docker/config.json",
        "file.json",
    ];
    for name in [docker, runtime, config, user, file] {
        place(name)?;
    }
    let helper = rig.path("bin/docker-credential-test");
    write(
        &helper,
        "#!/bin/sh\nread host\n[ \"$1\" = get ] && echo '{\"ServerURL\":\"'$host'\",\"Username\":\"alice\",\"Secret\":\"secret\"}'\n",
    )?;
    std::fs::set_permissions(&helper, std::fs::Permissions::from_mode(0o755))?;
    write(&rig.path("helped/config.json"), &format!(r#"{{"credHelpers":{{"{}":"test"}}}}"#, home.address))?;
    for (variable, value) in [
        ("DOCKER_CONFIG", "docker"),
        ("XDG_RUNTIME_DIR", "runtime"),
        ("XDG_CONFIG_HOME", "config"),
        ("HOME", "user"),
        ("REGISTRY_AUTH_FILE", "file.json"),
        ("DOCKER_CONFIG", "helped"),
    ] {
        let mut command = Command::new(env!("CARGO_BIN_EXE_lamina"));
        let found = std::env::var_os("PATH").unwrap_or_default().into_string().unwrap_or_default();
        command.args(["push", &source, &name, "--ca"]).arg(certs.join("ca.crt"));
        command
            .env_clear()
            .env("PATH", format!("{}:{found}", text(&rig.path("bin"))))
            .env("HOME", "/nonexistent");
        run(command.env(variable, rig.path(value))).map_err(|error| error.context(variable))?;
    }
    Ok(())
}

#[test]
fn a_login_that_comes_while_an_image_is_mounted_counts_from_then_on() -> Result<()> {
    let rig = Rig::new()?;
    let (home, certs) = guarded(&rig, false)?;
    let (source, name, ca) = (small(&rig)?, home.name("a:t"), text(&certs.join("ca.crt")));
    let file = auth_file(&rig, "login.json", &home.address, GOOD)?;
    let access = ["--ca", &ca, "--auth-file", &file];
    rig.ok(&[&["push", &source, &name], &access[..]].concat())?;
    let mounted = text(&rig.path("mount"));
    rig.ok(&[&["mount", "--no-boot", "--no-trace", &name, &mounted], &access[..]].concat())?;
    // logged out and in again: the daemon reads the file when it is asked who it is
    auth_file(&rig, "login.json", &home.address, WRONG)?;
    let other = text(&rig.path("scratch"));
    let said = rig.fails(&["mount", &home.name("a:other"), &other])?;
    ensure!(said.contains(&home.address), "{said}");
    auth_file(&rig, "login.json", &home.address, GOOD)?;
    ensure!(std::fs::read(rig.path("mount/f"))? == noise(200_000, 1));
    rig.unmount()
}

#[test]
fn a_proxy_is_used_for_what_is_not_here_and_not_for_what_no_proxy_names() -> Result<()> {
    let rig = Rig::new()?;
    let (home, certs) = guarded(&rig, false)?;
    let port = home.address.rsplit(':').next().unwrap_or_default().to_owned();
    // an address of this machine that is not a loopback address by its look
    let name = format!("0.0.0.0:{port}/a:t");
    let good = auth_file(&rig, "good.json", &format!("0.0.0.0:{port}"), GOOD)?;
    let proxy_port = std::net::TcpListener::bind("127.0.0.1:0")?.local_addr()?.port();
    let log = rig.path("proxy.log");
    let config = write(
        &rig.path("tinyproxy.conf"),
        &format!(
            "Port {proxy_port}\nListen 127.0.0.1\nTimeout 60\nMaxClients 20\nConnectPort {port}\nBasicAuth bob hush\nLogFile \"{}\"\n",
            log.display()
        ),
    )?;
    let mut command = Command::new("tinyproxy");
    let mut proxy = Process::spawn("tinyproxy", command.args(["-d", "-c", &config]))?;
    proxy.wait_port(([127, 0, 0, 1], proxy_port).into(), DEADLINE)?;
    let source = small(&rig)?;
    let push = |proxy: &str, no_proxy: &str| -> Result<String> {
        let mut command = Command::new(env!("CARGO_BIN_EXE_lamina"));
        command.args(["push", &source, &name, "--auth-file", &good, "--ca"]).arg(certs.join("ca.crt"));
        command.env("HTTPS_PROXY", proxy).env("NO_PROXY", no_proxy);
        Ok(match run(&mut command) {
            Ok(_) => String::new(),
            Err(error) => error.to_string(),
        })
    };
    let through = format!("http://bob:hush@127.0.0.1:{proxy_port}");
    ensure!(push(&through, "")?.is_empty());
    until("the proxy to have seen it", DEADLINE, || {
        Ok(std::fs::read_to_string(&log)?.contains(&format!("CONNECT 0.0.0.0:{port}")).then_some(()))
    })?;
    let nobody = "http://127.0.0.1:1";
    let said = push(nobody, "")?;
    ensure!(said.contains("through the proxy http://127.0.0.1:1"), "{said}");
    ensure!(push(nobody, "other.example,0.0.0.0")?.is_empty(), "NO_PROXY");
    Ok(())
}
