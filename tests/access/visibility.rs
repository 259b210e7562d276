//! What deduplication tells, and to whom.

use anyhow::{Context, Result, ensure};
use lamina_testkit::image::Image;
use lamina_testkit::noise;
use lamina_testkit::process::until;
use serde_json::Value;

use crate::guarded::{Guarded, RULES, small};
use crate::rig::{DEADLINE, skopeo};

/// Waits until a user's image is converted.
fn converted(guarded: &Guarded, user: &str, name: &str) -> Result<Value> {
    until("the conversion", DEADLINE, || {
        let status = guarded.json(user, &["inspect", &guarded.name(name)])?;
        Ok((status["conversion"]["state"] == "done").then_some(status))
    })
}

/// The packs of an image, as its artifact lists them.
fn packs(guarded: &Guarded, user: &str, repository: &str, manifest: &Value) -> Result<Vec<String>> {
    let credential = format!("{user}:secret");
    let path = format!("/v2/{repository}/referrers/{}", manifest.as_str().context("a digest")?);
    let (status, answer) = guarded.curl(&path, &["-u", &credential])?;
    ensure!(status == "200", "{answer}");
    let body = |answer: &str| -> Result<Value> {
        Ok(serde_json::from_str(answer.split("\r\n\r\n").nth(1).context("a body")?)?)
    };
    let artifact = body(&answer)?["manifests"][0]["digest"].as_str().context("an artifact")?.to_owned();
    let (_, answer) =
        guarded.curl(&format!("/v2/{repository}/manifests/{artifact}"), &["-u", &credential])?;
    let artifact = body(&answer)?;
    let layers = artifact["layers"].as_array().context("layers")?;
    let packs = layers.iter().filter(|layer| layer["mediaType"] == "application/vnd.lamina.pack.v1");
    Ok(packs.filter_map(|layer| layer["digest"].as_str().map(str::to_owned)).collect())
}

#[test]
fn a_push_is_told_of_chunks_only_that_its_user_may_read() -> Result<()> {
    for (scope, known) in [("all", true), ("namespace", false), ("repository", false)] {
        let guarded = Guarded::start(&format!("deduplication = \"{scope}\"\n{RULES}"), &[])?;
        let (hidden, open) = (small(&guarded.rig, 1)?, small(&guarded.rig, 2)?);
        guarded.lamina("alice", &["push", &hidden, &guarded.name("team/closed:t")])?;
        guarded.lamina("alice", &["push", &open, &guarded.name("team/open:t")])?;
        let pushed = guarded.json("bob", &["push", &hidden, &guarded.name("bob/a:t")])?;
        ensure!(pushed["layers_known"] == 0 && pushed["chunks_known"] == 0, "{scope}: {pushed}");
        let pushed = guarded.json("bob", &["push", &open, &guarded.name("bob/b:t")])?;
        ensure!((pushed["layers_known"] == 1) == known, "{scope}: {pushed}");
        // alice may read both, and they lie in one namespace
        let pushed = guarded.json("alice", &["push", &hidden, &guarded.name("team/open:u")])?;
        ensure!((pushed["layers_known"] == 1) == (scope != "repository"), "{scope}: {pushed}");
    }
    Ok(())
}

#[test]
fn blobs_of_others_are_not_there_by_get_by_head_by_mount_or_by_manifest() -> Result<()> {
    let guarded = Guarded::start(&format!("deduplication = \"all\"\n{RULES}"), &[])?;
    guarded.lamina("alice", &["push", &small(&guarded.rig, 1)?, &guarded.name("team/closed:t")])?;
    let manifest = guarded.json("alice", &["inspect", &guarded.name("team/closed:t")])?;
    let tree = manifest["tree"].as_str().context("a tree")?;
    let bob = ["-u", "bob:secret"];
    for (path, method, expected) in [
        (format!("/v2/team/closed/blobs/{tree}"), "GET", "403"),
        (format!("/v2/bob/a/blobs/{tree}"), "GET", "404"),
        (format!("/v2/bob/a/blobs/uploads/?mount={tree}&from=team/closed"), "POST", "202"),
        (format!("/v2/bob/a/blobs/uploads/?mount={tree}"), "POST", "202"),
        (format!("/v2/bob/a/blobs/{tree}"), "GET", "404"),
        (format!("/v2/team/absent/blobs/{tree}"), "GET", "403"),
    ] {
        let (status, answer) = guarded.curl(&path, &[&bob[..], &["-X", method]].concat())?;
        ensure!(status == expected, "{method} {path}: {answer}");
    }
    // the manifest itself, put elsewhere, brings nothing along
    let (_, answer) = guarded.curl("/v2/team/closed/manifests/t", &["-u", "alice:secret"])?;
    let file = guarded.rig.path("manifest.json");
    std::fs::write(&file, answer.split("\r\n\r\n").nth(1).context("a body")?)?;
    let data = format!("@{}", file.display());
    let put = [
        "-X",
        "PUT",
        "-H",
        "Content-Type: application/vnd.oci.image.manifest.v1+json",
        "--data-binary",
        &data,
    ];
    let (status, answer) = guarded.curl("/v2/bob/a/manifests/t", &[&bob[..], &put[..]].concat())?;
    ensure!(status == "404" && answer.contains("MANIFEST_BLOB_UNKNOWN"), "{answer}");
    let catalog = |user: &str| guarded.curl("/v2/_catalog", &["-u", user]);
    ensure!(
        catalog("alice:secret")?.1.contains("team/closed")
            && !catalog("bob:secret")?.1.contains("team/closed")
    );
    Ok(())
}

#[test]
fn a_conversion_uses_no_pack_of_another_namespace() -> Result<()> {
    let guarded = Guarded::start(RULES, &[])?;
    let shared = || Image::new().layer(|layer| layer.file("shared", noise(600_000, 5)).gzip());
    let mine = guarded
        .rig
        .layout("mine", &shared().layer(|layer| layer.file("secret", noise(300_000, 6)).gzip()))?;
    let theirs = guarded
        .rig
        .layout("theirs", &shared().layer(|layer| layer.file("other", noise(300_000, 7)).gzip()))?;
    let push = |creds: &str, source: &str, name: &str| {
        let target = format!("docker://{}", guarded.name(name));
        skopeo(&["copy", "-q", "--dest-tls-verify=false", "--dest-creds", creds, source, &target])
    };
    push("alice:secret", &mine, "team/closed:t")?;
    let mine = converted(&guarded, "alice", "team/closed:t")?;
    push("bob:secret", &theirs, "bob/a:t")?;
    let theirs = converted(&guarded, "bob", "bob/a:t")?;
    let mine = packs(&guarded, "alice", "team/closed", &mine["manifest"])?;
    let theirs = packs(&guarded, "bob", "bob/a", &theirs["manifest"])?;
    ensure!(!mine.is_empty() && !theirs.is_empty(), "{mine:?} {theirs:?}");
    ensure!(theirs.iter().all(|pack| !mine.contains(pack)), "{mine:?} {theirs:?}");
    for pack in mine {
        let (status, _) = guarded.curl(&format!("/v2/bob/a/blobs/{pack}"), &["-I", "-u", "bob:secret"])?;
        ensure!(status == "404", "{pack}: {status}");
    }
    Ok(())
}
