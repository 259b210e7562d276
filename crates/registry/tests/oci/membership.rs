//! Which repository has which blob: nothing is read, named or taken through one that does not have it.

use bytes::Bytes;
use http::{Method, StatusCode};
use lamina_image::{Digest, Tree, media_type, unpack_tree};
use lamina_testkit::noise;

use crate::support::{Image, Registry};

fn image() -> Image {
    let big = noise(2_000_000, 7);
    Image::new(&[&[("lib/big", &big)], &[("etc/motd", b"hello")]])
}

#[tokio::test]
async fn a_blob_is_read_only_through_a_repository_that_has_it() {
    let registry = Registry::start().await;
    let digest = registry.push_blob("a", &Bytes::from_static(b"mine")).await.digest;
    registry.get(&format!("/v2/a/blobs/{digest}")).await.expect(StatusCode::OK);
    for method in [Method::GET, Method::HEAD, Method::DELETE] {
        let reply = registry.send(method, &format!("/v2/b/blobs/{digest}"), &[], "").await;
        reply.expect(StatusCode::NOT_FOUND);
    }
}

#[tokio::test]
async fn a_manifest_cannot_name_the_blobs_of_another_repository() {
    let registry = Registry::start().await;
    let image = image();
    registry.push("a", "v1", &image).await;
    let refused = registry.put_manifest("b", "v1", media_type::OCI_MANIFEST, &image.manifest).await;
    refused.refused(StatusCode::NOT_FOUND, "MANIFEST_BLOB_UNKNOWN");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_manifest_alone_opens_neither_the_layers_nor_the_tree_of_an_image() {
    let registry = Registry::start().await;
    let image = image();
    let digest = registry.push("a", "v1", &image).await;
    let tree = registry.converted(digest).await.tree.unwrap().digest;
    // taken, since it is pushed by digest, with a warning
    let put =
        registry.put_manifest("b", &digest.to_string(), media_type::OCI_MANIFEST, &image.manifest).await;
    put.expect(StatusCode::CREATED).header("warning");
    let listed = registry.get(&format!("/v2/b/referrers/{digest}")).await.json();
    assert_eq!(listed["manifests"], serde_json::json!([]));
    let layers = image.layers.iter().chain(&image.tars).map(|bytes| Digest::of(bytes));
    for blob in layers.chain([tree, Digest::of(&image.config)]) {
        registry.get(&format!("/v2/b/blobs/{blob}")).await.refused(StatusCode::NOT_FOUND, "BLOB_UNKNOWN");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_repository_with_the_image_has_all_that_its_tree_needs() {
    let registry = Registry::start().await;
    let image = image();
    let digest = registry.push("one", "v1", &image).await;
    let tree = registry.converted(digest).await.tree.unwrap().digest;
    registry.push("two", "v1", &image).await;
    for repo in ["one", "two"] {
        let blob = registry.get(&format!("/v2/{repo}/blobs/{tree}")).await.expect(StatusCode::OK).body;
        let tree = Tree::open(unpack_tree(&blob).unwrap().into()).unwrap();
        let packs: Vec<Digest> = tree.packs().map(Digest::from).collect();
        assert!(!packs.is_empty());
        for blob in packs.into_iter().chain(image.tars.iter().map(|tar| Digest::of(tar))) {
            let path = format!("/v2/{repo}/blobs/{blob}");
            registry.send(Method::HEAD, &path, &[], "").await.expect(StatusCode::OK);
        }
    }
}
