//! Every kind of manifest that the OCI image specification allows: pushed, read back byte for byte, and deleted.

use bytes::Bytes;
use http::{Method, StatusCode};
use lamina_image::{Algorithm, Descriptor, Digest, media_type};
use lamina_store::ImageState;
use serde_json::{Value, json};

use crate::support::{Image, Registry, Reply};

fn image() -> Image {
    Image::new(&[&[("etc/motd", b"hello")], &[("etc/issue", b"lamina")]])
}

/// A manifest of the image with `change` made to it.
fn changed(image: &Image, change: impl Fn(&mut Value)) -> Vec<u8> {
    let mut manifest: Value = serde_json::from_slice(&image.manifest).unwrap();
    change(&mut manifest);
    manifest.to_string().into_bytes()
}

fn index(manifests: &[Value], change: impl Fn(&mut Value)) -> Vec<u8> {
    let mut index = json!({ "schemaVersion": 2, "mediaType": media_type::OCI_INDEX, "manifests": manifests });
    change(&mut index);
    index.to_string().into_bytes()
}

fn descriptor(media_type: &str, bytes: &[u8], algorithm: Algorithm) -> Value {
    json!({ "mediaType": media_type, "digest": Digest::by(algorithm, bytes), "size": bytes.len() })
}

async fn push_blobs(registry: &Registry, repo: &str, image: &Image) {
    for blob in image.blobs() {
        registry.push_blob(repo, blob).await;
    }
}

/// Pushes a document by its digest and, where it has one, by a tag.
async fn put(registry: &Registry, media_type: &str, bytes: &[u8], tag: Option<&str>) -> Digest {
    let digest = Digest::of(bytes);
    let target = digest.to_string();
    for target in [Some(target.as_str()), tag].into_iter().flatten() {
        registry.put_manifest("a", target, media_type, bytes).await.expect(StatusCode::CREATED);
        let read = registry.get(&format!("/v2/a/manifests/{target}")).await.expect(StatusCode::OK);
        assert!(read.body == bytes, "other bytes came back");
        assert_eq!(read.header("content-type"), media_type);
        assert_eq!(read.header("docker-content-digest"), digest.to_string());
    }
    digest
}

async fn delete(registry: &Registry, digest: Digest) {
    let path = format!("/v2/a/manifests/{digest}");
    registry.send(Method::DELETE, &path, &[], "").await.expect(StatusCode::ACCEPTED);
    registry.get(&path).await.expect(StatusCode::NOT_FOUND);
}

fn warnings(reply: &Reply) -> Vec<&str> {
    reply.headers.get_all("warning").iter().map(|value| value.to_str().unwrap()).collect()
}

#[tokio::test]
async fn manifests_are_kept_as_they_came_whatever_else_they_say() {
    let registry = Registry::start().await;
    let image = image();
    push_blobs(&registry, "a", &image).await;
    let long = "A".repeat(10_000);
    for change in [
        // what nobody has specified
        (|it: &mut Value, _: &str| it["x-unknown"] = json!({ "a": [1, 2.5, null] })) as fn(&mut Value, &str),
        |it, _| it["config"]["data"] = json!("e30="),
        |it, _| it["artifactType"] = json!("application/x"),
        // no layers at all
        |it, _| it["layers"] = json!([]),
        // close to the limit
        |it, long| (0..390).for_each(|number| it["annotations"][format!("long-{number}")] = json!(long)),
        // the media type only in the header
        |it, _| drop(it.as_object_mut().unwrap().remove("mediaType")),
    ] {
        let bytes = changed(&image, |it| change(it, &long));
        let digest = put(&registry, media_type::OCI_MANIFEST, &bytes, Some("v1")).await;
        delete(&registry, digest).await;
        registry.get("/v2/a/manifests/v1").await.expect(StatusCode::NOT_FOUND);
    }
}

#[tokio::test]
async fn indexes_may_be_empty_nested_of_artifacts_and_have_subjects() {
    let registry = Registry::start().await;
    let image = image();
    push_blobs(&registry, "a", &image).await;
    let child = put(&registry, media_type::OCI_MANIFEST, &image.manifest, None).await;
    let of_child = descriptor(media_type::OCI_MANIFEST, &image.manifest, Algorithm::Sha256);
    let plain = index(&[of_child.clone(), of_child.clone()], |_| {});
    let parent = put(&registry, media_type::OCI_INDEX, &plain, Some("index")).await;
    let of_plain = descriptor(media_type::OCI_INDEX, &plain, Algorithm::Sha256);
    let nested = index(&[of_plain.clone(), of_child], |_| {});
    let nested = put(&registry, media_type::OCI_INDEX, &nested, Some("nested")).await;
    let empty = put(&registry, media_type::OCI_INDEX, &index(&[], |_| {}), Some("empty")).await;
    let hanging = index(&[], |it| {
        it["subject"] = of_plain.clone();
        it["artifactType"] = json!("application/x-list");
        it["annotations"] = json!({ "who": "me" });
    });
    let hanging = put(&registry, media_type::OCI_INDEX, &hanging, Some("hanging")).await;
    let nameless = index(&[], |it| it["subject"] = of_plain.clone());
    put(&registry, media_type::OCI_INDEX, &nameless, None).await;

    let listed = registry.get(&format!("/v2/a/referrers/{parent}")).await.json();
    let listed = listed["manifests"].as_array().unwrap();
    let find = |digest: Digest| listed.iter().find(|it| it["digest"] == digest.to_string()).unwrap();
    assert_eq!(find(hanging)["artifactType"], "application/x-list");
    assert_eq!(find(hanging)["annotations"]["who"], "me");
    assert_eq!(find(Digest::of(&nameless)).get("artifactType"), None);
    for digest in [nested, empty, hanging, parent, child] {
        delete(&registry, digest).await;
    }
}

#[tokio::test]
async fn everything_may_be_named_by_sha512() {
    let registry = Registry::start().await;
    let image = image();
    let sha512 = |bytes: &[u8]| Digest::by(Algorithm::Sha512, bytes);
    for blob in image.blobs() {
        let path = format!("/v2/a/blobs/uploads/?digest={}", sha512(blob));
        registry.send(Method::POST, &path, &[], blob.clone()).await.expect(StatusCode::CREATED);
    }
    let manifest = changed(&image, |it| {
        it["config"]["digest"] = json!(sha512(&image.config));
        for (layer, bytes) in it["layers"].as_array_mut().unwrap().iter_mut().zip(&image.layers) {
            layer["digest"] = json!(sha512(bytes));
        }
    });
    let index = index(&[descriptor(media_type::OCI_MANIFEST, &manifest, Algorithm::Sha512)], |_| {});
    for (media_type, bytes) in [(media_type::OCI_MANIFEST, &manifest), (media_type::OCI_INDEX, &index)] {
        let digest = sha512(bytes);
        let put = registry.put_manifest("a", &digest.to_string(), media_type, bytes).await;
        let put = put.expect(StatusCode::CREATED);
        assert_eq!(warnings(&put), Vec::<&str>::new());
        assert_eq!(put.header("location"), format!("/v2/a/manifests/{digest}"));
        let read = registry.get(&format!("/v2/a/manifests/{digest}")).await.expect(StatusCode::OK);
        assert!(read.body == *bytes);
        assert_eq!(read.header("docker-content-digest"), digest.to_string());
    }
    // its plain layers have sha256 names, so it gets a tree
    let record = registry.converted(sha512(&manifest)).await;
    assert_eq!((record.state, record.reason), (ImageState::Done, None));
    let listed = registry.get(&format!("/v2/a/referrers/{}", sha512(&manifest))).await.json();
    assert_eq!(listed["manifests"][0]["artifactType"], media_type::TREE);
    delete(&registry, sha512(&index)).await;
    delete(&registry, sha512(&manifest)).await;
}

#[tokio::test]
async fn layers_that_may_not_be_distributed_need_not_be_here() {
    let registry = Registry::start().await;
    let image = image();
    push_blobs(&registry, "a", &image).await;
    let foreign = |media_type: &str| {
        let digest = Digest::of(media_type.as_bytes());
        json!({ "mediaType": media_type, "digest": digest, "size": 12_345, "urls": ["https://store.example/x"] })
    };
    let bytes = changed(&image, |it| {
        let layers = it["layers"].as_array_mut().unwrap();
        layers.insert(0, foreign("application/vnd.oci.image.layer.nondistributable.v1.tar+gzip"));
        layers.insert(1, foreign("application/vnd.docker.image.rootfs.foreign.diff.tar.gzip"));
    });
    let put = registry.put_manifest("a", "v1", media_type::OCI_MANIFEST, &bytes).await;
    assert_eq!(warnings(&put.expect(StatusCode::CREATED)), Vec::<&str>::new());
}

#[tokio::test]
async fn what_is_not_all_here_is_taken_with_a_warning_where_that_is_meant() {
    let registry = Registry::start().await;
    let image = image();
    push_blobs(&registry, "a", &image).await;
    let missing = Digest::of(b"a layer that never came");
    let sparse = changed(&image, |it| {
        let layers = it["layers"].as_array_mut().unwrap();
        layers.push(json!({ "mediaType": media_type::OCI_LAYER, "digest": missing, "size": 10 }));
    });
    // under a tag it is taken for a mistake, until it is here
    let refused = registry.put_manifest("a", "v1", media_type::OCI_MANIFEST, &sparse).await;
    assert_eq!(refused.json()["errors"][0]["detail"]["digest"], missing.to_string());
    refused.refused(StatusCode::NOT_FOUND, "MANIFEST_BLOB_UNKNOWN");
    let digest = Digest::of(&sparse);
    for target in [&digest.to_string(), "v1"] {
        let put = registry.put_manifest("a", target, media_type::OCI_MANIFEST, &sparse).await;
        let put = put.expect(StatusCode::CREATED);
        let said = warnings(&put);
        assert!(
            said.len() == 1 && said[0].starts_with("299 - \"") && said[0].contains(&missing.to_string()),
            "{said:?}"
        );
    }
    assert!(registry.get("/v2/a/manifests/v1").await.expect(StatusCode::OK).body == sparse);
    assert_eq!(registry.store.image(digest).await.unwrap(), None, "it cannot be converted");

    // a copy of one platform
    let here = put(&registry, media_type::OCI_MANIFEST, &image.manifest, None).await;
    let absent = Descriptor::named(media_type::OCI_MANIFEST, missing, 1024);
    let children = [json!(Descriptor::of(media_type::OCI_MANIFEST, &image.manifest)), json!(absent)];
    let bytes = index(&children, |_| {});
    let put = registry.put_manifest("a", "platforms", media_type::OCI_INDEX, &bytes).await;
    assert_eq!(warnings(&put.expect(StatusCode::CREATED)).len(), 1);
    delete(&registry, here).await;
}

#[tokio::test]
async fn everything_that_is_missing_is_named_and_no_warning_is_too_long() {
    let registry = Registry::start().await;
    let image = image();
    registry.push_blob("a", &image.config).await;
    let many = changed(&image, |it| {
        let layers = (0..900u32).map(|number| {
            let digest = Digest::of(&number.to_le_bytes());
            json!({ "mediaType": media_type::OCI_LAYER, "digest": digest, "size": 1 })
        });
        it["layers"] = layers.collect();
    });
    let refused = registry.put_manifest("a", "v1", media_type::OCI_MANIFEST, &many).await;
    assert_eq!(refused.json()["errors"].as_array().unwrap().len(), 900);
    refused.refused(StatusCode::NOT_FOUND, "MANIFEST_BLOB_UNKNOWN");
    let digest = Digest::of(&many).to_string();
    let put = registry.put_manifest("a", &digest, media_type::OCI_MANIFEST, &many).await;
    let put = put.expect(StatusCode::CREATED);
    let said = warnings(&put).concat();
    assert!(said.len() < 4096 && said.contains(" more\""), "{said}");
}

#[tokio::test]
async fn docker_manifests_and_lists_are_taken_as_they_are() {
    let registry = Registry::start().await;
    let image = image();
    push_blobs(&registry, "a", &image).await;
    let docker = changed(&image, |it| {
        it["mediaType"] = json!(media_type::DOCKER_MANIFEST);
        it["config"]["mediaType"] = json!(media_type::DOCKER_CONFIG);
        for layer in it["layers"].as_array_mut().unwrap() {
            layer["mediaType"] = json!("application/vnd.docker.image.rootfs.diff.tar.gzip");
        }
    });
    let digest = put(&registry, media_type::DOCKER_MANIFEST, &docker, Some("v1")).await;
    let list = json!({ "schemaVersion": 2, "mediaType": media_type::DOCKER_INDEX,
        "manifests": [descriptor(media_type::DOCKER_MANIFEST, &docker, Algorithm::Sha256)] });
    put(&registry, media_type::DOCKER_INDEX, list.to_string().as_bytes(), Some("list")).await;
    assert_eq!(registry.converted(digest).await.state, ImageState::Done);
}

#[tokio::test]
async fn repositories_are_listed_by_the_page_while_they_have_manifests() {
    let registry = Registry::start().await;
    let image = image();
    let mut digest = Digest::of(b"");
    for repo in ["b", "team/app", "a", "team"] {
        digest = registry.push(repo, "v1", &image).await;
    }
    registry.push_blob("only-a-blob", &Bytes::from_static(b"x")).await;
    let page = registry.get("/v2/_catalog?n=3").await.expect(StatusCode::OK);
    assert_eq!(page.json()["repositories"], json!(["a", "b", "team"]));
    assert_eq!(page.header("link"), "</v2/_catalog?n=3&last=team>; rel=\"next\"");
    let page = registry.get("/v2/_catalog?n=3&last=team").await;
    assert_eq!(page.json()["repositories"], json!(["team/app"]));
    assert!(!page.headers.contains_key("link"));
    registry.converted(digest).await;
    let path = format!("/v2/b/manifests/{digest}");
    registry.send(Method::DELETE, &path, &[], "").await.expect(StatusCode::ACCEPTED);
    let listed = registry.get("/v2/_catalog").await.json();
    assert!(!listed["repositories"].as_array().unwrap().contains(&json!("b")), "{listed}");
}
