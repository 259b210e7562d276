//! Clients as they are installed.

use std::collections::BTreeMap;
use std::path::Path;

use lamina_image::Digest;
use lamina_testkit::noise;

use crate::support::{Image, Registry, run};

fn image() -> Image {
    let big = noise(3_000_000, 1);
    Image::new(&[
        &[("etc/motd", b"hello\n"), ("bin/big", &big)],
        &[("etc/.wh.motd", b""), ("etc/issue", b"lamina")],
    ])
}

fn layout(path: &Path) -> BTreeMap<String, Vec<u8>> {
    let files = std::fs::read_dir(path.join("blobs/sha256")).unwrap();
    files
        .map(|file| {
            let path = file.unwrap().path();
            (path.file_name().unwrap().to_str().unwrap().to_owned(), std::fs::read(&path).unwrap())
        })
        .collect()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn skopeo_gets_back_the_bytes_that_it_pushed() {
    let registry = Registry::start().await;
    let (there, back) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let image = image();
    image.write_layout(there.path());
    let source = format!("oci:{}:v1", there.path().display());
    let name = registry.reference("library/app:v1");
    run("skopeo", &["copy", "--dest-tls-verify=false", &source, &name]).await;
    let target = format!("oci:{}:v1", back.path().display());
    run("skopeo", &["copy", "--src-tls-verify=false", &name, &target]).await;
    assert_eq!(layout(there.path()), layout(back.path()));

    let tags = run("skopeo", &["list-tags", "--tls-verify=false", &registry.reference("library/app")]).await;
    assert!(tags.contains("\"v1\""), "{tags}");
    registry.converted(Digest::of(&image.manifest)).await;
    let raw = run("skopeo", &["inspect", "--raw", "--tls-verify=false", &name]).await;
    assert_eq!(raw.as_bytes(), image.manifest, "conversion changed the manifest");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn skopeo_pushes_docker_manifests_and_deletes_them() {
    let registry = Registry::start().await;
    let there = tempfile::tempdir().unwrap();
    image().write_layout(there.path());
    let source = format!("oci:{}:v1", there.path().display());
    let name = registry.reference("app:docker");
    run("skopeo", &["copy", "--format=v2s2", "--dest-tls-verify=false", &source, &name]).await;
    let raw = run("skopeo", &["inspect", "--raw", "--tls-verify=false", &name]).await;
    assert!(raw.contains("vnd.docker.distribution.manifest.v2+json"), "{raw}");
    let record = registry.converted(Digest::of(raw.as_bytes())).await;
    assert_eq!(record.reason, None);
    run("skopeo", &["delete", "--tls-verify=false", &name]).await;
    let tags = registry.get("/v2/app/tags/list").await;
    assert!(!String::from_utf8_lossy(&tags.body).contains("docker"), "{tags:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn podman_pushes_and_pulls() {
    let registry = Registry::start().await;
    let there = tempfile::tempdir().unwrap();
    image().write_layout(there.path());
    let storage = tempfile::tempdir().unwrap();
    let (root, run_root) = (storage.path().join("root"), storage.path().join("run"));
    let (root, run_root) = (root.to_str().unwrap(), run_root.to_str().unwrap());
    let common =
        ["--root", root, "--runroot", run_root, "--storage-driver", "vfs", "--cgroup-manager", "cgroupfs"];
    let podman = |arguments: &[&str]| {
        let arguments: Vec<String> = common.iter().chain(arguments).map(|text| (*text).to_owned()).collect();
        async move { run("podman", &arguments.iter().map(String::as_str).collect::<Vec<_>>()).await }
    };
    let source = format!("oci:{}:v1", there.path().display());
    run("skopeo", &["copy", "--dest-tls-verify=false", &source, &registry.reference("team/app:v1")]).await;
    let name = format!("{}/team/app:v1", registry.address);
    let id = podman(&["pull", "-q", "--tls-verify=false", &name]).await;
    let name = format!("{}/team/app:v2", registry.address);
    podman(&["push", "-q", "--tls-verify=false", id.trim(), &name]).await;
    podman(&["rmi", "-a", "-f"]).await;
    let pulled = podman(&["pull", "-q", "--tls-verify=false", &name]).await;
    assert_eq!(pulled.trim(), id.trim(), "the image ID changed on the way");
}
