//! Distribution-spec 1.1, "Endpoints": one test for each line of its table, named after the line, with what the line
//! calls success and failure, for both digest algorithms where a digest is part of the path.

use bytes::Bytes;
use http::{Method, StatusCode};
use lamina_image::{Algorithm, Descriptor, Digest, media_type};
use lamina_testkit::noise;

use crate::support::{Image, Registry, Reply, manifest_of};

const ALGORITHMS: [Algorithm; 2] = [Algorithm::Sha256, Algorithm::Sha512];

/// A blob that no other test has, and its digest.
fn blob(algorithm: Algorithm, len: usize) -> (Bytes, Digest) {
    let bytes = Bytes::from(noise(len, len as u64));
    let digest = Digest::by(algorithm, &bytes);
    (bytes, digest)
}

fn absent(algorithm: Algorithm) -> Digest {
    Digest::by(algorithm, b"never pushed")
}

async fn begin(registry: &Registry) -> String {
    let begun = registry.send(Method::POST, "/v2/a/blobs/uploads/", &[], "").await;
    begun.expect(StatusCode::ACCEPTED).header("location").to_owned()
}

/// The blob can be read where the answer says it is.
async fn leads_to(registry: &Registry, created: Reply, bytes: &Bytes) {
    let created = created.expect(StatusCode::CREATED);
    let read = registry.get(created.header("location")).await.expect(StatusCode::OK);
    assert!(read.body == bytes, "other bytes came back");
    assert_eq!(created.header("docker-content-digest"), read.header("docker-content-digest"));
}

#[tokio::test]
async fn end_1_the_base_says_that_the_api_is_here() {
    let registry = Registry::start().await;
    let base = registry.get("/v2/").await.expect(StatusCode::OK);
    assert_eq!(base.header("docker-distribution-api-version"), "registry/2.0");
    registry.get("/v1/").await.expect(StatusCode::NOT_FOUND);
}

#[tokio::test]
async fn end_2_a_blob_is_read_whole_in_part_and_by_its_head() {
    let registry = Registry::start().await;
    for algorithm in ALGORITHMS {
        let (bytes, digest) = blob(algorithm, 2048);
        let path = format!("/v2/a/blobs/{digest}");
        registry.get(&path).await.refused(StatusCode::NOT_FOUND, "BLOB_UNKNOWN");
        let put = format!("/v2/a/blobs/uploads/?digest={digest}");
        registry.send(Method::POST, &put, &[], bytes.clone()).await.expect(StatusCode::CREATED);
        let head = registry.send(Method::HEAD, &path, &[], "").await.expect(StatusCode::OK);
        assert_eq!((head.header("content-length"), head.body.len()), ("2048", 0));
        assert_eq!(head.header("docker-content-digest"), digest.to_string());
        let whole = registry.get(&path).await.expect(StatusCode::OK);
        assert!(whole.body == bytes);
        for (range, expected) in [
            ("bytes=500-1499", 500..1500),
            ("bytes=500-", 500..2048),
            ("bytes=-500", 1548..2048),
            ("bytes=2000-5000", 2000..2048),
        ] {
            let part = registry.send(Method::GET, &path, &[("range", range)], "").await;
            let part = part.expect(StatusCode::PARTIAL_CONTENT);
            let (first, last) = (expected.start, expected.end - 1);
            assert_eq!(part.header("content-range"), format!("bytes {first}-{last}/2048"));
            assert!(part.body == bytes.slice(expected), "{range}");
        }
        for range in ["bytes=500-0", "bytes=5000-10000"] {
            let outside = registry.send(Method::GET, &path, &[("range", range)], "").await;
            outside.expect(StatusCode::RANGE_NOT_SATISFIABLE);
        }
        let known = [("if-none-match", whole.header("etag"))];
        registry.send(Method::GET, &path, &known, "").await.expect(StatusCode::NOT_MODIFIED);
    }
}

#[tokio::test]
async fn end_3_a_manifest_is_read_by_tag_and_by_digest() {
    let registry = Registry::start().await;
    let image = Image::new(&[&[("a", b"1")]]);
    registry.get("/v2/a/manifests/v1").await.refused(StatusCode::NOT_FOUND, "MANIFEST_UNKNOWN");
    let digest = registry.push("a", "v1", &image).await;
    for target in ["v1".to_owned(), digest.to_string()] {
        let path = format!("/v2/a/manifests/{target}");
        let read = registry.get(&path).await.expect(StatusCode::OK);
        assert!(read.body == image.manifest);
        let head = registry.send(Method::HEAD, &path, &[], "").await.expect(StatusCode::OK);
        for name in ["content-type", "content-length", "docker-content-digest"] {
            assert_eq!(head.header(name), read.header(name));
        }
        assert_eq!(read.header("content-type"), media_type::OCI_MANIFEST);
        assert_eq!(read.header("docker-content-digest"), digest.to_string());
        let known = [("if-none-match", read.header("etag"))];
        let same = registry.send(Method::GET, &path, &known, "").await.expect(StatusCode::NOT_MODIFIED);
        // RFC 9110, 15.4.5
        for name in ["etag", "vary"] {
            assert_eq!(same.header(name), read.header(name));
        }
    }
    for algorithm in ALGORITHMS {
        let path = format!("/v2/a/manifests/{}", absent(algorithm));
        registry.get(&path).await.refused(StatusCode::NOT_FOUND, "MANIFEST_UNKNOWN");
    }
}

#[tokio::test]
async fn end_4a_an_upload_begins() {
    let registry = Registry::start().await;
    for query in ["", "?digest-algorithm=sha256", "?digest-algorithm=sha512"] {
        let path = format!("/v2/a/blobs/uploads/{query}");
        let begun = registry.send(Method::POST, &path, &[], "").await.expect(StatusCode::ACCEPTED);
        assert!(begun.header("location").starts_with("/v2/a/blobs/uploads/"));
    }
    let refused = registry.send(Method::POST, "/v2/a/blobs/uploads/?digest-algorithm=md5", &[], "").await;
    refused.refused(StatusCode::BAD_REQUEST, "DIGEST_INVALID");
    let refused = registry.send(Method::POST, "/v2/A/blobs/uploads/", &[], "").await;
    refused.refused(StatusCode::BAD_REQUEST, "NAME_INVALID");
}

#[tokio::test]
async fn end_4b_a_blob_comes_in_one_request() {
    let registry = Registry::start().await;
    for algorithm in ALGORITHMS {
        // of nothing, of less than a part, and of several parts
        for len in [0, 512, 20_000_000] {
            let (bytes, digest) = blob(algorithm, len);
            let path = format!("/v2/a/blobs/uploads/?digest={digest}");
            let sent = registry.send(Method::POST, &path, &[], bytes.clone()).await;
            leads_to(&registry, sent, &bytes).await;
        }
        let path = format!("/v2/a/blobs/uploads/?digest={}", absent(algorithm));
        let refused = registry.send(Method::POST, &path, &[], "something else").await;
        refused.refused(StatusCode::BAD_REQUEST, "DIGEST_INVALID");
    }
}

#[tokio::test]
async fn end_5_parts_come_in_order_and_others_are_refused() {
    let registry = Registry::start().await;
    for algorithm in ALGORITHMS {
        let (bytes, digest) = blob(algorithm, 3067);
        let place = begin(&registry).await;
        let part = |range: &'static str, slice: Bytes| {
            let (registry, place) = (&registry, place.clone());
            async move { registry.send(Method::PATCH, &place, &[("content-range", range)], slice).await }
        };
        let early = part("1024-2047", bytes.slice(1024..2048)).await;
        early.refused(StatusCode::RANGE_NOT_SATISFIABLE, "BLOB_UPLOAD_INVALID");
        let first = part("0-1023", bytes.slice(..1024)).await.expect(StatusCode::ACCEPTED);
        assert_eq!(first.header("range"), "0-1023");
        for out_of_order in ["0-1023", "2048-3066"] {
            let refused = part(out_of_order, bytes.slice(..1024)).await;
            let refused = refused.expect(StatusCode::RANGE_NOT_SATISFIABLE);
            assert_eq!(refused.header("range"), "0-1023");
            let status = registry.get(refused.header("location")).await.expect(StatusCode::NO_CONTENT);
            assert_eq!(status.header("range"), "0-1023");
        }
        part("1024-3066", bytes.slice(1024..)).await.expect(StatusCode::ACCEPTED);
        let put = registry.send(Method::PUT, &format!("{place}?digest={digest}"), &[], "").await;
        leads_to(&registry, put, &bytes).await;
        let ended = registry.send(Method::PATCH, &place, &[], "more").await;
        ended.refused(StatusCode::NOT_FOUND, "BLOB_UPLOAD_UNKNOWN");
    }
}

#[tokio::test]
async fn end_6_an_upload_ends_with_or_without_a_last_part() {
    let registry = Registry::start().await;
    for algorithm in ALGORITHMS {
        // in one piece; a last part after another one, announced as another algorithm; staged and read again
        for (len, sent, query) in
            [(600, 0, ""), (700, 100, "?digest-algorithm=sha512"), (20_000_000, 9_000_000, "")]
        {
            let (bytes, digest) = blob(algorithm, len);
            let path = format!("/v2/a/blobs/uploads/{query}");
            let begun = registry.send(Method::POST, &path, &[], "").await.expect(StatusCode::ACCEPTED);
            let place = begun.header("location");
            if sent > 0 {
                registry
                    .send(Method::PATCH, place, &[], bytes.slice(..sent))
                    .await
                    .expect(StatusCode::ACCEPTED);
            }
            let put = format!("{place}?digest={digest}");
            let put = registry.send(Method::PUT, &put, &[], bytes.slice(sent..)).await;
            leads_to(&registry, put, &bytes).await;
        }
        let place = begin(&registry).await;
        registry.send(Method::PUT, &place, &[], "x").await.refused(StatusCode::BAD_REQUEST, "DIGEST_INVALID");
        let wrong = absent(algorithm);
        let refused = registry.send(Method::PUT, &format!("{place}?digest={wrong}"), &[], "x").await;
        refused.refused(StatusCode::BAD_REQUEST, "DIGEST_INVALID");
        registry.get(&format!("/v2/a/blobs/{wrong}")).await.refused(StatusCode::NOT_FOUND, "BLOB_UNKNOWN");
        let staged = begin(&registry).await;
        registry.send(Method::PATCH, &staged, &[], noise(9_000_000, 9)).await.expect(StatusCode::ACCEPTED);
        let refused = registry.send(Method::PUT, &format!("{staged}?digest={wrong}"), &[], "").await;
        refused.refused(StatusCode::BAD_REQUEST, "DIGEST_INVALID");
        registry.get(&format!("/v2/a/blobs/{wrong}")).await.refused(StatusCode::NOT_FOUND, "BLOB_UNKNOWN");
    }
}

#[tokio::test]
async fn end_7_a_manifest_comes_by_tag_and_by_digest_with_tags() {
    let registry = Registry::start().await;
    let image = Image::new(&[&[("a", b"1")]]);
    for blob in image.blobs() {
        registry.push_blob("a", blob).await;
    }
    let put = registry.put_manifest("a", "v1", media_type::OCI_MANIFEST, &image.manifest).await;
    leads_to(&registry, put, &image.manifest).await;
    for algorithm in ALGORITHMS {
        let digest = Digest::by(algorithm, &image.manifest);
        let target = format!("{digest}?tag={algorithm}-one&tag={algorithm}-two");
        let put = registry.put_manifest("a", &target, media_type::OCI_MANIFEST, &image.manifest).await;
        let tags: Vec<_> = put.headers.get_all("oci-tag").iter().cloned().collect();
        assert_eq!(tags, [format!("{algorithm}-one"), format!("{algorithm}-two")]);
        assert_eq!(put.header("docker-content-digest"), digest.to_string());
        leads_to(&registry, put, &image.manifest).await;
        let read = registry.get(&format!("/v2/a/manifests/{algorithm}-two")).await.expect(StatusCode::OK);
        assert_eq!(read.header("docker-content-digest"), digest.to_string());
        let wrong = absent(algorithm).to_string();
        let refused = registry.put_manifest("a", &wrong, media_type::OCI_MANIFEST, &image.manifest).await;
        refused.refused(StatusCode::BAD_REQUEST, "DIGEST_INVALID");
    }
    let refused = registry.put_manifest("a", "sha256:bad", media_type::OCI_MANIFEST, &image.manifest).await;
    refused.refused(StatusCode::BAD_REQUEST, "DIGEST_INVALID");
    let long = vec![b' '; (4 << 20) + 1];
    let refused = registry.put_manifest("a", "v2", media_type::OCI_MANIFEST, &long).await;
    refused.refused(StatusCode::PAYLOAD_TOO_LARGE, "SIZE_INVALID");
}

#[tokio::test]
async fn end_8a_tags_are_listed_in_order() {
    let registry = Registry::start().await;
    registry.get("/v2/a/tags/list").await.refused(StatusCode::NOT_FOUND, "NAME_UNKNOWN");
    let image = Image::new(&[&[("a", b"1")]]);
    for tag in ["b", "C", "a", "1"] {
        registry.push("a", tag, &image).await;
    }
    let listed = registry.get("/v2/a/tags/list").await.expect(StatusCode::OK).json();
    assert_eq!(listed, serde_json::json!({ "name": "a", "tags": ["1", "C", "a", "b"] }));
}

#[tokio::test]
async fn end_8b_tags_are_listed_by_the_page() {
    let registry = Registry::start().await;
    let image = Image::new(&[&[("a", b"1")]]);
    for tag in ["a", "b", "c"] {
        registry.push("a", tag, &image).await;
    }
    for (query, tags, link) in [
        ("n=2", &["a", "b"][..], Some("</v2/a/tags/list?n=2&last=b>; rel=\"next\"")),
        ("n=2&last=b", &["c"], None),
        ("last=a", &["b", "c"], None),
        ("n=3", &["a", "b", "c"], None),
        ("n=0", &[], None),
        ("last=zzz", &[], None),
    ] {
        let page = registry.get(&format!("/v2/a/tags/list?{query}")).await.expect(StatusCode::OK);
        assert_eq!(page.json()["tags"], serde_json::json!(tags), "{query}");
        assert_eq!(page.headers.get("link").map(|link| link.to_str().unwrap()), link, "{query}");
    }
    registry.get("/v2/a/tags/list?n=x").await.expect(StatusCode::BAD_REQUEST);
}

#[tokio::test]
async fn end_9_tags_and_manifests_are_gone_as_soon_as_they_are_deleted() {
    let registry = Registry::start().await;
    let image = Image::new(&[&[("a", b"1")]]);
    let digest = registry.push("a", "v1", &image).await;
    registry.push("a", "v2", &image).await;
    let delete = |target: String| {
        let registry = &registry;
        async move { registry.send(Method::DELETE, &format!("/v2/a/manifests/{target}"), &[], "").await }
    };
    delete("v1".to_owned()).await.expect(StatusCode::ACCEPTED);
    registry.get("/v2/a/manifests/v1").await.expect(StatusCode::NOT_FOUND);
    registry.get("/v2/a/manifests/v2").await.expect(StatusCode::OK);
    delete("v1".to_owned()).await.refused(StatusCode::NOT_FOUND, "MANIFEST_UNKNOWN");
    delete(digest.to_string()).await.expect(StatusCode::ACCEPTED);
    for target in ["v2".to_owned(), digest.to_string()] {
        registry.get(&format!("/v2/a/manifests/{target}")).await.expect(StatusCode::NOT_FOUND);
        delete(target).await.refused(StatusCode::NOT_FOUND, "MANIFEST_UNKNOWN");
    }
}

#[tokio::test]
async fn end_10_a_blob_is_gone_as_soon_as_it_is_deleted_and_only_there() {
    let registry = Registry::start().await;
    for algorithm in ALGORITHMS {
        let (bytes, digest) = blob(algorithm, 777);
        for repo in ["a", "b"] {
            let path = format!("/v2/{repo}/blobs/uploads/?digest={digest}");
            registry.send(Method::POST, &path, &[], bytes.clone()).await.expect(StatusCode::CREATED);
        }
        let path = format!("/v2/a/blobs/{digest}");
        registry.send(Method::DELETE, &path, &[], "").await.expect(StatusCode::ACCEPTED);
        registry.send(Method::HEAD, &path, &[], "").await.expect(StatusCode::NOT_FOUND);
        registry.get(&path).await.refused(StatusCode::NOT_FOUND, "BLOB_UNKNOWN");
        let again = registry.send(Method::DELETE, &path, &[], "").await;
        again.refused(StatusCode::NOT_FOUND, "BLOB_UNKNOWN");
        registry.get(&format!("/v2/b/blobs/{digest}")).await.expect(StatusCode::OK);
        let path = format!("/v2/a/blobs/uploads/?digest={digest}");
        let back = registry.send(Method::POST, &path, &[], bytes.clone()).await;
        leads_to(&registry, back, &bytes).await;
    }
}

#[tokio::test]
async fn end_11_a_blob_is_mounted_with_and_without_its_source() {
    let registry = Registry::start().await;
    for algorithm in ALGORITHMS {
        let (bytes, digest) = blob(algorithm, 888);
        let path = format!("/v2/there/blobs/uploads/?digest={digest}");
        registry.send(Method::POST, &path, &[], bytes.clone()).await.expect(StatusCode::CREATED);
        let mount = |into: &'static str, query: String| {
            let registry = &registry;
            let path = format!("/v2/{into}/blobs/uploads/?mount={query}");
            async move { registry.send(Method::POST, &path, &[], "").await }
        };
        leads_to(&registry, mount("one", format!("{digest}&from=there")).await, &bytes).await;
        leads_to(&registry, mount("two", digest.to_string()).await, &bytes).await;
        // from where it is not, and what is nowhere: an upload begins
        for query in [format!("{digest}&from=elsewhere"), absent(algorithm).to_string()] {
            let begun = mount("three", query).await.expect(StatusCode::ACCEPTED);
            assert!(begun.header("location").starts_with("/v2/three/blobs/uploads/"));
        }
        registry.get(&format!("/v2/three/blobs/{digest}")).await.expect(StatusCode::NOT_FOUND);
    }
}

/// An artifact that hangs on `subject`, whether that is here or not, and carries nothing.
async fn hang(registry: &Registry, subject: Digest, artifact_type: &str) -> Digest {
    let config = Bytes::from_static(b"{}");
    registry.push_blob("a", &config).await;
    let mut artifact = manifest_of(&config, vec![]);
    artifact.config.media_type = media_type::OCI_EMPTY.to_owned();
    artifact.artifact_type = Some(artifact_type.to_owned());
    artifact.subject = Some(Descriptor::named(media_type::OCI_MANIFEST, subject, 123));
    artifact.annotations.insert("of".to_owned(), artifact_type.to_owned());
    let bytes = serde_json::to_vec(&artifact).unwrap();
    let digest = Digest::of(&bytes);
    let put = registry.put_manifest("a", &digest.to_string(), media_type::OCI_MANIFEST, &bytes).await;
    assert_eq!(put.expect(StatusCode::CREATED).header("oci-subject"), subject.to_string());
    digest
}

#[tokio::test]
async fn end_12a_what_hangs_on_a_manifest_is_listed_also_where_that_is_not_here() {
    let registry = Registry::start().await;
    for algorithm in ALGORITHMS {
        let path = format!("/v2/a/referrers/{}", absent(algorithm));
        let nothing = registry.get(&path).await.expect(StatusCode::OK);
        assert_eq!(nothing.header("content-type"), media_type::OCI_INDEX);
        assert_eq!(nothing.json()["manifests"], serde_json::json!([]));
        let digest = hang(&registry, absent(algorithm), "application/x-sbom").await;
        let listed = registry.get(&path).await.expect(StatusCode::OK).json();
        assert_eq!(
            (&listed["schemaVersion"], &listed["mediaType"]),
            (&2.into(), &media_type::OCI_INDEX.into())
        );
        let found = &listed["manifests"][0];
        assert_eq!(found["digest"], digest.to_string());
        assert_eq!(found["artifactType"], "application/x-sbom");
        assert_eq!(found["annotations"]["of"], "application/x-sbom");
    }
    registry.get("/v2/a/referrers/sha256:bad").await.refused(StatusCode::BAD_REQUEST, "DIGEST_INVALID");
}

#[tokio::test]
async fn end_12b_what_hangs_on_a_manifest_is_filtered_by_its_type() {
    let registry = Registry::start().await;
    let subject = absent(Algorithm::Sha256);
    let wanted = hang(&registry, subject, "application/x-sbom+json").await;
    hang(&registry, subject, "application/x-signature").await;
    let all = registry.get(&format!("/v2/a/referrers/{subject}")).await;
    assert_eq!(all.json()["manifests"].as_array().unwrap().len(), 2);
    assert!(!all.headers.contains_key("oci-filters-applied"));
    let path = format!("/v2/a/referrers/{subject}?artifactType=application%2Fx-sbom%2Bjson");
    let listed = registry.get(&path).await.expect(StatusCode::OK);
    assert_eq!(listed.header("oci-filters-applied"), "artifactType");
    let listed = listed.json();
    assert_eq!(listed["manifests"].as_array().unwrap().len(), 1);
    assert_eq!(listed["manifests"][0]["digest"], wanted.to_string());
    let path = format!("/v2/a/manifests/{wanted}");
    registry.send(Method::DELETE, &path, &[], "").await.expect(StatusCode::ACCEPTED);
    let listed = registry.get(&format!("/v2/a/referrers/{subject}")).await.json();
    assert_eq!(listed["manifests"].as_array().unwrap().len(), 1);
}

#[tokio::test]
async fn end_13_an_upload_says_how_far_it_is() {
    let registry = Registry::start().await;
    let place = begin(&registry).await;
    let status = registry.get(&place).await.expect(StatusCode::NO_CONTENT);
    assert_eq!((status.header("range"), status.header("location")), ("0-0", place.as_str()));
    registry.send(Method::PATCH, &place, &[], noise(10_000, 1)).await.expect(StatusCode::ACCEPTED);
    assert_eq!(registry.get(&place).await.header("range"), "0-9999");
    for unknown in ["/v2/a/blobs/uploads/7", &place.replace("/v2/a/", "/v2/b/")] {
        registry.get(unknown).await.refused(StatusCode::NOT_FOUND, "BLOB_UPLOAD_UNKNOWN");
    }
}

#[tokio::test]
async fn end_14_an_upload_is_cancelled() {
    let registry = Registry::start().await;
    let place = begin(&registry).await;
    registry.send(Method::PATCH, &place, &[], noise(9_000_000, 1)).await.expect(StatusCode::ACCEPTED);
    registry.send(Method::DELETE, &place, &[], "").await.expect(StatusCode::NO_CONTENT);
    registry.get(&place).await.refused(StatusCode::NOT_FOUND, "BLOB_UPLOAD_UNKNOWN");
    let again = registry.send(Method::DELETE, &place, &[], "").await;
    again.refused(StatusCode::NOT_FOUND, "BLOB_UPLOAD_UNKNOWN");
}
