//! Everyday clients with everyday images: every compression, several platforms, both families of media types.

use std::collections::BTreeMap;
use std::path::Path;

use http::StatusCode;
use lamina_image::{Digest, media_type};
use lamina_store::ImageState;
use lamina_testkit::image::Image;
use lamina_testkit::noise;
use serde_json::{Value, json};

use crate::support::{Registry, run};

fn blobs(layout: &Path) -> BTreeMap<String, Vec<u8>> {
    let files = std::fs::read_dir(layout.join("blobs/sha256")).unwrap();
    let read = |path: std::path::PathBuf| {
        (path.file_name().unwrap().to_str().unwrap().to_owned(), std::fs::read(&path).unwrap())
    };
    files.map(|file| read(file.unwrap().path())).collect()
}

/// An image with a layer of each compression.
fn image(label: &str) -> Image {
    let image = Image::new()
        .layer(|l| l.dir("etc").file("etc/motd", label).gzip())
        .layer(|l| l.dir("lib").file("lib/one", noise(700_000, 1)).zstd())
        .layer(|l| l.file("lib/two", noise(300_000, 2)).symlink("bin", "lib").plain());
    image.command(["/lib/one"])
}

/// The manifest of a tag in a layout.
fn manifest_of(layout: &Path, tag: &str) -> Value {
    let index: Value = serde_json::from_slice(&std::fs::read(layout.join("index.json")).unwrap()).unwrap();
    let named = |it: &&Value| it["annotations"]["org.opencontainers.image.ref.name"] == tag;
    index["manifests"].as_array().unwrap().iter().find(named).unwrap().clone()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn layers_of_every_compression_come_back_as_they_went_and_make_a_tree() {
    let registry = Registry::start().await;
    let directory = tempfile::tempdir().unwrap();
    let (there, back) = (directory.path().join("there"), directory.path().join("back"));
    let source = image("hello").write(&there, "v1").unwrap();
    let name = registry.reference("team/app:v1");
    run("skopeo", &["copy", "--preserve-digests", "--dest-tls-verify=false", &source, &name]).await;
    let target = format!("oci:{}:v1", back.display());
    run("skopeo", &["copy", "--preserve-digests", "--src-tls-verify=false", &name, &target]).await;
    assert!(blobs(&there) == blobs(&back), "other blobs came back");
    let digest: Digest = manifest_of(&there, "v1")["digest"].as_str().unwrap().parse().unwrap();
    let record = registry.converted(digest).await;
    assert_eq!((record.state, record.reason), (ImageState::Done, None));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn skopeo_recompresses_on_the_way_and_changes_the_family_of_media_types() {
    let registry = Registry::start().await;
    let directory = tempfile::tempdir().unwrap();
    // skopeo makes no Docker image of zstd layers
    let image = Image::new()
        .layer(|l| l.dir("etc").file("etc/motd", "hello").gzip())
        .layer(|l| l.file("lib/two", noise(300_000, 2)).symlink("bin", "lib").plain())
        .command(["/lib/one"]);
    let source = image.write(&directory.path().join("there"), "v1").unwrap();
    for (tag, how) in [
        ("zstd", &["--dest-compress-format=zstd", "--format=oci"][..]),
        ("gzip", &["--dest-compress-format=gzip", "--format=oci"]),
        ("docker", &["--dest-compress-format=gzip", "--format=v2s2"]),
    ] {
        let name = registry.reference(&format!("app:{tag}"));
        let arguments = [&["copy", "--dest-tls-verify=false"][..], how, &[&source, &name]].concat();
        run("skopeo", &arguments).await;
        let raw = run("skopeo", &["inspect", "--raw", "--tls-verify=false", &name]).await;
        let record = registry.converted(Digest::of(raw.as_bytes())).await;
        assert_eq!((record.state, record.reason), (ImageState::Done, None), "{tag}");
        let id = run("skopeo", &["inspect", "--config", "--tls-verify=false", &name]).await;
        assert!(id.contains("/lib/one"), "{id}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_index_of_platforms_is_copied_whole_and_read_by_platform() {
    let registry = Registry::start().await;
    let directory = tempfile::tempdir().unwrap();
    let (there, back) = (directory.path().join("there"), directory.path().join("back"));
    let mut children = Vec::new();
    for architecture in ["amd64", "arm64"] {
        image(architecture).write(&there, architecture).unwrap();
        let mut child = manifest_of(&there, architecture);
        child.as_object_mut().unwrap().remove("annotations");
        child["platform"] = json!({ "os": "linux", "architecture": architecture });
        children.push(child);
    }
    let index = json!({ "schemaVersion": 2, "mediaType": media_type::OCI_INDEX, "manifests": children });
    let index = index.to_string();
    let digest = Digest::of(index.as_bytes());
    std::fs::write(there.join("blobs/sha256").join(digest.hex()), &index).unwrap();
    let top = json!({ "schemaVersion": 2, "manifests": [{ "mediaType": media_type::OCI_INDEX, "digest": digest,
        "size": index.len(), "annotations": { "org.opencontainers.image.ref.name": "all" } }] });
    std::fs::write(there.join("index.json"), top.to_string()).unwrap();

    let (source, name) = (format!("oci:{}:all", there.display()), registry.reference("app:all"));
    run("skopeo", &["copy", "--all", "--preserve-digests", "--dest-tls-verify=false", &source, &name]).await;
    let target = format!("oci:{}:all", back.display());
    run("skopeo", &["copy", "--all", "--preserve-digests", "--src-tls-verify=false", &name, &target]).await;
    assert!(blobs(&there) == blobs(&back), "other blobs came back");
    for (child, architecture) in children.iter().zip(["amd64", "arm64"]) {
        let config = ["--override-arch", architecture, "inspect", "--tls-verify=false", &name];
        let said: Value = serde_json::from_str(&run("skopeo", &config).await).unwrap();
        assert_eq!(said["Digest"], digest.to_string());
        let child: Digest = child["digest"].as_str().unwrap().parse().unwrap();
        assert_eq!(registry.converted(child).await.state, ImageState::Done);
    }
    run("skopeo", &["delete", "--tls-verify=false", &name]).await;
    registry.get("/v2/app/manifests/all").await.expect(StatusCode::NOT_FOUND);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn buildah_builds_pushes_and_pulls() {
    let registry = Registry::start().await;
    let directory = tempfile::tempdir().unwrap();
    let at = |name: &str| directory.path().join(name).display().to_string();
    let (root, run_root, file) = (at("root"), at("run"), at("motd"));
    std::fs::write(&file, "built").unwrap();
    let buildah = |arguments: &[&str]| {
        let common = ["--root", &root, "--runroot", &run_root, "--storage-driver", "vfs"];
        let arguments: Vec<String> = common.iter().chain(arguments).map(|text| (*text).to_owned()).collect();
        async move { run("buildah", &arguments.iter().map(String::as_str).collect::<Vec<_>>()).await }
    };
    let container = buildah(&["from", "scratch"]).await.trim().to_owned();
    buildah(&["copy", &container, &file, "/etc/motd"]).await;
    for (tag, format) in [("oci", "oci"), ("docker", "docker")] {
        let id = buildah(&["commit", "--quiet", "--format", format, &container]).await.trim().to_owned();
        let name = registry.reference(&format!("team/built:{tag}"));
        buildah(&["push", "--quiet", "--tls-verify=false", &id, &name]).await;
        buildah(&["rmi", "--force", &id]).await;
        let pulled = buildah(&["pull", "--quiet", "--tls-verify=false", &name]).await;
        assert_eq!(pulled.trim(), id, "the image ID changed on the way");
        let manifest = registry.get(&format!("/v2/team/built/manifests/{tag}")).await.expect(StatusCode::OK);
        assert_eq!(registry.converted(Digest::of(&manifest.body)).await.state, ImageState::Done);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn umoci_unpacks_what_was_pulled_and_its_own_images_are_pushed() {
    let registry = Registry::start().await;
    let directory = tempfile::tempdir().unwrap();
    let at = |name: &str| directory.path().join(name).display().to_string();
    let source = image("hello").write(&directory.path().join("there"), "v1").unwrap();
    let name = registry.reference("app:v1");
    run("skopeo", &["copy", "--dest-tls-verify=false", &source, &name]).await;
    // umoci reads gzip and plain layers
    let layout = at("layout");
    let gzip = ["--dest-compress-format=gzip", "--dest-compress", &name, &format!("oci:{layout}:v1")];
    run("skopeo", &[&["copy", "--src-tls-verify=false"][..], &gzip].concat()).await;
    let (new, extra) = (format!("{layout}:v2"), at("extra"));
    std::fs::write(&extra, "more").unwrap();
    run("umoci", &["insert", "--image", &format!("{layout}:v1"), "--tag", "v2", &extra, "/etc/extra"]).await;
    let name = registry.reference("app:v2");
    run("skopeo", &["copy", "--dest-tls-verify=false", &format!("oci:{new}"), &name]).await;
    let again = at("again");
    run("skopeo", &["copy", "--src-tls-verify=false", &name, &format!("oci:{again}:v2")]).await;
    run("umoci", &["unpack", "--image", &format!("{again}:v2"), &at("bundle")]).await;
    for (file, expected) in [("etc/motd", "hello"), ("etc/extra", "more")] {
        let found = std::fs::read_to_string(directory.path().join("bundle/rootfs").join(file)).unwrap();
        assert_eq!(found, expected);
    }
}
