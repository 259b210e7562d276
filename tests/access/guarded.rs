//! Users, rules, tokens, guesses.

use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use lamina_testkit::image::Image;
use lamina_testkit::noise;
use lamina_testkit::process::{Process, run, until};
use serde_json::Value;

use crate::rig::{DEADLINE, Rig, skopeo, text};

/// All with the password `secret`.
const HASH: &str = "$2b$05$xwugU7Y2yEN0A9Hdu6PhIO7upbuPROJSi6Mf6mzmXWQVTNXxZ8bdG";
/// The base64 of `<user>:secret`.
const ALICE: &str = "YWxpY2U6c2VjcmV0";
const BOB: &str = "Ym9iOnNlY3JldA==";

pub(crate) struct Guarded {
    pub(crate) rig: Rig,
    pub(crate) address: String,
    _process: Process,
}

impl Guarded {
    /// A registry for `alice` and `bob`, with this in its table `[access]` and these arguments.
    pub(crate) fn start(access: &str, arguments: &[&str]) -> Result<Self> {
        let rig = Rig::new()?;
        std::fs::write(rig.path("htpasswd"), format!("alice:{HASH}\nbob:{HASH}\n"))?;
        std::fs::write(rig.path("registry.toml"), format!("[access]\nusers = \"htpasswd\"\n{access}"))?;
        let mut command = Command::new(env!("CARGO_BIN_EXE_lamina"));
        command.args(["registry", "--listen", "127.0.0.1:0", "--config"]).arg(rig.path("registry.toml"));
        command.arg("--storage").arg(rig.path("guarded")).args(arguments);
        let mut process = Process::spawn("a guarded registry", &mut command)?;
        let line = process.wait_line("listening on ", DEADLINE)?;
        let address = line.rsplit('/').next().context("an address")?.to_owned();
        for (user, auth) in [("alice", ALICE), ("bob", BOB)] {
            let file = format!(r#"{{"auths":{{"{address}":{{"auth":"{auth}"}}}}}}"#);
            std::fs::write(rig.path(&format!("{user}.json")), file)?;
        }
        Ok(Self { rig, address, _process: process })
    }

    pub(crate) fn name(&self, name: &str) -> String {
        format!("{}/{name}", self.address)
    }

    /// Where the login of a user is; of one that does not exist for nobody.
    pub(crate) fn login(&self, user: &str) -> String {
        text(&self.rig.path(&format!("{user}.json")))
    }

    /// Runs `lamina` as a user.
    pub(crate) fn lamina(&self, user: &str, arguments: &[&str]) -> Result<String> {
        self.rig.ok(&[arguments, &["--auth-file", &self.login(user)]].concat())
    }

    pub(crate) fn refused(&self, user: &str, arguments: &[&str]) -> Result<String> {
        self.rig.fails(&[arguments, &["--auth-file", &self.login(user)]].concat())
    }

    pub(crate) fn json(&self, user: &str, arguments: &[&str]) -> Result<Value> {
        Ok(serde_json::from_str(&self.lamina(user, &[arguments, &["--json"]].concat())?)?)
    }

    /// What curl gets: the status, and the answer with its headers.
    pub(crate) fn curl(&self, path: &str, arguments: &[&str]) -> Result<(String, String)> {
        let url = format!("http://{}{path}", self.address);
        let mut curl = Command::new("curl");
        let output = run(curl.args(["-s", "-i", "-w", "\n%{http_code}", &url]).args(arguments))?;
        let answer = String::from_utf8(output.stdout)?;
        let (answer, status) = answer.rsplit_once('\n').context("a status")?;
        Ok((status.to_owned(), answer.to_owned()))
    }

    /// A token for a scope.
    fn token(&self, user: &str, scope: &str) -> Result<String> {
        let (status, answer) = self.curl(&format!("/token?service=lamina&scope={scope}"), &["-u", user])?;
        ensure!(status == "200", "{status} {answer}");
        let body = answer.split("\r\n\r\n").nth(1).context("a body")?;
        let token: Value = serde_json::from_str(body)?;
        Ok(token["token"].as_str().context("a token")?.to_owned())
    }
}

pub(crate) const RULES: &str = r#"
[[access.rules]]
repositories = ["team/**"]
users = ["alice"]
allow = ["pull", "push", "delete"]
[[access.rules]]
repositories = ["team/open"]
users = ["bob"]
allow = ["pull"]
[[access.rules]]
repositories = ["bob/*"]
users = ["bob"]
allow = ["pull", "push"]
[[access.rules]]
repositories = ["public/*"]
users = ["anonymous"]
allow = ["pull"]
[[access.rules]]
repositories = ["public/*"]
users = ["alice"]
allow = ["push"]
"#;

pub(crate) fn small(rig: &Rig, seed: u64) -> Result<String> {
    let image = Image::new().layer(|layer| layer.file("f", noise(400_000, seed)).gzip());
    rig.layout(&format!("layout{seed}"), &image)
}

#[test]
fn everyday_clients_log_in_and_do_what_the_rules_say_and_no_more() -> Result<()> {
    let guarded = Guarded::start(RULES, &[])?;
    let source = small(&guarded.rig, 1)?;
    let docker = |name: &str| format!("docker://{}", guarded.name(name));
    let push = |creds: &str, name: &str| {
        skopeo(&["copy", "-q", "--dest-tls-verify=false", "--dest-creds", creds, &source, &docker(name)])
    };
    let pull = |credentials: &str, name: &str| {
        skopeo(&["inspect", "--tls-verify=false", credentials, &docker(name)])
            .map_err(|error| error.to_string())
    };
    for name in ["team/open:t", "team/closed:t", "public/a:t"] {
        push("alice:secret", name)?;
    }
    ensure!(push("bob:secret", "team/open:t").is_err() && push("bob:wrong", "bob/a:t").is_err());
    push("bob:secret", "bob/a:t")?;
    for (credentials, name, allowed) in [
        ("--creds=alice:secret", "team/closed:t", true),
        ("--creds=bob:secret", "team/open:t", true),
        ("--creds=bob:secret", "team/closed:t", false),
        ("--creds=bob:secret", "public/a:t", true),
        ("--creds=bob:wrong", "public/a:t", false),
        ("--no-creds", "public/a:t", true),
        ("--no-creds", "team/open:t", false),
    ] {
        let pulled = pull(credentials, name);
        ensure!(pulled.is_ok() == allowed, "{credentials} {name}: {pulled:?}");
    }
    let delete =
        |creds: &str, name: &str| skopeo(&["delete", "--tls-verify=false", "--creds", creds, &docker(name)]);
    ensure!(delete("bob:secret", "bob/a:t").is_err());
    delete("alice:secret", "team/closed:t")?;

    let podman = |arguments: &[&str]| {
        let auth = guarded.rig.path("podman.json");
        let mut command = Command::new("podman");
        command
            .arg("--root")
            .arg(guarded.rig.path("podman"))
            .arg("--runroot")
            .arg(guarded.rig.path("podman-run"));
        run(command.args(["--storage-driver", "vfs"]).args(arguments).env("REGISTRY_AUTH_FILE", auth))
    };
    ensure!(podman(&["login", "--tls-verify=false", "-u", "bob", "-p", "wrong", &guarded.address]).is_err());
    podman(&["login", "--tls-verify=false", "-u", "bob", "-p", "secret", &guarded.address])?;
    podman(&["pull", "-q", "--tls-verify=false", &guarded.name("team/open:t")])?;
    ensure!(podman(&["pull", "-q", "--tls-verify=false", &guarded.name("team/closed:t")]).is_err());
    // and podman's login is ours
    let login = text(&guarded.rig.path("podman.json"));
    guarded.rig.ok(&["inspect", &guarded.name("team/open:t"), "--auth-file", &login])?;
    Ok(())
}

#[test]
fn a_push_and_a_mount_go_by_tokens_that_are_renewed() -> Result<()> {
    let guarded = Guarded::start(&format!("token-seconds = 1\n{RULES}"), &[])?;
    let source = small(&guarded.rig, 1)?;
    guarded.lamina("alice", &["push", &source, &guarded.name("team/open:t")])?;
    let mounted = text(&guarded.rig.path("mount"));
    let plain = ["--no-boot", "--no-trace"];
    guarded.lamina("bob", &[&["mount", &guarded.name("team/open:t"), &mounted], &plain[..]].concat())?;
    // the token of the mount has ended when the contents are read
    let token = guarded.token("bob:secret", "repository:team/open:pull")?;
    let header = format!("Authorization: Bearer {token}");
    until("a token to end", DEADLINE, || {
        let (status, _) = guarded.curl("/v2/team/open/tags/list", &["-H", &header])?;
        Ok((status == "401").then_some(()))
    })?;
    ensure!(std::fs::read(guarded.rig.path("mount/f"))? == noise(400_000, 1));
    guarded.rig.unmount()?;
    for (user, expected) in [("bob", "bob may not push"), ("nobody", "no credential")] {
        let said = guarded.refused(user, &["push", &source, &guarded.name("team/open:t")])?;
        ensure!(said.contains(expected) && said.contains(&guarded.address), "{user}: {said}");
    }
    Ok(())
}

#[test]
fn a_token_opens_what_it_was_issued_for_and_nothing_else() -> Result<()> {
    let guarded = Guarded::start(RULES, &[])?;
    guarded.lamina("alice", &["push", &small(&guarded.rig, 1)?, &guarded.name("team/open:t")])?;
    let status = |token: &str, path: &str, method: &str| -> Result<String> {
        let header = format!("Authorization: Bearer {token}");
        Ok(guarded.curl(path, &["-X", method, "-H", &header])?.0)
    };
    let pull = guarded.token("alice:secret", "repository:team/open:pull")?;
    let uploads = "/v2/team/open/blobs/uploads/";
    ensure!(status(&pull, "/v2/team/open/tags/list", "GET")? == "200");
    ensure!(status(&pull, "/v2/team/other/tags/list", "GET")? == "401", "another repository");
    ensure!(status(&pull, uploads, "POST")? == "401", "more than it was asked for");
    let asked = guarded.token("bob:secret", "repository:team/open:pull,push,delete")?;
    ensure!(status(&asked, uploads, "POST")? == "403", "more than the user may");
    let nobody = guarded.curl("/token?scope=repository:team/open:pull", &[])?;
    ensure!(nobody.0 == "200" && !nobody.1.contains("\"pull\""), "{nobody:?}");
    let parts: Vec<&str> = pull.split('.').collect();
    // {"alg":"none","typ":"JWT"}
    let unsigned = format!("eyJhbGciOiJub25lIiwidHlwIjoiSldUIn0.{}.", parts[1]);
    for token in [unsigned.as_str(), &format!("{}.{}.AAAA", parts[0], parts[1]), "x", ""] {
        ensure!(status(token, "/v2/team/open/tags/list", "GET")? == "401", "{token}");
    }
    let (status, answer) = guarded.curl("/v2/", &[])?;
    ensure!(status == "401" && answer.contains("UNAUTHORIZED"), "{answer}");
    let challenge = format!("Bearer realm=\"http://{}/token\",service=\"lamina\"", guarded.address);
    ensure!(answer.contains(&challenge), "{answer}");
    ensure!(guarded.curl("/v2/", &["-u", "alice:secret"])?.0 == "200");
    let (_, answer) = guarded.curl("/v2/", &["-H", "Host: x\",evil=\""])?;
    ensure!(!answer.contains("evil"), "{answer}");
    Ok(())
}

#[test]
fn who_guesses_passwords_has_to_wait_and_others_need_not() -> Result<()> {
    let guarded = Guarded::start("", &[])?;
    let mut refused = None;
    for _ in 0..20 {
        let (status, answer) = guarded.curl("/v2/", &["-u", "alice:guess"])?;
        if status == "429" {
            refused = Some(answer);
            break;
        }
        ensure!(status == "401", "{answer}");
    }
    let refused = refused.context("nobody had to wait")?.to_lowercase();
    ensure!(refused.contains("retry-after") && refused.contains("toomanyrequests"), "{refused}");
    ensure!(
        guarded.curl("/v2/", &["-u", "bob:secret"])?.0 == "429",
        "from the same address not even a right one"
    );
    ensure!(guarded.curl("/v2/", &["-u", "bob:secret", "--interface", "127.0.0.2"])?.0 == "200");
    let again = until("the wait to end", Duration::from_secs(30), || {
        Ok((guarded.curl("/v2/", &["-u", "bob:secret"])?.0 == "200").then_some(()))
    });
    again.context("who waits may try again")
}

#[test]
fn a_configuration_that_makes_no_sense_is_named() -> Result<()> {
    let rig = Rig::new()?;
    let file = rig.path("c.toml");
    std::fs::write(rig.path("plain"), "alice:{SHA}x\n")?;
    for (config, expected) in [
        ("users = \"absent\"", "absent"),
        ("users = \"plain\"", "line 1"),
        ("users = \"plain\"\nanonymous = true", "anonymous"),
        ("users = \"plain\"\n[[access.rules]]\nrepositories=[\"a*\"]\nusers=[]\nallow=[]", "a*"),
        ("users = \"plain\"\n[[access.rules]]\nrepositories=[\"a\"]\nusers=[]\nallow=[\"write\"]", "write"),
        ("users = \"plain\"\ndeduplication = \"some\"", "some"),
    ] {
        std::fs::write(&file, format!("[access]\n{config}\n"))?;
        let storage = text(&rig.path("other"));
        let said = rig.fails(&[
            "registry",
            "--listen",
            "127.0.0.1:0",
            "--storage",
            &storage,
            "--config",
            &text(&file),
        ])?;
        ensure!(said.contains(expected) && said.contains(&text(&rig.path(""))), "{config}: {said}");
    }
    Ok(())
}
