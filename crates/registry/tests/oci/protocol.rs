//! Distribution-spec 1.1, request by request.

use bytes::Bytes;
use http::{Method, StatusCode};
use lamina_image::{Descriptor, Digest, media_type};
use lamina_testkit::noise;

use crate::support::{Image, Registry, manifest_of};

#[tokio::test]
async fn a_blob_can_be_pushed_in_parts_and_only_in_order() {
    let registry = Registry::start().await;
    let bytes = Bytes::from(noise(20_000_000, 1));
    let digest = Digest::of(&bytes);
    let begun =
        registry.send(Method::POST, "/v2/a/blobs/uploads/", &[], "").await.expect(StatusCode::ACCEPTED);
    let place = begun.header("location").to_owned();
    let (first, second) = (bytes.slice(..12_345_678), bytes.slice(12_345_678..));

    let part = registry.send(Method::PATCH, &place, &[("content-range", "0-12345677")], first.clone()).await;
    assert_eq!(part.expect(StatusCode::ACCEPTED).header("range"), "0-12345677");
    let again = registry.send(Method::PATCH, &place, &[("content-range", "0-12345677")], first).await;
    let again = again.expect(StatusCode::RANGE_NOT_SATISFIABLE);
    assert_eq!(again.header("range"), "0-12345677");
    let status = registry.get(&place).await.expect(StatusCode::NO_CONTENT);
    assert_eq!(status.header("range"), "0-12345677");
    let put = format!("{place}?digest={digest}");
    registry
        .send(Method::PUT, &put, &[("content-range", "12345678-19999999")], second)
        .await
        .expect(StatusCode::CREATED);

    let whole = registry.get(&format!("/v2/a/blobs/{digest}")).await.expect(StatusCode::OK);
    assert_eq!(whole.header("docker-content-digest"), digest.to_string());
    assert!(whole.body == bytes, "other bytes came back");
    registry.get(&place).await.refused(StatusCode::NOT_FOUND, "BLOB_UPLOAD_UNKNOWN");
}

#[tokio::test]
async fn a_blob_under_a_wrong_digest_never_appears() {
    let registry = Registry::start().await;
    for len in [100, 10_000_000] {
        let bytes = Bytes::from(noise(len, 2));
        let wrong = Digest::of(b"something else");
        let path = format!("/v2/a/blobs/uploads/?digest={wrong}");
        let refused = registry.send(Method::POST, &path, &[], bytes.clone()).await;
        refused.refused(StatusCode::BAD_REQUEST, "DIGEST_INVALID");
        for digest in [wrong, Digest::of(&bytes)] {
            let path = format!("/v2/a/blobs/{digest}");
            registry.get(&path).await.refused(StatusCode::NOT_FOUND, "BLOB_UNKNOWN");
        }
    }
}

#[tokio::test]
async fn an_upload_can_be_cancelled_and_belongs_to_its_repository() {
    let registry = Registry::start().await;
    let begun = registry.send(Method::POST, "/v2/a/blobs/uploads/", &[], "").await;
    let place = begun.header("location").to_owned();
    registry.send(Method::PATCH, &place, &[], noise(9_000_000, 3)).await.expect(StatusCode::ACCEPTED);
    let elsewhere = place.replace("/v2/a/", "/v2/b/");
    registry.get(&elsewhere).await.refused(StatusCode::NOT_FOUND, "BLOB_UPLOAD_UNKNOWN");
    registry.send(Method::DELETE, &place, &[], "").await.expect(StatusCode::NO_CONTENT);
    registry.get(&place).await.refused(StatusCode::NOT_FOUND, "BLOB_UPLOAD_UNKNOWN");
}

#[tokio::test]
async fn ranges_of_a_blob_are_exact() {
    let registry = Registry::start().await;
    let bytes = Bytes::from(noise(5_000_000, 4));
    let digest = registry.push_blob("a", &bytes).await.digest;
    let path = format!("/v2/a/blobs/{digest}");
    for (range, expected) in [
        ("bytes=0-0", 0..1),
        ("bytes=1048570-3000000", 1_048_570..3_000_001),
        ("bytes=-7", 4_999_993..5_000_000),
    ] {
        let reply = registry.send(Method::GET, &path, &[("range", range)], "").await;
        let reply = reply.expect(StatusCode::PARTIAL_CONTENT);
        assert_eq!(
            reply.header("content-range"),
            format!("bytes {}-{}/5000000", expected.start, expected.end - 1)
        );
        assert!(reply.body == bytes.slice(expected), "{range}");
    }
    let outside = registry.send(Method::GET, &path, &[("range", "bytes=5000000-")], "").await;
    assert_eq!(outside.expect(StatusCode::RANGE_NOT_SATISFIABLE).header("content-range"), "bytes */5000000");
    let head = registry.send(Method::HEAD, &path, &[], "").await.expect(StatusCode::OK);
    assert_eq!((head.header("content-length"), head.body.len()), ("5000000", 0));
}

#[tokio::test]
async fn a_blob_that_is_here_can_be_mounted_and_another_begins_an_upload() {
    let registry = Registry::start().await;
    let digest = registry.push_blob("a", &Bytes::from_static(b"bytes")).await.digest;
    let path = format!("/v2/b/blobs/uploads/?mount={digest}&from=a");
    let mounted = registry.send(Method::POST, &path, &[], "").await.expect(StatusCode::CREATED);
    assert_eq!(mounted.header("location"), format!("/v2/b/blobs/{digest}"));
    let path = format!("/v2/b/blobs/uploads/?mount={}&from=a", Digest::of(b"others"));
    registry.send(Method::POST, &path, &[], "").await.expect(StatusCode::ACCEPTED);
}

#[tokio::test]
async fn a_manifest_that_names_what_is_not_here_is_refused_by_name() {
    let registry = Registry::start().await;
    let image = Image::new(&[&[("a", b"1")]]);
    let missing = Digest::of(&image.layers[0]);
    registry.push_blob("a", &image.config).await;
    let refused = registry.put_manifest("a", "v1", media_type::OCI_MANIFEST, &image.manifest).await;
    let message = refused.refused(StatusCode::NOT_FOUND, "MANIFEST_BLOB_UNKNOWN");
    assert!(message.contains(&missing.to_string()), "{message}");
    registry.get("/v2/a/manifests/v1").await.refused(StatusCode::NOT_FOUND, "MANIFEST_UNKNOWN");

    let index = serde_json::json!({ "schemaVersion": 2, "mediaType": media_type::OCI_INDEX,
        "manifests": [Descriptor::of(media_type::OCI_MANIFEST, &image.manifest)] });
    let refused = registry.put_manifest("a", "v1", media_type::OCI_INDEX, index.to_string().as_bytes()).await;
    refused.refused(StatusCode::NOT_FOUND, "MANIFEST_BLOB_UNKNOWN");
}

#[tokio::test]
async fn bad_manifests_are_refused() {
    let registry = Registry::start().await;
    let image = Image::new(&[&[("a", b"1")]]);
    registry.push("a", "v1", &image).await;
    let mut manifest = manifest_of(&image.config, vec![Descriptor::of("application/x", &image.layers[0])]);
    manifest.layers[0].size += 1;
    let lying = serde_json::to_vec(&manifest).unwrap();
    let oci = media_type::OCI_MANIFEST;
    let wrong_digest = Digest::of(b"x").to_string();
    for (target, media_type, bytes, status, code) in [
        ("v2", oci, &b"{"[..], 400, "MANIFEST_INVALID"),
        ("v2", "text/plain", &image.manifest[..], 400, "MANIFEST_INVALID"),
        ("v2", media_type::DOCKER_MANIFEST, &image.manifest[..], 400, "MANIFEST_INVALID"),
        ("v2", oci, &lying[..], 400, "MANIFEST_INVALID"),
        (&wrong_digest, oci, &image.manifest[..], 400, "DIGEST_INVALID"),
        ("-v2", oci, &image.manifest[..], 400, "NAME_INVALID"),
        ("v2", oci, &vec![b' '; (4 << 20) + 1][..], 413, "SIZE_INVALID"),
    ] {
        let refused = registry.put_manifest("a", target, media_type, bytes).await;
        refused.refused(StatusCode::from_u16(status).unwrap(), code);
    }
    registry.get("/v2/a/manifests/v2").await.refused(StatusCode::NOT_FOUND, "MANIFEST_UNKNOWN");
    registry.get("/v2/A/manifests/v2").await.refused(StatusCode::BAD_REQUEST, "NAME_INVALID");
    registry.get("/v2/a%2fb/manifests/v2").await.refused(StatusCode::BAD_REQUEST, "NAME_INVALID");
}

#[tokio::test]
async fn tags_come_in_pages_and_go_when_they_are_deleted() {
    let registry = Registry::start().await;
    let image = Image::new(&[&[("a", b"1")]]);
    for tag in ["c", "a", "b", "d"] {
        registry.push("x/y", tag, &image).await;
    }
    let page = registry.get("/v2/x/y/tags/list?n=2").await.expect(StatusCode::OK);
    assert_eq!(page.json()["tags"], serde_json::json!(["a", "b"]));
    assert_eq!(page.header("link"), "</v2/x/y/tags/list?n=2&last=b>; rel=\"next\"");
    registry.send(Method::DELETE, "/v2/x/y/manifests/c", &[], "").await.expect(StatusCode::ACCEPTED);
    let page = registry.get("/v2/x/y/tags/list?n=2&last=b").await;
    assert_eq!(page.json()["tags"], serde_json::json!(["d"]));
    assert!(!page.headers.contains_key("link"));

    let path = format!("/v2/x/y/manifests/{}", Digest::of(&image.manifest));
    registry.send(Method::DELETE, &path, &[], "").await.expect(StatusCode::ACCEPTED);
    registry.get("/v2/x/y/manifests/a").await.refused(StatusCode::NOT_FOUND, "MANIFEST_UNKNOWN");
    registry.get("/v2/no/such/tags/list").await.refused(StatusCode::NOT_FOUND, "NAME_UNKNOWN");
}

#[tokio::test]
async fn what_hangs_on_a_manifest_is_listed_and_filtered() {
    let registry = Registry::start().await;
    let image = Image::new(&[&[("a", b"1")]]);
    let subject = registry.push("a", "v1", &image).await;
    registry.converted(subject).await;
    let empty = Bytes::from_static(b"{}");
    registry.push_blob("a", &empty).await;
    let mut artifact = manifest_of(&empty, vec![]);
    artifact.config.media_type = media_type::OCI_EMPTY.to_owned();
    artifact.artifact_type = Some("application/x-sbom".to_owned());
    artifact.subject = Some(Descriptor::named(media_type::OCI_MANIFEST, subject, 1));
    artifact.annotations.insert("who".to_owned(), "me".to_owned());
    let bytes = serde_json::to_vec(&artifact).unwrap();
    let digest = Digest::of(&bytes);
    let put = registry.put_manifest("a", &digest.to_string(), media_type::OCI_MANIFEST, &bytes).await;
    assert_eq!(put.expect(StatusCode::CREATED).header("oci-subject"), subject.to_string());

    let listed = registry.get(&format!("/v2/a/referrers/{subject}?artifactType=application%2Fx-sbom")).await;
    assert_eq!(listed.header("oci-filters-applied"), "artifactType");
    assert_eq!(listed.header("content-type"), media_type::OCI_INDEX);
    let listed = listed.json();
    assert_eq!(listed["manifests"].as_array().unwrap().len(), 1);
    assert_eq!(listed["manifests"][0]["digest"], digest.to_string());
    assert_eq!(listed["manifests"][0]["annotations"]["who"], "me");
    let path = format!("/v2/a/manifests/{digest}");
    registry.send(Method::DELETE, &path, &[], "").await.expect(StatusCode::ACCEPTED);
    let listed = registry.get(&format!("/v2/a/referrers/{subject}?artifactType=application/x-sbom")).await;
    assert_eq!(listed.json()["manifests"], serde_json::json!([]));
    let nothing = registry.get(&format!("/v2/zz/referrers/{subject}")).await.expect(StatusCode::OK);
    assert_eq!(nothing.json()["manifests"], serde_json::json!([]));
}
